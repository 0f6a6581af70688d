"""What wandb costs a training, offline: in the loop, at its start and at its end, and in its own thread.

A validation of 10,000 pictures, 100 types and 30 airlines, whose predictions are drawn at random.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import numpy as np

from hybrid_dist.config import Config, load_config
from hybrid_dist.tracking import Judgement, Position, Wandb, wandb_sink
from hybrid_dist.tracking.media import media
from hybrid_dist.training.tasks import make_tasks
from hybrid_dist.training.validate import Validated

PICTURES, LINES = 10_000, 2_000
CLASSES = {"type": 100, "airline": 30}


class State:
    """Where a checkpoint would keep the id."""

    wandb_id: str | None = None


def main() -> None:
    """Print a line for each thing that is measured."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("configs/base.yaml", [f"run.dir={folder}", "tracking.wandb=offline"])
        config.folder.mkdir()
        judgement = made_up(config)
        wandb_sink.PATIENCE = 60.0
        sink = Wandb(config, "offline", {"a": LINES}, print)
        report("start, with the import of wandb", lambda: sink.begin(State(), 0))
        file = (config.folder / "metrics.jsonl").open("a")
        spent = 0.0
        for step in range(LINES):
            line = {"phase": "a", "epoch": 1, "step": step, "samples": 64 * step, "time": time.time()}
            file.write(json.dumps({**line, **({"train/loss": 1.0} if step < LINES - 1 else {"val/score": 0.5})}) + "\n")
            file.flush()
            began = time.perf_counter()
            if step == LINES - 1:
                sink.validated(judgement)
            sink.metrics(judgement.at, {})
            spent += time.perf_counter() - began
        print(f"a line, in the loop: {1e6 * spent / LINES:.0f} µs")
        report(f"end, with what was left of {LINES} lines and a validation", sink.close)
        began = time.thread_time()
        media(judgement)
        print(f"charts and pictures of a validation: {time.thread_time() - began:.2f} s of one core")


def report(what: str, call: Any) -> None:
    began = time.perf_counter()
    call()
    print(f"{what}: {time.perf_counter() - began:.2f} s")


def made_up(config: Config) -> Judgement:
    """A validation's outcome."""
    rng = np.random.default_rng(0)
    tasks = make_tasks(config.tasks, {name: tuple(f"{name} {n}" for n in range(k)) for name, k in CLASSES.items()})
    predictions, targets = {}, {}
    for task in tasks:
        if task.classes:
            chances = rng.random((PICTURES, len(task.classes))).astype(np.float32) ** 8
            predictions[task.name] = chances / chances.sum(axis=1, keepdims=True)
            targets[task.name] = rng.integers(-1, len(task.classes), PICTURES)
        else:
            predictions[task.name] = rng.random(PICTURES).astype(np.float32)
            targets[task.name] = rng.random(PICTURES)
    losses = {task.name: rng.random(PICTURES).astype(np.float32) for task in tasks}
    return Judgement(
        Position("a", 1, LINES - 1, 64 * LINES), {"val/score": 0.5, "val/loss": 1.0},
        Validated(np.arange(PICTURES), predictions, targets, losses), tasks,
        [f"{number}.jpg" for number in range(PICTURES)],
        lambda row: rng.integers(0, 255, (375, 500, 3), dtype=np.uint8),
    )  # fmt: skip


if __name__ == "__main__":
    main()
