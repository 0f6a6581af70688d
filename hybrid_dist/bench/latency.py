"""How long an answer takes: end to end from a file's bytes, and in the model alone, beside its bare backbones."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from hybrid_dist.bench.synthetic import CLASSES
from hybrid_dist.config import load_config
from hybrid_dist.data.labels import ClassMap
from hybrid_dist.data.pictures import decode_picture
from hybrid_dist.errors import UserError
from hybrid_dist.inference.found import find_model
from hybrid_dist.inference.opened import OpenedModel, open_model
from hybrid_dist.model.hybrid import build_model
from hybrid_dist.training.description import describe_model, parse_description

HEIGHT, WIDTH = 683, 1024
"""Of the pictures whose bytes an answer begins with."""
_FEWEST = 5
_WARM_UP = 2


def from_model(folder: Path, device: str | None) -> OpenedModel:
    """A trained model.

    Raises:
        UserError: there is none.
    """
    return open_model(find_model(folder), device)


def from_config(file: str, overrides: Sequence[str], device: str | None) -> OpenedModel:
    """A model of a config with fresh weights and `CLASSES` classes a task: what it knows takes no time."""
    config = load_config(file, overrides)
    classes = ClassMap.from_names(str(number) for number in range(CLASSES))
    maps = {name: classes for name, task in config.tasks.items() if task.kind == "classification"}
    description = parse_description(describe_model(config, maps, {}), file)
    counts = dict.fromkeys(maps, CLASSES)
    model = build_model(config.model, config.tasks, counts, config.final_size, config.run.seed, load=False)
    return OpenedModel(description, model, device)


def bench(
    opened: OpenedModel, sizes: Sequence[int], repeats: int, seconds: float, tell: Callable[[int, int], None]
) -> dict[str, Any]:
    """Measure each batch size: model and bare backbones in turns, so that a busy moment meets both; then end to end.

    Args:
        repeats: Turns at most.
        seconds: For a batch size, about; a few turns are made in any case.

    Returns:
        Plain values, and a row in `batches` for each size: milliseconds a picture, and `ratio`, of the medians of the
        model and of its bare backbones one after the other.
    """
    if min(sizes) < 1 or repeats < 1 or not seconds > 0:
        raise UserError(f"--batch {' '.join(map(str, sizes))} --repeats {repeats} --seconds {seconds:g}: all above 0")
    rows = []
    for done, size in enumerate(sizes):
        tell(done, len(sizes))
        rows.append(_measure(Turns(opened, size), size, repeats, seconds))
    return {
        "device": torch.cuda.get_device_name(opened.device) if opened.device.type == "cuda" else opened.device.type,
        "threads": torch.get_num_threads(), "precision": opened.precision, "image_size": opened.image_size,
        "parameters": opened.parameters, "picture": [HEIGHT, WIDTH],
        "batches": rows,
    }  # fmt: skip


class Turns:
    """What is measured, for one batch size."""

    def __init__(self, opened: OpenedModel, size: int):
        self.opened, self.size = opened, size
        self.files = [_jpeg(seed) for seed in range(size)]
        self.images = self._batch().to(opened.device)
        branches = opened.model.branches().values()
        # What a bare backbone is given is normalised already: that is no work of its.
        self.bare = [(branch.net, branch.normalise(self.images)) for branch in branches]

    def end_to_end(self) -> list[np.ndarray]:
        """From JPEG bytes to probabilities and scores on the host, in this process alone."""
        outputs = self.opened.forward(self._batch().to(self.opened.device))
        return [task.predict(outputs[task.name]).cpu().numpy() for task in self.opened.tasks]

    def model(self) -> dict[str, Tensor]:
        """uint8 pictures on the device → raw outputs."""
        return self._wait(self.opened.forward(self.images))

    @torch.inference_mode()
    def backbones(self) -> list[Tensor]:
        """timm's models one after the other, as they are, in the same precision."""
        opened = self.opened
        with torch.autocast(opened.device.type, opened.dtype, enabled=opened.dtype is not None):
            return self._wait([net(images) for net, images in self.bare])

    def _batch(self) -> Tensor:
        """uint8 (B, 3, S, S), channels-last in memory, as a loader gives it."""
        size = self.opened.image_size
        images = np.empty((self.size, size, size, 3), np.uint8)
        for place, data in enumerate(self.files):
            images[place] = self.opened.fit(decode_picture(data, "picture", size), (), 0)
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _wait(self, outputs: Any) -> Any:
        if self.opened.device.type == "cuda":
            torch.cuda.synchronize(self.opened.device)
        return outputs


def _measure(turns: Turns, size: int, repeats: int, seconds: float) -> dict[str, Any]:
    # In turns, each after itself as often as after the other: what was there before matters to caches.
    pair = times_in_turns([turns.model, turns.backbones], repeats, seconds * 0.7)
    (whole,) = times_in_turns([turns.end_to_end], repeats, seconds * 0.3)
    row: dict[str, Any] = {"batch": size, "turns": len(pair[0])}
    for name, each in zip(("end_to_end", "model", "backbones"), (whole, *pair), strict=True):
        a_picture = np.array(each) * 1000 / size
        row[name] = {"p50_ms": float(np.median(a_picture)), "p95_ms": float(np.quantile(a_picture, 0.95))}
    row["ratio"] = row["model"]["p50_ms"] / row["backbones"]["p50_ms"]
    return row


def times_in_turns(runs: Sequence[Callable[[], object]], repeats: int, seconds: float) -> list[list[float]]:
    """Seconds of each, in turns of there and back, so that a busy moment of the machine meets all of them.

    Args:
        repeats: Turns at most.
        seconds: For all of them, about; a few turns are made in any case.
    """
    times: list[list[float]] = [[] for _ in runs]
    for _, run in itertools.product(range(_WARM_UP), runs):
        run()
    until = time.perf_counter() + seconds
    for turn in range(repeats):
        if turn >= _FEWEST and time.perf_counter() > until:
            break
        order = list(zip(runs, times, strict=True))
        for run, found in order if turn % 2 == 0 else reversed(order):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    return times


def describe(result: dict[str, Any]) -> str:
    """The result for people."""
    height, width = result["picture"]
    lines = [
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['image_size']} px, {result['precision']} on"
        f" {result['device']}, {result['threads']} threads; milliseconds a picture, p50 (p95)",
        f"{'batch':>5}  {f'from {width}×{height} JPEG':>22}  {'model alone':>22}  {'bare backbones':>22}  model / bare",
    ]
    for row in result["batches"]:
        cells = [f"{row[key]['p50_ms']:.2f} ({row[key]['p95_ms']:.2f})" for key in ("end_to_end", "model", "backbones")]
        lines.append(f"{row['batch']:>5}  {'  '.join(f'{cell:>22}' for cell in cells)}  {row['ratio']:>12.3f}")
    return "\n".join(lines)


def _jpeg(seed: int) -> bytes:
    """Patches under fine grain: about as many bytes as a photograph."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 256, (12, 18, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    picture = np.minimum(picture, 239) + draw.integers(0, 16, picture.shape, dtype=np.uint8)
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
