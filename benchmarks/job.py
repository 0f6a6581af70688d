"""The whole job beside the plain recipe, and an epoch beside what people use now: ratios of wall-clock time.

    python benchmarks/job.py [--config FILE] [--batch 32] [--epochs A B C] [--rates A B C] [--train 3000] [--val 400]
                             [--repeats 3] [--timm FILE] [--accelerate FILE] [--json FILE] [key=value …]

The three phases of a config's pair, from random weights, on the same rendered pictures, for the same epochs, as two
whole commands by turns, each turn with a seed of its own: `train.py`, and plain_recipe.py, which is what a script for
this would be. Then one task and one backbone: an epoch of `train.py`, of timm's train.py (`--timm`) and of Accelerate's
complete_cv_example.py (`--accelerate`). Those are the projects' own files, run as they are, but that the second has its
model, sizes and epochs in its code. An epoch is half of the difference between a run of three and one of one.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_dist.config import load_config
from hybrid_dist.files import read_object

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
EPOCHS = {"a": 2.0, "b": 2.0, "c": 4.0}
RATES = {"a": 2e-3, "b": 2e-3, "c": 4e-3}
BATCH, SIZE = 32, 96
"""Of the quickstart, and of the peers."""
LOW = 0.45
"""What the job may take of the plain recipe's time."""


def call(words: list[str], folder: Path, threads: int | None = None) -> float:
    """Run a command; the seconds that it takes."""
    changes = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | changes
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    began = time.monotonic()
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.monotonic() - began


def places(data: Path) -> list[str]:
    return [
        f"data.train_csv={data / 'train.csv'}", f"data.train_images={data / 'train'}",
        f"data.val_csv={data / 'val.csv'}", f"data.val_images={data / 'val'}",
    ]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """What is trained: a config's file, pictures a step, and by phase epochs and rates."""

    config: Path = CONFIG
    batch: int = BATCH
    epochs: Mapping[str, float] = field(default_factory=lambda: EPOCHS)
    rates: Mapping[str, float] = field(default_factory=lambda: RATES)
    changes: tuple[str, ...] = ()
    """Of the config."""


def pair_options(parser: argparse.ArgumentParser) -> None:
    """What `pair_of` reads."""
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--batch", type=int, default=BATCH)
    for name, values in {"epochs": EPOCHS, "rates": RATES}.items():
        three = list(values.values())
        parser.add_argument(f"--{name}", type=float, nargs=3, default=three, help="of the three phases, for both")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="of the config")


def pair_of(arguments: argparse.Namespace) -> Pair:
    """What `pair_options` has read."""
    epochs, rates = (dict(zip(RATES, values, strict=True)) for values in (arguments.epochs, arguments.rates))
    return Pair(arguments.config.resolve(), arguments.batch, epochs, rates, tuple(arguments.changes))


def ours(data: Path, work: Path, changes: list[str], phases: list[dict[str, Any]], pair: Pair) -> tuple[float, float]:
    """Seconds, and the last phase's best val/score."""
    shutil.rmtree(work / "runs", ignore_errors=True)
    keys = [
        *places(data),
        f"run.dir={work / 'runs'}",
        "run.name=job",
        "tracking.report=false",
        f"train.global_batch_size={pair.batch}",
        f"train.micro_batch_size={pair.batch}",
        "model.allow_scratch=true",
        "data.augment=false",
        *(f"model.{part}.weights=scratch" for part in ("cnn", "transformer") if f"model.{part}=null" not in changes),
        f"phases={json.dumps(phases)}",
        *pair.changes,
        *changes,
    ]
    taken = call([sys.executable, str(ROOT / "train.py"), "--config", str(pair.config), *keys], ROOT, os.cpu_count())
    best = read_object(work / "runs" / "job" / f"phase_{phases[-1]['name']}" / "best.json")
    return taken, float(best["metrics"]["val/score"])


