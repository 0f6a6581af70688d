"""One trajectory: who works, and in how small bites, never changes which samples make a step."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_dist.data.order import (
    PADDING,
    TrainSampler,
    ValSampler,
    check_divides,
    epoch_order,
    samples_in_step,
    steps_per_epoch,
)
from hybrid_dist.errors import UserError


@st.composite
def layouts(draw):
    """(length, micro_batch, world_size, accumulation), with at least a sample per rank."""
    micro_batch, world_size, accumulation = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return draw(st.integers(world_size, 90)), micro_batch, world_size, accumulation


def sampler(layout, rank, start, end, seed=3, phase="a"):
    length, micro_batch, world_size, accumulation = layout
    global_batch = micro_batch * world_size * accumulation
    return TrainSampler(length, global_batch, micro_batch, rank, world_size, seed, phase, start, end)


def global_batches(layout, start, end, **which):
    """Each optimizer step's samples, put together from all ranks' micro batches by the layout."""
    length, micro_batch, world_size, accumulation = layout
    ranks = [list(sampler(layout, rank, start, end, **which)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks must take the same number of micro steps"
    streams = [iter(batches) for batches in ranks]
    steps = []
    for step in range(start, end):
        real = samples_in_step(length, micro_batch * world_size * accumulation, step)
        keys = []
        for _ in range(accumulation):  # in a short last batch too
            for stream in streams:
                batch = next(stream)
                assert len(batch) == micro_batch
                keys += batch
        assert all(row == PADDING for _, row in keys[real:]), "padding stands at the end alone"
        steps.append(keys[:real])
    assert all(next(stream, None) is None for stream in streams)
    return steps


@given(layouts(), st.integers(0, 3))
@settings(deadline=None, max_examples=150)
def test_every_sample_exactly_once_an_epoch(layout, epoch):
    """Catches a dropped or repeated remainder, a row lost between ranks, and padding counted as a sample."""
    length, micro_batch, world_size, accumulation = layout
    per_epoch = steps_per_epoch(length, micro_batch * world_size * accumulation)
    steps = global_batches(layout, epoch * per_epoch, (epoch + 1) * per_epoch)
    keys = [key for step in steps for key in step]
    assert [row for _, row in keys] == epoch_order(length, 3, "a", epoch).tolist()
    assert sorted(row for _, row in keys) == list(range(length))
    assert {of for of, _ in keys} == {epoch}


@given(st.integers(1, 4), st.integers(0, 7), st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=100)
def test_the_same_steps_on_any_machine_and_after_any_resume(scale, start, more, data):
    """Catches an order that depends on ranks, micro batch or where the run was taken up again."""
    global_batch = 12 * scale
    length = data.draw(st.integers(12, 100))
    expected = global_batches((length, global_batch, 1, 1), 0, start + more)
    for world_size, micro_batch in ((1, scale), (2, 6 * scale), (3, 2), (4, 3 * scale), (12, 1)):
        layout = (length, micro_batch, world_size, global_batch // (micro_batch * world_size))
        assert global_batches(layout, start, start + more) == expected[start:]


@given(layouts(), st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, max_examples=150)
def test_length_is_what_iterating_yields(layout, start, end):
    """Catches a progress bar, or a loader, that waits for batches which never come."""
    for rank in range(layout[2]):
        part = sampler(layout, rank, start, end)
        assert len(part) == len(list(part))


def test_order_depends_on_seed_phase_and_epoch_alone():
    """Catches epochs or phases that repeat each other's order, and an order that follows Python's salted hash()."""
    orders = [epoch_order(50, *which).tolist() for which in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len({tuple(order) for order in orders}) == 4
    code = "from hybrid_dist.data.order import epoch_order; print(epoch_order(50, 0, 'b', 0).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(orders[2])


def test_order_stays_what_it_was():
    """Catches a change of generator or hash: a resumed run would see some samples twice and others not at all."""
    assert epoch_order(10, 7, "b", 2).tolist() == STORED
    assert epoch_order(0, 7, "b", 2).tolist() == []
    assert epoch_order(10, 7, "b", 2).dtype == np.int64


STORED = [5, 6, 1, 7, 2, 0, 3, 8, 4, 9]


@given(st.integers(0, 80), st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=150)
def test_validation_sees_every_row_once_with_equal_batches(length, micro_batch, world_size):
    """Catches rows counted twice in a metric, and a rank that waits alone in a collective."""
    ranks = [list(ValSampler(length, micro_batch, rank, world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(ValSampler(length, micro_batch, 0, world_size))}
    assert all(len(batch) == micro_batch for batches in ranks for batch in batches)
    in_turn = [row for turn in zip(*ranks, strict=True) for batch in turn for _, row in batch]
    assert in_turn[:length] == list(range(length))
    assert set(in_turn[length:]) <= {PADDING}


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
@settings(max_examples=300)
def test_what_does_not_divide_is_refused_with_values_that_do(global_batch, micro_batch, world_size):
    """Catches a silently changed batch size, and advice that is refused in its turn."""
    if global_batch % (micro_batch * world_size) == 0:
        accumulation = check_divides(global_batch, micro_batch, world_size)
        assert accumulation * micro_batch * world_size == global_batch
        return
    with pytest.raises(UserError) as caught:
        check_divides(global_batch, micro_batch, world_size)
    advice = str(caught.value).split("with the rest as it is, ")[1].removesuffix(" would do")
    for hint in advice.split("; or "):
        for word in hint.replace(",", " ").split():
            if word.isdigit() and hint.startswith("train.micro"):
                check_divides(global_batch, int(word), world_size)
            elif word.isdigit() and hint.startswith("train.global"):
                check_divides(int(word), micro_batch, world_size)
            elif word.isdigit():
                check_divides(global_batch, micro_batch, int(word))


def test_more_processes_than_samples_is_refused():
    """Catches ranks that train on padding alone from the first step to the last."""
    with pytest.raises(UserError, match="4 processes, but the training split has 3 samples"):
        sampler((3, 1, 4, 1), 0, 0, 1)


def test_a_sampler_carries_no_state_of_its_own():
    """Catches a second iteration that goes on where the first one stopped instead of starting over."""
    part = sampler((20, 2, 2, 2), 1, 3, 9)
    first = list(part)
    assert list(part) == first == list(pickle.loads(pickle.dumps(part)))
