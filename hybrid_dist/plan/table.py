"""A plan for people: a table, and the command to type."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_dist.plan.answer import Choice, Plan, Row, Scale
from hybrid_dist.plan.seconds import Machine

GB = 1e9
WIDTH = 180
"""Characters that the table needs, whatever there is."""
# What `accelerate launch` starts by itself.
USUAL_PROCESSES = {"single_gpu": 1, "cpu": 1}
COLUMNS = {
    "weights": "parameters", "gradients": "gradients", "optimizer": "optimizer", "ema": "ema",
    "activations": "activations", "buckets": "buckets", "workspace": "workspace", "peak": "peak", "host": "host",
}  # fmt: skip
"""Of a `Row`, by what they are called; in GB."""
PACE = ("sent", "pictures/s")


def print_plan(plan: Plan, machine: Machine, config: str, overrides: Sequence[str], notes: Sequence[str]) -> None:
    """Print all of it.

    Args:
        config: The config's file.
        overrides: The user's own `key.path=value`.
        notes: What is taken for granted, a line each.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.width = max(console.width, WIDTH)
    console.print(
        f"{_gpus(plan.processes)} of {plan.memory / GB:g} GB, {plan.precision}, global batch {plan.global_batch}; "
        "GB on each GPU, with the largest micro batch that fits; host: in the machine's memory, for each GPU"
    )
    console.print(table(plan))
    console.print(
        f"\nfrom 1 to {plan.scaling[-1].processes} of {machine.device.title}; best for all phases; pictures/s"
    )
    console.print(scaling_table(plan))
    for note in (*notes, *_kept(plan)):
        console.print(f"· {note}")
    console.print()
    for line in advice(plan, config, overrides, machine.gpus_per_node):
        console.print(line)


def _kept(plan: Plan) -> Iterator[str]:
    """What the pictures/s of a phase do not tell."""
    for phase, kept in plan.kept.items():
        if kept is not None:
            yield (
                f"phase {phase} keeps what {' and '.join(kept.branches)} gave: its pictures/s are those of the first"
                f" {_epochs(kept.views)}; in the {kept.steps} steps after that it is read, and the time says so"
            )


def _epochs(count: int) -> str:
    return "epoch" if count == 1 else f"{count} epochs"


def table(plan: Plan) -> Table:
    """For each phase and launch file its largest micro batch that fits, or the smallest there is. In GB a process."""
    found = Table(box=None, pad_edge=False)
    columns = {name: key for name, key in COLUMNS.items() if key != "ema" or any(row.ema for row in plan.rows)}
    recomputes = any(row.recompute for row in shown(plan.rows))
    again = ("recomputes",) if recomputes else ()
    for column in ("phase", "launch file", *again, "micro batch", *columns, "fullest in", *PACE, "held up by", ""):
        right = column in ("micro batch", *columns, *PACE)
        found.add_column(column, justify="right" if right else "left", no_wrap=True)
    before = None
    for row in shown(plan.rows):
        if before not in (None, row.phase):
            found.add_section()
        pace = row.pace
        found.add_row(
            row.phase if row.phase != before else "", row.launch,
            *(("yes" if row.recompute else "",) if recomputes else ()), str(row.micro_batch),
            *(f"{getattr(row, key) / GB:.2f}" for key in columns.values()), row.fullest,
            *((f"{row.sent / GB:.2f}", _digits(pace.images_per_s), pace.bottleneck) if pace else ("", "", "")),
            "fits" if row.fits else "too large", style=None if row.fits else "red",
        )  # fmt: skip
        before = row.phase
    return found


def scaling_table(plan: Plan) -> Table:
    """The best launch file for all phases on more and more GPUs, and what it gives."""
    found = Table(box=None, pad_edge=False)
    found.add_column("GPUs", justify="right")
    for column in ("launch file", "micro batch"):
        found.add_column(column, justify="left" if column == "launch file" else "right")
    for phase in plan.phases:
        found.add_column(phase, justify="right")
        found.add_column("held up by")
    for column in ("time", "GPU-hours", "of linear"):
        found.add_column(column, justify="right")
    first = next((scale for scale in plan.scaling if scale.choice is not None), None)
    for scale in plan.scaling:
        if scale.choice is None or first is None:
            found.add_row(str(scale.processes), "nothing fits")
            continue
        each = [(_digits(scale.images_per_s[phase]), scale.bottleneck[phase]) for phase in plan.phases]
        found.add_row(
            str(scale.processes), _setting(scale.choice), str(scale.choice.micro_batch),
            *(cell for pair in each for cell in pair), _span(scale.choice.hours), _digits(scale.choice.gpu_hours),
            f"{efficiency(scale, first):.0%}",
        )  # fmt: skip
    return found


def efficiency(scale: Scale, first: Scale) -> float:
    """Its last phase's pictures/s by the fewest GPUs', both for each GPU."""
    rates = [list(one.images_per_s.values())[-1] / one.processes for one in (scale, first)]
    return rates[0] / rates[1]


