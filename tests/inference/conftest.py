"""Copies of a trained run, and models with random weights that look like an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hybrid_dist import cli
from hybrid_dist.config import parse_config
from hybrid_dist.data.labels import ClassMap
from hybrid_dist.model.hybrid import build_model
from hybrid_dist.training.description import describe_model
from tests.conftest import AIRLINES, TYPES, tiny_values

MAPS = {"type": ClassMap.from_names(TYPES), "airline": ClassMap.from_names(AIRLINES)}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "run"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `hybrid-dist` in this process: its exit code, standard output and standard error."""

    def ask(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


def write_model(folder: Path, **model: Any) -> Path:
    """A model with random weights, large enough to matter everywhere; keyword arguments are keys of the config."""
    values = tiny_values(folder, folder)
    values["model"] |= model
    config = parse_config(values, "test")
    described = describe_model(config, MAPS, {})
    counts = {name: len(classes) for name, classes in MAPS.items()}
    net = build_model(config.model, config.tasks, counts, config.data.image_size, seed=0, load=False)
    draw = torch.Generator().manual_seed(5)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(described))
    return folder


def edit_json(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
