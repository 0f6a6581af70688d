"""What a run stands on: read and checked before anything is written, the same from its first phase to its last."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_dist.checkpoint import Found, RunLock, Saver, Store
from hybrid_dist.config import Config, PhaseConfig
from hybrid_dist.data.annotations import Table, check_pictures, read_table, read_training
from hybrid_dist.data.augment import Augment
from hybrid_dist.data.balance import Balance
from hybrid_dist.data.dataset import Samples, training_samples
from hybrid_dist.data.degrade import check_degrade
from hybrid_dist.data.features import Places
from hybrid_dist.data.labels import ClassMap
from hybrid_dist.data.loader import BatchLoader, LoaderPool, resolve_workers
from hybrid_dist.data.mix import check_mixing
from hybrid_dist.data.order import TrainSampler, ValSampler, check_divides
from hybrid_dist.data.packed import Packed, Stale, choose_packed, open_packed
from hybrid_dist.data.pictures import read_picture
from hybrid_dist.data.source import Source
from hybrid_dist.distributed import Topology, agree, decide
from hybrid_dist.errors import UserError
from hybrid_dist.machine import has_bf16
from hybrid_dist.model.hybrid import Hybrid, build_model
from hybrid_dist.tracking import NodeFacts, Sink, Sinks, Status, Terminal, Wandb, choose_mode, logged_in
from hybrid_dist.training.description import describe_model
from hybrid_dist.training.frozen import Pixels, make_places
from hybrid_dist.training.phase import Length
from hybrid_dist.training.publish import best_step, checkpoint_name, checkpoint_phase, publish_best
from hybrid_dist.training.room import Limits, Room, choose
from hybrid_dist.training.stop import Stop
from hybrid_dist.training.tasks import Task, make_tasks
from hybrid_dist.training.utilisation import Utilisation
from hybrid_dist.training.watch import Watch


@dataclass(frozen=True)
class Job:
    """A run's fixed facts, the same from its first phase to its last."""

    config: Config
    folder: Path
    topology: Topology
    micro_batch: int
    accumulation: int
    class_maps: dict[str, ClassMap]
    tasks: list[Task]
    train_table: Table
    val_table: Table
    packed: dict[tuple[str, int], Packed]
    """By split, `train` or `val`, and size of pictures: those that are read from a packed copy."""
    store: Store
    saver: Saver
    room: Room
    lock: RunLock
    stop: Stop
    watch: Watch
    utilisation: Utilisation
    status: Status
    terminal: Terminal
    sinks: Sinks
    """Those that last for the whole run, the terminal among them."""

    @property
    def tables(self) -> dict[str, Table]:
        """By split."""
        return {"train": self.train_table, "val": self.val_table}

    @cached_property
    def balance(self) -> Balance | None:
        """Which rows an epoch draws; None: each once."""
        task = self.config.data.balance
        return Balance.of(self.train_table.labels[task]) if task is not None else None

    @property
    def sources(self) -> dict[str, Source]:
        """By split."""
        return {"train": Source(self.config.data.train_images), "val": Source(self.config.data.val_images)}

    def describe(self) -> dict[str, Any]:
        """What is to be said of any model of this run."""
        return describe_model(self.config, self.class_maps, self.tables)

    def val_picture(self, size: int, row: int) -> np.ndarray:
        """A validation picture's pixels, for a person: uint8 (height, width, 3), RGB; `size` is its phase's."""
        if ("val", size) in self.packed:
            return self.packed["val", size].picture(row)
        return read_picture(self.val_table.images / self.val_table.filename(row), size)

    def length(self, phase: PhaseConfig) -> Length:
        return Length.of(phase, len(self.train_table), self.config.train.global_batch_size)

    def steps_after(self, phase: PhaseConfig) -> int:
        """Optimizer steps of all later phases."""
        phases = self.config.phases
        return sum(self.length(later).total for later in phases[phases.index(phase) + 1 :])

    def build(self, phase: PhaseConfig, load: bool) -> Hybrid:
        """A phase's model on the host, with its configured weights if `load`, else with fresh ones.

        Raises:
            UserError: a backbone or its weights can't be had, or it can't be run as `train` says.
        """
        config = self.config
        classes = {name: len(found.classes) for name, found in self.class_maps.items()}
        learned = config.train.task_balance == "uncertainty"
        size, seed = config.size(phase), config.run.seed
        model = build_model(config.model, config.tasks, classes, size, seed, load=load, balance=learned)
        model.checkpoint_activations(config.train.checkpoint_activations)
        if config.train.compile:
            model.compile_blocks()
        return model

    @cached_property
    def train_pool(self) -> LoaderPool:
        """For the phases by name."""
        config, table, splits = self.config, self.train_table, {}
        for phase in config.phases:
            size = config.size(phase)
            held = self.packed.get(("train", size))
            splits[phase.name] = training_samples(config, table, size, phase.name, held, self.balance)
            splits[phase.name].places = make_places(config, phase, len(table))
        return self._pool(splits)

    def places(self, phase: PhaseConfig) -> Places:
        """Where the features lie that the phase keeps, as its loader processes know it."""
        places = self.train_pool.splits[phase.name].places
        assert places is not None
        return places

    @cached_property
    def val_pool(self) -> LoaderPool:
        """For the phases by name."""
        config, splits = self.config, {}
        for phase in config.phases:
            size = config.size(phase)
            plain, held = Augment(size, config.tasks, train=False), self.packed.get(("val", size))
            splits[phase.name] = Samples(self.val_table, plain, config.run.seed, phase.name, packed=held)
        return self._pool(splits)

    def _pool(self, splits: dict[str, Samples]) -> LoaderPool:
        workers = resolve_workers(self.config.data.workers, self.topology.local_world_size)
        return LoaderPool(splits, workers, self.topology.device.type == "cuda")

    def train_loader(self, phase: PhaseConfig, start: int, end: int, frozen: Pixels) -> BatchLoader:
        """The phase's steps [start, end), for this rank; `frozen`: what is kept of its samples."""
        order = self.train_order(phase, start, end)
        return self.train_pool.batches(phase.name, order, frozen.views, frozen.recall())

    def train_order(self, phase: PhaseConfig, start: int, end: int) -> TrainSampler:
        """The samples of the phase's steps [start, end), for this rank."""
        topology, train = self.topology, self.config.train
        return TrainSampler(
            len(self.train_table), train.global_batch_size, self.micro_batch,
            topology.rank, topology.world_size, self.config.run.seed, phase.name, start, end, self.balance,
        )  # fmt: skip

    def val_loader(self, phase: PhaseConfig) -> BatchLoader:
        """The phase's validation, for this rank."""
        order = ValSampler(len(self.val_table), self.micro_batch, self.topology.rank, self.topology.world_size)
        return self.val_pool.batches(phase.name, order)


