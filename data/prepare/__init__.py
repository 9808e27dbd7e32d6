"""From corpora to token shards: `prepare`, and the command `python -m data.prepare`."""

from data.prepare.run import changed_sources, check, is_prepared, prepare, prepare_all

__all__ = ["changed_sources", "check", "is_prepared", "prepare", "prepare_all"]
