"""The `hybrid-dist` command: thin, one function a subcommand. What a subcommand needs is imported when it runs."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_dist import __version__
from hybrid_dist.commands import compare, model, plan, report
from hybrid_dist.commands.bar import bar
from hybrid_dist.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from hybrid_dist.data.output import Imported
    from hybrid_dist.doctor import Line


def synth(arguments: argparse.Namespace) -> int:
    """Render a data set."""
    from hybrid_dist.data.synth import is_rendered, render_dataset

    total = arguments.train + arguments.val
    if is_rendered(arguments.out, arguments.train, arguments.val, arguments.seed):
        print(f"{arguments.out}: its {total} pictures are there already")
        return 0
    with bar("rendering") as tell:
        render_dataset(
            arguments.out, arguments.train, arguments.val, arguments.seed,
            workers=arguments.workers, progress=lambda done: tell(done, total),
        )  # fmt: skip
    print(f"{arguments.out}: {total} pictures")
    return 0


def import_fgvc(arguments: argparse.Namespace) -> int:
    """Bring FGVC-Aircraft into the project's format: crops by box, without the banner."""
    from hybrid_dist.data import fgvc

    with bar("cropping") as tell:
        imported = fgvc.import_fgvc(
            arguments.root, arguments.out, arguments.level, arguments.margin, arguments.train, arguments.val,
            workers=arguments.workers, progress=tell,
        )  # fmt: skip
    _describe_import(arguments.out, imported)
    return 0


def import_folder(arguments: argparse.Namespace) -> int:
    """Bring a folder of class folders into the project's format: pictures stay as they are, by hard link or copy."""
    from hybrid_dist.data import folder

    with bar("linking") as tell:
        imported = folder.import_folder(arguments.root, arguments.out, arguments.val, arguments.seed, progress=tell)
    _describe_import(arguments.out, imported)
    return 0


def _describe_import(out: Path, imported: Imported) -> None:
    """What was written, and what to type next."""
    for note in imported.notes:
        print(note)
    counts = ", ".join(f"{split} {count}" for split, count in imported.counts.items())
    print(f"{out}: {counts} pictures; {len(imported.classes)} classes")
    print("The labels are types alone. Next, with this config or one of your own:")
    keys = [
        shlex.quote(f"data.{split}_{kind}={out / split}{suffix}")
        for split in ("train", "val")
        for kind, suffix in (("csv", ".csv"), ("images", ""))
    ]
    first, second = " ".join(keys[:2]), " ".join(keys[2:])
    print(f"  hybrid-dist check-data --config configs/stage2_convnext.yaml \\\n    {first} \\\n    {second}")


def pack(arguments: argparse.Namespace) -> int:
    """Decode the pictures once, for a loader that is several times faster. Again, it makes only what has changed.

    Exits with 3 where more pictures than data.max_bad can't be used.
    """
    from hybrid_dist.config import load_config
    from hybrid_dist.data.pack import pack_splits

    config = load_config(arguments.config, arguments.overrides)
    warn = functools.partial(print, file=sys.stderr)
    with bar("packing") as tell:
        packed = pack_splits(config.data, config.tasks, config.sizes, warn, tell)
    too_many = [split for split in packed if split.bad > config.data.max_bad * split.pictures]
    for split in packed:
        unusable = f", {split.bad} of them can't be used" if split.bad else ""
        more = f": more than data.max_bad: {config.data.max_bad:g} allows" if split in too_many else ""
        print(f"{split.folder}: {split.pictures} pictures{unusable}{more}, {split.bytes / 1e9:.2f} GB")
    return 3 if too_many else 0


def checkpoints(arguments: argparse.Namespace) -> int:
    """List a run's checkpoints, and check every byte of them."""
    from rich.console import Console

    from hybrid_dist.checkpoint import Store
    from hybrid_dist.config import load_config
    from hybrid_dist.training.state import check_own

    config_file = arguments.run_folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{arguments.run_folder} is not a run's folder (it has no config.yaml)")
    config = load_config(config_file)
    store = Store(arguments.run_folder / "checkpoints", config.checkpoint.keep, [phase.name for phase in config.phases])
    with Console(stderr=True).status("") as status:
        rows = store.survey(
            lambda found: check_own(config, found), lambda name: status.update(f"checking the sums of {name}")
        )
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"{arguments.run_folder} has no checkpoint yet")
    else:
        # A pipe or a log has no width to fit.
        Console(width=None if sys.stdout.isatty() else 160).print(_checkpoint_table(rows))
    return 3 if any(row["problem"] for row in rows) else 0


