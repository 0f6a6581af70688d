"""How long an optimizer step takes on this machine, with pictures that are in memory already."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_dist.bench.launched import run_module
from hybrid_dist.bench.synthetic import CLASSES, synthetic_batch
from hybrid_dist.config import Config, PhaseConfig, load_config
from hybrid_dist.errors import UserError

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch
    from hybrid_dist.distributed import Engine, Topology

WARM_UP = 2
"""Steps before the clock runs: the first ones take memory, choose algorithms and make the optimizer's state."""
PARTS = ("forward", "backward", "optimizer")


def bench(
    config: str, overrides: Sequence[str], launch: Sequence[str], phase: str | None, steps: int
) -> list[dict[str, Any]]:
    """Measure each phase, or `phase`, under each launch file, or here if there is none.

    Returns:
        A dictionary of plain values for each; nothing on ranks but the first.

    Raises:
        UserError: there is no such phase, or nothing to measure; a launch fails, and its own output has said why.
    """
    loaded = load_config(config, overrides)
    chosen(loaded, phase)
    if steps < 1:
        raise UserError(f"--steps {steps}: 1 or more would do")
    if not launch:
        return [{"launch": None, **row} for row in _here(loaded, phase, steps)]
    rows = []
    for file in launch:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            arguments = ["--config", config, "--steps", str(steps), "--out", str(out)]
            run_module(file, __name__, [*arguments, *(["--phase", phase] if phase else []), *overrides])
            rows += [{"launch": file, **row} for row in json.loads(out.read_text())]
    return rows


def chosen(config: Config, phase: str | None) -> list[PhaseConfig]:
    """The phase that is named, or all.

    Raises:
        UserError: there is none of that name.
    """
    found = [each for each in config.phases if phase in (None, each.name)]
    if not found:
        raise UserError(f"--phase {phase}: this config has the phases {', '.join(each.name for each in config.phases)}")
    return found


def _here(config: Config, phase: str | None, steps: int) -> list[dict[str, Any]]:
    """All ranks together; the first one's rows."""
    from hybrid_dist.distributed import leave, start

    topology = start(config.train.precision, config.train.stall_timeout, compiled=config.train.compile)
    try:
        rows = [measure(config, topology, each, steps) for each in chosen(config, phase)]
        return rows if topology.is_main else []
    finally:
        leave()


def measure(config: Config, topology: Topology, phase: PhaseConfig, steps: int) -> dict[str, Any]:
    """A phase's steps, as a training makes them, but for its data; random weights take as long as others.

    The parts are measured in steps of their own: on a GPU each is waited for, which a training does not do.

    Returns:
        Medians: `seconds` of a step, and of its parts; `flops_per_image` and `tflops`, of each process, by `plan`'s
        count; `mfu` where the device's peak is known, else None.

    Raises:
        UserError: the global batch does not divide.
    """
    from hybrid_dist.data.order import check_divides
    from hybrid_dist.machine import forget_peak_memory, peak_memory_gb
    from hybrid_dist.plan.flops import flops_per_picture
    from hybrid_dist.training.room import choose, look
    from hybrid_dist.training.utilisation import peak_flops

    train, world = config.train, topology.world_size
    check_divides(train.global_batch_size, train.micro_batch(1), world)
    classes = {name: CLASSES for name, task in config.tasks.items() if task.kind == "classification"}
    micro = choose(config, classes, topology, look(config, topology, fresh=True), lambda text: None)
    forget_peak_memory(topology.device)
    times, parts, parameters = _times(config, topology, phase, micro, steps)
    flops = sum(flops_per_picture(config, classes, phase)) if topology.is_main else 0.0
    seconds = statistics.median(times)
    speed = train.global_batch_size / seconds
    peak = peak_flops(topology.device, train.precision)
    return {
        "topology": topology.label, "phase": phase.name, "precision": train.precision,
        "image_size": config.size(phase), "global_batch_size": train.global_batch_size,
        "micro_batch_size": micro, "steps": steps, **parameters,
        "seconds": seconds, "lowest": min(times), "highest": max(times),
        **{f"{part}_s": parts[part] for part in PARTS},
        "images_per_s": speed, "peak_memory_gb": peak_memory_gb(topology.device),
        "flops_per_image": flops, "tflops": flops * speed / world / 1e12,
        "mfu": flops * speed / world / peak if peak is not None else None,
    }  # fmt: skip


