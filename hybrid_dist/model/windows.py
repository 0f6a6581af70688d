"""Windows of Swin Transformers for pictures of any size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.models import model_entrypoint, split_model_name_tag

from hybrid_dist.errors import UserError

FAMILIES = ("timm.models.swin_transformer", "timm.models.swin_transformer_v2")
"""timm's modules whose models take `img_size`, `window_size` and `always_partition`."""
LEAST = 2
"""Side of a window that is chosen here: in a window of one, a place would see nothing but itself."""

Window = tuple[int, int]
"""(height, width)."""


@dataclass(frozen=True)
class Stages:
    """What a Swin Transformer's windows have to fit; each stage after the first halves the map."""

    patch: int
    """Side of its patches in pixels."""
    windows: tuple[Window, ...]
    """By stage, as they were asked for."""

    @classmethod
    def of(cls, net: Any) -> Stages:
        """Those of timm's model, made with `always_partition`: else its windows are cut to its maps."""
        return cls(max(net.patch_embed.patch_size), tuple(tuple(stage.blocks[0].window_size) for stage in net.layers))


def is_windowed(name: str) -> bool:
    """Whether a timm model is a Swin Transformer (Liu et al., 2021, arxiv.org/abs/2103.14030), of either version."""
    return model_entrypoint(split_model_name_tag(name)[0]).__module__ in FAMILIES


def fit_windows(stages: Stages, image_size: int, scale: float) -> tuple[Window, ...]:
    """The windows for pictures of another size than a Swin Transformer has been made for.

    A window that divides its stage's map, or covers it, stays: what has been learned for its places keeps its meaning.
    Otherwise it becomes the divisor of the map whose side is nearest, in ratio, to `scale` times its own: with the
    pictures' ratio a window shows the same share of them, as where the authors fine-tuned 224 pixels at 384, and as
    timm's `set_input_size` does it. timm alone would pad the map with zeros that take part in the attention.

    Args:
        image_size: Side of the pictures in pixels.
        scale: By how much they are larger than those that the windows are for.

    Raises:
        UserError: the maps can't be halved evenly; says which sizes near it would do.
    """
    unit = stages.patch * 2 ** (len(stages.windows) - 1)
    if image_size % unit:
        below = image_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise UserError(
            f"its {len(stages.windows)} stages halve maps of patches of {stages.patch} pixels, so it takes multiples"
            f" of {unit}; {near} would do"
        )
    sides = [image_size // (stages.patch * 2**stage) for stage in range(len(stages.windows))]
    return tuple(
        (_fit(height, side, scale), _fit(width, side, scale))
        for (height, width), side in zip(stages.windows, sides, strict=True)
    )


def as_kwarg(windows: Sequence[Window]) -> Any:
    """As timm's `window_size`: one number where that says it all."""
    sides = {side for window in windows for side in window}
    # By stage always in pairs: timm takes two numbers for one window's height and width.
    return sides.pop() if len(sides) == 1 else tuple(windows)


def _fit(window: int, side: int, scale: float) -> int:
    if window >= side or side % window == 0:
        return window
    wanted = max(window * scale, LEAST)
    divisors = [divisor for divisor in range(LEAST, side + 1) if side % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(math.log(divisor / wanted)), -divisor))
