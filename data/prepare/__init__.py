"""From corpora to token shards: `prepare`, and the command `python -m data.prepare`."""

from data.prepare.run import changed_sources, is_prepared, prepare

__all__ = ["changed_sources", "is_prepared", "prepare"]
