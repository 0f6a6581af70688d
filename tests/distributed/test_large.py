"""The 391 M pair at its full size, in little memory."""

from __future__ import annotations

import math
import resource
from pathlib import Path

import pytest

from tests.conftest import launch, read_lines, write_split

LIMIT_GB = 12


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_large_steps_in_phase_c_under_zero3(tmp_path: Path) -> None:
    """Catches: a copy of the whole state on one process: in start-up, step, validation, checkpoint or best."""
    data = tmp_path / "data"
    write_split(data, "train", 4, seed=1, blank=0.0)
    write_split(data, "val", 4, seed=2, blank=0.0)
    launch(
        "--config", "configs/large.yaml", f"run.dir={tmp_path / 'runs'}",
        f"data.train_csv={data / 'train.csv'}", f"data.train_images={data / 'train'}",
        f"data.val_csv={data / 'val.csv'}", f"data.val_images={data / 'val'}", "data.workers=0",
        "model.cnn.weights=scratch", "model.transformer.weights=scratch", "model.allow_scratch=true",
        "train.global_batch_size=4", "train.micro_batch_size=2",
        "phases=[{name: c, trainable: [all], steps: 1, lr: 1e-5}]",
        config_file="zero3", timeout=2700,
    )  # fmt: skip
    train, val = read_lines(tmp_path / "runs" / "large" / "metrics.jsonl")
    assert math.isfinite(train["train/loss"])
    assert train["train/grad_norm"] > 0
    assert math.isfinite(val["val/loss"])
    # The largest of all processes that have ended below this one.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(f"peak of a process: {peak:.2f} GB; images/s {train['perf/images_per_s']:.3f}")
    assert peak < LIMIT_GB
