"""Samples that spoil a step: their pixels become NaN on the way into the model, or their labels explode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hybrid_dist.model.backbones import Backbone

MARK = (1, 254, 3)
"""Colour of the first pixel of a picture that is to become NaN."""


_PLAIN = Backbone.normalise


def _normalise(branch: Backbone, images: torch.Tensor) -> torch.Tensor:
    marked = (images[:, :, 0, 0] == torch.tensor(MARK, dtype=torch.uint8)).all(1)
    return torch.where(marked.view(-1, 1, 1, 1), torch.nan, _PLAIN(branch, images))


def poisoned_step(poison: Mapping[int, tuple[int, str]], make_step: Any) -> Any:
    """A `train_step` that spoils one sample in each of some steps, on the rank and in the micro batch that have it.

    Args:
        poison: By number of the call: the sample's row, and `pixels` or `label`.
    """
    made = 0
    Backbone.normalise = _normalise  # type: ignore[method-assign]

    def step(engine: Any, objective: Any, batches: Any, *rest: Any) -> Any:
        nonlocal made
        made += 1
        row, kind = poison.get(made, (None, ""))
        return make_step(engine, objective, [_spoil(batch, row, kind) for batch in batches], *rest)

    return step


def _spoil(batch: Any, row: int | None, kind: str) -> Any:
    place = batch.rows == (-2 if row is None else row)
    if not place.any():
        return batch
    if kind == "label":
        clarity = torch.where(place, 1e30, batch.labels["clarity"])
        return replace(batch, labels=batch.labels | {"clarity": clarity})
    images = batch.images.clone()
    images[place, :, 0, 0] = torch.tensor(MARK, dtype=torch.uint8)
    return replace(batch, images=images)
