"""Checkpoints that any topology writes and any other reads. Tensors are safetensors, the rest JSON."""

from hybrid_dist.checkpoint.lock import RunLock
from hybrid_dist.checkpoint.portable import PieceReader, write_shard
from hybrid_dist.checkpoint.saver import Content, Saver
from hybrid_dist.checkpoint.store import MANIFEST, Damaged, Found, Store, inspect

__all__ = [
    "MANIFEST", "Content", "Damaged", "Found", "PieceReader", "RunLock", "Saver", "Store", "inspect",
    "write_shard",
]  # fmt: skip
