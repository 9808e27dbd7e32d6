"""From corpora to batches: sources -> tokenizer -> token shards -> mixture -> `PackedDataModule`.

`data.prepare` writes the shards once; everything after it is a pure function of (recipe, seed, sample index).
Nothing here knows a model.
"""
