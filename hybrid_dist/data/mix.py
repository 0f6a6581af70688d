"""Mixup and CutMix for several tasks: who is mixed with whom, the pixels, and which labels stay true of the result.

Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018; Yun et al., CutMix, ICCV 2019. Everything follows
from the sample's key, the partner too: no rank has to know another's samples, and micro batches make no difference.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.augment import EFFECTS, sensitivity
from hybrid_dist.data.balance import Balance
from hybrid_dist.data.pictures import BACKGROUND
from hybrid_dist.errors import UserError

Kind = Literal["mixup", "cutmix"]

CHANGES: dict[Kind, frozenset[str]] = {
    # Two pictures that shine through each other have no one sharpness or colour, and what is hidden can't be told.
    "mixup": EFFECTS,
    # A patch hides what is behind it, and is as sharp as the picture that it comes from.
    "cutmix": frozenset({"sharpness", "occlusion"}),
}
"""What mixing changes in a picture: a task whose label depends on it has none in the mixed sample."""

WHOLE = 1 << 16
"""Shares are counted in parts of it: sums of them are whole numbers, whoever adds them up in whatever order."""
_LEVELS = 256
"""Mixup's shares are counted in parts of this: finer ones would not show in 8 bits, and 16 suffice to compute it."""


@dataclass(frozen=True)
class Draw:
    """How one sample is mixed.

    partner: a row of the training table, another one than the sample's own.
    key: what the partner's augmentation follows from.
    share: in 0–1, what is left of the sample itself; with CutMix before it is known where the pictures lie.
    place: where CutMix's patch lies within the picture's content, in 0–1 down and to the right.
    """

    kind: Kind
    partner: int
    key: int
    share: float
    place: tuple[float, float]


class Mixing:
    """Draws partners and shares, and mixes pixels.

    Args:
        rows: The training table's.
        balance: How likely each of them is to be a partner; None: all alike.
    """

    def __init__(
        self, data: DataConfig, tasks: Mapping[str, TaskConfig], rows: int, balance: Balance | None = None
    ) -> None:
        self.alphas = alphas(data)
        self.probability = data.mix_prob
        self.rows, self.balance = rows, balance
        self.kept = {kind: kept(kind, tasks) for kind in self.alphas}

    def draw(self, row: int, key: int) -> Draw | None:
        """How the sample is mixed; None where it is not. The same for the same arguments.

        Args:
            key: 128 bits of the sample's own, of no other use.
        """
        chance = random.Random(key)
        if chance.random() >= self.probability:
            return None
        kind = chance.choice(list(self.alphas))
        share = chance.betavariate(self.alphas[kind], self.alphas[kind])
        partner = chance.randrange(self.rows) if self.balance is None else self.balance.draw(chance)
        if partner == row:
            partner = (row + chance.randrange(1, self.rows)) % self.rows if self.rows > 1 else row
        if partner == row:
            return None
        return Draw(kind, partner, chance.getrandbits(128), share, (chance.random(), chance.random()))

    def mix(self, draw: Draw, own: np.ndarray, partner: np.ndarray) -> tuple[np.ndarray, float]:
        """The mixed pixels, uint8 (S, S, 3) as both, and the share of the own picture, a multiple of 1 / `WHOLE`."""
        return mixup(own, partner, draw.share) if draw.kind == "mixup" else cutmix(own, partner, draw.share, draw.place)


def alphas(data: DataConfig) -> dict[Kind, float]:
    """Of the Beta distribution that shares are drawn from, by the kinds of mixing that are on."""
    both: dict[Kind, float] = {"mixup": data.mixup, "cutmix": data.cutmix}
    return {kind: alpha for kind, alpha in both.items() if alpha > 0 and data.mix_prob > 0}


def kept(kind: Kind, tasks: Mapping[str, TaskConfig]) -> frozenset[str]:
    """Tasks whose labels stay true in a mixed sample, as shares of two classes or as a mean.

    A class's label does if nothing that mixing changes tells it. A score's mean is one only where the picture's light,
    colour and sharpness tell nothing about it.
    """
    return frozenset(
        name
        for name, task in tasks.items()
        if not sensitivity(task) & (CHANGES[kind] if task.kind == "classification" else EFFECTS)
    )


