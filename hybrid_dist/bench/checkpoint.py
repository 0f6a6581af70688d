"""How long a checkpoint holds the loop up, beside `accelerator.save_state` for the same model and engine."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_dist.bench.launched import run_module
from hybrid_dist.bench.synthetic import CLASSES, synthetic_batch
from hybrid_dist.config import Config, load_config
from hybrid_dist.errors import UserError

if TYPE_CHECKING:
    from hybrid_dist.checkpoint import Saver
    from hybrid_dist.distributed import Engine, Topology


def bench(config: str, overrides: Sequence[str], launch: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure under each launch file, or in one process if there is none; a dictionary of plain values for each.

    Raises:
        UserError: a launch fails; its own output has said why.
    """
    # What is wrong with it is said once, before anything starts.
    runs = Path(load_config(config, overrides).run.dir).absolute()
    # A system's folder for temporary files may lie in memory: the disk that counts is the one that runs are kept on.
    disk = next(path for path in (runs, *runs.parents) if path.is_dir())
    rows = []
    files: list[str | None] = [*launch] or [None]
    for file in files:
        with tempfile.TemporaryDirectory(dir=disk) as folder:
            out = Path(folder) / "row.json"
            arguments = ["--config", config, "--repeats", str(repeats), "--out", str(out)]
            run_module(file, __name__, [*arguments, *overrides])
            rows.append({"launch": file, **json.loads(out.read_text())})
    return rows


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    lines = []
    for row in rows:
        lines += [
            f"{row['topology']}, {row['parameters'] / 1e6:.1f} M parameters, {row['bytes'] / 1e6:.0f} MB,"
            f" medians of {row['repeats']}",
            f"  the loop is held up        {row['blocked_s']:8.3f} s   (the first time {row['blocked_first_s']:.3f} s)",
            f"  until it is on the disk    {row['total_s']:8.3f} s",
            f"  accelerator.save_state     {row['save_state_s']:8.3f} s",
            f"  held up / save_state       {row['ratio']:8.3f}",
        ]
    return "\n".join(lines)


def measure(config: Config, topology: Topology, repeats: int, folder: Path) -> dict[str, Any]:
    """Save in turn with both, `repeats` times; all ranks together.

    Args:
        folder: Where both write; emptied after each.
    """
    from hybrid_dist.checkpoint import Saver, Store
    from hybrid_dist.distributed import make_engine
    from hybrid_dist.model.hybrid import build_model
    from hybrid_dist.training.optim import param_groups
    from hybrid_dist.training.phase import Layout
    from hybrid_dist.training.tasks import make_tasks

    classes = dict.fromkeys(config.tasks, tuple(str(index) for index in range(CLASSES)))
    counts = dict.fromkeys(config.tasks, CLASSES)
    model = build_model(config.model, config.tasks, counts, config.final_size, config.run.seed, load=False)
    model.set_trainable(config.phases[-1].trainable)
    layout = Layout.of(model)
    groups = param_groups(model, config.train.weight_decay)
    engine = make_engine(topology, model, groups, config.train, config.train.micro_batch(1), 1)
    _one_step(engine, topology, config, make_tasks(config.tasks, classes))
    store = Store(folder / "ours", 1, ["bench"])
    saver = Saver(store, topology.control, print, lambda: None, lambda found, tick: store.prune(found.path))
    ours, theirs, totals = [], [], []
    for index in range(repeats):
        blocked, total = _ours(saver, engine, layout, index + 1)
        ours.append(blocked)
        totals.append(total)
        theirs.append(_theirs(topology, folder / "theirs"))
    size = sum(file.stat().st_size for file in store.folder.rglob("*") if file.is_file())
    blocked, save_state = statistics.median(ours), statistics.median(theirs)
    return {
        "topology": topology.label, "parameters": sum(shape.numel() for shape in layout.shapes.values()),
        "bytes": size, "repeats": repeats, "blocked_s": blocked, "blocked_first_s": ours[0],
        "total_s": statistics.median(totals), "save_state_s": save_state, "ratio": blocked / save_state,
    }  # fmt: skip


def _one_step(engine: Engine, topology: Topology, config: Config, tasks: Any) -> None:
    """The optimizer has state only after a first step."""
    from hybrid_dist.training.objective import Objective
    from hybrid_dist.training.step import train_step

    micro = config.train.micro_batch(1)
    batch = synthetic_batch(config, config.final_size, micro, pin=False)
    counts = {task.name: micro * topology.world_size for task in tasks}
    engine.set_lr(1e-6)
    train_step(engine, Objective(tasks), [batch], counts, 0, topology.device, lambda doing: None)


def _ours(saver: Saver, engine: Engine, layout: Any, step: int) -> tuple[float, float]:
    """Seconds that the slowest rank was held up, and seconds until the checkpoint was there."""
    from hybrid_dist.checkpoint import Content

    control = saver.control
    shapes = {name: list(shape) for name, shape in layout.shapes.items()}
    content = Content(f"bench-{step}", {"step": step, "shapes": shapes}, {})
    buffers = layout.held_buffers(engine.model) if control.rank == 0 else {}
    control.barrier()
    began = time.perf_counter()
    problem = saver.begin(content, engine.pieces(), buffers, False, None)
    blocked = time.perf_counter() - began
    # Then what a step does: tell the others, and take the save on when all are ready.
    while saver.under_way():
        time.sleep(0.02)
        sums = control.total(saver.facts())
        again = time.perf_counter()
        saver.proceed(*sums)
        blocked += time.perf_counter() - again
    if saver.newest is None or saver.newest.path.name != content.name:
        raise UserError(problem or f"checkpoint {content.name} can't be written")
    return max(control.to_all(blocked)), time.perf_counter() - began


def _theirs(topology: Topology, folder: Path) -> float:
    """Seconds that the slowest rank spends in save_state."""
    topology.control.barrier()
    began = time.perf_counter()
    topology.accelerator.save_state(str(folder))
    seconds = max(topology.control.to_all(time.perf_counter() - began))
    if topology.is_main:
        shutil.rmtree(folder)
    topology.control.barrier()
    return seconds


def main() -> int:
    """One rank of a measurement; started by `bench`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    from hybrid_dist.distributed import leave, start

    # One small step is enough for the optimizer to have its state.
    topology = None
    config = load_config(arguments.config, arguments.overrides)
    topology = start(config.train.precision, config.train.stall_timeout)
    small = ["train.micro_batch_size=1", f"train.global_batch_size={topology.world_size}"]
    config = load_config(arguments.config, [*arguments.overrides, *small])
    try:
        row = measure(config, topology, arguments.repeats, arguments.out.parent)
        if topology.is_main:
            arguments.out.write_text(json.dumps(row))
    finally:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