def dashboard(arguments: argparse.Namespace) -> int:
    """Save a wandb workspace with sections and panels for a run."""
    from hybrid_dist.config import load_config
    from hybrid_dist.tracking.workspace import save_workspace

    config_file = arguments.run_folder / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{arguments.run_folder} is not a run's folder (it has no config.yaml)")
    print(save_workspace(load_config(config_file)))
    return 0


def _checkpoint_table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("checkpoint", "size", "written", "by", "state", box=None)
    table.columns[1].justify, table.columns[4].overflow = "right", "fold"
    for row in rows:
        words = ["whole", *(["phase's end"] if row["finished"] else []), *(["best"] if row["best"] else [])]
        state = Text(f"damaged: {row['problem']}", style="red") if row["problem"] else Text(", ".join(words))
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["written"])) if row["written"] else ""
        table.add_row(Text(row["name"]), f"{row['bytes'] / 1e6:.1f} MB", written, row["topology"], state)
    return table


def check_data(arguments: argparse.Namespace) -> int:
    """Tell everything that is wrong with a data set. Exits with 3 where there is an error or a warning."""
    from hybrid_dist.config import load_config
    from hybrid_dist.data.check import check_data
    from hybrid_dist.report.data_text import print_check

    config = load_config(arguments.config, arguments.overrides)
    if arguments.workers is not None and arguments.workers < 0:
        raise UserError(f"--workers {arguments.workers}: 0 or more would do")
    if arguments.html:
        from hybrid_dist.report.page import check_writable

        check_writable(arguments.html, "--html")
    with bar("decoding pictures") as tell:
        check = check_data(config, arguments.workers, tell)
    if arguments.html:
        from hybrid_dist.report.data_page import write_page

        write_page(check, arguments.html)
    if arguments.json:
        print(json.dumps(check.to_json(), indent=1))
    else:
        print_check(check)
    return 3 if check.failed else 0


def doctor(arguments: argparse.Namespace) -> int:
    """Tell what would fail in the queue. Under srun every node is looked at. Exits with 3 where something would."""
    from rich.console import Console

    from hybrid_dist.config import load_config
    from hybrid_dist.doctor import examine, failed

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if arguments.overrides and config is None:
        raise UserError(f"{arguments.overrides[0]}: changes a key of a config; --config FILE would name it")
    with Console(stderr=True).status("") as status:
        lines = examine(config, lambda what: status.update(f"looking at {what}"))
    if lines is None:  # another task of the same step says it all
        return 0
    if arguments.json:
        print(json.dumps([vars(line) for line in lines], indent=1))
    else:
        _print_lines(lines)
    return 3 if failed(lines) else 0


def _print_lines(lines: Sequence[Line]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for line in lines:
        where = f"{line.host}: " if line.host else ""
        console.print(Text.assemble((f"{line.state:5}", colours[line.state]), f"{where}{line.check}: {line.text}"))
        if line.remedy:
            console.print(Text(f"     → {line.remedy}"))


def bench_checkpoint(arguments: argparse.Namespace) -> int:
    """How long a checkpoint holds training up, beside accelerator.save_state."""
    from hybrid_dist.bench.checkpoint import bench, describe

    rows = bench(arguments.config, arguments.overrides, arguments.launch, arguments.repeats)
    print(json.dumps(rows, indent=1) if arguments.json else describe(rows))
    return 0


def bench_data(arguments: argparse.Namespace) -> int:
    """How many pictures a loader process gives in a second, from the files and from a packed copy."""
    from hybrid_dist.bench.data import bench, describe

    rows = bench(arguments.config, arguments.overrides, arguments.pictures, arguments.repeats)
    print(json.dumps(rows, indent=1) if arguments.json else describe(rows))
    return 0


def bench_step(arguments: argparse.Namespace) -> int:
    """How long an optimizer step of each phase takes, and its parts, with pictures that are in memory already."""
    from hybrid_dist.bench.step import bench, describe

    rows = bench(arguments.config, arguments.overrides, arguments.launch, arguments.phase, arguments.steps)
    if rows:  # ranks but the first have none
        print(json.dumps(rows, indent=1) if arguments.json else describe(rows))
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

    _add_imports(commands)
    command = commands.add_parser("pack", help="decode the pictures once", description=pack.__doc__)
    command.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/base.yaml")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=pack)

    command = commands.add_parser("doctor", help="tell what would fail in the queue", description=doctor.__doc__)
    command.add_argument("--config", metavar="FILE", help="a YAML file, such as configs/base.yaml")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=doctor)

    command = commands.add_parser(
        "checkpoints", help="list a run's checkpoints and verify them", description=checkpoints.__doc__
    )
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.set_defaults(run=checkpoints)
    command = commands.add_parser("dashboard", help="save a wandb workspace", description=dashboard.__doc__)
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder, such as runs/quickstart")
    command.set_defaults(run=dashboard)
    plan.add(commands)
    _add_check_data(commands)
    model.add(commands)
    compare.add(commands)
    report.add(commands)
    _add_bench(commands)
    return parser


