"""A comparison on the terminal, or in a pipe: a table, the gates, and the first pictures on which the runs disagree."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hybrid_dist.report.compare.comparison import Comparison
from hybrid_dist.report.compare.disagreement import Disagreement, Example
from hybrid_dist.report.compare.gates import Verdict
from hybrid_dist.report.compare.metrics import Figure, Metric
from hybrid_dist.report.data_text import printable

SHOWN = 4
"""Pictures of a task that the terminal shows; `--html` and `--json` have more."""


def print_comparison(comparison: Comparison, verdicts: Sequence[Verdict], console: Console | None = None) -> None:
    """Print it all to standard output."""
    # A pipe or a log has no width to fit.
    console = console or Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for run in comparison.runs:
        step = "" if run.step is None else f", step {run.step}"
        console.print(Text(printable(f"{run.label}: best of phase {run.phase}{step} ({run.predictions})")))
    for warning in comparison.warnings:
        console.print(Text(printable(f"warning: {warning}"), "yellow"), soft_wrap=not console.is_terminal)
    console.print()
    for table in _tables(comparison, console):
        console.print(table)
    console.print(Text(printable(legend(comparison)), "dim"), soft_wrap=not console.is_terminal)
    for found in comparison.disagreements:
        _print_disagreement(console, comparison, found)
    if verdicts:
        console.print()
    for verdict in verdicts:
        word, style = ("held", "green") if verdict.held else ("NOT HELD", "bold red")
        line = Text.assemble((f"{word:8} ", style), printable(f"{verdict.gate} {verdict.run}: {verdict.reason}"))
        console.print(line, soft_wrap=not console.is_terminal)


def legend(comparison: Comparison) -> str:
    """What the table's figures are."""
    return (
        f"{comparison.pictures:,} pictures; differences to {comparison.runs[0].label} with 95 % intervals, p by"
        " McNemar's exact test; latency of one picture in the model, here; memory in training"
    )


def value_text(metric: Metric, value: float | None) -> str:
    """A value as a table shows it; blank where there is none."""
    if value is None:
        return ""
    if metric.name == "parameters":
        return f"{value / 1e6:.2f} M"
    return f"{value:.2f}" if metric.source == "measured" else f"{value:.4f}"


def difference_text(metric: Metric, figure: Figure) -> str:
    """A difference with its interval."""
    if figure.difference is None:
        return ""
    sign = "+" if figure.difference >= 0 else "-"
    shown = sign + value_text(metric, abs(figure.difference))
    if figure.difference_low is None or figure.difference_high is None:
        return shown
    return f"{shown} [{figure.difference_low:+.4f}, {figure.difference_high:+.4f}]"


def p_text(p: float | None) -> str:
    """McNemar's p."""
    if p is None:
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def verdict_of(metric: Metric, figure: Figure) -> str:
    """`better` or `worse` where the interval leaves out that there is no difference, else empty."""
    if figure.difference_low is None or figure.difference_high is None:
        return ""
    if figure.difference_low <= 0 <= figure.difference_high:
        return ""
    return "better" if (figure.difference_low > 0) == (metric.better > 0) else "worse"


def summaries(comparison: Comparison, found: Disagreement) -> list[str]:
    """Of a task of classes: how often the answers differ, and who alone is right."""
    if not found.counted:
        return [f"{found.task}: the answers that lie furthest apart"]
    first = comparison.runs[0].label
    lines = [f"{found.task}: {found.count:,} of {comparison.labelled[found.task]:,} pictures with unlike answers"]
    for run, test in zip(comparison.runs, comparison.tests[found.task], strict=True):
        if test is not None:
            lines.append(f"right in {run.label} alone {test.second:,}, in {first} alone {test.first:,}")
    return lines


def _tables(comparison: Comparison, console: Console) -> list[Table]:
    """All runs in one; where the terminal is too narrow, each beside the first alone."""
    places = range(len(comparison.runs))
    whole = _table(comparison, places)
    width = Measurement.get(console, console.options.update(width=10_000), whole).maximum
    return [whole] if width <= console.width else [_table(comparison, (0, place)) for place in places[1:]]


def _table(comparison: Comparison, places: Sequence[int]) -> Table:
    table = Table("", box=None, pad_edge=False)
    for place in places:
        table.add_column(Text(printable(comparison.runs[place].label)), justify="right", no_wrap=True)
        if place:
            table.add_column("difference", no_wrap=True)
            table.add_column("p", justify="right", no_wrap=True)
    styles = {"better": "green", "worse": "red", "": ""}
    for metric in comparison.metrics.values():
        cells = [Text(printable(metric.name))]
        for place in places:
            figure = metric.figures[place]
            cells.append(Text(value_text(metric, figure.value)))
            if place:
                cells.append(Text(difference_text(metric, figure), styles[verdict_of(metric, figure)]))
                cells.append(Text(p_text(figure.p)))
        table.add_row(*cells)
    return table


def _print_disagreement(console: Console, comparison: Comparison, found: Disagreement) -> None:
    if not found.examples:
        return
    console.print()
    console.print(Text(printable("; ".join(summaries(comparison, found)))), soft_wrap=not console.is_terminal)
    for example in found.examples[:SHOWN]:
        line = printable(f"{example.filename}: {example.label}; {_answers(comparison, example)}")
        console.print(Text(f"  {line}"), soft_wrap=not console.is_terminal)


def _answers(comparison: Comparison, example: Example) -> str:
    told = []
    for run, answer in zip(comparison.runs, example.answers, strict=True):
        if answer is not None:
            sure = "" if answer.probability is None else f" ({answer.probability:.2f})"
            told.append(f"{run.label} says {answer.text}{sure}")
    return ", ".join(told)
