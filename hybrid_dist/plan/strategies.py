"""The launch files as data: what each splits over the processes, and what it puts into host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hybrid_dist.distributed.tuning import tuned


@dataclass(frozen=True)
class Strategy:
    """A file of `launch/accelerate/`."""

    name: str
    stage: int = 0
    """ZeRO's; 0: every process holds everything."""
    offload_optimizer: bool = False
    offload_parameters: bool = False
    recompute: bool = False
    """With `train.checkpoint_activations`; no part of the file."""


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


def strategy_of(zero: Mapping[str, Any], processes: int, device: str, recompute: bool) -> Strategy:
    """What a launch does, whatever its file is called.

    Args:
        zero: DeepSpeed's section `zero_optimization`; empty without DeepSpeed.
        device: `cuda` or `cpu`.
    """
    if processes == 1 and not zero:
        return replace(ONE_PROCESS if device == "cuda" else ON_THE_CPU, recompute=recompute)

    def offloads(what: str) -> bool:
        return ((zero.get(what) or {}).get("device") or "none") != "none"

    stage = int(zero.get("stage", 0))
    return Strategy("as launched", stage, offloads("offload_optimizer"), offloads("offload_param"), recompute)


PERSISTENT = 100_000
"""`stage3_param_persistence_threshold`: parameters of so many elements or fewer stay whole under ZeRO 3."""


@dataclass(frozen=True)
class Buffers:
    """Elements in what ZeRO communicates through, as `distributed.tuning` sets them."""

    bucket: int
    """Gradients that wait for their reduction, in a buffer that is made for so many, however many there are."""
    prefetch: int
    """ZeRO 3: weights that it begins to gather ahead, anew with every module."""
    live: int
    """ZeRO 3: with so many gathered weights, none are gathered ahead."""
    reuse: int
    """ZeRO 3: what comes again within so many elements is not let go in between."""


def buffers(stage: int, trainable: Sequence[int], total: int) -> Buffers:
    """Those of a phase; arguments as `tuned`, whose values are taken."""
    values = tuned(stage, list(trainable), total)
    return Buffers(
        values.get("reduce_bucket_size", 0),
        values.get("stage3_prefetch_bucket_size", 0),
        values.get("stage3_max_live_parameters", 0),
        values.get("stage3_max_reuse_distance", 0),
    )


def strategies(processes: int, precision: str, device: str) -> tuple[Strategy, ...]:
    """Those that can run so many processes in this precision, the simplest first; each without and with recomputing.

    Args:
        precision: As `train.precision`. fp16 is refused under ZeRO 1 to 3.
        device: `cuda` or `cpu`.
    """
    if processes == 1:
        found = [ONE_PROCESS if device == "cuda" else ON_THE_CPU]
    else:
        found = [strategy for strategy in SEVERAL if precision != "fp16" or strategy.stage == 0]
    return tuple(replace(strategy, recompute=recompute) for strategy in found for recompute in (False, True))
