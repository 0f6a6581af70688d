"""The same runs on one GPU. Never measured where there is none: skipped with that reason.

One process, so NCCL beside the gloo control group is not covered here: that takes two GPUs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from tests.conftest import launch, read_lines, tiny_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(
    data: Path, folder: Path, config_file: str | None, precision: str, gpu: bool, deterministic: bool = False
) -> list[dict]:
    folder.mkdir()
    values = tiny_values(data, folder)
    values["train"] |= {"precision": precision, "deterministic": deterministic}
    YAML().dump(values, folder / "config.yaml")
    extra = ("--num_processes", "1") if config_file else ()
    launch("--config", str(folder / "config.yaml"), config_file=config_file, extra=extra, gpu=gpu)
    run = folder / "runs" / "tiny"
    norm = next(line["train/grad_norm"] for line in read_lines(run / "metrics.jsonl") if "train/grad_norm" in line)
    lines = read_lines(run / "trace.jsonl")
    lines[-1]["grad_norm"] = norm
    return lines


@pytest.mark.parametrize("config_file", ["single_gpu", "ddp", "zero2", "zero3"])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-3), ("bf16", 0.02), ("fp16", 0.02)])
def test_gpu_follows_cpu(config_file: str, precision: str, bound: float, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a device, dtype or scaler that only CUDA meets; other samples or pixels than on a CPU."""
    if precision == "fp16" and config_file.startswith("zero"):
        pytest.skip("refused: DeepSpeed's fp16 autocast is wrong at ZeRO 1 to 3")
    want = train(tiny_data, tmp_path / "cpu", None, "fp32", gpu=False)
    have = train(tiny_data, tmp_path / "gpu", config_file, precision, gpu=True)
    assert [(line["sample_ids"], line["digest"]) for line in have] == [
        (line["sample_ids"], line["digest"]) for line in want
    ]
    # A constant factor on the gradients hides behind AdamW in the losses, but not in their norm.
    assert have[-1]["grad_norm"] == pytest.approx(want[-1]["grad_norm"], rel=10 * bound)
    for one, other in zip(want, have, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=bound), f"step {one['step']}"


@pytest.mark.parametrize("config_file", ["single_gpu", "zero2"])
def test_deterministic_is_to_the_bit(config_file: str, tiny_data: Path, tmp_path: Path) -> None:
    """Catches: an operation whose sum depends on which thread comes first; one that has no deterministic algorithm."""
    lines = [train(tiny_data, tmp_path / name, config_file, "bf16", gpu=True, deterministic=True) for name in "ab"]
    assert lines[0] == lines[1]
    one, other = (load_file(tmp_path / name / "runs" / "tiny" / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one)
