"""Batches: the right labels beside the right pixels, whoever made them, and workers that stay at work."""

import io
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from multiprocessing import resource_sharer

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from PIL import Image

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.annotations import read_training
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.dataset import Samples, pixel_digest
from hybrid_dist.data.loader import make_loader, resolve_workers
from hybrid_dist.data.order import PADDING, TrainSampler, ValSampler
from hybrid_dist.data.pictures import BACKGROUND
from hybrid_dist.errors import UserError

TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "airline": TaskConfig(kind="classification", column="airlinename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "block": TaskConfig(kind="regression", column="block"),
}
ROWS = 22
SIZE = 32


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """22 noisy pictures; row i has type i % 3, and blanks in a pattern of its own for each task."""
    folder = tmp_path_factory.mktemp("split")
    lines = ["filename,typename,airlineid,airlinename,clarity,block"]
    for row in range(ROWS):
        noise = np.random.default_rng(row).integers(0, 255, (20, 40 + row, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{row}.png")
        airline = "" if row % 2 else f"airline {row % 4}"
        clarity, block = "" if row % 3 == 1 else row / 100, "" if row % 5 == 0 else row / 50
        lines.append(f"{row}.png,type {row % 3},{row % 4},{airline},{clarity},{block}")
    (folder / "train.csv").write_text("\n".join(lines))
    return read_training(folder / "train.csv", folder, TASKS)[0]


def samples(table, train=True, **more):
    return Samples(table, Augment(SIZE, TASKS, train), seed=1, phase="a", **more)


def train_sampler(rank=0, world_size=1, micro_batch=4, start=0, end=6):
    return TrainSampler(ROWS, 8, micro_batch, rank, world_size, 1, "a", start, end)


def trajectory(table, workers, **which):
    """Row, digest and airline of all real samples that a loader yields, in order."""
    found = []
    for batch in make_loader(samples(table, digest=True), train_sampler(**which), workers, pin_memory=False):
        columns = (batch.rows, batch.digests, batch.labels["airline"])
        found += [entry for entry in zip(*(column.tolist() for column in columns), strict=True) if entry[0] != PADDING]
    return found


def test_digests_do_not_depend_on_workers_ranks_micro_batch_or_resume(table):
    """Catches augmentation drawn from a worker's or a rank's own generator, and one repeated each epoch."""
    alone = trajectory(table, 0)
    assert len(alone) == 2 * ROWS
    assert sorted(row for row, _, _ in alone[:ROWS]) == list(range(ROWS))
    assert len({digest for _, digest, _ in alone}) == 2 * ROWS
    assert trajectory(table, 1) == trajectory(table, 2) == alone
    assert trajectory(table, 2, start=2) == alone[16:]
    ranks = [trajectory(table, 0, rank=rank, world_size=2, micro_batch=2) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)


def test_labels_belong_to_their_rows_and_padding_has_none(table):
    """Catches labels shifted against pictures, and padding that counts as class 0 or a score of 0."""
    rows = [5, PADDING, 0, 21, 4]
    batch = samples(table, train=False, digest=True).__getitems__([(0, row) for row in rows])
    assert batch.rows.tolist() == rows
    assert batch.labels["type"].tolist() == [2, -1, 0, 0, 1]
    assert batch.labels["airline"].tolist() == [-1, -1, 0, -1, 0]
    expected = torch.tensor([0.05, torch.nan, 0, 0.21, torch.nan])
    torch.testing.assert_close(batch.labels["clarity"], expected, equal_nan=True)
    assert torch.isnan(batch.labels["block"]).tolist() == [True, True, True, False, False]
    assert (batch.labels["type"].dtype, batch.labels["block"].dtype) == (torch.int64, torch.float32)
    assert not batch.images[1].any()
    assert batch.digests[1] == 0
    for place, row in ((0, 5), (4, 4)):
        with Image.open(table.images / f"{row}.png") as image:
            pixels = Augment(SIZE, TASKS, train=False)(np.array(image), (), 0)
        assert (batch.images[place].permute(1, 2, 0).numpy() == pixels).all()
        assert batch.digests[place] == pixel_digest(pixels)


def test_augmentation_is_told_which_labels_a_sample_really_has(table):
    """Catches a blank label protecting a sample, or a label that protects its neighbour in the batch."""
    told = {}

    class Recorder(Augment):
        def __call__(self, picture, present, key, harm=None):
            told[picture.shape[1] - 40] = set(present)
            return super().__call__(picture, present, key, harm)

    Samples(table, Recorder(SIZE, TASKS, train=True), 1, "a").__getitems__([(0, row) for row in range(ROWS)])
    for row in range(ROWS):
        blanks = (("airline", row % 2), ("clarity", row % 3 == 1), ("block", row % 5 == 0))
        assert told[row] == set(TASKS) - {task for task, blank in blanks if blank}


def test_a_batch_crosses_the_queue_channels_last(table):
    """Catches a copy into another layout, or labels that arrive as something else than tensors."""
    (batch,) = make_loader(samples(table), ValSampler(ROWS, ROWS, 0, 1), 1, pin_memory=False)
    here = samples(table).__getitems__([(0, row) for row in range(ROWS)])
    for one in (batch, pickle.loads(pickle.dumps(here))):
        assert one.images.shape == (ROWS, 3, SIZE, SIZE)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        assert (one.images == here.images).all()
        assert one.digests is None
        for task, values in here.labels.items():
            torch.testing.assert_close(one.labels[task], values, equal_nan=True, rtol=0, atol=0)


def test_validation_can_be_iterated_again_and_ranks_agree_on_its_length(table):
    """Catches a val loader that is empty the second time, or ends early on one rank."""
    for rank in (0, 1):
        loader = make_loader(samples(table, train=False), ValSampler(ROWS, 4, rank, 2), 1, pin_memory=False)
        rows = [[batch.rows.tolist() for batch in loader] for _ in range(2)]
        assert rows[0] == rows[1]
        assert len(rows[0]) == len(loader) == 3


def test_loading_leaves_the_global_generator_alone(table):
    """Catches dropout that changes with every validation or restart: torch's loader draws a seed each time."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for workers in (0, 1):
        for _ in make_loader(samples(table), train_sampler(end=1), workers, pin_memory=False):
            pass
    assert (torch.get_rng_state() == before).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_is_a_sample_without_labels_in_any_process(tmp_path, workers):
    """Catches a run that dies of one file, or learns from what is not there; a bad one that changes its neighbours."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    for row in range(6):
        (tmp_path / f"{row}.png").write_bytes(out.getvalue() if row != 4 else b"<html>")
    text = "filename,typename,clarity\n" + "".join(f"{row}.png,A,0.5\n" for row in range(6))
    (tmp_path / "train.csv").write_text(text)
    tasks = {"type": TASKS["type"], "clarity": TASKS["clarity"]}
    table, _ = read_training(tmp_path / "train.csv", tmp_path, tasks)
    split = Samples(table, Augment(SIZE, tasks, False), 0, "a", digest=True)
    batches = list(make_loader(split, ValSampler(6, 2, 0, 1), workers, False))
    assert [batch.rows.tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert [batch.bad for batch in batches] == [{}, {}, {4: "is no picture, it starts with b'<html>'"}]
    assert batches[2].labels["type"].tolist() == [-1, 0]
    assert batches[2].labels["clarity"].isnan().tolist() == [True, False]
    assert batches[2].digests.tolist() == [0, int(batches[0].digests[0])]
    assert (batches[2].images[0].permute(1, 2, 0).numpy() == BACKGROUND).all()
    assert table.labels["type"].tolist() == [0] * 6, "the table itself stays"


def test_a_loader_process_that_dies_is_named(table):
    """Catches torch's RuntimeError with a process id and no more; one raised in the middle of something else."""
    before = signal.getsignal(signal.SIGCHLD)

    class Deadly(Samples):
        def picture(self, row):
            if self.table.filename(row) == "7.png":
                os.kill(os.getpid(), signal.SIGKILL)
            return super().picture(row)

    split = Deadly(table, Augment(SIZE, TASKS, False), 0, "a")
    loader = make_loader(split, ValSampler(12, 2, 0, 1), 2, pin_memory=False)
    with pytest.raises(UserError) as caught:
        list(loader)
    pattern = rf"loader process 1 \(\d+\) was ended by SIGKILL at {table.images}/7\.png; .*data\.workers"
    assert re.match(pattern, str(caught.value)), str(caught.value)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_loader_process_that_is_about_to_die_is_named(table, tmp_path):
    """Catches the socket's own error: a dying process's sockets close first, and torch finds it alive still."""
    deaf = tmp_path / "deaf"

    class Dying(Samples):
        def picture(self, row):
            if self.table.filename(row) == "4.png":
                resource_sharer._resource_sharer._listener.close()
                deaf.touch()
                time.sleep(600)
            return super().picture(row)

    split = Dying(table, Augment(SIZE, TASKS, False), 0, "a")
    others = multiprocessing.active_children()
    batches = iter(make_loader(split, ValSampler(12, 2, 0, 1), 1, pin_memory=False))
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    next(batches)  # the processes are given their work at the first
    waited_until = time.monotonic() + 60
    while not deaf.exists() and time.monotonic() < waited_until:
        time.sleep(0.01)
    threading.Timer(0.3, worker.kill).start()
    with pytest.raises(UserError, match=rf"^loader process 0 \({worker.pid}\) was ended by SIGKILL at .*4\.png"):
        list(batches)


def test_workers_outlive_signals_to_the_group_but_obey_their_parent(table):
    """Catches a SIGTERM to the whole job that kills the workers before the main process has saved its checkpoint."""
    others = multiprocessing.active_children()
    # Arrow has threads by now, as after reading a table: a forked worker gets new ones before its first line of Python.
    pa.concat_tables([pa.table({"x": range(10)})] * 4).take(list(range(40)))
    pa.csv.read_csv(pa.py_buffer(b"a,b\n" + b"1,2\n" * 300_000))
    loader = iter(make_loader(samples(table), train_sampler(end=300), 2, pin_memory=False))
    for _ in range(4):
        next(loader)
    workers = [worker for worker in multiprocessing.active_children() if worker not in others]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # From another process than the parent, as a launcher or a scheduler does.
            os.spawnlp(os.P_WAIT, "kill", "kill", f"-{int(number)}", str(worker.pid))
    for _ in range(40):
        next(loader)
    assert all(worker.is_alive() for worker in workers)
    del loader
    deadline = time.monotonic() + 20
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)


def test_auto_workers_share_the_machine(monkeypatch):
    """Catches every rank starting a worker per core, and a share of less than one core becoming negative."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    assert [resolve_workers("auto", ranks) for ranks in (1, 4, 16, 32, 64)] == [16, 7, 1, 0, 0]
    assert resolve_workers(5, 64) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_pinning_keeps_the_layout(table):
    """Catches a pinned copy in another layout, or a batch that the loader hands on unpinned."""
    for workers in (0, 1):
        batch = next(iter(make_loader(samples(table), train_sampler(), workers, pin_memory=True)))
        assert batch.images.is_pinned()
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert all(values.is_pinned() for values in batch.labels.values())
