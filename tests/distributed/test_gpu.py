"""The same runs on one GPU. Never measured where there is none: skipped with that reason.

One process, so NCCL beside the gloo control group is not covered here: that takes two GPUs.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file

from hybrid_dist.config import load_config
from hybrid_dist.distributed import FORWARD, span
from hybrid_dist.plan import Planner
from hybrid_dist.plan.split import ASSUMED
from hybrid_dist.training.glance import FIRST, Glance
from tests.conftest import ROOT, launch, read_lines, tiny_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def train(data: Path, folder: Path, config_file: str | None, precision: str, gpu: bool, **keys: Any) -> list[dict]:
    """The run's trace, with the first norm of its gradients in the last line. `keys` go into the config's `train`."""
    folder.mkdir()
    values = tiny_values(data, folder)
    values["train"] |= {"precision": precision, **keys}
    if "compile" in keys:  # what is drawn in compiled blocks is to be the same
        values["model"]["dropout"] = values["model"]["transformer"]["kwargs"]["drop_path_rate"] = 0.2
    YAML().dump(values, folder / "config.yaml")
    extra = ("--num_processes", "1") if config_file else ()
    launch("--config", str(folder / "config.yaml"), config_file=config_file, extra=extra, gpu=gpu, timeout=1800)
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


def test_compiled_blocks_follow(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a compiled kernel that computes something else, or dropout that is drawn otherwise."""
    plain, compiled = (
        train(tiny_data, tmp_path / str(on), "single_gpu", "fp32", gpu=True, compile=on) for on in (False, True)
    )
    assert [line["digest"] for line in compiled] == [line["digest"] for line in plain]
    assert [line["loss"] for line in compiled] != [line["loss"] for line in plain], "nothing was compiled"
    for one, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3), f"step {one['step']}"


def test_profile_of_a_gpu(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: kernels that are not in the trace, or that no part owns."""
    train(tiny_data, tmp_path / "run", "single_gpu", "bf16", gpu=True, profile={"start": 4, "steps": 3})
    for phase in "abc":
        found = json.loads((tmp_path / "run" / "runs" / "tiny" / "profile" / f"{phase}.json").read_text())
        assert found["steps"] == [4, 5, 6]
        assert sum(found["split"].values()) == pytest.approx(found["seconds"], rel=1e-6)
        assert min(found["split"][part] for part in ("forward", "backward", "optimizer")) > 0
        assert found["split"]["communication"] == 0
        assert found["split"]["other"] < 0.5 * found["seconds"]
        assert len(found["operations"]) > 5 and found["allocated_gb"] > 0


def test_a_look_at_a_gpu() -> None:
    """Catches: a look that sees no kernel, and says that this GPU tells nothing."""
    topology: Any = SimpleNamespace(is_main=True, world_size=2, device=torch.device("cuda", 0))
    glance = Glance(topology, True, 1, pytest.fail)
    values = torch.randn(2048, 2048, device="cuda")
    for number in range(1, FIRST + 2):
        with glance.step(number, False), span(FORWARD):
            glance.agree(glance.wish())
            values @ values
    assert glance.take() == 0, "nothing was sent"


def test_memory_runs_out_on_a_gpu(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: an out of memory of CUDA's that is no reason to halve, or that leaves the device unusable."""
    lines = {}
    for name, micro_batch in (("whole", 48), ("auto", "auto")):
        folder = tmp_path / name
        folder.mkdir()
        values = tiny_values(tiny_data, folder)
        values["model"]["cnn"]["kwargs"]["dims"] = [24, 32, 48, 64]
        values["data"]["image_size"] = 192
        values["train"] |= {"global_batch_size": 48, "micro_batch_size": micro_batch}
        values["phases"] = [values["phases"][2] | {"steps": 3}]
        YAML().dump(values, folder / "config.yaml")
        monkeypatch.setenv("LITTLE_GPU", "100000" if name == "whole" else "250")
        script = "tests/distributed/little_gpu.py"
        launch("--config", str(folder / "config.yaml"), config_file="single_gpu", gpu=True, script=script)
        lines[name] = read_lines(folder / "runs" / "tiny" / "trace.jsonl")
    tried = read_lines(tmp_path / "auto" / "runs" / "tiny" / "out_of_memory.jsonl")
    assert [line["micro_batch"] for line in tried] == [48 >> index for index in range(len(tried))] != []
    for one, other in zip(lines["whole"], lines["auto"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3), f"step {one['step']}"


def test_planned_peak_of_a_gpu(tiny_data: Path, tmp_path: Path) -> None:
    """Catches: a planned peak that a GPU's kernels, with their workspaces, do not keep to."""
    keys = ["model.allow_scratch=true", "model.cnn.weights=scratch", "model.transformer.weights=scratch"]
    keys += ["train.micro_batch_size=8", "train.global_batch_size=16"]
    config = load_config(str(ROOT / "configs" / "small.yaml"), keys)
    planner = Planner(config, dict.fromkeys(("type", "airline"), ASSUMED), 1, 10**12, "cuda")
    (strategy,) = (one for one in planner.strategies if not one.recompute)
    phase = config.phases[-1]
    (_, tensors), allowed = planner.process(phase.name, strategy, 8).peak, planner.row(phase.name, strategy, 8).peak
    data = [f"data.{split}_{kind}={tiny_data / split}{'.csv' if kind == 'csv' else ''}" for split in ("train", "val")
            for kind in ("csv", "images")]  # fmt: skip
    phases = json.dumps([{"name": phase.name, "trainable": ["all"], "steps": 4, "lr": 1e-5}])
    keys += [*data, f"run.dir={tmp_path}", "run.name=small", f"phases={phases}", "tracking.report=false"]
    launch("--config", "configs/small.yaml", *keys, config_file="single_gpu", gpu=True)
    lines = read_lines(tmp_path / "small" / "metrics.jsonl")
    taken = max(line.get("perf/peak_memory_gb", 0.0) for line in lines) * 1e9
    assert 0.85 * tensors < taken < allowed
