"""train.deterministic: what is set, and before what; and what has no deterministic algorithm is named."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from hybrid_dist.distributed.determinism import choose_algorithms
from hybrid_dist.model.heads import Head
from hybrid_dist.training import phase as phase_module


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    benchmark = torch.backends.cudnn.benchmark
    yield
    choose_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def scatter(answers: Tensor) -> Tensor:
    """As it was; by a way of which torch has no deterministic implementation on any device."""
    return torch.zeros_like(answers).put_(torch.arange(answers.numel()), answers)


def test_it_is_set_and_a_refusal_is_explained(
    tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: a flag set after CUDA has begun or left on in the next run, a traceback where a sentence would do."""
    config = tiny_config(phases=[{"name": "a", "trainable": ["all"], "steps": 1, "lr": 1e-3}])
    make_step, seen = phase_module.train_step, []

    def look(*arguments: object) -> object:
        flags = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
        seen.append((*flags, torch.backends.cudnn.benchmark, os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        return make_step(*arguments)

    def go(runs: str, deterministic: str) -> int:
        where = (f"run.dir={config.parent / runs}", f"train.deterministic={deterministic}")
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *where])
        return train.main()

    monkeypatch.setattr(phase_module, "train_step", look)
    torch.backends.cudnn.benchmark = True
    assert go("fixed", "true") == 0, "every operation of the model and of AdamW has a deterministic implementation"
    assert seen == [(True, True, False, ":4096:8")]
    answer = Head.__call__
    monkeypatch.setattr(Head, "__call__", lambda head, *given: scatter(answer(head, *given)))
    assert go("refused", "true") == 2
    said = capsys.readouterr().err
    assert "train.deterministic: put_ has no deterministic implementation; false" in said
    assert "Traceback" not in said
    assert go("free", "false") == 0
    assert seen[-1][:2] == (False, False)
