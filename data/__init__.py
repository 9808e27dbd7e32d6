"""From corpora to batches: `corpus` -> `prepare` -> `shards` -> `datamodule`.

`data.corpus` reads documents and tokenizes them, `data.prepare` writes token shards once, `data.shards` is what is read
from them in training: a pure function of (recipe, seed, sample index). Nothing here knows a model.
"""
