"""A run: phases in order, each from where it stands to its end."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from hybrid_dist.checkpoint import Damaged, Found, PieceReader, RunLock, Saver, Store, inspect
from hybrid_dist.config import Config, PhaseConfig, load_config
from hybrid_dist.data.annotations import (
    Table,
    check_pictures,
    describe_unseen,
    read_table,
    read_training,
    table_sums,
    untrained,
)  # fmt: skip
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
from hybrid_dist.distributed import Engine, Topology, agree, decide, differences, explained, make_engine
from hybrid_dist.errors import UserError
from hybrid_dist.files import write_atomic
from hybrid_dist.machine import forget_peak_memory, give_back_freed_memory
from hybrid_dist.model.hybrid import Hybrid, build_model, check_model, describe, fit_weights
from hybrid_dist.tracking import NodeFacts, Sink, Sinks, Status, Terminal, Wandb, choose_mode, logged_in
from hybrid_dist.training.description import DESCRIPTION, describe_model
from hybrid_dist.training.frozen import Pixels, make_places, open_features, views_of, weights_sums
from hybrid_dist.training.guard import BAD_STEPS, TooManyBad, has_gone_back, note_went_back
from hybrid_dist.training.optim import param_groups, peak_rates
from hybrid_dist.training.phase import Layout, Length, PhaseLoop
from hybrid_dist.training.profile import check_folder as check_profile_folder
from hybrid_dist.training.publish import (
    best_is_there,
    best_step,
    checkpoint_name,
    checkpoint_phase,
    find_best,
    publish_best,
    publish_model,
)  # fmt: skip
from hybrid_dist.training.room import Again, Limits, Room, choose, look
from hybrid_dist.training.starts import note_start
from hybrid_dist.training.state import TrainState, check_own
from hybrid_dist.training.stop import EXIT_STOPPED, Stop, Stopped
from hybrid_dist.training.tasks import Task, make_tasks
from hybrid_dist.training.utilisation import Utilisation
from hybrid_dist.training.watch import Watch

DONE = 0
SHARED = 10.0
"""Seconds for a network disk to show another machine's file."""


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


def run(config: Config, topology: Topology, stop: Stop, only: str | None, fresh: bool) -> int:
    """Train what is left of the run, or of its phase `only`. Returns the exit code.

    Args:
        stop: Listening.

    Raises:
        UserError: something is the user's to fix; if it is found before training begins, nothing has been written.
    """
    if topology.is_main:
        stop.look_for(config.folder / "STOP")
    limits = look(config, topology, fresh)
    job = agree(topology, lambda: prepare(config, topology, stop, limits))
    for (split, size), signature in decide(topology, lambda: _choose_packed(job)).items():
        found = agree(topology, lambda: _open_packed(job, split, size, signature))  # noqa: B023 (called at once)
        job.packed[split, size] = found
        job.terminal.say(f"{split} pictures come from {found.folder}")
    decide(topology, lambda: _check_pictures(job))
    try:
        return _go(job, only, fresh)
    finally:
        job.watch.close()
        job.room.close()
        if not job.saver.busy():  # a save that an error has left behind keeps the lock until the process ends
            job.lock.release()


