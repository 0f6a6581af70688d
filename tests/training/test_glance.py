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
from hybrid_dist.training.glance import BUDGET, FIRST, MOST, Glance

STEP, SLOWER, READING = 0.02, 0.03, 0.5
"""Seconds of a step, by how much more one takes that is looked at, and of reading what was seen."""


def topology(rank: int = 0, world_size: int = 2) -> Any:
    return SimpleNamespace(is_main=rank == 0, world_size=world_size, device=torch.device("cpu"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that Glance goes by: it only moves as `steps` and the reading of a trace move it."""
    now, read = SimpleNamespace(seconds=100.0), module.exported

    def slowly(*arguments: Any) -> Any:
        now.seconds += READING
        return read(*arguments)

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    monkeypatch.setattr(module, "exported", slowly)
    return now


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def steps(
    glance: Glance, numbers: range, clock: Any, pauses: tuple[int, ...] = (), ahead: bool = False
) -> dict[int, float]:
    """What is seen, by the step after which it was; `ahead`: wishes for the next step are told in this one."""
    seen = {}
    values = torch.ones(1_000_000)
    told = 0
    for number in numbers:
        resting = glance._rests_until
        with glance.step(number, number in pauses), span(BACKWARD):
            told = told if ahead else glance.wish()
            glance.agree(told)
            told = glance.wish() if ahead else 0
            dist.all_reduce(values)
            time.sleep(0.01)
            clock.seconds += STEP + (SLOWER if resting == float("inf") else 0)
        share = glance.take()
        if share is not None:
            seen[number] = share
    return seen


@pytest.mark.parametrize("ahead", [False, True])
def test_when_it_looks(group: None, clock: SimpleNamespace, ahead: bool) -> None:
    """Catches: a look at the slow first steps, at one with a validation in it, twice in a row, or never again; one that
    costs more than it may; a share that is of something else than the step."""
    first = FIRST + 1 + ahead
    glance = Glance(topology(), True, 1, pytest.fail)
    seen = steps(glance, range(1, 40), clock, pauses=(first,), ahead=ahead)
    # The wish comes anew in the step that pauses, or, as its facts have been told by then, in the one after it.
    assert list(seen) == [first + 1 + ahead]
    (share,) = seen.values()
    assert 0 < share < 0.9, "it sleeps most of the time"
    rests = glance._rests_until - clock.seconds + STEP * (39 - first - 1 - ahead)
    # A step that is slowed counts with a usual one at the most.
    assert rests == pytest.approx((READING + STEP) / BUDGET)
    assert steps(glance, range(40, 60), clock, ahead=ahead) == {}
    clock.seconds += rests
    assert list(steps(glance, range(60, 80), clock, ahead=ahead)) == [61 + ahead]


def test_where_it_does_not(group: None, clock: SimpleNamespace) -> None:
    """Catches: a look where there is nobody to wait for, where it is off, or at too much; a rank that wishes for one
    beside the first, or reads what that reads."""
    off = [(topology(world_size=1), True, 1), (topology(), False, 1), (topology(), True, MOST + 1)]
    for where, wanted, accumulation in off:
        assert steps(Glance(where, wanted, accumulation, pytest.fail), range(1, 10), clock) == {}
    other = Glance(topology(rank=1), True, 1, pytest.fail)
    assert steps(other, range(1, 10), clock) == {}
    other.agree(1)
    begun = clock.seconds
    assert steps(other, range(10, 12), clock) == {}
    assert clock.seconds - begun < READING


@pytest.mark.parametrize("found", [OSError(28, "No space left on device"), {}, {"traceEvents": []}])
def test_none_is_to_be_had(
    found: Any, group: None, clock: SimpleNamespace, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: a training that ends for it, words of Kineto's own, a look that is tried again at each step."""
    said: list[str] = []

    def exported(*_: Any) -> Any:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(module, "exported", exported)
    assert steps(Glance(topology(), True, 1, said.append), range(1, 20), clock) == {}
    (line,) = said
    assert line.startswith("warning: perf/communication will be missing: ")
    assert capfd.readouterr().err == ""


def test_a_step_that_fails(group: None, clock: SimpleNamespace) -> None:
    """Catches: an error of a step that a look hides, or a trace that stays open."""
    glance = Glance(topology(), True, 1, pytest.fail)
    steps(glance, range(1, FIRST + 1), clock)
    with pytest.raises(KeyError), glance.step(FIRST + 1, False):
        raise KeyError
    assert glance.take() is None
    again = Glance(topology(), True, 1, pytest.fail)
    assert list(steps(again, range(1, 10), clock)) == [FIRST + 1]
