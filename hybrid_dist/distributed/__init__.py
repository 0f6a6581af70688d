"""What differs between one process, DDP and ZeRO; nothing outside this room asks which it is."""

from hybrid_dist.distributed.agreement import agree, decide
from hybrid_dist.distributed.control import Control
from hybrid_dist.distributed.determinism import explained
from hybrid_dist.distributed.engine import Engine, OptimizerSlice, Piece
from hybrid_dist.distributed.launch import Place, Topology, join, leave, start
from hybrid_dist.distributed.make import make_engine
from hybrid_dist.distributed.meeting import differences, listed

__all__ = [
    "Control", "Engine", "OptimizerSlice", "Piece", "Place", "Topology",
    "agree", "decide", "differences", "explained", "join", "leave", "listed", "make_engine", "start",
]  # fmt: skip
