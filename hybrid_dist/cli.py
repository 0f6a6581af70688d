"""The `hybrid-dist` command: thin, one function a subcommand. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid_dist import __version__
from hybrid_dist.errors import UserError


def synth(arguments: argparse.Namespace) -> int:
    """Render a data set."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from hybrid_dist.data.synth import is_rendered, render_dataset

    total = arguments.train + arguments.val
    if is_rendered(arguments.out, arguments.train, arguments.val, arguments.seed):
        print(f"{arguments.out}: its {total} pictures are there already")
        return 0
    columns = (TextColumn("rendering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        render_dataset(
            arguments.out, arguments.train, arguments.val, arguments.seed,
            workers=arguments.workers, progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    print(f"{arguments.out}: {total} pictures")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="hybrid-dist", description="Tools around train.py.")
    parser.add_argument("--version", action="version", version=f"hybrid-dist {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("synth", help="render a small aircraft data set", description=synth.__doc__)
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument("--train", type=int, required=True, metavar="N", help="training pictures")
    command.add_argument("--val", type=int, required=True, metavar="M", help="validation pictures")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="the same seed renders the same pictures")
    command.add_argument("--workers", type=int, default=1, metavar="N", help="processes; the pictures stay the same")
    command.set_defaults(run=synth)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 2 the user's to fix."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"hybrid-dist: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