def _go(job: Job, only: str | None, fresh: bool) -> int:
    config, topology, terminal = job.config, job.topology, job.terminal
    _check_shared(job)
    resumes = decide(topology, lambda: _open_folder(job, only, fresh))
    found = _newest(job, lambda candidate: check_own(config, candidate)) if resumes else None
    job.saver.newest = found
    sums = _data_sums(job)
    state = agree(topology, lambda: _position(job, found, only, fresh, sums))
    if not (state.finished and state.phase == config.phases[-1].name):
        agree(topology, lambda: _start_loaders(job))
    # In a list, for the first phase to take it out: held here it would stay in memory through all the others.
    initial = [agree(topology, lambda: _first_model(job))] if found is None else []
    decide(topology, lambda: _claim_folder(job, fresh, found))
    job.room.start(lambda reason: _begins_anew(job, reason))
    try:
        agree(topology, lambda: check_profile_folder(config))
        job.utilisation.begin()
        _report_unseen(job)
        _forget_lost_best(job, state)
        _train(job, state, found, only, initial)
        _finish(job, state)
        return DONE
    except Stopped as asked:
        job.status("stopped", state.phase, state.step, str(asked))
        job.sinks.ended("stopped", str(asked))
        job.stop.done(terminal.say)
        terminal.say(f"stopped at step {state.step} ({asked}); the same command goes on from there")
        return EXIT_STOPPED
    except Again as lack:
        _begins_anew(job, str(lack))
        raise
    except UserError as error:
        reason = str(error)
        if error.shared:
            job.status("failed", state.phase, state.step, reason)
        else:
            reason = job.status.failed(_at_rank(topology, reason))
        job.sinks.ended("failed", reason)
        raise
    except Exception as error:
        job.room.wait_for_news()
        reason = job.status.failed(_at_rank(topology, f"{type(error).__name__}: {error}"))
        job.sinks.ended("failed", reason)
        raise
    finally:
        job.utilisation.close()
        job.sinks.close()


def _start_loaders(job: Job) -> None:
    """While this process is small."""
    try:
        for pool in (job.train_pool, job.val_pool):
            pool.start()
    except OSError as error:
        raise UserError(f"data.workers: no more processes can be started ({error.strerror}); fewer would do") from None


def _begins_anew(job: Job, reason: str) -> None:
    """To those who watch it is a stop that somebody goes on from; if one was asked for, nobody does."""
    job.sinks.ended("stopped", reason)
    job.sinks.close()
    if job.stop.requested():
        job.stop.done(job.terminal.say)
        job.terminal.say(f"stopped ({job.stop.reason}); the same command goes on from the newest checkpoint")
        os._exit(EXIT_STOPPED)


def _at_rank(topology: Topology, reason: str) -> str:
    return f"rank {topology.rank}: {reason}" if topology.world_size > 1 else reason


def prepare(config: Config, topology: Topology, stop: Stop, limits: Limits) -> Job:
    """Read and check everything that a run stands on but the pictures, writing nothing."""
    terminal = Terminal(quiet=not topology.is_main)
    train = config.train
    for sentence in (*check_mixing(config.data, config.tasks), *check_degrade(config.data, config.tasks)):
        terminal.say(sentence)
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


def _first_model(job: Job) -> Hybrid:
    """The model as a new run begins with it; every phase's rule is tried on it."""
    _check_models(job.config)
    model = job.build(job.config.phases[0], load=True)
    for index, phase in enumerate(job.config.phases):
        try:
            model.set_trainable(phase.trainable)
        except UserError as error:
            raise UserError(f"phases.{index}.trainable: {error}") from None
        _, why_not = views_of(phase, model.frozen(), job.length(phase))
        if why_not is not None:
            job.terminal.say(why_not)
        try:
            peak_rates(model, phase)
        except UserError as error:
            raise UserError(f"phases.{index}.{error}") from None
    return model


def _check_models(config: Config) -> None:
    """One for each size of pictures."""
    seen: set[int] = set()
    for index, phase in enumerate(config.phases):
        size = config.size(phase)
        if size in seen:
            continue
        try:
            check_model(config.model, size)
        except UserError as error:
            if not seen:  # it need not be about the size
                raise
            raise UserError(f"phases.{index}.image_size: {error}") from None
        seen.add(size)


