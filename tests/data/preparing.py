"""What the tests of preparation ask for, and what tells its results apart."""

from data.prepare.spec import PrepareSpec
from data.shards import TokenShards

ROWS = [{"text": f"Text of row {i}: " + "lorem ipsum dolor ✓ " * (i % 7 + 1)} for i in range(120)]


def spec(corpus, output, **overrides):
    values = {
        "output": str(output),
        "sources": [{"path": str(corpus), "name": "c"}],
        "tokenizer": {"train": {"vocab_size": 300, "sample_bytes": 5000}},
        "heldout_fraction": 0.2,
        "shard_tokens": 400,
    }
    return PrepareSpec.parse(values | overrides)


def many_parts(corpora, output, **overrides):
    sources = [{"path": str(corpora / name / "*.jsonl"), "name": name} for name in "ab"]
    return spec(None, output, sources=sources, part_bytes=4000, **overrides)


def identities(output):
    """What tells two outputs apart: tokens, counts and origins of both splits."""
    found = []
    for split in ("train", "heldout"):
        shards = TokenShards(output / split)
        shards.verify()
        origins = [shards.origin(i) for i in range(len(shards.offsets) - 1)]
        found.append((shards.identity, shards.counts().tolist(), origins, shards.manifest["sources"]))
    return found
