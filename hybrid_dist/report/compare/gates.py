"""What a run must hold against the first one, and whether it does."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_dist.errors import UserError
from hybrid_dist.report.compare.bootstrap import CONFIDENCE
from hybrid_dist.report.compare.comparison import Comparison
from hybrid_dist.report.compare.metrics import Figure, Metric

_FORM = re.compile(r"(?P<metric>[^:\s]+):(?P<sign>[-+<>])(?P<amount>\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)")
_SLACK = 1e-9
"""0.85 - 0.84 is a little less than 0.01 to a computer."""


@dataclass(frozen=True)
class Gate:
    """One claim: `METRIC:+0.01` and `METRIC:-0.01` of a difference, `METRIC:<100` and `METRIC:>0.9` of a value."""

    text: str
    metric: str
    sign: str
    amount: float
    """Never negative."""


@dataclass(frozen=True)
class Verdict:
    """Whether a run holds a gate."""

    gate: str
    run: str
    held: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return dict(vars(self))


def parse_gate(text: str) -> Gate:
    """Read one gate.

    Raises:
        UserError: it is none.
    """
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"--gate {text}: METRIC:+0.01 (at least so much more than the first run), METRIC:-0.01 (less),"
            " METRIC:<100 or METRIC:>0.9 (the value itself) would do"
        )
    return Gate(text.strip(), found["metric"].removeprefix("val/"), found["sign"], float(found["amount"]))


def check_gates(gates: Sequence[Gate], comparison: Comparison, point: bool) -> None:
    """See that each gate can be judged at all.

    Raises:
        UserError: no run has its metric, or it needs an interval that the metric can't have.
    """
    for gate in gates:
        metric = comparison.metrics.get(gate.metric)
        if metric is None:
            near = difflib.get_close_matches(gate.metric, comparison.metrics, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(comparison.metrics)}"
            raise UserError(f"--gate {gate.text}: no run has a metric {gate.metric}; {hint}")
        if metric.source == "best" and not point:
            raise UserError(
                f"--gate {gate.text}: {gate.metric} has no interval, for predictions_val.csv lacks what it takes;"
                " --point would judge it without one"
            )


def judge(gates: Sequence[Gate], comparison: Comparison, point: bool = False) -> list[Verdict]:
    """Each gate for each run after the first.

    With an interval, a difference counts if the run's gain is at least the gate's amount and the interval leaves out
    that there is none; an accuracy's must pass McNemar's test too, which stays exact where few pictures decide. Where
    the gate allows a loss, the interval must leave out a larger one. A bound on the value must hold for the whole
    interval. What has no interval because it is no mean over pictures (parameters, latency, memory) is judged as it is.

    Args:
        point: Look at the values alone.
    """
    return [
        _judge(gate, comparison.metrics[gate.metric], run.label, comparison.metrics[gate.metric].figures[place], point)
        for gate in gates
        for place, run in enumerate(comparison.runs)
        if place
    ]


def _judge(gate: Gate, metric: Metric, run: str, figure: Figure, point: bool) -> Verdict:
    by_value = point or metric.source == "measured"
    if gate.sign in "<>":
        held, reason = _bound(gate, figure, by_value)
    else:
        held, reason = _difference(gate, metric.better, figure, by_value)
    return Verdict(gate.text, run, held, reason)


def _bound(gate: Gate, figure: Figure, by_value: bool) -> tuple[bool, str]:
    if figure.value is None:
        return False, "it has no such value"
    if by_value:
        edge: float | None = figure.value
    else:
        edge = figure.high if gate.sign == "<" else figure.low
    if edge is None:
        return False, f"{figure.value:.4g}, without an interval for want of labels"
    shown = f"{figure.value:.4g}" if by_value else f"{figure.value:.4g} [{figure.low:.4g}, {figure.high:.4g}]"
    return (edge < gate.amount if gate.sign == "<" else edge > gate.amount), shown


def _difference(gate: Gate, better: int, figure: Figure, by_value: bool) -> tuple[bool, str]:
    if figure.difference is None:
        return False, "there is no difference to tell: one of both lacks it, or it is made of other tasks"
    wanted = better * (gate.amount if gate.sign == "+" else -gate.amount)  # as a gain; below 0: a loss allowed
    enough = better * figure.difference >= wanted - _SLACK
    if by_value:
        return enough, f"{figure.difference:+.4g}" + ("" if enough else ", which is not enough")
    if figure.difference_low is None or figure.difference_high is None:
        return False, f"{figure.difference:+.4f}, without an interval for want of labels"
    shown = f"{figure.difference:+.4f} [{figure.difference_low:+.4f}, {figure.difference_high:+.4f}]"
    worst = figure.difference_low if better > 0 else -figure.difference_high
    if not enough:
        return False, f"{shown}, which is not enough"
    if worst <= min(wanted, 0):
        what = "no gain at all" if wanted >= 0 else "a larger loss"
        return False, f"{shown}: the interval does not leave out {what}"
    if wanted >= 0 and figure.p is not None and figure.p > 1 - CONFIDENCE:
        return False, f"{shown}: McNemar's test does not leave out chance (p = {figure.p:.3f})"
    return True, shown