def advice(plan: Plan, config: str, overrides: Sequence[str], gpus_per_node: int) -> list[str]:
    """What to type: for all phases in one job, and for each where that is something else; arguments as `print_plan`."""
    lines = []
    if plan.run is None:
        lines.append(f"no launch file and micro batch fits all phases into {plan.memory / GB:g} GB a GPU")
        lines.append(f"  {_what_would_do(plan)}")
    else:
        lines.append(f"all phases: {_setting(plan.run)}, micro batch {plan.run.micro_batch}{_time(plan.run)}")
        lines += _typed(plan.run, plan, config, overrides, None, gpus_per_node)
    for phase, choice in plan.phases.items():
        if choice is None:
            lines.append(f"phase {phase} does not fit")
        elif plan.run is None or _set(choice) != _set(plan.run):
            said = f"{_setting(choice)}, micro batch {choice.micro_batch}{_time(choice)}"
            lines.append(f"phase {phase} as a job of its own: {said}")
            lines += _typed(choice, plan, config, overrides, phase, gpus_per_node)
    return lines


def _set(choice: Choice) -> tuple[str, bool, int]:
    return choice.launch, choice.recompute, choice.micro_batch


def _setting(choice: Choice) -> str:
    return f"{choice.launch}, recomputing" if choice.recompute else choice.launch


def _what_would_do(plan: Plan) -> str:
    more = next((s.processes for s in plan.scaling if s.choice is not None and s.processes > plan.processes), None)
    least = min(max(row.peak for row in rows) for rows in _by_setting(plan.rows).values())
    words = [f"{more} of them would do"] if more is not None else []
    words.append(f"GPUs of {math.ceil(least / GB)} GB would do")
    return "; ".join([*words, "smaller pictures (data.image_size) or a smaller pair of backbones take less"])


def _by_setting(rows: Sequence[Row]) -> dict[tuple[str, bool, int], list[Row]]:
    found: dict[tuple[str, bool, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.launch, row.recompute, row.micro_batch), []).append(row)
    return found


def _time(choice: Choice) -> str:
    return "" if choice.hours is None else f"; about {_span(choice.hours)}, {_digits(choice.gpu_hours)} GPU-hours"


def _span(hours: float | None) -> str:
    if hours is None:
        return ""
    return f"{_digits(hours)} h" if hours >= 1 else f"{max(round(60 * hours), 1)} min"


def _digits(value: float | None) -> str:
    """Two: no more are known."""
    return "" if value is None else f"{value:.2g}" if value < 10 else f"{float(f'{value:.2g}'):,.0f}"


def _typed(
    choice: Choice, plan: Plan, config: str, overrides: Sequence[str], phase: str | None, gpus_per_node: int
) -> list[str]:
    """What to type on one node or under SLURM on several."""
    if plan.processes <= gpus_per_node or plan.processes % gpus_per_node:
        return [f"  {command(choice, plan.processes, config, overrides, phase)}"]
    words = ["sbatch", f"--nodes={plan.processes // gpus_per_node}", f"--gpus-per-node={gpus_per_node}"]
    words += ["launch/slurm.sh", *_training(choice, config, overrides, phase)]
    return [f"  LAUNCH={choice.launch} {shlex.join(words)}"]


def command(choice: Choice, processes: int, config: str, overrides: Sequence[str], phase: str | None) -> str:
    """The line that starts the training so."""
    words = ["accelerate", "launch", "--config_file", f"launch/accelerate/{choice.launch}.yaml"]
    words += ["--num_processes", str(processes)] if processes != USUAL_PROCESSES.get(choice.launch, 2) else []
    return shlex.join([*words, "train.py", *_training(choice, config, overrides, phase)])


def _training(choice: Choice, config: str, overrides: Sequence[str], phase: str | None) -> list[str]:
    told = {override.partition("=")[0] for override in choice.overrides}
    own = [override for override in overrides if override.partition("=")[0] not in told]
    only = ["--phase", phase] if phase is not None else []
    return ["--config", config, *only, *own, *choice.overrides]


def to_json(plan: Plan, machine: Machine, classes: Mapping[str, int], notes: Sequence[str]) -> dict[str, Any]:
    """All of it in plain values: bytes, seconds, hours, pictures and FLOPs a second."""
    return {**asdict(plan), "machine": asdict(machine), "classes": dict(classes), "notes": list(notes)}


def shown(rows: Sequence[Row]) -> list[Row]:
    """Of each phase and launch file the largest micro batch that fits, or the smallest there is.

    With recomputing only where that lets more fit.
    """
    best: dict[tuple[str, str, bool], Row] = {}
    for row in rows:  # the largest micro batch comes first
        key = row.phase, row.launch, row.recompute
        if key not in best or not best[key].fits:
            best[key] = row

    def helps(row: Row) -> bool:
        plain = best[row.phase, row.launch, False]
        return (row.fits, row.fits * row.micro_batch) > (plain.fits, plain.fits * plain.micro_batch)

    return [row for row in best.values() if not row.recompute or helps(row)]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
