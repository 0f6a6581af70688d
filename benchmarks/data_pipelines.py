"""The loader beside what people use now, on the same pictures and with the same operations, by turns in one run.

    python benchmarks/data_pipelines.py [--json] [--pictures N] [--repeats N]

The pictures are photographs (scikit-learn's two samples, mirrored, tiled, cropped and shrunk, so that they have a
camera's detail), as JPEGs of 500×375 and 1024×683, with four tasks and blanks as in real annotations. Every pipeline
runs in one process of torch's DataLoader and hands over batches of 32 at 224 px.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from hybrid_dist.bench.data import MICRO_BATCH, WARM_UP, our_loader, rate
from hybrid_dist.config import TaskConfig
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.data.augment import OPERATIONS, RESAMPLING, SMALLEST, STEEPEST, Augment
from hybrid_dist.data.pack import pack
from hybrid_dist.data.packed import open_packed
from hybrid_dist.data.pictures import BACKGROUND
from hybrid_dist.data.resize import shrink
from hybrid_dist.data.source import Source

SIZE = 224
COUNT = 600
SHAPES = {"500x375": (500, 375), "1024x683": (1024, 683)}
TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "airline": TaskConfig(kind="classification", column="airlinename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "block": TaskConfig(kind="regression", column="block"),
}
# A quarter of the airlines and a fifth of the scores have no label.
BLANK = {"airline": 0.25, "clarity": 0.2, "block": 0.2}


def write_pictures(folder: Path, width: int, height: int) -> Table:
    """`COUNT` photographs and their CSV."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    lines = ["filename,typename,airlinename,clarity,block"]
    for index in range(COUNT):
        first, second = photographs[index % 2], photographs[index // 2 % 2]
        row = np.concatenate([first, second[:, ::-1]], 1)
        scene = np.concatenate([row, row[::-1]], 0)  # (854, 1280, 3)
        tall = int(min(height / rng.uniform(0.8, 1.0), scene.shape[0]))
        wide = min(int(tall * width / height), scene.shape[1])
        top, left = rng.integers(scene.shape[0] - tall + 1), rng.integers(scene.shape[1] - wide + 1)
        crop = scene[top : top + tall, left : left + wide, ::-1]
        picture = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "train" / f"{index}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])
        labels = {"airline": f"airline {index % 5}", "clarity": "0.7", "block": "0.1"}
        cells = ["" if rng.random() < BLANK[task] else label for task, label in labels.items()]
        lines.append(f"{index}.jpg,type {index % 10},{','.join(cells)}")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return read_training(folder / "train.csv", folder / "train", TASKS)[0]


def composed(forbidden: frozenset[str], before: list[Any], after: list[Any]) -> A.Compose:
    """The operations that `Augment` gives a sample for which these effects are forbidden, as Albumentations alone."""
    operations = [operation.make() for operation in OPERATIONS if not operation.changes & forbidden]
    place = [A.PadIfNeeded(SIZE, SIZE, position="random", border_mode=cv2.BORDER_CONSTANT, fill=BACKGROUND)]
    if not RESAMPLING & forbidden:
        place.append(A.Affine(scale=(SMALLEST, 1.0), fill=BACKGROUND, p=1.0))
        place.append(A.Rotate((-STEEPEST, STEEPEST), fill=BACKGROUND, p=0.5))
    return A.Compose([*before, *operations, *place, *after])


class Usual(Dataset[Any]):
    """Pictures by `read`, then the operations that the sample's labels allow, a sample at a time."""

    def __init__(self, table: Table, read: Callable[[int], Any], before: list[Any], after: list[Any]):
        self.table, self.read = table, read
        augment = Augment(SIZE, TASKS, train=True)
        valid = {task: table.valid(task) for task in TASKS}
        self.rules = [augment.forbidden([task for task in TASKS if valid[task][row]]) for row in range(len(table))]
        self.pipelines = {rule: composed(rule, before, after) for rule in set(self.rules)}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Any:
        row %= len(self.table)
        pixels = self.pipelines[self.rules[row]](image=self.read(row))["image"]
        return pixels, {task: labels[row] for task, labels in self.table.labels.items()}


class Timm(Dataset[Any]):
    """timm's default transform for training (its own operations: a random crop and colour jitter).

    With its prefetcher it hands over bytes, which are normalised on the GPU.
    """

    def __init__(self, table: Table, prefetcher: bool):
        self.table, self.transform = table, create_transform(SIZE, is_training=True, use_prefetcher=prefetcher)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Any:
        row %= len(self.table)
        picture = Image.open(self.table.images / self.table.filename(row)).convert("RGB")
        return self.transform(picture), {task: labels[row] for task, labels in self.table.labels.items()}


def their_loader(dataset: Dataset[Any], pictures: int) -> DataLoader[Any]:
    """One process, as many batches as ours."""
    rows = np.random.default_rng(0).integers(0, COUNT, pictures + WARM_UP * MICRO_BATCH).tolist()

    def start(_: int) -> None:
        cv2.setNumThreads(0)
        torch.set_num_threads(1)

    return DataLoader(dataset, MICRO_BATCH, sampler=rows, num_workers=1, worker_init_fn=start)


def pipelines(table: Table, pictures: int) -> dict[str, Callable[[], Any]]:
    """Each as a function that makes its loader."""
    source = Source(str(table.images))
    pack(table, source, SIZE, 2, print, lambda done: None)
    packed = open_packed(table, SIZE, source)
    paths = [table.images / table.filename(row) for row in range(len(table))]
    fit = [A.LongestMaxSize(SIZE, interpolation=cv2.INTER_AREA)]
    small = [shrink(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), SIZE) for path in paths]
    by_pillow = Usual(
        table, lambda row: np.array(Image.open(paths[row]).convert("RGB")), fit, [A.Normalize(), ToTensorV2()]
    )
    by_pillow_bytes = Usual(table, lambda row: np.array(Image.open(paths[row]).convert("RGB")), fit, [ToTensorV2()])
    by_opencv_bytes = Usual(
        table, lambda row: cv2.cvtColor(cv2.imread(str(paths[row])), cv2.COLOR_BGR2RGB), fit, [ToTensorV2()]
    )
    decoded = Usual(table, small.__getitem__, [], [ToTensorV2()])
    return {
        "plain": lambda: our_loader(table, TASKS, SIZE, pictures, None),
        "packed": lambda: our_loader(table, TASKS, SIZE, pictures, packed),
        "PIL + Albumentations + Normalize": lambda: their_loader(by_pillow, pictures),
        "PIL + Albumentations, bytes": lambda: their_loader(by_pillow_bytes, pictures),
        "cv2 + Albumentations, bytes": lambda: their_loader(by_opencv_bytes, pictures),
        "timm": lambda: their_loader(Timm(table, False), pictures),
        "timm with its prefetcher, bytes": lambda: their_loader(Timm(table, True), pictures),
        "Albumentations alone, pre-decoded": lambda: their_loader(decoded, pictures),
    }


