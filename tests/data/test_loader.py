"""Loader processes that serve one order after the other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.annotations import Table, read_training
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.dataset import Samples
from hybrid_dist.data.loader import LoaderPool, make_loader
from hybrid_dist.data.order import TrainSampler, ValSampler
from hybrid_dist.errors import UserError

TASKS = {"type": TaskConfig(kind="classification", column="typename")}
ROWS = 24


@pytest.fixture
def table(tmp_path: Path) -> Table:
    for row in range(ROWS):
        Image.fromarray(np.full((32, 32, 3), 5 * row, np.uint8)).save(tmp_path / f"{row}.png")
    lines = "".join(f"{row}.png,{'AB'[row % 2]}\n" for row in range(ROWS))
    (tmp_path / "t.csv").write_text(f"filename,typename\n{lines}")
    return read_training(tmp_path / "t.csv", tmp_path, TASKS)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_orders_one_after_the_other(table: Table, workers: int) -> None:
    """Catches: processes that start with each order, and hold what their parent has in memory by then; batches of an
    order that was left behind, or of another split; one that is left and goes on, and takes the next one's batches."""
    others = set(multiprocessing.active_children())
    splits = {
        name: Samples(table, Augment(32, TASKS, name != "plain"), 1, name, digest=True) for name in ("a", "b", "plain")
    }
    pool = LoaderPool(splits, workers, pin_memory=False)
    pool.start()
    processes = set(multiprocessing.active_children()) - others
    assert len(processes) == workers
    val = ValSampler(ROWS, 4, 0, 1)
    for name in ("a", "plain", "b", "plain"):
        order = val if name == "plain" else TrainSampler(ROWS, 8, 4, 0, 1, 1, name, 0, 6, None)
        wants = [(batch.rows.tolist(), batch.digests.tolist()) for batch in make_loader(splits[name], order, 0, False)]
        left = iter(pool.batches(name, order))
        assert next(left).rows.tolist() == wants[0][0]
        haves = [(batch.rows.tolist(), batch.digests.tolist()) for batch in pool.batches(name, order)]
        assert haves == wants
        assert list(left) == []
    assert len({tuple(batch.rows.tolist()) for batch in pool.batches("a", val)}) == ROWS // 4
    assert set(multiprocessing.active_children()) - others == processes


def test_processes_that_stand_still_or_die_between_two_orders(table: Table) -> None:
    """Catches: a loop that waits for one where nobody can ask it to stop; a death without its process and reason."""
    others = set(multiprocessing.active_children())
    pool = LoaderPool({"a": Samples(table, Augment(32, TASKS, False), 1, "a")}, 2, pin_memory=False)
    val = ValSampler(ROWS, 4, 0, 1)
    assert len(list(pool.batches("a", val))) == ROWS // 4
    processes = sorted(child.pid or 0 for child in set(multiprocessing.active_children()) - others)
    os.kill(processes[0], signal.SIGSTOP)
    rescue = threading.Timer(60, os.kill, (processes[0], signal.SIGCONT))
    rescue.start()
    batches = iter(pool.batches("a", val))
    assert rescue.is_alive(), "it has not waited"
    rescue.cancel()
    os.kill(processes[0], signal.SIGCONT)
    assert len(list(batches)) == ROWS // 4
    os.kill(processes[1], signal.SIGKILL)
    with pytest.raises(UserError, match=rf"loader process \d \({processes[1]}\) was ended by SIGKILL"):
        list(pool.batches("a", val))