def job_phases(pair: Pair) -> list[dict[str, Any]]:
    """Nothing is augmented, so a picture has one view, for which a frozen branch gives the same always."""
    parts = {"a": ["heads", "fusion"], "b": ["heads", "fusion", "transformer"], "c": ["all"]}
    phases: list[dict[str, Any]] = [
        {"name": name, "trainable": parts[name], "epochs": epochs, "lr": pair.rates[name]}
        for name, epochs in pair.epochs.items()
    ]
    return [phase | ({"cache_features": 1} if phase["name"] != "c" else {}) for phase in phases]


def plain(data: Path, work: Path, pair: Pair, *extra: str) -> tuple[float, float]:
    """The plain recipe in a process of its own; as `ours`."""
    out = work / "plain"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = [sys.executable, str(ROOT / "benchmarks" / "plain_recipe.py"), str(data), str(out)]
    words += ["--config", str(pair.config), "--batch", str(pair.batch)]
    words += ["--epochs", *(f"{name}={value}" for name, value in pair.epochs.items())]
    words += ["--rates", *(f"{name}={value}" for name, value in pair.rates.items())]
    taken = call([*words, *extra, "--changes", *pair.changes], ROOT)
    return taken, float(read_object(out / "score.json")["score"])


def folders_by_class(data: Path, out: Path) -> int:
    """The pictures with a type as both peers want them: split/TYPE/TYPE_N.jpg, and all/TYPE_N.jpg; how many types."""
    from PIL import Image

    types = set()
    for split in ("train", "val"):
        with (data / f"{split}.csv").open(encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file)):
                name = "".join(c if c.isalnum() else "-" for c in row["typename"])
                if not name:
                    continue
                types.add(name)
                place = out / split / name / f"{name}_{number:05d}.jpg"
                place.parent.mkdir(parents=True, exist_ok=True)
                source = data / split / row["filename"]
                if source.suffix.lower() in (".jpg", ".jpeg"):
                    shutil.copy(source, place)
                else:
                    Image.open(source).convert("RGB").save(place, quality=95)
                (out / "all").mkdir(exist_ok=True)
                if split == "train":
                    shutil.copy(place, out / "all" / place.name)
    return len(types)


def kwargs() -> dict[str, Any]:
    found = load_config(CONFIG).model.cnn
    assert found is not None
    return found.kwargs


def timm_epochs(script: Path, folder: Path, types: int, work: Path) -> Callable[[int], float]:
    """Seconds of timm's train.py for so many epochs: the quickstart's ConvNeXt on the type alone, no augmentation."""
    literal = [
        f"{key}={json.dumps(value) if not isinstance(value, str) else repr(value)}" for key, value in kwargs().items()
    ]
    literal = [text.replace("true", "True").replace("null", "None") for text in literal]

    def run(epochs: int) -> float:
        return call(
            [
                *(
                    sys.executable,
                    str(script),
                    "--data-dir",
                    str(folder),
                    "--train-split",
                    "train",
                    "--val-split",
                    "val",
                ),
                *("--model", "convnext_atto", "--num-classes", str(types), "--input-size", "3", str(SIZE), str(SIZE)),
                *("--epochs", str(epochs), "--warmup-epochs", "0", "--cooldown-epochs", "0", "--sched", "cosine"),
                *("-b", str(BATCH), "--opt", "adamw", "--lr", "4e-3", "--weight-decay", "0.05", "--clip-grad", "1.0"),
                *("--no-aug", "--workers", "2", "--device", "cpu", "--output", str(work / "timm")),
                *("--model-kwargs", *literal),
            ],
            work,
        )

    return run


