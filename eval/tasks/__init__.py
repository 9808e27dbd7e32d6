"""lm-eval tasks that need no network: held-out perplexity and passkey retrieval."""
