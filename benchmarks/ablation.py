"""What each part of the recipe is worth: alone against the plain recipe, over seeds, on rendered and real pictures.

    python benchmarks/ablation.py [--photos FOLDER] [--seeds 3] [--jobs 2] [--only PART …] [--json FILE]

The quickstart's pair is first trained on pictures of its own, rendered with another seed: those are the pretrained
weights. From them each recipe fine-tunes on 1,000 other rendered pictures (`rendered`; `tail`: the same with the rarer
half of the types cut to a tenth), and on FOLDER, which holds train.csv, train/, val.csv and val/ (`photos`). A run is
scored by the best of its last phase on the validation pictures. What is compared at equal time has its epochs set by
measured seconds. Finished runs are not made again: the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_dist.files import read_lines, read_object

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "runs" / "ablation"
EPOCHS, PROBE = 8.0, 3.0
RATES = {"rendered": 4e-3, "tail": 4e-3, "photos": 8e-3}
"""The best of 2e-3, 4e-3 and 8e-3 for the plain recipe."""
SMOOTHING = ["tasks.type.smoothing=0.1", "tasks.airline.smoothing=0.1"]
EMA = ["train.ema=0.999"]


@dataclass(frozen=True)
class Part:
    """A recipe: what it changes in the plain one."""

    changes: list[str] = field(default_factory=list)
    sets: tuple[str, ...] = ("rendered", "photos")
    as_long_as: str | None = None
    """Its epochs are so many that it takes the same time as this one."""


PARTS = {
    "plain": Part(sets=("rendered", "photos", "tail")),
    "ema": Part(EMA),
    "layer decay": Part(["phases.1.layer_decay=0.8"]),
    "lower backbone rates": Part(["phases.1.lr={heads: 1, fusion: 1, cnn: 0.5, transformer: 0.5}"]),
    "smoothing": Part(SMOOTHING),
    "mixup": Part(["data.mixup=0.2", "data.mix_prob=0.5"]),
    "cutmix": Part(["data.cutmix=1.0", "data.mix_prob=0.5"]),
    "degrade": Part(["data.degrade=0.25"]),
    "augment": Part(["data.augment=true"]),
    "uncertainty": Part(["train.task_balance=uncertainty"]),
    "tail: balanced": Part(["tasks.type.tail=balanced"], ("tail",)),
    "tail: logit_adjusted": Part(["tasks.type.tail=logit_adjusted"], ("tail",)),
    "data.balance": Part(["data.balance=type"], ("tail",)),
    "ema + smoothing": Part([*EMA, *SMOOTHING]),
    "plain, longer": Part(as_long_as="ema + smoothing"),
    "ConvNeXt alone": Part(["model.transformer=null"], as_long_as="plain"),
    "Swin alone": Part(["model.cnn=null"], as_long_as="plain"),
}


def synth(name: str, train: int, val: int, seed: int) -> Path:
    """Render a data set, unless it is there; its folder."""
    folder = WORK / "data" / name
    if not folder.exists():
        numbers = ["--train", train, "--val", val, "--seed", seed, "--workers", 2]
        call("-m", "hybrid_dist.cli", "synth", str(folder), *map(str, numbers))
    return folder


def cut_tail(folder: Path) -> None:
    """tail.csv beside train.csv: of the rarer half of the types every tenth picture."""
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["typename"] for row in rows}, key=lambda name: sum(row["typename"] == name for row in rows))
    rare, seen, kept = set(names[: len(names) // 2]), dict.fromkeys(names, 0), []
    for row in rows:
        seen[row["typename"]] += 1
        if row["typename"] not in rare or seen[row["typename"]] % 10 == 1:
            kept.append(row)
    with (folder / "tail.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def call(*arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr[-4000:]}")


def places(folder: Path, train: str = "train") -> list[str]:
    return [
        f"data.train_csv={folder / train}.csv", f"data.train_images={folder / 'train'}",
        f"data.val_csv={folder / 'val.csv'}", f"data.val_images={folder / 'val'}",
    ]  # fmt: skip


def train(name: str, keys: list[str], phases: list[dict[str, Any]]) -> Path:
    """Train a run of the quickstart's pair, unless it is finished; its folder."""
    run = WORK / name
    last = f"phase_{phases[-1]['name']}"
    if not (run / "model" / "model.json").exists():
        own = [f"run.dir={WORK}", f"run.name={name}", "data.workers=0", "tracking.report=false", "tracking.wandb=off"]
        call("train.py", "--config", "configs/quickstart.yaml", *own, f"phases={json.dumps(phases)}", *keys)
    assert (run / last / "best.json").exists()
    return run


