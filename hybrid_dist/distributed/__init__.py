"""What differs between one process, DDP and ZeRO; nothing outside this room asks which it is."""

from hybrid_dist.distributed.agreement import agree, decide
from hybrid_dist.distributed.control import Control
from hybrid_dist.distributed.engine import Engine, OptimizerSlice, Piece
from hybrid_dist.distributed.launch import Place, Topology, leave, meet, start
from hybrid_dist.distributed.make import make_engine

__all__ = [
    "Control",
    "Engine",
    "OptimizerSlice",
    "Piece",
    "Place",
    "Topology",
    "agree",
    "decide",
    "leave",
    "make_engine",
    "meet",
    "start",
]
