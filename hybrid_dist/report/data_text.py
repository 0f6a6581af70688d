"""A checked data set on the terminal, or in a pipe: figures, then a line for each thing that is wrong."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hybrid_dist.data.check.findings import SEVERITIES, Finding, plural
from hybrid_dist.data.check.run import DataCheck
from hybrid_dist.errors import spelt_out

SHOWN = 3
"""Examples of a finding that the terminal shows; `--json` has more."""

PICTURES = 3
"""Copies of one picture that a line names."""

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def print_check(check: DataCheck, console: Console | None = None) -> None:
    """Print the whole check to standard output. In a pipe nothing is wrapped: one thing is one line."""
    # A pipe or a log has no width to fit.
    console = console or Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    figures = {split.name: check.figures(number) for number, split in enumerate(check.splits)}
    for name, values in figures.items():
        _line(console, "", f"{name:6}", _pictures(values))
    console.print()
    console.print(_tasks(figures))
    for finding in check.findings:
        _print_finding(console, finding)
    console.print()
    counts = ", ".join(plural(check.count(severity), severity) for severity in SEVERITIES if check.count(severity))
    _line(console, "" if check.failed else "green", "", counts or "nothing wrong was found")


def printable(text: str) -> str:
    """Text on one line, as `spelt_out`."""
    return spelt_out(" ".join(text.split()))


def _print_finding(console: Console, finding: Finding) -> None:
    console.print()
    _line(console, _STYLES[finding.severity], f"{finding.severity:9}", f"{finding.what}; {finding.remedy}")
    for example in finding.examples[:SHOWN]:
        _line(console, "", " " * 9, example.text(PICTURES))
    if len(finding.examples) > SHOWN:
        _line(console, "dim", " " * 9, f"and {finding.count - SHOWN:,} more")


def _line(console: Console, style: str, lead: str, text: str) -> None:
    """One line, wrapped under itself on a terminal, not at all elsewhere."""
    if not console.is_terminal:
        console.print(Text(lead + printable(text)), soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(lead, style), Text(printable(text), style if not lead.strip() else ""))
    console.print(grid)


def _pictures(values: dict[str, Any]) -> str:
    counts = f"{plural(values['rows'], 'row')}, {plural(values['pictures'], 'picture')}"
    if not values["usable"]:
        return f"{counts}, none usable ({values['csv']})"
    width, height, aspect = values["width"], values["height"], values["aspect"]
    formats = ", ".join(f"{count:,} {name}" for name, count in values["formats"].items())
    return (
        f"{counts}: {formats}; {_range(width)} pixels wide, {_range(height)} high, "
        f"medians {width['median']:g} × {height['median']:g}; up to {aspect['max']:.1f}:1"
    )


def _range(values: dict[str, float]) -> str:
    low, high = f"{values['min']:g}", f"{values['max']:g}"
    return low if low == high else f"{low} to {high}"


def _tasks(figures: dict[str, dict[str, Any]]) -> Table:
    """Per task: its labels in training, and how many each split has."""
    table = Table("task", "labels in train", box=None, pad_edge=False)
    for name in figures:
        table.add_column(name, justify="right")
        table.add_column("blank", justify="right")
    for task in next(iter(figures.values()))["tasks"]:
        cells = [task, _labels(next(iter(figures.values()))["tasks"][task])]
        for values in figures.values():
            labels = values["tasks"][task]
            cells += ["–", "–"] if labels is None else [f"{labels['labelled']:,}", f"{labels['blank_rate']:.1%}"]
        table.add_row(*cells)
    return table


def _labels(values: dict[str, Any] | None) -> str:
    if values is None or not values["labelled"]:
        return "none"
    if values["kind"] == "regression":
        return f"{_range(values['scores'])}, median {values['scores']['median']:g}"
    counts = values["classes"].values()
    return f"{plural(len(counts), 'class')} of {_range({'min': min(counts), 'max': max(counts)})}"
