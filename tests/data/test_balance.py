"""An epoch that draws rare classes more often: how often, and that nothing else of the order changes with it."""

import random
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_dist.data.balance import Balance
from hybrid_dist.data.order import PADDING, TrainSampler, epoch_order

labels_of_a_table = st.lists(st.integers(-1, 5), min_size=12, max_size=120).map(lambda some: np.array(some, np.int64))


@given(labels_of_a_table, st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_classes_come_by_their_root_and_blank_rows_once(labels, epoch):
    """Catches an epoch of another length, a class left out, blank labels drawn more or less often than before."""
    balance = Balance.of(labels)
    turns, rows = balance.epoch(3, "a", epoch)
    assert len(turns) == len(rows) == len(labels)
    drawn = Counter(labels[rows].tolist())
    numbers = Counter(labels.tolist())
    roots = {label: np.sqrt(count) for label, count in numbers.items() if label >= 0}
    labelled = len(labels) - numbers[-1]
    for label, root in roots.items():
        assert abs(drawn[label] - labelled * root / sum(roots.values())) < 1
        assert drawn[label] >= 1
    blank = rows[labels[rows] < 0]
    assert sorted(blank.tolist()) == np.flatnonzero(labels < 0).tolist()
    assert set(turns[labels[rows] < 0].tolist()) <= {epoch}


@given(labels_of_a_table, st.integers(1, 9))
@settings(deadline=None, max_examples=100)
def test_a_class_goes_round_its_rows_over_the_epochs(labels, epochs):
    """Catches rows that chance never draws, and one that comes twice with the same augmentation."""
    balance = Balance.of(labels)
    seen = [
        pair
        for epoch in range(epochs)
        for pair in zip(*(v.tolist() for v in balance.epoch(3, "a", epoch)), strict=True)
    ]
    assert len(set(seen)) == len(seen)
    times = Counter(row for _, row in seen)
    for label in set(labels.tolist()):
        own = [times[row] for row in np.flatnonzero(labels == label).tolist()]
        assert max(own) - min(own) <= 1
    for turn, row in seen:
        assert 0 <= turn <= times[row], "turns are counted up, none is left out"


def sampler(labels, layout, rank, start, end, balance):
    micro_batch, world_size, accumulation = layout
    batch = micro_batch * world_size * accumulation
    return TrainSampler(len(labels), batch, micro_batch, rank, world_size, 3, "a", start, end, balance)


@given(labels_of_a_table, st.integers(0, 7), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_the_same_steps_on_any_machine_and_after_any_resume(labels, start, more):
    """Catches draws that depend on ranks, micro batch or where the run was taken up again."""
    whole = list(sampler(labels, (12, 1, 1), 0, 0, start + more, Balance.of(labels)))[start:]
    for layout in ((1, 1, 12), (3, 2, 2), (2, 3, 2), (1, 12, 1)):
        ranks = [
            iter(sampler(labels, layout, rank, start, start + more, Balance.of(labels))) for rank in range(layout[1])
        ]
        for step in whole:
            keys = [key for _ in range(layout[2]) for stream in ranks for key in next(stream)]
            assert [key for key in keys if key[1] != PADDING] == [key for key in step if key[1] != PADDING]


def test_equal_classes_change_nothing_but_the_order():
    """Catches a balance that costs rows where there is nothing to balance."""
    labels = np.array([0, 1, 2, -1] * 6)
    turns, rows = Balance.of(labels).epoch(0, "a", 4)
    assert sorted(rows.tolist()) == list(range(24))
    assert set(turns.tolist()) == {4}


def test_the_draws_are_shuffled_and_no_round_is_like_another():
    """Catches an epoch class by class, and halves of a class that always come together."""
    labels = np.array([0] * 64 + [1] * 4 + [-1] * 12)
    balance = Balance.of(labels)
    (batch,) = sampler(labels, (80, 1, 1), 0, 0, 1, balance)
    turns, rows = balance.epoch(3, "a", 0)
    order = epoch_order(80, 3, "a", 0)
    assert batch == list(zip(turns[order].tolist(), rows[order].tolist(), strict=True))
    halves = set()
    for epoch in range(0, 24, 2):  # 14 draws of 4 rows: three rounds, and half of one
        times = Counter(row for row in balance.epoch(3, "a", epoch)[1].tolist() if labels[row] == 1)
        halves.add(frozenset(row for row, count in times.items() if count == 4))
    assert {len(half) for half in halves} == {2}
    assert len(halves) > 2


def test_partners_are_drawn_as_an_epoch_draws():
    """Catches a partner's class that is as common as in the table, and rows of one class favoured."""
    labels = np.array([0] * 64 + [1] * 4 + [-1] * 12)
    balance, chance = Balance.of(labels), random.Random(0)
    drawn = Counter(balance.draw(chance) for _ in range(40_000))
    epoch = Counter(label for number in range(40) for label in labels[balance.epoch(0, "a", number)[1]].tolist())
    for label, count in epoch.items():
        own = [drawn[row] for row in np.flatnonzero(labels == label).tolist()]
        assert abs(sum(own) / 40_000 - count / (40 * 80)) < 0.01
        assert max(own) < 1.4 * min(own)