def make_job(config: Config, topology: Topology, stop: Stop, limits: Limits) -> Job:
    """Read and check everything that a run stands on, writing nothing; all ranks together.

    Raises:
        UserError: something is the user's to fix.
    """
    job = agree(topology, lambda: _prepare(config, topology, stop, limits))
    for (split, size), signature in decide(topology, lambda: _choose_packed(job)).items():
        found = agree(topology, lambda: _open_packed(job, split, size, signature))  # noqa: B023 (called at once)
        job.packed[split, size] = found
        job.terminal.say(f"{split} pictures come from {found.folder}")
    decide(topology, lambda: _check_pictures(job))
    return job


def _prepare(config: Config, topology: Topology, stop: Stop, limits: Limits) -> Job:
    """Read and check everything that a run stands on but the pictures, writing nothing."""
    terminal = Terminal(quiet=not topology.is_main)
    train = config.train
    for sentence in (*check_mixing(config.data, config.tasks), *check_degrade(config.data, config.tasks)):
        terminal.say(sentence)
    if train.precision == "bf16" and topology.device.type == "cpu" and not has_bf16(topology.device):
        terminal.say(
            "warning: train.precision: this CPU does bf16 in software, ten times slower than fp32; train.precision=fp32"
            " would do"
        )
    data = config.data
    check_divides(train.global_batch_size, train.micro_batch(1), topology.world_size)
    train_table, class_maps = read_training(Path(data.train_csv), Path(data.train_images), config.tasks)
    sizes = {name: len(found.classes) for name, found in class_maps.items()}
    micro_batch = choose(config, sizes, topology, limits, terminal.say)
    val_table = read_table(Path(data.val_csv), Path(data.val_images), config.tasks, class_maps)
    if topology.world_size > len(train_table):
        raise UserError(
            f"{data.train_csv}: {len(train_table)} samples can't be shared by {topology.world_size} processes;"
            f" {len(train_table)} processes or fewer would do"
        )
    judged = [name for name, task in config.tasks.items() if task.share(name) > 0 and val_table.valid_counts()[name]]
    if not judged:
        raise UserError(f"{data.val_csv}: no label of a task that counts in val/score, so no epoch could be the best")
    classes = {name: found.classes for name, found in class_maps.items()}
    counts = {name: train_table.class_counts(name, found) for name, found in class_maps.items()}
    status = Status(config.folder, topology.is_main, terminal.say)
    phases = {phase.name for phase in config.phases}
    store = Store(config.folder / "checkpoints", config.checkpoint.keep, phases)
    place = (topology.rank, topology.world_size)
    lengths = {phase.name: Length.of(phase, len(train_table), train.global_batch_size).total for phase in config.phases}
    sinks = Sinks(_sinks(config, topology, terminal, lengths))

    def stuck(reason: str) -> None:
        status.failed(reason)
        sinks.ended("stuck", reason)
        sinks.close()

    watch = Watch(config.folder, place, config.train.stall_timeout, stuck)
    return Job(
        config=config, folder=config.folder, topology=topology, micro_batch=micro_batch,
        accumulation=check_divides(train.global_batch_size, micro_batch, topology.world_size), class_maps=class_maps,
        tasks=make_tasks(config.tasks, classes, counts), train_table=train_table, val_table=val_table, packed={},
        store=store, saver=_saver(config, topology, store, watch, terminal),
        room=Room(config, topology, micro_batch, limits.start), lock=RunLock(config.folder, terminal.say), stop=stop,
        watch=watch, utilisation=Utilisation(config, sizes, topology, terminal.say), status=status, terminal=terminal,
        sinks=sinks,
    )  # fmt: skip


