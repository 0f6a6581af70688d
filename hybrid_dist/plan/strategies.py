"""The launch files as data: what each splits over the processes, and what it puts into host memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Strategy:
    """A file of `launch/accelerate/`."""

    name: str
    stage: int = 0
    """ZeRO's; 0: every process holds everything."""
    offload_optimizer: bool = False
    offload_parameters: bool = False


ONE_PROCESS = Strategy("single_gpu")
ON_THE_CPU = Strategy("cpu")
SEVERAL = (
    Strategy("ddp"),
    Strategy("zero1", 1),
    Strategy("zero2", 2),
    Strategy("zero3", 3),
    Strategy("zero2_offload", 2, offload_optimizer=True),
    Strategy("zero3_offload", 3, offload_optimizer=True, offload_parameters=True),
)
"""The simplest and fastest first."""

BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: gradients, as elements, that wait for their reduction in a buffer that is made
for so many, however many there are."""
PREFETCH = 50_000_000
"""`stage3_prefetch_bucket_size`: elements that ZeRO 3 begins to gather ahead, anew with every module."""
PERSISTENT = 100_000
"""`stage3_param_persistence_threshold`: parameters of so many elements or fewer stay whole under ZeRO 3."""
LIVE = 1_000_000_000
"""`stage3_max_live_parameters`."""
REUSE = 1_000_000_000
"""`stage3_max_reuse_distance`: what comes again within so many elements is not let go in between."""


def strategies(processes: int, precision: str, device: str) -> tuple[Strategy, ...]:
    """Those that can run so many processes in this precision, the simplest first.

    Args:
        precision: As `train.precision`. fp16 is refused under ZeRO 1 to 3.
        device: `cuda` or `cpu`.
    """
    if processes == 1:
        return (ONE_PROCESS if device == "cuda" else ON_THE_CPU,)
    return tuple(strategy for strategy in SEVERAL if precision != "fp16" or strategy.stage == 0)
