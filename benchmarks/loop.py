"""What the training loop costs on top of its arithmetic: each of its steps beside one of a bare loop, in the same run.

    python benchmarks/loop.py [--launch zero2 | ddp] [--steps 100] [--config FILE] [key=value …]

A training runs as it always does. After each of its steps a twin, which began with the same weights, makes a bare one
with batches of a loader of its own: forward, loss, backward, clip, update, as a script of 20 lines has it; in one
process with torch alone, under a launch file with DeepSpeed or DDP alone. Both have a loader process, and the same
layers for a CPU. So whatever else the machine does slows both down. The ratio is that of the sums of the steps' times,
but for the first five, with a 95 % interval by bootstrap over blocks of ten steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid_dist.config import load_config
from hybrid_dist.data.loader import make_loader
from hybrid_dist.distributed import Topology, leave, start
from hybrid_dist.model.on_cpu import hasten
from hybrid_dist.training import feed
from hybrid_dist.training import run as runner
from hybrid_dist.training.optim import param_groups, peak_rates
from hybrid_dist.training.phase import PhaseLoop
from hybrid_dist.training.stop import Stop

ROOT = Path(__file__).resolve().parent.parent
SKIPPED, BLOCK, DRAWS = 5, 10, 2000


def bare_loop(loop: PhaseLoop, topology: Topology) -> Callable[[], None]:
    """A function that makes one step of the same work without any of this project's training code."""
    job, phase = loop.job, loop.phase
    train = job.config.train
    model = job.build(phase, load=True)
    model.set_trainable(phase.trainable)
    model.train()
    if topology.device.type == "cpu":
        hasten(model)
    groups = param_groups(model, train.weight_decay, None, peak_rates(model, phase))
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=train.betas, weight_decay=train.weight_decay, fused=True)
    # Loader processes of its own: the run's serve one order at a time.
    samples, order = job.train_pool.splits[phase.name], job.train_order(phase, 0, loop.length.total)
    batches = iter(make_loader(samples, order, workers=1, pin_memory=False))
    tasks, dtype = job.tasks, {"bf16": torch.bfloat16, "fp32": None}[train.precision]

    def loss_of(outputs: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
        parts = []
        for task in tasks:
            target = batch.labels[task.name]
            each = task.losses(outputs[task.name], target)
            parts.append(task.weight * each.sum() / task.labelled(target, None).sum().clamp(min=1))
        return torch.stack(parts).sum()

    if topology.zero:
        return _deepspeed(model, optimizer, batches, loss_of, job, topology)
    wrapped: Any = model
    if topology.world_size > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(
            model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        for index in range(job.accumulation):
            batch = next(batches)
            last = index == job.accumulation - 1
            waits = wrapped.no_sync() if topology.world_size > 1 and not last else contextlib.nullcontext()
            with waits:
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    outputs = wrapped(batch.images)
                (loss_of(outputs, batch) / job.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trainable, train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _deepspeed(
    model: Any, optimizer: Any, batches: Any, loss_of: Any, job: Any, topology: Topology
) -> Callable[[], None]:
    import deepspeed

    plugin = topology.accelerator.state.deepspeed_plugin
    config = json.loads(json.dumps({key: value for key, value in plugin.deepspeed_config.items() if value != "auto"}))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> None:
        for _ in range(job.accumulation):
            batch = next(batches)
            engine.backward(loss_of(engine(batch.images), batch))
            engine.step()

    return step


class Beside(PhaseLoop):
    """The loop, with a bare step after each of its own; whose turn is first changes."""

    bare: Callable[[], None] | None = None

    def _make_step(self, source: feed.Feed) -> None:
        if self.bare is None:
            self.bare = bare_loop(self, self.topology)
        first = self.state.phase_step % 2 == 0
        for own in (first, not first):
            self.topology.control.barrier()
            began = time.perf_counter()
            if own:
                super()._make_step(source)
            else:
                self.bare()
            (OURS if own else BARE).append(time.perf_counter() - began)


OURS: list[float] = []
BARE: list[float] = []


def rank(arguments: argparse.Namespace) -> None:
    """One process of the measurement."""
    config = load_config(arguments.config, arguments.overrides)
    runner.PhaseLoop = Beside  # type: ignore[misc]
    feed.BRISK *= 2  # here a step takes as long as two
    topology = start(config.train.precision, config.train.stall_timeout)
    try:
        runner.run(config, topology, Stop(), None, False)
        if topology.is_main:
            arguments.out.write_text(json.dumps({"ours": OURS[SKIPPED:], "bare": BARE[SKIPPED:]}))
    finally:
        leave()


def interval(ours: np.ndarray, bare: np.ndarray) -> tuple[float, float]:
    """95 % of the ratio of sums, by blocks drawn anew."""
    count = len(ours) // BLOCK
    pairs = np.stack(
        [ours[: count * BLOCK].reshape(count, BLOCK).sum(1), bare[: count * BLOCK].reshape(count, BLOCK).sum(1)]
    )
    drawn = pairs[:, np.random.default_rng(0).integers(0, count, (DRAWS, count))].sum(2)
    low, high = np.quantile(drawn[0] / drawn[1], [0.025, 0.975])
    return float(low), float(high)


def main() -> int:
    """Start, read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--launch", help="a file of launch/accelerate, without .yaml; none: one process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    if arguments.out is not None:
        rank(arguments)
        os._exit(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        made = [sys.executable, "-m", "hybrid_dist.cli", "synth", str(work / "data"), "--train", "1600", "--val", "32"]
        subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
        data = work / "data"
        phases = json.dumps([{"name": "c", "trainable": ["all"], "steps": arguments.steps, "lr": 1e-5}])
        keys = [
            f"data.train_csv={data / 'train.csv'}", f"data.train_images={data / 'train'}", "data.workers=1",
            f"data.val_csv={data / 'val.csv'}", f"data.val_images={data / 'val'}", f"run.dir={work / 'runs'}",
            f"phases={phases}", "tracking.report=false", "tracking.wandb=off",
        ]  # fmt: skip
        launcher = ["-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{arguments.launch}.yaml"]
        words = [sys.executable, *(launcher if arguments.launch else []), __file__, "--config", arguments.config]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words += ["--out", str(work / "steps.json"), *keys, *arguments.overrides]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(done.stderr[-4000:])
        steps = json.loads((work / "steps.json").read_text())
    ours, bare = np.array(steps["ours"]), np.array(steps["bare"])
    low, high = interval(ours, bare)
    found = {"ratio": float(ours.sum() / bare.sum()), "low": low, "high": high, "ours_s": float(np.median(ours))}
    found |= {"bare_s": float(np.median(bare)), "steps": len(ours)}
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print(
            f"a step ÷ a bare one: {found['ratio']:.3f} ({low:.3f} to {high:.3f}), medians"
            f" {found['ours_s'] * 1e3:.1f} and {found['bare_s'] * 1e3:.1f} ms, {len(ours)} steps"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