def _sinks(config: Config, topology: Topology, terminal: Terminal, lengths: dict[str, int]) -> list[Sink]:
    """What this rank tells its news to. Another sink comes in here."""
    mode = choose_mode(config.tracking.wandb)
    if topology.is_main:
        if mode == "online" and not logged_in():  # wandb would ask on the terminal
            raise UserError("tracking.wandb is online, and nobody is logged in; wandb login or offline would do")
        return [terminal, *([Wandb(config, mode, lengths, terminal.say)] if mode != "off" else [])]
    node, local_rank = divmod(topology.rank, topology.local_world_size)
    return [NodeFacts(config.folder / "wandb", node)] if mode != "off" and node > 0 and local_rank == 0 else []


def _saver(config: Config, topology: Topology, store: Store, watch: Watch, terminal: Terminal) -> Saver:
    phases = config.phases
    carried = {phase.name for phase, later in itertools.pairwise(phases) if later.carry_optimizer}

    def settle(found: Found, tick: Callable[[], None]) -> None:
        """After a commit: the best comes out, and what is no longer needed goes."""
        publish_best(config.folder, found, tick)
        since = found.state["too_many_since"] or found.state["bad_since"]
        good = store.newest_name(lambda state: state.get("step", since) < since) if since is not None else None
        spare = [good] if good is not None else []  # it may have to be gone back behind all that is kept
        # As long as a checkpoint may have to be gone back to from which the next phase would begin once more.
        phases = {checkpoint_phase(name) for name in [*store.kept(found.path), *spare]} & carried
        spare += [checkpoint_name(phase, best_step(config.folder, phase) or 0) for phase in phases]
        store.prune(found.path, spare)

    return Saver(store, topology.control, terminal.say, watch.beat, settle)


def _choose_packed(job: Job) -> dict[tuple[str, int], str]:
    """The signatures of the copies to read from, by split and size."""
    found = {}
    for (split, table), size in itertools.product(job.tables.items(), job.config.sizes):
        packed = choose_packed(job.config.data.packed, table, job.sources[split], size, job.terminal.say)
        if packed is not None:
            found[split, size] = packed.signature()
    return found


def _open_packed(job: Job, split: str, size: int, signature: str) -> Packed:
    """On a rank of another machine it may not be there, or be another one."""
    try:
        packed = open_packed(job.tables[split], size, None)
    except Stale as reason:
        raise UserError(f"on {socket.gethostname()}: {reason}") from None
    if packed is None:
        raise UserError(f"on {socket.gethostname()}: there is no packed copy of {job.tables[split].csv}")
    if packed.signature() != signature:
        raise UserError(f"on {socket.gethostname()}: {packed.folder} holds other pictures than on rank 0's machine")
    return packed


def _check_pictures(job: Job) -> None:
    """Those of both splits are there, but for as many as may be bad."""
    for split, table in job.tables.items():
        if not job.sources[split].there() and all((split, size) in job.packed for size in job.config.sizes):
            continue
        missing = check_pictures(table, job.config.data.max_bad)
        if missing is not None:
            job.terminal.say(f"warning: {missing}")