def check_mixing(data: DataConfig, tasks: Mapping[str, TaskConfig]) -> list[str]:
    """Sentences on the labels that mixed samples go without.

    Raises:
        UserError: they would go without all of them.
    """
    told, labelled = [], {name for name in tasks if data.mix_prob < 1}
    for kind in alphas(data):
        staying = [name for name in tasks if name in kept(kind, tasks)]
        lost = [name for name in tasks if name not in staying]
        labelled |= set(staying)
        if not staying:
            what = ", ".join(f"tasks.{name}.sensitive_to" for name in lost)
            raise UserError(
                f"data.{kind}: a mixed sample would have no label left, for each task's label depends on what {kind}"
                f" changes ({', '.join(sorted(CHANGES[kind]))}); data.{kind}: 0 would do, or {what} that says"
                " otherwise, such as []"
            )
        if lost:
            told.append(
                f"data.{kind}: mixed samples keep the labels of {', '.join(staying)}; those of {', '.join(lost)} would"
                " not be true of them"
            )
    never = [name for name in tasks if name not in labelled]
    if alphas(data) and never:
        told.append(
            f"warning: data.mix_prob is 1, so {', '.join(never)} will never have a label in training; 0.5 would do"
        )
    return told


def mixup(own: np.ndarray, partner: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """share · own + (1 − share) · partner, rounded; and the share that it was, in whole 256ths."""
    level = round(share * _LEVELS)
    # At most 255 · 256 + 128, which 16 bits hold.
    mixed = own * np.uint16(level) + partner * np.uint16(_LEVELS - level) + np.uint16(_LEVELS // 2)
    return (mixed // np.uint16(_LEVELS)).astype(np.uint8), level / _LEVELS


def cutmix(own: np.ndarray, partner: np.ndarray, share: float, place: tuple[float, float]) -> tuple[np.ndarray, float]:
    """A patch of the partner over the own picture; and the own share of what can be seen of the two.

    Wide pictures stand in bars: a patch anywhere in the square would often hide nothing and show nothing. So it covers
    1 − share of the box that holds the own content, and comes from the same place within the partner's. What counts is
    what can be seen in the end: pixels that are no background, of either.
    """
    mine, theirs = _content(own), _content(partner)
    if mine is None or theirs is None:
        return own, 1.0
    side = (1.0 - share) ** 0.5
    height, width = round(mine.height * side), round(mine.width * side)
    if height == 0 or width == 0:
        return own, 1.0
    top = mine.top + round((mine.height - height) * place[0])
    left = mine.left + round((mine.width - width) * place[1])
    # Shifted as the contents' centres are, as far as the patch stays within the square.
    down = (theirs.top * 2 + theirs.height - mine.top * 2 - mine.height) // 2
    across = (theirs.left * 2 + theirs.width - mine.left * 2 - mine.width) // 2
    from_top = min(max(top + down, 0), own.shape[0] - height)
    from_left = min(max(left + across, 0), own.shape[1] - width)
    mixed = own.copy()
    patch = partner[from_top : from_top + height, from_left : from_left + width]
    hidden = cv2.countNonZero(_seen(own[top : top + height, left : left + width]))
    mixed[top : top + height, left : left + width] = patch
    shown, remaining = cv2.countNonZero(_seen(patch)), mine.pixels - hidden
    if shown + remaining == 0:
        return own, 1.0
    return mixed, round(remaining / (shown + remaining) * WHOLE) / WHOLE


@dataclass(frozen=True)
class _Box:
    """The upright box around a picture's content, and the number of its pixels that are no background."""

    top: int
    left: int
    height: int
    width: int
    pixels: int


def _seen(pixels: np.ndarray) -> np.ndarray:
    """uint8 (height, width), 0 where the picture is background."""
    return np.asarray(cv2.bitwise_not(cv2.inRange(pixels, BACKGROUND, BACKGROUND)))


def _content(picture: np.ndarray) -> _Box | None:
    seen = _seen(picture)
    pixels = cv2.countNonZero(seen)
    left, top, width, height = cv2.boundingRect(seen)
    return _Box(top, left, height, width, pixels) if pixels else None