def _check_shared(job: Job) -> None:
    """Every machine writes its own part of a checkpoint, so all must see one disk: a file that rank 0 lays there."""
    topology, folder = job.topology, job.folder
    if topology.world_size == topology.local_world_size:
        return

    def lay() -> Path:
        place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        file = place / f".{folder.name}.seen-by-all-{os.getpid()}-{time.time_ns():x}"
        with _disk(place):
            file.touch()
        return file

    def see() -> None:
        until = time.monotonic() + SHARED
        while not file.exists():
            if time.monotonic() > until:
                raise UserError(
                    f"rank {topology.rank} on {socket.gethostname()} doesn't see what rank 0 writes into {file.parent}:"
                    " all machines need one disk for the run; another run.dir would do"
                )
            time.sleep(0.1)

    file = decide(topology, lay)
    try:
        agree(topology, see)
    finally:
        if topology.is_main:
            file.unlink(missing_ok=True)


def check_folder(config: Config, only: str | None, fresh: bool) -> bool:
    """Whether the run's folder holds this very run already.

    Raises:
        UserError: a phase that does not exist; a folder that is another run's, or no run's.
    """
    names = [phase.name for phase in config.phases]
    if only is not None and only not in names:
        raise UserError(f"--phase {only}: this config has the phases {', '.join(names)}")
    folder = config.folder
    if fresh or not _is_used(folder):
        return False
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run's folder (it has no config.yaml); another run.name would do")
    there, here = load_config(folder / "config.yaml").identity(), config.identity()
    differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
    if differing:
        what = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing[:4])
        raise UserError(f"{folder} belongs to another config: {what}. Another run.name, or --fresh, would do")
    return True


def _data_sums(job: Job) -> dict[str, str]:
    """SHA-256 of each split's CSV, and of the classes that its labels count in; the same on all ranks.

    Raises:
        UserError: they are not.
    """
    sums = table_sums(job.config.data)
    for name, classes in job.class_maps.items():
        text = json.dumps(classes.to_json(), sort_keys=True)
        sums[f"the classes of {name}"] = hashlib.sha256(text.encode()).hexdigest()
    found = differences(job.topology.control.to_all({"host": socket.gethostname(), "same": sums}))
    if found:
        raise UserError(found, shared=True)
    return sums


def _is_used(folder: Path) -> bool:
    """Whether there is a run in it, or anything else but what a start that was cut off at once has left."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def _open_folder(job: Job, only: str | None, fresh: bool) -> bool:
    """Rank 0: keep other jobs off a folder that is there already, and see whether it holds this very run.

    What a save that was cut off has left is put in order first: it may be the newest checkpoint.
    """
    resumes = check_folder(job.config, only, fresh)
    if job.folder.is_dir():
        with _disk(job.folder):
            job.lock.take()
            resumes = check_folder(job.config, only, fresh)  # another job may have been here until just now
            if resumes:
                job.store.sweep()
    return resumes


def _newest(job: Job, accept: Callable[[Found], None]) -> Found | None:
    """The checkpoint to go on from; rank 0 looks and decides, the others follow."""
    found = None
    if job.topology.is_main:
        found = job.store.newest(accept, job.terminal.say)
    return job.topology.control.from_main(found)


def _claim_folder(job: Job, fresh: bool, found: Found | None) -> None:
    """Make the run's folder, with its config; under `--fresh` an old one keeps everything under another name.

    In a folder that goes on, a best that an earlier start was cut off in comes out.
    """
    folder = job.folder
    with _disk(folder):
        if fresh and job.lock.held and _is_used(folder):
            _keep_old(job)
        if not job.lock.held:
            folder.mkdir(parents=True, exist_ok=True)
            job.lock.take()
            if _is_used(folder):
                raise UserError(f"another job has begun a run in {folder} just now; start again to go on with that one")
        write_atomic(folder / "config.yaml", job.config.to_yaml())
        write_atomic(folder / DESCRIPTION, json.dumps(job.describe(), indent=1, ensure_ascii=False) + "\n")
        job.stop.clear_stale(job.terminal.say)
        if found is not None:
            publish_best(job.folder, found, verify=True)


def _keep_old(job: Job) -> None:
    """Rename the folder, which is locked here."""
    folder = job.folder
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = (f"{folder.name}.{stamp}{more}" for more in ("", *(f"-{count}" for count in range(2, 100))))
    kept = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(kept)
    job.lock.release()
    job.terminal.say(f"the old run is kept as {kept}")


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """What the disk refuses in here is the user's to fix."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None


