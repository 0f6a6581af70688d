"""Pictures made worse, with the label that this makes true: clarity and block are learned from clean pictures too.

Augmentation may not touch what a label of the sample depends on; here it is touched, and the label changed with it.
What the two labels mean is taken from where it is known, the rendered pictures (`data/synth`).

Clarity: there, a picture of clarity c is blurred by a Gaussian of `blur_sigma(c, width)` pixels. Gaussians one after
the other add up in their squares, so what leads from c to a lower c' is known without looking at the picture.
This holds for rendered pictures and for any data whose clarity means the same: how wide the blur is, as a share of
the longer side, whatever its cause. Where clarity was judged by eye, on a scale of its own, leave `data.degrade` at 0
or see first whether these pictures look like their labels. Measured on 60 rendered pictures: what was rendered with
the new clarity is the nearest among all clarities but for 0.005 on average at 224 pixels, for 0.014 at 96.

Block: a fence of bars at a random phase hides each pixel with the same chance f, so whatever the aircraft's outline,
which nobody has drawn in, the part of it that was visible loses f of it on average: b becomes b + (1 − b) · f.
Measured on 150 rendered aircraft: off by 0.013 on average, by 0.08 at most, to neither side.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.augment import sensitivity
from hybrid_dist.data.synth import blur_sigma
from hybrid_dist.errors import UserError

RELABELLED = {"clarity": frozenset({"sharpness"}), "block": frozenset({"occlusion"})}
"""By column: the one change after which the label is known anew."""

_LEAST_COVER, _MOST_COVER, _MORE_SLIGHT = 0.02, 0.7, 1.7  # as rendered pictures are covered
_BARS = 4, 9
"""How many bars cross the picture. Fewer would hide now the nose and now nothing: a label true only on average."""


@dataclass(frozen=True)
class Fence:
    """Bars between the camera and the aircraft.

    cover: the share of the picture that they hide. phase, lean: in periods; by how much they lean over the height.
    """

    cover: float
    bars: int
    phase: float
    lean: float
    colour: tuple[int, int, int]

    def mask(self, height: int, width: int) -> np.ndarray:
        """Bool (height, width): what is hidden. Bars stand across the longer side."""
        across, along = np.arange(width) + 0.5, np.arange(height) + 0.5
        if height > width:
            across, along = along, across
        place = across * (self.bars / len(across)) + along[:, None] * (self.lean / len(along)) + self.phase
        hidden = place % 1.0 < self.cover
        return hidden.T if height > width else hidden


@dataclass(frozen=True)
class Harm:
    """What is done to one sample's picture.

    labels: what its labels are then, by task. lost: tasks whose label can't be known any more.
    softness, blur: sigmas of Gaussians, as shares of the longer side: of the fence's edges, which are as sharp as the
        picture was, and of what comes over it all.
    """

    labels: Mapping[str, float]
    lost: frozenset[str]
    fence: Fence | None
    softness: float
    blur: float

    def __call__(self, content: np.ndarray) -> np.ndarray:
        """uint8 (height, width, 3) to the same."""
        side = max(content.shape[:2])
        pixels = content.astype(np.float32)
        if self.fence is not None:
            hidden = _blurred(self.fence.mask(*content.shape[:2]).astype(np.float32), self.softness * side)[..., None]
            pixels += hidden * (np.array(self.fence.colour, np.float32) - pixels)
        pixels = _blurred(pixels, self.blur * side)
        return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    if sigma <= 0.05:  # less than would show
        return values
    return cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


class Degrade:
    """Draws what is done to a sample, from its key alone."""

    def __init__(self, share: float, tasks: Mapping[str, TaskConfig]) -> None:
        self.share = share
        self.sensitive = {name: sensitivity(task) for name, task in tasks.items()}
        self.relabelled = relabelled(tasks)

    def draw(self, labels: Mapping[str, float], key: int) -> Harm | None:
        """What is done to a sample with these labels, by task; None for nothing.

        Args:
            key: 128 bits of the sample's own, of no other use.
        """
        chance = random.Random(key)
        able = sorted({effect for name in labels for effect in self.relabelled.get(name, ())})
        if chance.random() >= self.share or not able:
            return None
        effects = frozenset(chance.choice([[effect] for effect in able] + ([able] if len(able) > 1 else [])))
        lost = {name for name, own in self.sensitive.items() if own & effects - self.relabelled.get(name, frozenset())}
        changed: dict[str, float] = {}
        fence = _draw_fence(chance) if "occlusion" in effects else None
        shift = chance.random()
        softness = blur = 0.0
        for name in sorted(labels.keys() & self.relabelled.keys()):
            if self.relabelled[name] == {"occlusion"} and fence is not None:
                changed[name] = labels[name] + (1 - labels[name]) * fence.cover
            elif self.relabelled[name] == {"sharpness"}:
                softness = blur_sigma(labels[name], 1)
                if "sharpness" in effects:
                    changed[name] = labels[name] * shift
                    blur = (blur_sigma(changed[name], 1) ** 2 - softness**2) ** 0.5
        return Harm(
            {name: value for name, value in changed.items() if name not in lost}, frozenset(lost), fence, softness, blur
        )


def _draw_fence(chance: random.Random) -> Fence:
    return Fence(
        cover=_LEAST_COVER + (_MOST_COVER - _LEAST_COVER) * chance.random() ** _MORE_SLIGHT,
        bars=chance.randint(*_BARS),
        phase=chance.random(),
        lean=chance.uniform(-1.0, 1.0),
        colour=(chance.randint(30, 225), chance.randint(30, 225), chance.randint(30, 225)),
    )


def relabelled(tasks: Mapping[str, TaskConfig]) -> dict[str, frozenset[str]]:
    """Tasks whose label is known anew after a change, and which; of each column of `RELABELLED` the first task."""
    found: dict[str, frozenset[str]] = {}
    for column, effect in RELABELLED.items():
        own = [name for name, task in tasks.items() if (task.column, task.kind) == (column, "regression")]
        found.update({name: effect for name in own[:1] if effect <= sensitivity(tasks[name])})
    return found


def check_degrade(data: DataConfig, tasks: Mapping[str, TaskConfig]) -> list[str]:
    """Sentences on the labels that degraded samples go without.

    Raises:
        UserError: there is nothing to be learned from them.
    """
    if data.degrade == 0:
        return []
    known = relabelled(tasks)
    if not known:
        raise UserError(
            f"data.degrade: no score in {' or '.join(RELABELLED)} that depends on sharpness or occlusion is a task"
            " here, so no label would follow; data.degrade: 0 would do"
        )
    effects = frozenset().union(*known.values())
    lost = [name for name, task in tasks.items() if sensitivity(task) & effects - known.get(name, frozenset())]
    return [f"data.degrade: blurred or covered samples go without labels of {', '.join(lost)}"] if lost else []
