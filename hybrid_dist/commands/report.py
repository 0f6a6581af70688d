"""The page about a run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def report(arguments: argparse.Namespace) -> int:
    """Write RUN/report.html: how the run went, and what its newest best can and can't do. Training does so at its
    end."""
    from rich.console import Console

    from hybrid_dist.report.page import check_writable, write
    from hybrid_dist.report.run.close import NAME
    from hybrid_dist.report.run.page import report_page
    from hybrid_dist.report.run.report import make_report

    out = arguments.out or arguments.run_folder / NAME
    if arguments.out is not None:
        check_writable(out, "--out")
    with Console(stderr=True).status("") as status:
        found = make_report(arguments.run_folder, status.update)
        if not arguments.json or arguments.out is not None:
            status.update("looking where the branches looked")
            write(out, report_page(found))
    print(json.dumps(found.to_json(), indent=1) if arguments.json else out)
    return 0


def add(commands: Any) -> None:
    """The subcommand's command line."""
    command = commands.add_parser("report", help="a page about a run", description=report.__doc__)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    command.add_argument("--out", type=Path, metavar="FILE", help="the page; RUN/report.html")
    command.add_argument("--json", action="store_true", help="instead: plain values on standard output")
    command.set_defaults(run=report)
