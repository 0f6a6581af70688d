"""Pieces of parameters in safetensors files: each rank writes those it owns, a reader takes what it needs.

A tensor in a shard is called `KIND/PARAMETER@START`: the flat fp32 elements of `KIND` (`weight`, `exp_avg`,
`exp_avg_sq`) of a parameter from element START on. Nothing in a file says how many ranks there were, or which ZeRO
stage: the pieces of all shards together cover each parameter exactly once.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hybrid_dist.distributed.engine import Piece
from hybrid_dist.errors import UserError

_KEY = re.compile(r"^(weight|exp_avg|exp_avg_sq)/(.+)@(\d+)$")


def write_shard(path: Path, pieces: Iterable[Piece], buffers: Mapping[str, Tensor]) -> None:
    """Write one rank's pieces, with the optimizer's step counts, and whole `buffers` of the model.

    Args:
        path: The safetensors file.
        pieces: What this rank owns; copied to host memory as fp32.
        buffers: Persistent buffers, given by one rank alone.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for piece in pieces:
        for kind, values in piece.values.items():
            # A clone: views of one flat buffer would be refused as shared memory.
            tensors[f"{kind}/{piece.name}@{piece.start}"] = values.detach().to("cpu", torch.float32, copy=True)
        if piece.step is not None:
            steps[piece.name] = piece.step
    tensors.update({f"buffer/{name}": values.detach().to("cpu", copy=True) for name, values in buffers.items()})
    save_file(tensors, path, metadata={"format": "hybrid-dist/1", "steps": json.dumps(steps, sort_keys=True)})


@dataclass(frozen=True)
class _Run:
    start: int
    numel: int
    file: int
    key: str


class PieceReader:
    """The pieces of a checkpoint's shards as if they were one file.

    Called as `reader(name, kind, start, numel)` it gives the flat fp32 elements of that range, read from disk then.
    """

    def __init__(self, files: Iterable[Path]):
        self._files = [safe_open(path, framework="pt") for path in files]
        self._runs: dict[tuple[str, str], list[_Run]] = {}
        self._buffers: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        for index, file in enumerate(self._files):
            self._steps.update(json.loads((file.metadata() or {}).get("steps", "{}")))
            for key in file.keys():  # noqa: SIM118 - not a dict
                self._index(index, file, key)
        for runs in self._runs.values():
            runs.sort(key=lambda run: run.start)

    def _index(self, index: int, file: Any, key: str) -> None:
        match = _KEY.match(key)
        if match:
            kind, name, start = match.groups()
            numel = file.get_slice(key).get_shape()[0]
            self._runs.setdefault((name, kind), []).append(_Run(int(start), numel, index, key))
        elif key.startswith("buffer/"):
            self._buffers[key.removeprefix("buffer/")] = index

    def step(self, name: str) -> int | None:
        """How often the optimizer has updated the parameter; None where it has no state."""
        return self._steps.get(name)

    def names(self) -> Iterator[str]:
        """Every parameter that has a weight here."""
        return (name for name, kind in self._runs if kind == "weight")

    def __call__(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        runs = self._runs.get((name, kind), [])
        out = torch.empty(numel, dtype=torch.float32)
        done = 0
        first = max(bisect_right([run.start for run in runs], start) - 1, 0)
        for run in runs[first:]:
            begin = max(start, run.start)
            end = min(start + numel, run.start + run.numel)
            if begin >= end or begin - start != done:
                break
            piece = self._files[run.file].get_slice(run.key)[begin - run.start : end - run.start]
            out[begin - start : end - start] = piece
            done = end - start
        if done != numel:
            raise UserError(f"checkpoint holds no {kind} for elements {start + done} to {start + numel} of {name}")
        return out

    def weights(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Whole fp32 weights by name, in the given shapes, and the buffers."""
        found = {name: self(name, "weight", 0, shape.numel()).view(shape) for name, shape in shapes.items()}
        found.update({name: self._files[index].get_tensor(f"buffer/{name}") for name, index in self._buffers.items()})
        return found