def recipe(part: str, data: str, seed: int, epochs: float, folders: dict[str, Path], weights: Path) -> Path:
    """Fine-tune by a recipe; the run's folder."""
    rate = RATES[data]
    phases = [
        {"name": "a", "trainable": ["heads", "fusion"], "steps": 30, "lr": 2e-3},
        {"name": "c", "trainable": ["all"], "epochs": round(epochs, 2), "lr": rate},
    ]
    keys = [*places(folders[data], "tail" if data == "tail" else "train"), f"run.seed={seed}"]
    for change in PARTS[part].changes:
        if change.startswith("phases.1.lr="):  # factors of the plain rate
            parts = dict(pair.split(": ") for pair in change.partition("=")[2].strip("{}").split(", "))
            phases[1]["lr"] = {name: rate * float(factor) for name, factor in parts.items()}
        else:
            keys.append(change)
    alone = {key.partition("=")[0] for key in keys}
    keys += [f"model.{one}.weights={weights}" for one in ("cnn", "transformer") if f"model.{one}" not in alone]
    name = "-".join(["".join(c if c.isalnum() else "_" for c in part), data, str(seed)])
    return train(name, keys, phases)


def seconds(run: Path, phase: str | None = None) -> float:
    """From its beginning, or that of a phase, to its last line."""
    begun = next(start["time"] for start in read_lines(run / "starts.jsonl") if phase in (None, start["phase"]))
    return float(list(read_lines(run / "metrics.jsonl"))[-1]["time"]) - float(begun)


def figures(runs: list[Path]) -> dict[str, Any]:
    """Mean and standard deviation of what matters over the seeds."""
    best = [read_object(run / "phase_c" / "best.json")["metrics"] for run in runs]
    out: dict[str, Any] = {"seconds": statistics.median(map(seconds, runs))}
    for key in ("val/score", "val/type_acc1", "val/type_f1"):
        values = [each[key] for each in best]
        out[key] = {
            "each": values,
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if values[1:] else 0,
        }
    return out


def measure(part: str, data: str, seeds: int, epochs: float, pool: Any, folders: Any, weights: Path) -> dict[str, Any]:
    runs = list(pool.map(lambda seed: recipe(part, data, seed, epochs, folders, weights), range(seeds)))
    return {**figures(runs), "epochs": round(epochs, 2)}


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """A table for each data set."""
    lines = []
    for data, parts in found.items():
        lines += [
            f"\n{data}:\n",
            "| recipe | `val/score` | type top-1 | macro F1 | epochs | seconds |",
            "|---" * 6 + "|",
        ]
        for part, facts in parts.items():
            cells = [f"{facts[key]['mean']:.3f} ± {facts[key]['sd']:.3f}" for key in list(facts)[1:4]]
            lines.append(f"| {part} | {' | '.join(cells)} | {facts['epochs']:g} | {facts['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pretrain, rendered = synth("pretrain", 4000, 300, 100), synth("rendered", 1000, 600, 101)
    cut_tail(rendered)
    folders = {"rendered": rendered, "tail": rendered}
    if arguments.photos is not None:
        folders["photos"] = arguments.photos.resolve()
    weights = train("pretrained", places(pretrain), [{"name": "c", "trainable": ["all"], "epochs": 6, "lr": 4e-3}])
    found: dict[str, dict[str, Any]] = {data: {} for data in folders}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = (pool, folders, weights)
        for part in sorted(arguments.only, key=lambda name: PARTS[name].as_long_as is not None):
            for data in (data for data in PARTS[part].sets if data in folders):
                epochs, other = EPOCHS, PARTS[part].as_long_as
                if other is not None:
                    # Beside each other, so that a busy machine holds up both.
                    probe = functools.partial(
                        recipe, data=data, seed=99, epochs=PROBE, folders=folders, weights=weights
                    )
                    one, two = (seconds(run, "c") for run in pool.map(probe, (other, part)))
                    epochs = EPOCHS * one / two
                found[data][part] = measure(part, data, arguments.seeds, epochs, *jobs)
                print(f"{data}, {part}: {found[data][part]}", file=sys.stderr, flush=True)
                if arguments.json is not None:
                    arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
