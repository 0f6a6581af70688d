"""AdamW over what trains, and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from hybrid_dist.model.hybrid import Hybrid

# Positions and single tokens, not maps of features; timm's own lists don't name them in every family.
TABLES = ("relative_position_bias_table", "pos_embed", "cls_token", "reg_token", "dist_token")


def param_groups(
    model: Hybrid, weight_decay: float, updates: Callable[[str], int | None] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters, each in exactly one group: a group for every part and, in it, with and without decay.

    No decay on vectors (biases, norms, layer-scale gammas), position tables and what timm lists in `no_weight_decay`.
    To be called before ZeRO takes the shapes away.

    Args:
        updates: How often each parameter's optimizer state has been updated already, None for those that have none.
            ZeRO keeps one such count for a whole group, so what differs in it gets groups of its own.

    Returns:
        Groups with `params`, `names` (list of str, parallel to params), `part` and `weight_decay`; none is empty.
    """
    exempt = {f"{part}.{name}" for part, branch in model.branches().items() for name in branch.no_weight_decay()}
    groups: dict[tuple[str, bool, int | None], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        decays = name not in exempt and _decays(name, parameter)
        group = groups.setdefault(
            (part, decays, updates(name) if updates is not None else None),
            {"params": [], "names": [], "part": part, "weight_decay": weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def learning_rate(step: int, total_steps: int, peak: float, warmup_fraction: float) -> float:
    """The rate for optimizer step `step` of `total_steps`, counted from 0.

    Rises linearly over the first `round(warmup_fraction · total_steps)` steps, never from 0, reaches `peak` at the step
    after them, and falls along half a cosine that would be 0 at `step == total_steps`: the last step still learns.

    Raises:
        ValueError: no steps, a step outside 0 … total_steps, or a fraction outside 0 to 1.
    """
    if total_steps < 1 or not 0 <= step <= total_steps or not 0 <= warmup_fraction <= 1:
        raise ValueError(f"no rate for step {step} of {total_steps} with a warm-up of {warmup_fraction}")
    warmup = round(warmup_fraction * total_steps)
    if step == total_steps:
        return 0.0
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(table in name for table in TABLES)
