"""Model FLOPs utilisation: absent where no peak is known, by the phase's FLOPs where one is, and without any trace in
the training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_dist.config import load_config
from hybrid_dist.plan.devices import DEVICES, reported
from hybrid_dist.plan.flops import flops_per_picture
from hybrid_dist.training import utilisation
from hybrid_dist.training.utilisation import Utilisation, peak_flops
from tests.conftest import read_lines
from tests.distributed.running import expect_same_run

PHASES = [
    {"name": "a", "trainable": ["heads", "fusion"], "steps": 2, "lr": 1e-3},
    {"name": "b", "trainable": ["all"], "steps": 2, "lr": 1e-3},
]
CLASSES = {"type": 3, "airline": 2}


def test_only_what_is_known_by_name() -> None:
    """Catches: a peak taken for another chip's of nearly the same name, or one that a CPU would have."""
    found = {name: reported(name) for name in ("NVIDIA H100 80GB HBM3", "A100-SXM4-80GB", "Tesla T4", "NVIDIA A10")}
    assert [device.name if device else None for device in found.values()] == ["h100", "a100-80", "t4", "a10"]
    others = (
        "NVIDIA A10G",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    )
    assert not any(map(reported, others))
    assert len({device.called for device in DEVICES if device.kind == "cuda"}) == len(DEVICES) - 1
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_in_the_metrics(call: Callable[..., int], tiny_config: Callable[..., Path], monkeypatch: Any) -> None:
    """Catches: FLOPs of another phase, or of the whole model where parts are frozen; a count that moves the training's
    random state."""
    config = tiny_config(phases=PHASES, tracking={"log_every": 1}, model={"dropout": 0.3})
    assert call(config, f"run.dir={config.parent / 'whole'}") == 0
    whole, run = config.parent / "whole" / "tiny", config.parent / "runs" / "tiny"
    lines = [line for line in read_lines(whole / "metrics.jsonl") if "train/loss" in line]
    assert len(lines) == 4
    assert not any("perf/mfu" in line for line in lines)
    assert all(line["perf/images_per_s_per_gpu"] == line["perf/images_per_s"] for line in lines)

    begin = Utilisation.begin

    def begin_and_wait(own: Utilisation) -> None:
        begin(own)
        assert own._thread is not None
        own._thread.join(600)  # a run this small would be over before anything is counted

    monkeypatch.setattr(utilisation, "peak_flops", lambda device, precision: 2e12)
    monkeypatch.setattr(Utilisation, "begin", begin_and_wait)
    assert call(config) == 0
    expect_same_run(run, whole)
    taken = {}
    for phase in "ab":
        own = [line for line in read_lines(run / "metrics.jsonl") if line["phase"] == phase and "train/loss" in line]
        each = [line["perf/mfu"] * 2e12 / line["perf/images_per_s"] for line in own]
        assert len(each) == 2 and each[0] == pytest.approx(each[1])
        taken[phase] = each[0]
    loaded = load_config(config)
    forward, backward = flops_per_picture(loaded, CLASSES, loaded.phases[0])
    assert taken["a"] == pytest.approx(forward + backward)
    assert backward < 0.05 * forward, "what is frozen has no backward"
    assert 2.5 * forward < taken["b"] < 3.1 * forward
