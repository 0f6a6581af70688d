"""One trajectory: the same samples, pixels and losses on every topology and with every micro batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tests.conftest import launch, read_lines, tiny_values

# name: launch file (None: plain python), extra launcher arguments, micro batch
TOPOLOGIES = {
    "one, micro 4": (None, (), 4),
    "one, micro 2": (None, (), 2),
    "DDP x2": ("ddp", (), 4),
    "ZeRO 0 x2": ("zero1", ("--zero_stage", "0"), 4),
    "ZeRO 1 x2": ("zero1", (), 8),
    "ZeRO 2 x2": ("zero2", (), 4),
    "ZeRO 3 x2": ("zero3", (), 2),
    "ZeRO 3 x4": ("zero3", ("--num_processes", "4"), 2),
    "ZeRO 2 offload x2": ("zero2_offload", (), 4),
    "ZeRO 3 offload x2": ("zero3_offload", (), 4),
}


@pytest.fixture(scope="module")
def reference(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others are held against: one process, micro batches of 8."""
    return train(tiny_data, tmp_path_factory.mktemp("reference"), None, (), 8)


def train(
    data: Path, folder: Path, config_file: str | None, extra: tuple[str, ...], micro: int, precision: str = "fp32"
) -> Path:
    config = folder / "config.yaml"
    values = tiny_values(data, folder)
    # Once with loader processes, that live beside DeepSpeed's threads.
    values["data"]["workers"] = 1 if config_file == "zero2" else 0
    values["train"]["precision"] = precision
    YAML().dump(values, config)
    launch("--config", str(config), f"train.micro_batch_size={micro}", config_file=config_file, extra=extra)
    return folder / "runs" / "tiny"


def test_reference_sees_every_sample_once_an_epoch(reference: Path) -> None:
    """Catches: a sample dropped or repeated at the short end of an epoch, or phases that share an order."""
    trace = read_lines(reference / "trace.jsonl")
    assert [line["step"] for line in trace] == list(range(1, 31))
    assert [line["phase"] for line in trace] == ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    assert [len(line["sample_ids"]) for line in trace[:10]] == [16, 16, 16, 8, 16, 16, 16, 8, 16, 16]
    firsts = []
    for phase in range(3):
        ids = [row for line in trace[10 * phase : 10 * phase + 8] for row in line["sample_ids"]]
        assert sorted(ids[:56]) == sorted(ids[56:]) == list(range(56))
        assert ids[:56] != ids[56:]
        firsts.append(ids[:56])
    assert firsts[0] != firsts[1] != firsts[2]
    assert len({line["digest"] for line in trace}) == 30


def grad_norms(run: Path) -> list[float]:
    return [line["train/grad_norm"] for line in read_lines(run / "metrics.jsonl") if "train/grad_norm" in line]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_same_trajectory(name: str, reference: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: an order, an augmentation, a normalisation of the loss, a clipping or a schedule that knows ranks,
    micro batches or ZeRO stages; weights or optimizer state lost between phases."""
    config_file, extra, micro = TOPOLOGIES[name]
    run = train(tiny_data, tmp_path, config_file, extra, micro)
    expected, found = read_lines(reference / "trace.jsonl"), read_lines(run / "trace.jsonl")
    assert [(line["phase"], line["step"], line["sample_ids"], line["digest"]) for line in found] == [
        (line["phase"], line["step"], line["sample_ids"], line["digest"]) for line in expected
    ]
    for want, have in zip(expected, found, strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-5), f"{name}, step {want['step']}"
    for want, have in zip(grad_norms(reference), grad_norms(run), strict=True):
        assert have == pytest.approx(want, rel=1e-4), "losses alone would not show a gradient that is off by a factor"
    wants = [line for line in read_lines(reference / "metrics.jsonl") if "val/score" in line]
    haves = [line for line in read_lines(run / "metrics.jsonl") if "val/score" in line]
    assert [line["step"] for line in haves] == [line["step"] for line in wants]
    for want, have in zip(wants, haves, strict=True):
        assert have["val/loss"] == pytest.approx(want["val/loss"], rel=1e-5)
        assert have["val/clarity_mae"] == pytest.approx(want["val/clarity_mae"], rel=1e-4)


def test_bf16_follows_on_zero2(reference: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: an autocast that DeepSpeed does not get to see, or weights and moments that are bf16 too."""
    run = train(tiny_data, tmp_path, "zero2", (), 4, precision="bf16")
    wants, haves = read_lines(reference / "trace.jsonl"), read_lines(run / "trace.jsonl")
    assert [line["digest"] for line in haves] == [line["digest"] for line in wants]
    differences = [abs(have["loss"] / want["loss"] - 1) for want, have in zip(wants, haves, strict=True)]
    assert 1e-7 < max(differences) < 0.02
    assert {tensor.dtype for tensor in load_file(run / "model" / "model.safetensors").values()} == {torch.float32}
