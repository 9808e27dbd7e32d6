"""Token shards on disk, and the sequence of windows that training reads from them."""

from data.shards.reader import DamagedShardsError, TokenShards
from data.shards.writer import ShardWriter, write_manifest

__all__ = ["DamagedShardsError", "ShardWriter", "TokenShards", "write_manifest"]