def accelerate_epochs(script: Path, folder: Path, work: Path) -> Callable[[int], float]:
    """Seconds of Accelerate's example for so many epochs; what its code names is named otherwise, all trains."""
    text = script.read_text(encoding="utf-8")
    edits = {
        'create_model("resnet50d", pretrained=True, num_classes=len(label_to_id))':
            f'create_model("convnext_atto", num_classes=len(label_to_id), **{kwargs()!r})',
        "param.requires_grad = False": "param.requires_grad = True",
        '"batch_size": 64, "image_size": 224': f'"batch_size": {BATCH}, "image_size": {SIZE}',
        "num_workers=4": "num_workers=2",
    }  # fmt: skip
    for old, new in edits.items():
        if old not in text:
            sys.exit(f"{script}: there is no {old!r} in it")
        text = text.replace(old, new)

    def run(epochs: int) -> float:
        copy = work / "example.py"
        copy.write_text(text.replace('"num_epochs": 3', f'"num_epochs": {epochs}'), encoding="utf-8")
        output = ["--output_dir", str(work / "accelerate")]
        return call(
            [
                sys.executable,
                str(copy),
                "--data_dir",
                str(folder / "all"),
                "--cpu",
                "--checkpointing_steps",
                "epoch",
                *output,
            ],
            work,
        )

    return run


def our_epochs(data: Path, work: Path) -> Callable[[int], float]:
    """Seconds of train.py for so many epochs of the same."""

    def run(epochs: int) -> float:
        phases = [{"name": "c", "trainable": ["all"], "epochs": epochs, "lr": 4e-3}]
        task = '{"type": {"kind": "classification", "column": "typename"}}'
        changes = ["model.transformer=null", f"tasks={task}", "tracking.goals={}"]
        return ours(data, work, changes, phases, Pair())[0]

    return run


def ratio(one: list[float], other: list[float]) -> str:
    """The median of pairs' ratios, with the least and the most."""
    each = sorted(a / b for a, b in zip(one, other, strict=True))
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    data = work / "data"
    sizes = ["--train", str(arguments.train), "--val", str(arguments.val), "--seed", "0", "--workers", "2"]
    call([sys.executable, "-m", "hybrid_dist.cli", "synth", str(data), *sizes], ROOT)
    pair = pair_of(arguments)
    found: dict[str, Any] = {"job": {"ours": [], "plain": []}, "score": {"ours": [], "plain": []}}
    for turn in range(arguments.repeats):
        both = {
            "ours": lambda seed: ours(data, work, [f"run.seed={seed}"], job_phases(pair), pair),
            "plain": lambda seed: plain(data, work, pair, "--seed", str(seed)),
        }
        for name, run in both.items():
            seconds, score = run(turn)
            found["job"][name].append(seconds)
            found["score"][name].append(score)
            print(f"{turn + 1}: {name} {seconds:.0f} s, val/score {score:.3f}", file=sys.stderr, flush=True)
    peers: dict[str, Callable[[int], float]] = {"ours": our_epochs(data, work)}
    types = folders_by_class(data, work / "folders") if arguments.timm or arguments.accelerate else 0
    if arguments.timm:
        peers["timm"] = timm_epochs(arguments.timm.resolve(), work / "folders", types, work)
    if arguments.accelerate:
        peers["accelerate"] = accelerate_epochs(arguments.accelerate.resolve(), work / "folders", work)
    found["epoch"] = {name: [] for name in peers} if len(peers) > 1 else {}
    for _ in range(arguments.repeats if len(peers) > 1 else 0):
        for name, epochs in peers.items():
            taken = (epochs(3) - epochs(1)) / 2
            found["epoch"][name].append(taken)
            print(f"an epoch of {name}: {taken:.1f} s", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pair_options(parser)
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--val", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timm", type=Path, metavar="FILE", help="timm's train.py")
    parser.add_argument("--accelerate", type=Path, metavar="FILE", help="Accelerate's examples/complete_cv_example.py")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    job, score = found["job"], found["score"]
    print(f"the job ÷ the plain recipe: {ratio(job['ours'], job['plain'])}, at most {LOW} is wanted")
    print(f"val/score {statistics.mean(score['ours']):.3f} and {statistics.mean(score['plain']):.3f}")
    for peer, seconds in found["epoch"].items():
        if peer != "ours":
            print(f"an epoch ÷ {peer}'s: {ratio(found['epoch']['ours'], seconds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
