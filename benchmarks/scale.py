"""Large tables and long runs: how long ten million rows take to open, what a loader process adds, whether memory grows.

    python benchmarks/scale.py [--json]

Real tables, samplers and loader processes; the pictures are all one, decoded anew each time.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.dataset import Samples
from hybrid_dist.data.loader import make_loader
from hybrid_dist.data.order import TrainSampler, steps_per_epoch
from hybrid_dist.data.pictures import decode_picture

SIZE, GLOBAL_BATCH, WORKERS = 32, 64, 2
TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "airline": TaskConfig(kind="classification", column="airlinename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "block": TaskConfig(kind="regression", column="block"),
}


class OnePicture(Samples):
    """Every row's picture is the same file."""

    def picture(self, row: int) -> np.ndarray:
        return decode_picture(PICTURE, "one.jpg", SIZE)


def _picture() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 60, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


PICTURE = _picture()


def write_table(folder: Path, rows: int) -> Path:
    """A CSV with as many distinct names, in the usual columns."""
    path = folder / "train.csv"
    kinds = [f"A{number}" for number in range(100)]
    with path.open("w") as file:
        file.write("filename,typeid,typename,airlinename,clarity,block\n")
        for start in range(0, rows, 100_000):
            file.writelines(
                f"2024/{row % 997:03d}/photograph_{row:08d}.jpg,{row % 100},{kinds[row % 100]},"
                f"{'' if row % 4 == 0 else f'airline {row % 50}'},{row % 101 / 100},{'' if row % 5 == 0 else 0.25}\n"
                for row in range(start, min(start + 100_000, rows))
            )
    return path


def open_table(folder: Path, rows: int) -> tuple[Table, dict[str, Any]]:
    """The table, and what opening it cost."""
    path = write_table(folder, rows)
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    table, _ = read_training(path, folder, TASKS)
    took = time.perf_counter() - began
    return table, {"rows": rows, "opens_in_s": took, "main_gb": (psutil.Process().memory_info().rss - before) / 1e9}


def workers_memory(table: Table, steps: int) -> dict[str, Any]:
    """Memory of its own (USS) that a loader process has after some batches, and of it what a small table's has not."""
    return {"own_mb": max(own for _, own in _run(table, steps, marks=1))}


def _run(table: Table, steps: int, marks: int) -> list[tuple[float, float]]:
    """RSS of this process and the largest USS of a loader process, in MB, at so many marks along the way."""
    samples = OnePicture(table, Augment(SIZE, TASKS, train=True), 0, "bench")
    order = TrainSampler(len(table), GLOBAL_BATCH, GLOBAL_BATCH, 0, 1, 0, "bench", 0, steps)
    others = multiprocessing.active_children()
    found = []
    for step, _ in enumerate(make_loader(samples, order, WORKERS, pin_memory=False), start=1):
        if step % (steps // marks) == 0:
            workers = [child for child in multiprocessing.active_children() if child not in others]
            own = [psutil.Process(worker.pid).memory_full_info().uss / 1e6 for worker in workers if worker.is_alive()]
            found.append((psutil.Process().memory_info().rss / 1e6, max(own, default=0.0)))
    return found


def growth(table: Table, steps: int) -> dict[str, Any]:
    """Memory along the way; `grows_mb` is from the first fifth's end to the end."""
    marks = _run(table, steps, marks=10)
    main, worker = ([mark[which] for mark in marks] for which in (0, 1))
    return {
        "samples": steps * GLOBAL_BATCH, "epochs": round(steps / steps_per_epoch(len(table), GLOBAL_BATCH), 1),
        "main_mb": main, "worker_mb": worker, "main_grows_mb": max(main[2:]) - main[1],
        "worker_grows_mb": max(worker[2:-1]) - worker[1],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small, _ = open_table(folder, 50_000)
        base = workers_memory(small, 100)["own_mb"]
        result["20 epochs of 50,000 rows"] = growth(small, 20 * steps_per_epoch(len(small), GLOBAL_BATCH))
        million, _ = open_table(folder, 1_000_000)
        result["1,000,000 rows once"] = growth(million, steps_per_epoch(len(million), GLOBAL_BATCH))
        large, facts = open_table(folder, 10_000_000)
        facts["worker_adds_mb"] = workers_memory(large, 100)["own_mb"] - base
        result["10,000,000 rows"] = facts
    print(json.dumps(result, indent=1) if arguments.json else _text(result))
    return 0


def _text(result: dict[str, Any]) -> str:
    lines = []
    for what, facts in result.items():
        shown = {key: round(value, 2) for key, value in facts.items() if isinstance(value, int | float)}
        lines.append(f"{what}: " + ", ".join(f"{key} {value}" for key, value in shown.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