def _report_unseen(job: Job) -> None:
    for line in describe_unseen(job.val_table.unseen):
        job.terminal.say(f"warning: validation: {line}")
    for line in describe_unseen(untrained(job.train_table, job.val_table, job.class_maps)):
        job.terminal.say(f"warning: validation: {line}")


def _forget_lost_best(job: Job, state: TrainState) -> None:
    """After going back behind damaged checkpoints the best may be one that has been pruned since, and overwritten."""
    phase, step = state.phase, state.best_step
    if state.finished or step is None or decide(job.topology, lambda: best_is_there(job.folder, phase, step)):
        return
    job.terminal.say(f"warning: the best so far, of step {step}, is gone or damaged; it will be one from here on")
    state.best_score, state.best_step, state.best_metrics, state.best_temperature = None, None, {}, {}
    state.stale = 0


def _position(job: Job, found: Found | None, only: str | None, fresh: bool, sums: dict[str, str]) -> TrainState:
    """Where the run stands: at its newest checkpoint, or at its beginning.

    Raises:
        UserError: the data is not what the run was trained on; the phase `only` is not next.
    """
    names = [phase.name for phase in job.config.phases]
    if found is None:
        traces = [*job.folder.glob("phase_*/best.json"), *job.folder.glob("checkpoints/[!.]*")]
        if traces and not fresh:
            raise UserError(f"{job.folder}: there is {traces[0]}, but no valid checkpoint; --fresh would start over")
        state = TrainState(names[0], data=sums)
    else:
        state = TrainState.from_dict(found.state)
        changed = [key for key in sums if sums[key] != state.data.get(key)]
        if changed:
            raise UserError(f"{' and '.join(changed)}: not what {job.folder} was trained on; --fresh would start over")
    next_phase = names.index(state.phase) + (1 if state.finished else 0)
    if only is not None and names.index(only) > next_phase:
        before = names[names.index(only) - 1]
        raise UserError(f"--phase {only} needs phase {before} finished first; --phase {names[next_phase]} would do now")
    return state


def _train(job: Job, state: TrainState, found: Found | None, only: str | None, initial: list[Hybrid]) -> None:
    """Go through the phases that are left, or through `only`; `state` moves along."""
    names = [phase.name for phase in job.config.phases]
    for index, phase in enumerate(job.config.phases):
        if only not in (None, phase.name):
            continue
        at = names.index(state.phase)
        if index < at or (index == at and state.finished):
            job.terminal.say(f"phase {phase.name} is finished")
            continue
        if index > at:
            state.begin(phase.name)
        found = _run_guarded(job, phase, state, found, initial.pop() if initial else None)


def _run_guarded(job: Job, phase: PhaseConfig, state: TrainState, found: Found | None, model: Hybrid | None) -> Found:
    """As `_run_phase`; after too many bad steps in a row once more, from the last good checkpoint."""
    try:
        return _run_phase(job, phase, state, found, model)
    except TooManyBad as error:
        reason, since = f"phase {phase.name}: {error}", error.since
    del model
    good = _go_back(job, phase, state, reason, since)
    try:
        return _run_phase(job, phase, state, good, None)
    except TooManyBad as error:
        raise UserError(_no_way_on(f"phase {phase.name}: {error}"), shared=True) from None


def _no_way_on(reason: str) -> str:
    return (
        f"{reason}. Going back to the last good checkpoint has not helped: {BAD_STEPS} names the steps and their"
        " samples; other pictures or labels there, or a lower learning rate in a new run, would do"
    )