def measure(name: str, pictures: int, repeats: int) -> dict[str, Any]:
    """Medians of all pipelines on pictures of one shape, and what ours are of theirs."""
    with tempfile.TemporaryDirectory() as folder:
        table = write_pictures(Path(folder) / name, *SHAPES[name])
        rates: dict[str, list[float]] = {}
        made = pipelines(table, pictures)
        for _ in range(repeats):
            for pipeline, make in made.items():
                rates.setdefault(pipeline, []).append(rate(make(), pictures))
    medians = {pipeline: statistics.median(found) for pipeline, found in rates.items()}
    ratios = {
        f"{ours} / {theirs}": medians[ours] / medians[theirs]
        for ours in ("plain", "packed")
        for theirs in medians
        if theirs not in ("plain", "packed")
    }
    return {"pictures": name, "images_per_s_per_worker": medians, "ratios": ratios}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=1600)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = [measure(name, arguments.pictures, arguments.repeats) for name in SHAPES]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"\n{row['pictures']}")
        for pipeline, found in row["images_per_s_per_worker"].items():
            print(f"  {pipeline:36}{found:8.0f} pictures/s")
        for ratio, found in row["ratios"].items():
            print(f"  {ratio:48}{found:6.2f} ×")
    return 0


if __name__ == "__main__":
    sys.exit(main())