def _add_imports(commands: Any) -> None:
    command = commands.add_parser("import-fgvc", help="bring FGVC-Aircraft along", description=import_fgvc.__doc__)
    command.add_argument("root", type=Path, metavar="ROOT", help="fgvc-aircraft-2013b/data, or a folder that holds it")
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    levels, splits = ("variant", "family", "manufacturer"), ("train", "val", "trainval", "test")
    command.add_argument("--level", choices=levels, default="variant", help="what the classes are (variant)")
    command.add_argument(
        "--margin", type=float, default=0.1, metavar="FRACTION", help="of the box, added on each side (0.1)"
    )
    command.add_argument(
        "--train", choices=splits, default="train",
        help="the official split to train on (train); papers take --train trainval --val test",
    )  # fmt: skip
    command.add_argument(
        "--val", choices=splits, default="val", help="the one to judge on (val); if neither is test, it is added"
    )
    command.add_argument("--workers", type=int, default=1, metavar="N", help="processes; the pictures stay the same")
    command.set_defaults(run=import_fgvc)

    command = commands.add_parser(
        "import-folder", help="bring one folder a class along", description=import_folder.__doc__
    )
    command.add_argument(
        "root", type=Path, metavar="ROOT", help="has CLASS/…, or train/CLASS/… and val/CLASS/…, with pictures"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument(
        "--val", type=float, metavar="FRACTION", help="of each class, drawn for val (0.2); not with train/ and val/"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="another seed draws other pictures")
    command.set_defaults(run=import_folder)


def _add_check_data(commands: Any) -> None:
    command = commands.add_parser(
        "check-data", help="tell everything that is wrong with a data set", description=check_data.__doc__
    )
    command.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/base.yaml")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots and pictures, too")
    command.add_argument("--workers", type=int, metavar="N", help="processes that decode; as many as there are cores")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=check_data)


def _add_bench(commands: Any) -> None:
    benches = commands.add_parser("bench", help="measure, beside what people use now").add_subparsers(
        metavar="WHAT", required=True
    )
    command = benches.add_parser("data", help="how fast the pictures come", description=bench_data.__doc__)
    command.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/base.yaml")
    command.add_argument("--pictures", type=int, default=2000, metavar="N", help="in each turn")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=bench_data)

    command = benches.add_parser(
        "checkpoint", help="how long a checkpoint holds training up", description=bench_checkpoint.__doc__
    )
    command.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/small.yaml")
    command.add_argument(
        "--launch", nargs="+", default=[], metavar="FILE", help="accelerate's launch files to measure under"
    )
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="saves of each kind")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=bench_checkpoint)

    command = benches.add_parser("step", help="how long an optimizer step takes", description=bench_step.__doc__)
    command.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/small.yaml")
    command.add_argument("--phase", metavar="NAME", help="only this phase")
    command.add_argument("--steps", type=int, default=10, metavar="N", help="steps that are measured (10)")
    command.add_argument(
        "--launch", nargs="+", default=[], metavar="FILE", help="accelerate's launch files to measure under"
    )
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=bench_step)
    model.add_bench(benches)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """As argparse does, but `key=value` may stand behind an option, too."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    strange = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(arguments, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    # A list of launch files takes what stands behind it, too.
    files = getattr(arguments, "launch", [])
    keys = [text for text in files if "=" in text and not Path(text).exists()]
    if keys:
        arguments.launch = [text for text in files if text not in keys]
        rest = [*rest, *keys]
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 2 the user's to fix, 3 a check did not hold, 130 by Ctrl-C."""
    arguments = _parse(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try again at its end
        return 141  # as a program that SIGPIPE ends: a gate that nobody read has not held
    except UserError as error:
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"hybrid-dist: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