def _go_back(job: Job, phase: PhaseConfig, state: TrainState, reason: str, since: int) -> Found:
    """Put `state`, and the disk, to the last good checkpoint before step `since`, once; all ranks together.

    Raises:
        UserError: the phase has gone back already, or there is nothing to go back to.
    """
    job.watch.beat("going back to the last good checkpoint")
    if decide(job.topology, lambda: has_gone_back(job.folder, phase.name)):
        raise UserError(_no_way_on(reason), shared=True)
    good = _newest(job, lambda candidate: _check_good(job, phase, since, candidate))
    if good is None:
        none = "There is no good checkpoint to go back to; other pictures, labels or weights, or a lower learning rate"
        raise UserError(f"{reason}. {none} in a new run, would do", shared=True)
    abandoned = state.step
    state.become(TrainState.from_dict(good.state))

    def tidy() -> None:
        with _disk(job.folder):
            job.store.drop_after(good.state["step"])  # a stop before they are made anew must not find them
            note_went_back(job.folder, phase.name, abandoned, good.path.name)
            Pixels(job.folder).drop()  # what a disk or a device gave may be what was bad
            publish_best(job.folder, good, job.watch.beat, verify=True)

    decide(job.topology, tidy)
    _forget_lost_best(job, state)
    if state.phase != phase.name:
        state.begin(phase.name)
    job.saver.newest = good
    job.sinks.close()  # they begin once more, with metrics.jsonl cut back; what they were told of the steps may be lost
    job.sinks.warned(f"{reason}; back to {good.path.name}, once")
    return good


def _check_good(job: Job, phase: PhaseConfig, since: int, found: Found) -> None:
    """Raises `Damaged` for what is not to be gone back to: it stands among bad steps, or before another phase."""
    check_own(job.config, found)
    state = TrainState.from_dict(found.state)
    names = [each.name for each in job.config.phases]
    if state.phase == phase.name and (state.bad_streak > 0 or state.step >= since):
        raise Damaged("it is of a step among the bad ones, or after them")
    if state.phase != phase.name and not (state.finished and names.index(state.phase) + 1 == names.index(phase.name)):
        raise Damaged(f"it is not what phase {phase.name} begins with")


def _run_phase(job: Job, phase: PhaseConfig, state: TrainState, found: Found | None, model: Hybrid | None) -> Found:
    """Take one phase from `state` to its end; `found` is the newest checkpoint, this phase's or the one's before."""
    job.watch.beat("building the model")
    job.sinks.begin(state, state.positions.get("metrics", 0))
    forget_peak_memory(job.topology.device)
    resumed = found is not None and found.state["phase"] == phase.name
    if model is None:
        assert found is not None
        model = job.build(phase, load=False)
        model.load_state_dict(fit_weights(job.config.model, _weights(job, phase, found, Layout.of(model)), model))
    model.set_trainable(phase.trainable)
    _announce(job, phase, state, model)
    layout = Layout.of(model)
    weights = weights_sums(model) if phase.cache_features is not None and job.topology.is_main else {}
    optimizer = found.reader() if found is not None and resumed else _carried(job, phase, found, layout)
    peaks, updates = peak_rates(model, phase), optimizer.step if optimizer is not None else None
    groups = param_groups(model, job.config.train.weight_decay, updates, peaks)
    job.watch.beat("building the engine")
    with job.room.guarded(phase.name, state), _engine(job, model, groups) as engine:
        if optimizer is not None:
            engine.load_optimizer(optimizer)
        if resumed:
            engine.load_extra_state(state.engine)
            engine.load_average(optimizer)
        frozen = open_features(job, phase, engine, state.data, weights)
        # What comes before may take its time: kernels are compiled, a cluster's disk wakes up. A signal to all ranks
        # shall not find some of them before this line and some behind it.
        job.topology.control.barrier()
        job.stop.wait_for_the_loop()
        job.watch.start(job.topology.control)
        job.status("running", state.phase, state.step, job.topology.label)
        with explained():
            last = PhaseLoop(job, phase, state, engine, layout, max(peaks.values()), frozen).run()
        if job.topology.is_main:
            frozen.drop()
        return last


