"""A plan for people: a table, and the command to type."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from hybrid_dist.plan.choose import Choice, Plan, Row

GB = 1e9
WIDTH = 140
"""Characters that the table needs, whatever there is."""
# What `accelerate launch` starts by itself.
USUAL_PROCESSES = {"single_gpu": 1, "cpu": 1}
COLUMNS = ("weights", "gradients", "optimizer", "activations", "buckets", "workspace", "peak", "host")


def print_plan(plan: Plan, config: str, overrides: Sequence[str], assumed: Mapping[str, int] | None) -> None:
    """Print all of it.

    Args:
        config: The config's file.
        overrides: The user's own `key.path=value`.
        assumed: Labels of each classification task, where they aren't the data's own.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.width = max(console.width, WIDTH)
    console.print(
        f"{_gpus(plan.processes)} of {plan.memory / GB:g} GB, {plan.precision}, global batch {plan.global_batch}; "
        "GB on each GPU, with the largest micro batch that fits; host: in the machine's memory, for each GPU"
    )
    console.print(table(plan))
    if assumed:
        counts = ", ".join(f"{count} for {task}" for task, count in assumed.items())
        console.print(f"the training split can't be read here: labels are taken to be {counts}")
    for line in advice(plan, config, overrides):
        console.print(line)


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


def advice(plan: Plan, config: str, overrides: Sequence[str]) -> list[str]:
    """What to type: for all phases in one job, and for each where that is something else; arguments as `print_plan`."""
    lines = []
    if plan.run is None:
        lines.append(f"no launch file and micro batch fits all phases into {plan.memory / GB:g} GB a GPU")
    else:
        lines.append(f"all phases: {plan.run.launch}, micro batch {plan.run.micro_batch}")
        lines.append(f"  {command(plan.run, plan.processes, config, overrides, None)}")
    for phase, choice in plan.phases.items():
        if choice is None:
            lines.append(f"phase {phase} does not fit; more GPUs, or more memory on each, would do")
        elif plan.run is None or (choice.launch, choice.micro_batch) != (plan.run.launch, plan.run.micro_batch):
            lines.append(f"phase {phase} as a job of its own: {choice.launch}, micro batch {choice.micro_batch}")
            lines.append(f"  {command(choice, plan.processes, config, overrides, phase)}")
    return lines


def command(choice: Choice, processes: int, config: str, overrides: Sequence[str], phase: str | None) -> str:
    """The line that starts the training so."""
    words = ["accelerate", "launch", "--config_file", f"launch/accelerate/{choice.launch}.yaml"]
    words += ["--num_processes", str(processes)] if processes != USUAL_PROCESSES.get(choice.launch, 2) else []
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
