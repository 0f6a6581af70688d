"""What `hybrid-dist plan` says of time beside rates that timm publishes of a GPU.

    python benchmarks/plan_time.py [--json]

The rates are those of pytorch-image-models, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv and
benchmark-infer-amp-nhwc-pt240-cu124-rtx4090.csv: one GPU, fp16 autocast, channels last, 224 pixels. The shares of a
data sheet's rates in `hybrid_dist.plan.seconds` were chosen by the first; the second is a check. Nothing runs on a GPU
here.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_dist.config import parse_config
from hybrid_dist.plan.activations import timeline
from hybrid_dist.plan.devices import named
from hybrid_dist.plan.fake import FakeModel
from hybrid_dist.plan.seconds import UPDATE, Machine, pace, passes
from hybrid_dist.plan.traffic import Traffic
from hybrid_dist.plan.work import Work

# Pictures a second and the batch size: training on an RTX 3090; inference on an RTX 4090, where it is known.
PUBLISHED: dict[str, tuple[float, int, float | None]] = {
    "convnext_tiny": (819.24, 256, None),
    "convnext_small": (487.15, 192, None),
    "convnext_base": (338.68, 128, 2096.16),
    "convnext_large": (187.93, 96, 1210.69),
    "swin_tiny_patch4_window7_224": (648.69, 256, None),
    "swin_small_patch4_window7_224": (400.37, 192, 1706.58),
    "swin_base_patch4_window7_224": (281.0, 128, 1237.04),
    "swin_large_patch4_window7_224": (153.79, 64, None),
}
INFERENCE_BATCH = 512


def work_of(name: str) -> tuple[Work, int]:
    """Of one backbone with a head of 1000 classes, and its parameters."""
    part, other = ("cnn", "transformer") if name.startswith("convnext") else ("transformer", "cnn")
    values: dict[str, Any] = {
        "run": {"name": "plan"},
        "data": dict.fromkeys(("train_csv", "train_images", "val_csv", "val_images"), "none"),
        "model": {part: {"name": name}, other: None},
        "tasks": {"type": {"kind": "classification", "column": "typename"}},
        "train": {"precision": "fp16"},
    }
    config = parse_config(values, name)
    fake = FakeModel(config, {"type": 1000})
    parameters = fake.train(config.phases[-1])
    return timeline(fake, "fp16", "cuda", False).work, sum(parameter.numel for parameter in parameters)


def row(name: str) -> dict[str, Any]:
    """Published and planned pictures a second."""
    work, parameters = work_of(name)
    rate, batch, inference = PUBLISHED[name]
    machine = Machine(named("rtx3090"), 8, 100.0, None)
    both = passes(work, batch, machine.device, "fp16")
    # SGD, as there, goes over three tensors where AdamW's kernels go over many.
    sent = Traffic(updated=round(parameters * 20 / UPDATE))
    planned = pace(both, sent, machine, 1, batch, 1, (1.0, 1.0)).images_per_s
    found = {"model": name, "training": rate, "planned": planned, "ratio": planned / rate}
    if inference is None:
        return found
    forward, _ = passes(work, INFERENCE_BATCH, named("rtx4090"), "fp16")
    faster = INFERENCE_BATCH / forward.seconds
    return found | {"inference": inference, "planned_inference": faster, "inference_ratio": faster / inference}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [row(name) for name in PUBLISHED]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = Table(
        "model", "RTX 3090, training", "planned", "ratio", "RTX 4090, inference", "planned", "ratio", box=None
    )
    keys = ("training", "planned", "ratio", "inference", "planned_inference", "inference_ratio")
    for found in rows:
        cells = (found.get(key) for key in keys)
        table.add_row(found["model"], *("" if cell is None else f"{cell:,.4g}" for cell in cells))
    Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