@contextlib.contextmanager
def _engine(job: Job, model: Hybrid, groups: list[dict[str, Any]]) -> Iterator[Engine]:
    engine = make_engine(job.topology, model, groups, job.config.train, job.micro_batch, job.accumulation)
    try:
        yield engine
    finally:
        engine.close()
        give_back_freed_memory()  # the next phase lays its own out


def _weights(job: Job, phase: PhaseConfig, found: Found, layout: Layout) -> dict[str, torch.Tensor]:
    """The weights that a phase goes on from: its own checkpoint's, or the best or last of the phase before, which are
    means if it kept any."""
    before = found.state["phase"]
    if before == phase.name:
        return found.reader().weights(layout.shapes)
    if phase.start == "last":
        shapes = {name: torch.Size(shape) for name, shape in found.state["shapes"].items()}  # of its own size
        return found.reader().weights(shapes, averaged=True)
    return load_file(decide(job.topology, lambda: find_best(job.folder, before, found.state["best_step"])))


def _carried(job: Job, phase: PhaseConfig, found: Found | None, layout: Layout) -> PieceReader | None:
    """The optimizer's state that a phase begins with, if it is to have any: as it was at the weights it begins with.

    A table of positions that has another shape in this phase begins anew: its moments belong to other places.
    """
    begins = _begins_at(job, phase, found) if found is not None and phase.carry_optimizer else None
    if begins is None:
        return None
    shapes = begins.state["shapes"]
    reader = begins.reader()
    reader.forget_steps(name for name, shape in layout.shapes.items() if shapes.get(name) != list(shape))
    return reader


def _begins_at(job: Job, phase: PhaseConfig, found: Found) -> Found | None:
    """The checkpoint of the weights that a phase begins with; `found` is the last one of the phase before."""
    if phase.start == "last" or found.state["best_step"] == found.state["step"]:
        return found
    path, best = job.store.folder / checkpoint_name(found.state["phase"], found.state["best_step"]), None
    if job.topology.is_main:
        try:
            best = inspect(path)
        except Damaged as reason:
            job.terminal.say(f"warning: phase {phase.name} begins without the optimizer's state of {path}: {reason}")
    return job.topology.control.from_main(best)


def _announce(job: Job, phase: PhaseConfig, state: TrainState, model: Hybrid) -> None:
    length, counts = job.length(phase), describe(model)["all"]
    at = f", from step {state.phase_step}" if state.phase_step else ""
    job.terminal.say(
        f"phase {phase.name}: {', '.join(phase.trainable)}"
        f" ({counts['trainable'] / 1e6:.1f} of {counts['total'] / 1e6:.1f} M parameters) for {length.total} steps"
        f" of {job.config.train.global_batch_size} on {job.topology.label}{at}"
    )
    if job.topology.is_main:
        note_start(job.folder, state, job.topology)


def _publish(job: Job, state: TrainState) -> None:
    with _disk(job.folder):
        publish_model(job.folder, state.phase, state.best_step, job.describe())
    Pixels(job.folder).drop()  # the last phase may have been cut off right at its end


def _finish(job: Job, state: TrainState) -> None:
    """Say what is left; after the last phase, make `model/`."""
    names = [phase.name for phase in job.config.phases]
    left = names[names.index(state.phase) + (1 if state.finished else 0) :]
    if left:
        reason = f"phase {state.phase} is finished" if state.finished else f"phase {state.phase} is not finished yet"
        reason += f", {' and '.join(left)} left"
    else:
        reason = "all phases are finished"
        decide(job.topology, lambda: _publish(job, state))
        facts = {"step": state.best_step, "metrics": state.best_metrics}
        job.sinks.published(str(job.folder.absolute() / "model"), facts)
    if state.finished:
        job.status("finished", state.phase, state.step, reason)
        job.sinks.ended("finished", reason)
    job.terminal.say(f"{reason}: {job.folder}")
