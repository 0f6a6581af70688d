"""Pieces of parameters in safetensors files: each rank writes those it owns, a reader takes what it needs.

A tensor in a shard is called `KIND/PARAMETER@START`: the flat fp32 elements of `KIND` (`weight`, `exp_avg`,
`exp_avg_sq`, `ema`) of a parameter from element START on. Nothing in a file says how many ranks there were, or which
ZeRO stage: the pieces of all shards together cover each parameter exactly once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hybrid_dist.distributed.engine import EMA, MOMENTS, Piece
from hybrid_dist.errors import UserError
from hybrid_dist.files import blocks

_KEY = re.compile(r"^(weight|exp_avg|exp_avg_sq|ema)/(.+)@(\d+)$")


def write_shard(
    path: Path, pieces: Iterable[Piece], buffers: Mapping[str, Tensor], tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write one rank's pieces, with the optimizer's step counts, and whole `buffers` of the model.

    The file is streamed, tensor by tensor: safetensors' own `save_file` first makes a copy of everything, which for a
    large model would double what a process holds, and refuses views of one flat buffer, which ZeRO's pieces are.

    Args:
        path: The safetensors file.
        pieces: What this rank owns, fp32.
        buffers: Persistent buffers, given by one rank alone.
        tick: Called after each tensor.

    Returns:
        `bytes` and `sha256` of the file, as a manifest lists them.
    """
    tensors: dict[str, Tensor] = {}
    steps: dict[str, int] = {}
    for piece in pieces:
        for kind, values in piece.values.items():
            assert values.dtype == torch.float32
            tensors[f"{kind}/{piece.name}@{piece.start}"] = values.detach()
        if piece.step is not None:
            steps[piece.name] = piece.step
    tensors.update({f"buffer/{name}": values.detach() for name, values in buffers.items()})
    metadata = {"format": "hybrid-dist/1", "steps": json.dumps(steps, sort_keys=True)}
    return stream_tensors(path, tensors, tensors.__getitem__, metadata, tick)


def stream_tensors(
    path: Path,
    layout: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    metadata: dict[str, str],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Write a safetensors file of which one tensor at a time is in memory; it is on the disk afterwards.

    Args:
        layout: Tensors with the shapes and dtypes of what will be written; may be on the meta device.
        read: Gives each of them by its name.
        tick: Called after each tensor.

    Returns:
        `bytes` and `sha256` of the file, summed as it is written.
    """
    total = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(layout, metadata)
        total.update(header)
        file.write(header)
        for name, expected in layout.items():
            values = read(name).cpu().contiguous()
            assert (values.shape, values.dtype) == (expected.shape, expected.dtype), name
            data = values.reshape(-1).view(torch.uint8).numpy().data
            for block in blocks(data):
                total.update(block)
                file.write(block)
            tick()
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": total.hexdigest()}


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The length and the JSON that a safetensors file begins with (github.com/huggingface/safetensors, «Format»)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.numel() * values.element_size()
        header[name] = {"dtype": _DTYPES[values.dtype], "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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

    def forget_steps(self, names: Iterable[str]) -> None:
        """From here on these have no optimizer state."""
        for name in names:
            self._steps.pop(name, None)

    def missing(self, shapes: Mapping[str, Sequence[int]]) -> str | None:
        """The first parameter of `shapes` whose pieces do not cover it; None if all are whole."""
        for name, shape in shapes.items():
            kinds = ["weight", *(MOMENTS if name in self._steps else []), *([EMA] if self._averages(name) else [])]
            if any(self._covered(name, kind) != math.prod(shape) for kind in kinds):
                return name
        return None

    def _covered(self, name: str, kind: str) -> int:
        """Elements from the first on, without a gap; -1 where two pieces overlap."""
        end = 0
        for run in self._runs.get((name, kind), []):
            if run.start != end:
                return -1 if run.start < end else end
            end += run.numel
        return end

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

    def weights(self, shapes: Mapping[str, torch.Size], averaged: bool = False) -> dict[str, Tensor]:
        """Whole fp32 weights by name, in the given shapes, and the buffers; `averaged`: means where there are any."""
        found = {name: self._whole(name, shape, averaged) for name, shape in shapes.items()}
        return found | {name: self._buffer(name) for name in self._buffers}

    def _whole(self, name: str, shape: torch.Size, averaged: bool) -> Tensor:
        kind = EMA if averaged and self._averages(name) else "weight"
        return self(name, kind, 0, shape.numel()).view(shape)

    def _averages(self, name: str) -> bool:
        return (name, EMA) in self._runs

    def write_weights(
        self, path: Path, shapes: Mapping[str, torch.Size], tick: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """What validation has judged, which is `averaged`, as a safetensors file, one tensor at a time; returns what
        `stream_tensors` does."""
        layout = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        layout |= {name: self._buffer(name).to("meta") for name in self._buffers}

        def read(name: str) -> Tensor:
            if name in self._buffers:
                return self._buffer(name)
            return self._whole(name, shapes[name], averaged=True)

        return stream_tensors(path, layout, read, {"format": "pt"}, tick)

    def _buffer(self, name: str) -> Tensor:
        return self._files[self._buffers[name]].get_tensor(f"buffer/{name}")
