"""Looks at single steps: when, what they cost, and what happens where none is to be had."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hybrid_dist.distributed import BACKWARD, span
from hybrid_dist.training import glance as module
from hybrid_dist.training.glance import BUDGET, FIRST, Glance


def topology(rank: int = 0, world_size: int = 2) -> Any:
    return SimpleNamespace(is_main=rank == 0, world_size=world_size, device=torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that Glance goes by: real, and what is added to it."""
    real, ahead = time.monotonic, SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: real() + ahead.seconds))
    return ahead


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps(glance: Glance, numbers: range, pauses: tuple[int, ...] = (), sleep: float = 0.02) -> dict[int, float]:
    """What is seen, by the step after which it was."""
    seen = {}
    values = torch.ones(1_000_000)
    for number in numbers:
        with glance.step(number, number in pauses), span(BACKWARD):
            dist.all_reduce(values)
            time.sleep(sleep)
        share = glance.take()
        if share is not None:
            seen[number] = share
    return seen


def test_when_it_looks(group: None, clock: SimpleNamespace) -> None:
    """Catches: a look at the slow first steps, at one with a validation in it, at each step, or never again; a share
    that is of something else than the step."""
    said: list[str] = []
    glance = Glance(topology(), True, 1, said.append)
    seen = steps(glance, range(1, 40), pauses=(FIRST,))
    assert list(seen) == [FIRST + 1]
    assert 0 < seen[FIRST + 1] < 0.9, "it sleeps most of the time"
    rests = glance._rests_until - module.time.monotonic()
    assert 0 < rests < 5 / BUDGET
    clock.seconds += rests
    assert list(steps(glance, range(40, 60))) == [40]
    assert steps(glance, range(60, 80)) == {}
    assert said == []


def test_where_it_does_not(group: None) -> None:
    """Catches: a look where there is nobody to wait for, on each rank, where it is off, or at too much."""
    assert steps(Glance(topology(), True, 9, pytest.fail), range(1, 10), sleep=0) == {}
    for none in (topology(world_size=1), topology(rank=1)):
        assert steps(Glance(none, True, 1, pytest.fail), range(1, 10), sleep=0) == {}
    assert steps(Glance(topology(), False, 1, pytest.fail), range(1, 10), sleep=0) == {}


def test_none_is_to_be_had(group: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a training that ends for it, words of Kineto's own, a look that is tried again at each step."""
    said: list[str] = []

    def no_space(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "exported", no_space)
    assert steps(Glance(topology(), True, 1, said.append), range(1, 20), sleep=0) == {}
    assert said == ["warning: perf/communication will be missing: [Errno 28] No space left on device"]
    assert capfd.readouterr().err == ""


def test_a_step_that_fails(group: None) -> None:
    """Catches: an error of a step that a look hides, or a trace that stays open."""
    glance = Glance(topology(), True, 1, pytest.fail)
    steps(glance, range(1, FIRST), sleep=0)
    with pytest.raises(KeyError), glance.step(FIRST, False):
        raise KeyError
    assert glance.take() is None
    assert list(steps(glance, range(FIRST + 1, 10), sleep=0)) == [FIRST + 1]
