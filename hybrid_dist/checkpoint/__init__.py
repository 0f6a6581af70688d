"""Checkpoints that any topology writes and any other reads. Tensors are safetensors, the rest JSON."""

from hybrid_dist.checkpoint.portable import PieceReader, write_shard
from hybrid_dist.checkpoint.store import Found, Store, write_atomic

__all__ = ["Found", "PieceReader", "Store", "write_atomic", "write_shard"]
