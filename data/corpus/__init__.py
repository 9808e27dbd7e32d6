"""Corpora as streams of documents, and the tokenizers that turn these into tokens."""
