"""What is done with a trained model: predict, evaluate, export, bench latency."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hybrid_dist.commands.bar import bar
from hybrid_dist.errors import UserError

if TYPE_CHECKING:
    from hybrid_dist.inference.evaluate import Evaluation

MODEL = "a run's folder, or one that hybrid-dist export made"
FORMATS = ("safetensors", "onnx", "torch")


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr)


def predict(arguments: argparse.Namespace) -> int:
    """Tell what a model sees in pictures. A picture that can't be used has its row, with the reason in `error`."""
    from hybrid_dist.inference.found import find_model
    from hybrid_dist.inference.inputs import collect
    from hybrid_dist.inference.opened import open_model
    from hybrid_dist.inference.outputs import check_out
    from hybrid_dist.inference.predict import answers, check_numbers, predict_to

    check_numbers(arguments.top, arguments.batch_size)
    check_out(arguments.out, arguments.model, arguments.paths)
    inputs = collect(arguments.paths, arguments.images)
    found = find_model(arguments.model)
    _say(found.note)
    opened = open_model(found, arguments.device)
    rows = answers(opened, inputs, arguments.top, arguments.batch_size, arguments.workers)
    with bar("predicting") as tell:
        done, bad = predict_to(arguments.out, rows, len(inputs), tell)
    unusable = f", {bad} of them can't be used: see their error" if bad else ""
    _say(f"{arguments.out or 'standard output'}: {done} pictures{unusable}")
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """Judge a model by a labelled CSV, with validation's metrics. Under accelerate launch or torchrun each process
    takes its share: -m hybrid_dist.cli evaluate …"""
    from hybrid_dist.distributed import join, leave
    from hybrid_dist.inference.evaluate import Wish
    from hybrid_dist.inference.evaluate import evaluate as run

    overrides = tuple(arguments.overrides)
    wish = Wish(arguments.model, arguments.csv, arguments.images, arguments.flip, overrides, arguments.out)
    place = join()
    try:
        with bar("evaluating", quiet=not place.is_main) as tell:
            found = run(wish, place, _say if place.is_main else lambda text: None, tell)
    finally:
        leave()
    if place.is_main and arguments.json:
        print(json.dumps(found.to_json(), indent=1))
    elif place.is_main:
        _print_evaluation(found)
    return 0


def _print_evaluation(found: Evaluation) -> None:
    how = f"{found.precision}{', with mirror images' if found.flip else ''}, {found.processes} process"
    print(f"{found.csv}: {found.pictures} pictures ({how}{'es' if found.processes > 1 else ''})")
    width = max(map(len, found.metrics))
    for name, value in found.metrics.items():
        print(f"  {name:{width}}  {'–' if value is None else f'{value:.6f}'}")


def export(arguments: argparse.Namespace) -> int:
    """Write a model for others, with a card: OUT is a new folder, whole or not there."""
    from hybrid_dist.inference.export import export as run
    from hybrid_dist.inference.found import find_model

    found = find_model(arguments.model)
    _say(found.note)
    for file in run(found, arguments.out, arguments.format):
        print(f"{arguments.out / file.name}: {file.bytes / 1e6:.1f} MB")
    return 0


def bench_latency(arguments: argparse.Namespace) -> int:
    """How long a picture takes: from its file's bytes, and in the model alone, beside its bare backbones."""
    from hybrid_dist.bench.latency import bench, describe, from_config, from_model

    named = [arguments.model] if arguments.model else []
    if arguments.config is not None:  # then what argparse takes for the model is a key=value
        measured = from_config(arguments.config, [*named, *arguments.overrides], arguments.device)
    elif named and not arguments.overrides:
        measured = from_model(Path(arguments.model), arguments.device)
    else:
        raise UserError("give a MODEL, or --config FILE for one with fresh weights, which takes as long")
    with bar("measuring") as tell:
        result = bench(measured, arguments.batch, arguments.repeats, arguments.seconds, tell)
    print(json.dumps(result, indent=1) if arguments.json else describe(result))
    return 0


def add(commands: Any) -> None:
    """The subcommands' command lines."""
    command = commands.add_parser("predict", help="tell what a model sees in pictures", description=predict.__doc__)
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    command.add_argument(
        "paths", nargs="+", metavar="PATH", help="pictures, folders with all below, patterns, or CSVs with a filename"
    )
    command.add_argument(
        "--out", type=Path, metavar="FILE", help=".csv, .jsonl or .parquet; without: JSON lines on standard output"
    )
    command.add_argument("--top", type=int, default=1, metavar="N", help="classes named for each task (1)")
    command.add_argument("--images", type=Path, metavar="D", help="a CSV's pictures; else the folder of its name")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures at a time (32)")
    command.add_argument("--workers", type=_workers, default="auto", metavar="N", help="loader processes (auto)")
    command.add_argument("--device", metavar="D", help="cpu or cuda; the GPU if there is one")
    command.set_defaults(run=predict)

    command = commands.add_parser("evaluate", help="judge a model by a labelled CSV", description=evaluate.__doc__)
    command.add_argument("model", type=Path, metavar="MODEL", help=MODEL)
    command.add_argument("--csv", type=Path, metavar="C", help="the annotations; else the run's validation split")
    command.add_argument("--images", type=Path, metavar="D", help="their pictures; else the folder of the CSV's name")
    command.add_argument("--flip", action="store_true", help="mean over each picture and its mirror image")
    command.add_argument("--out", type=Path, metavar="FILE", help="write predictions as in predictions_val.csv")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as train.micro_batch_size=64")
    command.set_defaults(run=evaluate)

    command = commands.add_parser("export", help="write a model for others", description=export.__doc__)
    command.add_argument("model", type=Path, metavar="RUN", help=MODEL)
    command.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    command.add_argument("--format", choices=FORMATS, required=True, help="torch: a .pt2 of torch.export")
    command.set_defaults(run=export)


def add_bench(benches: Any) -> None:
    """The command line of `bench latency`."""
    command = benches.add_parser("latency", help="how long a picture takes", description=bench_latency.__doc__)
    command.add_argument("model", nargs="?", metavar="MODEL", help=MODEL)
    command.add_argument("--config", metavar="FILE", help="instead: a model of this config, with fresh weights")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="pictures (1 8 32)")
    command.add_argument("--repeats", type=int, default=100, metavar="N", help="turns of each, at most (100)")
    command.add_argument("--seconds", type=float, default=60, metavar="S", help="for each batch size, about (60)")
    command.add_argument("--device", metavar="D", help="cpu or cuda; the GPU if there is one")
    command.add_argument("--json", action="store_true", help="plain values on standard output")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    command.set_defaults(run=bench_latency)


def _workers(text: str) -> Literal["auto"] | int:
    if text == "auto":
        return "auto"
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text}: auto, 0 or more would do")
    return number
