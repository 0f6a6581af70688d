"""AdamW over what trains, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hybrid_dist.config import PhaseConfig
from hybrid_dist.errors import UserError
from hybrid_dist.model.hybrid import Hybrid

# Positions and single tokens, not maps of features; timm's own lists don't name them in every family.
TABLES = ("relative_position_bias_table", "pos_embed", "cls_token", "reg_token", "dist_token")


def param_groups(
    model: Hybrid,
    weight_decay: float,
    updates: Callable[[str], int | None] | None = None,
    peaks: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """The trainable parameters, each in exactly one group: a group for every part and rate and, in it, with and without
    decay.

    No decay on vectors (biases, norms, layer-scale gammas), position tables and what timm lists in `no_weight_decay`.
    To be called before ZeRO takes the shapes away.

    Args:
        updates: How often each parameter's optimizer state has been updated already, None for those that have none.
            ZeRO keeps one such count for a whole group, so what differs in it gets groups of its own.
        peaks: The peak rate of each trainable parameter, from `peak_rates`; None: the same for all.

    Returns:
        Groups with `params`, `names` (list of str, parallel to params), `part`, `weight_decay`, and `lr_scale`, the
        group's rate as a share of the highest; none is empty.
    """
    exempt = {f"{part}.{name}" for part, branch in model.branches().items() for name in branch.no_weight_decay()}
    groups: dict[tuple[str, float, bool, int | None], dict[str, Any]] = {}
    highest = max(peaks.values()) if peaks is not None else 1.0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = name.partition(".")[0]
        scale = peaks[name] / highest if peaks is not None else 1.0
        decays = name not in exempt and _decays(name, parameter)
        group = groups.setdefault(
            (part, scale, decays, updates(name) if updates is not None else None),
            {"params": [], "names": [], "part": part, "weight_decay": weight_decay if decays else 0.0},
        )
        group["lr_scale"] = scale
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def peak_rates(model: Hybrid, phase: PhaseConfig) -> dict[str, float]:
    """The peak rate of each parameter that trains: its part's, and in a backbone less the nearer it is to the pictures.

    With `layer_decay` d the rate of layer l of a backbone of n layers is dⁿ⁻¹⁻ˡ times its part's, as in BEiT (Bao et
    al. 2021, arxiv.org/abs/2106.08254) and timm, by whose grouping layers are counted.

    Raises:
        UserError: a part that trains has no rate, or timm doesn't know a backbone's layers; names the phase's key.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = {name: name.partition(".")[0] for name in trainable}
    rates = phase.lr if isinstance(phase.lr, dict) else dict.fromkeys(parts.values(), phase.lr)
    lacking = [part for part in model.parts() if part in parts.values() and part not in rates]
    if lacking:
        raise UserError(
            f"lr: no rate for {' and '.join(lacking)}, which this phase trains; one number would do for all parts"
        )
    scales = _layer_scales(model, phase.layer_decay) if phase.layer_decay is not None else {}
    return {name: rates[part] * scales.get(name, 1.0) for name, part in parts.items()}


def _layer_scales(model: Hybrid, decay: float) -> dict[str, float]:
    """By parameter of a backbone, trainable or not."""
    scales: dict[str, float] = {}
    for part, branch in model.branches().items():
        try:
            layers = branch.layers()
        except UserError as error:
            raise UserError(f"layer_decay: {error}") from None
        top = max(layers.values(), default=0)
        scales.update({f"{part}.{name}": decay ** (top - layer) for name, layer in layers.items()})
    return scales


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


def ema_decay(step: int, most: float) -> float:
    """How much of the weights' running mean stays at the phase's `step`-th step, counted from 1.

    min(`most`, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage with `num_updates`: the mean soon
    forgets where the phase began.
    """
    return min(most, (1 + step) / (10 + step))


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(table in name for table in TABLES)
