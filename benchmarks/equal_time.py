"""What the default recipe scores in the time of the plain one, over seeds: rendered pictures, and real ones.

    python benchmarks/equal_time.py [--photos FOLDER] [--rendered 1000] [--weights FILE] [--seeds 3] [--config FILE]
                                    [--batch 32] [--epochs A B C] [--rates A B C] [--json FILE] [key=value …]

A config's pair, from random weights or those of a run's model.safetensors. plain_recipe.py trains its three
phases; then `train.py` trains them with its defaults, but that it keeps what frozen branches give, and like the plain
recipe augments nothing, which data.augment=true changes; all their epochs times a factor, so that as whole commands
both take the same time.
The factor comes from two runs of train.py per data set, of as many epochs and of twice as many, and all that follow.
FOLDER holds train.csv, train/, val.csv and val/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from job import ROOT, Pair, call, job_phases, ours, pair_of, pair_options, plain

MARGIN = 0.97
"""Of the plain recipe's time, for what varies from run to run."""


def default(data: Path, work: Path, once: Pair, factor: float, seed: int, weights: Path | None) -> tuple[float, float]:
    """Seconds and score of train.py with so many times the epochs."""
    pair = replace(once, epochs={name: round(factor * epochs, 3) for name, epochs in once.epochs.items()})
    changes = [f"run.seed={seed}"]
    if weights is not None:
        changes += [f"model.{part}.weights={weights}" for part in ("cnn", "transformer")]
    return ours(data, work, changes, job_phases(pair), pair)


def factor_of(own: list[tuple[float, float]], plain_seconds: list[float]) -> float:
    """How many times the epochs fit into the plain recipe's time, by a line through what so many times have taken."""
    slope, start_up = np.polyfit(*zip(*own, strict=True), 1)
    return float((MARGIN * statistics.mean(plain_seconds) - start_up) / slope)


def measure(data: Path, work: Path, pair: Pair, seeds: int, weights: Path | None) -> dict[str, Any]:
    """Both recipes with each seed, by turns."""
    found: dict[str, Any] = {"plain": [], "default": [], "factors": []}
    own = [(float(times), default(data, work, pair, times, 99, weights)[0]) for times in (1, 2)]
    extra = ["--weights", str(weights)] if weights is not None else []
    for seed in range(seeds):
        found["plain"].append(plain(data, work, pair, "--seed", str(seed), *extra))
        factor = factor_of(own, [seconds for seconds, _ in found["plain"]])
        found["factors"].append(factor)
        found["default"].append(default(data, work, pair, factor, seed, weights))
        own.append((factor, found["default"][-1][0]))
        print(f"{data.name}, seed {seed}: {found['plain'][-1]}, {found['default'][-1]}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rendered", type=int, default=1000, help="so many pictures of that kind; 0: none")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    pair_options(parser)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_intermixed_args()
    weights = arguments.weights.resolve() if arguments.weights is not None else None
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sets = [arguments.photos.resolve()] if arguments.photos is not None else []
        if arguments.rendered:
            sizes = ["--train", str(arguments.rendered), "--val", "600", "--seed", "101", "--workers", "2"]
            call([sys.executable, "-m", "hybrid_dist.cli", "synth", str(work / "rendered"), *sizes], ROOT)
            sets.insert(0, work / "rendered")
        for data in sets:
            found[data.name] = measure(data, work, pair_of(arguments), arguments.seeds, weights)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, facts in found.items():
        for recipe in ("plain", "default"):
            seconds, scores = zip(*facts[recipe], strict=True)
            spread = statistics.stdev(scores) if scores[1:] else 0.0
            times = f" ({statistics.mean(facts['factors']):.2f} times the epochs)" if recipe == "default" else ""
            took = f"{statistics.mean(seconds):.0f} s"
            print(f"{name}, {recipe}{times}: val/score {statistics.mean(scores):.3f} ± {spread:.3f} in {took}")


if __name__ == "__main__":
    main()