def _times(
    config: Config, topology: Topology, phase: PhaseConfig, micro: int, steps: int
) -> tuple[list[float], dict[str, float], dict[str, int]]:
    """Seconds of each step; a part's median; and how many parameters there are, and train."""
    from hybrid_dist.distributed import make_engine, measured
    from hybrid_dist.model.hybrid import build_model, describe
    from hybrid_dist.training.optim import param_groups, peak_rates

    counts = dict.fromkeys(config.tasks, CLASSES)
    model = build_model(config.model, config.tasks, counts, config.size(phase), config.run.seed, load=False)
    model.set_trainable(phase.trainable)
    model.checkpoint_activations(config.train.checkpoint_activations)
    if config.train.compile:
        model.compile_blocks()
    numbers = describe(model)["all"]
    groups = param_groups(model, config.train.weight_decay, None, peak_rates(model, phase))
    accumulation = config.train.global_batch_size // (micro * topology.world_size)
    engine = make_engine(topology, model, groups, config.train, micro, accumulation)
    del model
    try:
        batch = synthetic_batch(config, config.size(phase), micro, pin=topology.device.type == "cuda")
        step = _stepper(engine, topology, config, [batch] * accumulation)
        for _ in range(WARM_UP):
            step()
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        clocks = []
        for _ in range(steps):
            clocks.append(PartClock(_waiting(topology)))
            with measured(clocks[-1].span):
                step()
    finally:
        engine.close()
    parts = {part: statistics.median(clock.seconds[part] for clock in clocks) for part in PARTS}
    return times, parts, {"parameters": numbers["total"], "trainable": numbers["trainable"]}


def _stepper(engine: Engine, topology: Topology, config: Config, batches: list[Batch]) -> Callable[[], None]:
    """Makes a step, as the loop does, and waits for it."""
    from hybrid_dist.data.labels import ClassMap
    from hybrid_dist.training.objective import Objective
    from hybrid_dist.training.step import train_step
    from hybrid_dist.training.tasks import make_tasks

    names = ClassMap.from_names(str(number) for number in range(CLASSES)).classes
    tasks = make_tasks(config.tasks, dict.fromkeys(config.tasks, names))
    objective, wait = Objective(tasks), _waiting(topology)
    labels = dict.fromkeys(config.tasks, float(config.train.global_batch_size))
    engine.set_lr(1e-6)

    def step() -> None:
        train_step(engine, objective, batches, labels, 0, topology.device, lambda doing: None)
        if config.train.ema is not None:
            engine.update_ema(config.train.ema)
        wait()

    return step


def _waiting(topology: Topology) -> Callable[[], None]:
    import torch

    device = topology.device
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None


class PartClock:
    """How long each part of a step takes; what stands within another does not count to that one."""

    def __init__(self, wait: Callable[[], None]):
        """`wait`: for the device to be done."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._wait, self._within, self._since = wait, [""], 0.0

    @contextlib.contextmanager
    def span(self, part: str) -> Iterator[None]:
        """A context for a part, as `distributed.measured` wants it."""
        self._turn()
        self._within.append(part)
        try:
            yield
        finally:
            self._turn()
            self._within.pop()

    def _turn(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._within[-1] in self.seconds:
            self.seconds[self._within[-1]] += now - self._since
        self._since = now


def describe(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    lines: list[str] = []
    for index, row in enumerate(rows):
        if index == 0 or row["topology"] != rows[index - 1]["topology"]:
            lines += [
                f"{row['topology']}, {row['parameters'] / 1e6:.1f} M parameters, {row['precision']}, global batch"
                f" {row['global_batch_size']}, micro batches of {row['micro_batch_size']}; medians of {row['steps']}"
                " steps",
                f"{'phase':12}{'px':>5}{'s a step':>10}{'forward':>10}{'backward':>10}{'optimizer':>10}"
                f"{'pictures/s':>12}{'peak GB':>9}{'GFLOPs a picture':>18}{'TFLOP/s':>9}{'MFU':>8}",
            ]
        parts = "".join(f"{row[f'{part}_s']:10.4f}" for part in PARTS)
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{row['phase']:12}{row['image_size']:5}{row['seconds']:10.4f}{parts}{row['images_per_s']:12.1f}"
            f"{row['peak_memory_gb']:9.2f}{row['flops_per_image'] / 1e9:18.3f}{row['tflops']:9.3f}{mfu:>8}"
        )
    return "\n".join(lines)


def main() -> int:
    """One rank of a measurement; started by `bench`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument("--phase")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    try:
        rows = _here(load_config(arguments.config, arguments.overrides), arguments.phase, arguments.steps)
    except UserError as error:
        print(f"hybrid-dist: {error}", file=sys.stderr)
        return 2
    if rows:
        arguments.out.write_text(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
