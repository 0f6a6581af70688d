"""What differs between one process, DDP and ZeRO; nothing outside this room asks which it is."""

from hybrid_dist.distributed.agreement import agree, decide
from hybrid_dist.distributed.control import Control
from hybrid_dist.distributed.determinism import explained
from hybrid_dist.distributed.engine import Engine, OptimizerSlice, Piece
from hybrid_dist.distributed.launch import Place, Topology, join, leave, start
from hybrid_dist.distributed.make import make_engine
from hybrid_dist.distributed.meeting import differences, listed
from hybrid_dist.distributed.spans import BACKWARD, DATA, FORWARD, OPTIMIZER, PARTS, measured, span

__all__ = [
    "BACKWARD", "DATA", "FORWARD", "OPTIMIZER", "PARTS",
    "Control", "Engine", "OptimizerSlice", "Piece", "Place", "Topology",
    "agree", "decide", "differences", "explained", "join", "leave", "listed", "make_engine", "measured", "span",
    "start",
]  # fmt: skip
