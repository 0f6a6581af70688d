"""Runs beside each other, and gates that a run has to hold."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

GATE = (
    "exit with 3 where a run after the first does not hold it. METRIC:+0.01 (at least so much more than the first run)"
    " and METRIC:-0.01 (so much less), such as type_acc1:+0.01 or clarity_mae:-0.01: the measured gain is at least that"
    " and its 95 %% interval leaves out that there is none; for an accuracy, McNemar's test must leave it out too. That"
    " the true gain is as large it does not show. In a metric's worse direction it is the loss that is allowed, and the"
    " interval leaves out a larger one. METRIC:<100 and METRIC:>0.9, in quotes, such as 'latency_ms:<100', bound"
    " the value itself"
)


def compare(arguments: argparse.Namespace) -> int:
    """Compare runs with the first of them, on the pictures that they share: each run's best of its last finished phase,
    by its predictions_val.csv. Exits with 3 where a gate does not hold."""
    from rich.console import Console

    from hybrid_dist.report.compare.comparison import compare as run
    from hybrid_dist.report.compare.gates import check_gates, judge, parse_gate
    from hybrid_dist.report.compare.text import print_comparison
    from hybrid_dist.report.page import check_writable, write

    gates = [parse_gate(text) for text in arguments.gate]
    if arguments.html:
        check_writable(arguments.html, "--html")
    with Console(stderr=True).status("") as status:
        comparison = run(arguments.runs, status.update)
    check_gates(gates, comparison, arguments.point)
    verdicts = judge(gates, comparison, arguments.point)
    if arguments.html:
        from hybrid_dist.report.compare.page import comparison_page

        write(arguments.html, comparison_page(comparison, verdicts))
    if arguments.json:
        print(json.dumps({**comparison.to_json(), "gates": [verdict.to_json() for verdict in verdicts]}, indent=1))
    else:
        print_comparison(comparison, verdicts)
    sys.stdout.flush()
    return 0 if all(verdict.held for verdict in verdicts) else 3


def add(commands: Any) -> None:
    """The subcommand's command line."""
    command = commands.add_parser("compare", help="runs beside each other, and gates", description=compare.__doc__)
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders; the first is the baseline")
    command.add_argument("--gate", nargs="+", action="extend", default=[], metavar="METRIC:+DELTA", help=GATE)
    command.add_argument("--point", action="store_true", help="gates look at the measured values alone")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures in question, too")
    command.set_defaults(run=compare)
