"""A plan for people: a table, and the command to type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich.table import Table

from hybrid_dist.plan.choose import Choice, Plan, Row

GB = 1e9
COLUMNS = ("weights", "gradients", "optimizer", "activations", "buckets", "workspace", "peak", "host")


def table(plan: Plan) -> Table:
    """For each phase and launch file its largest micro batch that fits, or the smallest there is. In GB a process."""
    found = Table(box=None, pad_edge=False)
    for column in ("phase", "launch file", "micro batch", *COLUMNS, "fullest in", ""):
        found.add_column(column, justify="right" if column in ("micro batch", *COLUMNS) else "left", no_wrap=True)
    before = None
    for row in _shown(plan.rows):
        if before not in (None, row.phase):
            found.add_section()
        figures = (
            row.parameters, row.gradients, row.optimizer, row.activations, row.buckets, row.workspace, row.peak,
            row.host,
        )  # fmt: skip
        found.add_row(
            row.phase if row.phase != before else "", row.launch, str(row.micro_batch),
            *(f"{figure / GB:.2f}" for figure in figures), row.fullest, "fits" if row.fits else "too large",
            style=None if row.fits else "red",
        )  # fmt: skip
        before = row.phase
    return found


def advice(plan: Plan, config: str, overrides: Sequence[str], several: bool) -> list[str]:
    """What to type: for all phases in one job, and for each where that is something else.

    Args:
        config: The config's file.
        overrides: The user's own `key.path=value`.
        several: Name the number of processes, which the launch file would not start by itself.
    """
    processes = plan.processes if several else None
    lines = []
    if plan.run is None:
        lines.append(f"nothing fits all phases in {plan.memory / GB:.1f} GB on {_gpus(plan.processes)}")
    else:
        lines.append(f"all phases: {plan.run.launch}, micro batch {plan.run.micro_batch}")
        lines.append(f"  {command(plan.run, config, overrides, processes, None)}")
    for phase, choice in plan.phases.items():
        if choice is None:
            lines.append(f"phase {phase}: does not fit; more GPUs, or more memory on each, would do")
        elif plan.run is None or (choice.launch, choice.micro_batch) != (plan.run.launch, plan.run.micro_batch):
            lines.append(f"phase {phase} alone: {choice.launch}, micro batch {choice.micro_batch}")
            lines.append(f"  {command(choice, config, overrides, processes, phase)}")
    return lines


def command(
    choice: Choice, config: str, overrides: Sequence[str], processes: int | None, phase: str | None
) -> str:
    """The line that starts the training so."""
    words = ["accelerate", "launch", "--config_file", f"launch/accelerate/{choice.launch}.yaml"]
    words += ["--num_processes", str(processes)] if processes is not None else []
    words += ["train.py", "--config", config, *(["--phase", phase] if phase is not None else [])]
    own = [override for override in overrides if not override.startswith("train.micro_batch_size=")]
    return shlex.join([*words, *own, f"train.micro_batch_size={choice.micro_batch}"])


def _shown(rows: Sequence[Row]) -> list[Row]:
    best: dict[tuple[str, str], Row] = {}
    for row in rows:  # the largest micro batch comes first
        key = row.phase, row.launch
        if key not in best or not best[key].fits:
            best[key] = row
    return list(best.values())


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"
