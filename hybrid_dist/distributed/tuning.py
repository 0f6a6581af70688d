"""What DeepSpeed's settings should be for a model of this size, where the launch file leaves them open.

Its own defaults are for models a hundred times larger: one bucket of half a billion gradients would hold all of ours,
so that nothing is reduced before the backward pass is over, and ZeRO 3 would never let a gathered weight go.
"""

from __future__ import annotations

from typing import Any

MOST_IN_A_BUCKET = 25_000_000
"""Elements: 100 MB of fp32, with which links are well used."""
FEWEST_IN_A_BUCKET = 100_000
BUCKETS = 8
"""As many at least: each is small beside the gradients, and at ZeRO 3 all but the last are reduced while the backward
pass goes on."""


def tuned(stage: int, trainable: list[int], total: int) -> dict[str, Any]:
    """Values for DeepSpeed's `zero_optimization`. Whether to overlap is left to it: at stages 1 and 2 it does not, and
    has had races there.

    Args:
        stage: Of ZeRO, 0 to 3.
        trainable: Elements of each parameter of the phase that gets gradients.
        total: Elements of all parameters.
    """
    if stage == 0:
        return {}
    # A gradient larger than the bucket would be reduced in place, beside the buffers that are made for it.
    bucket = max(_bucket(sum(trainable)), max(trainable, default=0))
    values = {
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,  # stages 1 and 2 refuse an odd number
    }
    if stage == 3:
        # Gathered weights beyond this are let go after use: a quarter of the model, or splitting it would save nothing.
        live = max(total // 4, FEWEST_IN_A_BUCKET)
        values |= {
            "stage3_prefetch_bucket_size": _bucket(total),
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_gather_16bit_weights_on_model_save": False,  # checkpoints are written from the parts
        }
    return values


def _bucket(elements: int) -> int:
    return min(max(elements // BUCKETS, FEWEST_IN_A_BUCKET), MOST_IN_A_BUCKET)


def fill_in(zero: dict[str, Any], values: dict[str, Any], cuda: bool) -> None:
    """Put `values` into a launch file's `zero_optimization` where it says nothing, or `auto`.

    Offloaded state lies in memory that the GPU reads without a copy in between, if there is a GPU.
    """
    for key, value in values.items():
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    for section in ("offload_optimizer", "offload_param"):
        part = zero.get(section) or {}
        if part.get("device", "none") == "cpu" and part.get("pin_memory", "auto") == "auto":
            part["pin_memory"] = cuda
