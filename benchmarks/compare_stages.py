"""The three stages at the quickstart's size: one task, four tasks, both backbones; and a second seed of four tasks.

    hybrid-dist synth data/quickstart --train 8000 --val 600 --seed 0
    hybrid-dist pack --config configs/quickstart.yaml
    python benchmarks/compare_stages.py [--epochs 5] [--jobs 1] [--html FILE]

Trains `stage2_convnext`, `stage4_convnext` and the quickstart's hybrid, the two baselines with the quickstart's small
ConvNeXt, data, losses and learning rates in place of their own, all for the same epochs. Then it compares them, and
prints the table for the README. Again, it only compares.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hybrid_dist.config import Config, load_config
from hybrid_dist.report.compare.comparison import Comparison, compare
from hybrid_dist.report.compare.gates import judge, parse_gate
from hybrid_dist.report.compare.page import comparison_page
from hybrid_dist.report.compare.text import difference_text, p_text, print_comparison, value_text
from hybrid_dist.report.page import write

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path("runs/stages")
QUICKSTART = "configs/quickstart.yaml"


def overrides(config: str, epochs: float, quickstart: Config) -> list[str]:
    """What brings a baseline's config to the quickstart's size."""
    found = [f"run.dir={FOLDER}", "data.workers=0"]  # packed pictures come quickly; the result is the same
    last = {"name": "c", "trainable": ["all"], "epochs": epochs, "lr": quickstart.phases[-1].lr}
    if config == QUICKSTART:
        return [*found, f"phases.2.epochs={epochs:g}"]
    values = quickstart.model_dump(mode="json")
    sections: dict[str, dict[str, Any]] = {"data": values["data"], "train": values["train"]}
    changes = [f"{name}.{key}={json.dumps(value)}" for name, keys in sections.items() for key, value in keys.items()]
    changes += [f"model.cnn={json.dumps(values['model']['cnn'])}", f"model.dropout={values['model']['dropout']}"]
    changes += ["model.allow_scratch=true", f"phases={json.dumps([values['phases'][0], last])}"]
    tasks = load_config(ROOT / config).tasks
    changes += [f"tasks.{name}.weight={values['tasks'][name]['weight']}" for name in tasks]
    return changes + found


def train(name: str, config: str, seed: int, epochs: float) -> Path:
    """Train a run, or go on with it; its folder."""
    quickstart = load_config(ROOT / QUICKSTART)
    keys = [*overrides(config, epochs, quickstart), f"run.name={name}", f"run.seed={seed}"]
    subprocess.run([sys.executable, "train.py", "--config", config, *keys], cwd=ROOT, check=True, stdout=sys.stderr)
    return ROOT / FOLDER / name


def markdown(comparison: Comparison) -> str:
    """The figures as a table, differences in brackets."""
    labels = [run.label for run in comparison.runs]
    lines = [f"| | {' | '.join(labels)} |", "|---" * (len(labels) + 1) + "|"]
    for metric in comparison.metrics.values():
        if metric.source == "best":
            continue
        cells = []
        for figure in metric.figures:
            p = f", p {p_text(figure.p)}" if figure.p is not None else ""
            beside = f" ({difference_text(metric, figure)}{p})" if figure.difference is not None else ""
            cells.append(value_text(metric, figure.value) + beside)
        lines.append(f"| {metric.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=float, default=5, metavar="N", help="of the last phase of each (5)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs trained at a time (1)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the stages' comparison as a page, too")
    arguments = parser.parse_args()
    wanted = [
        ("hybrid", QUICKSTART, 0), ("stage4", "configs/stage4_convnext.yaml", 0),
        ("stage2", "configs/stage2_convnext.yaml", 0), ("stage4_seed1", "configs/stage4_convnext.yaml", 1),
    ]  # fmt: skip
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda entry: train(*entry, epochs=arguments.epochs), wanted))
    hybrid, stage4, stage2, again = done
    comparison = compare([stage2, stage4, hybrid])
    print_comparison(comparison, judge([parse_gate("type_acc1:+0.01")], comparison))
    print(f"\n{markdown(comparison)}\n")
    if arguments.html:
        write(arguments.html, comparison_page(comparison, []))
    for pair in ([stage4, hybrid], [stage4, again]):
        comparison = compare(pair)
        gates = [parse_gate(text) for text in ("type_acc1:+0.01", "clarity_mae:-0.005")]
        print_comparison(comparison, judge(gates, comparison))
        print(f"\n{markdown(comparison)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
