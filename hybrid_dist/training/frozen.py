"""Frozen branches run once over a few views of each picture; from then on what they gave is read from disk.

Turns of a phase count from 0, an epoch each. In turn t a sample is view t modulo K. In the first K turns the branches
run, and a thread writes what they give; in all others it is read. That rule, and not what happens to be there,
decides: a resumed run reads exactly what the uninterrupted one reads. What is missing then is computed, and kept.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from hybrid_dist.config import Config, PhaseConfig
from hybrid_dist.data.dataset import Batch
from hybrid_dist.data.features import (
    INDEX,
    Entry,
    FeatureTensors,
    Log,
    Places,
    Recall,
    Stored,
    check_room,
    entry_of,
    gigabytes,
)  # fmt: skip
from hybrid_dist.distributed import Engine, agree, decide
from hybrid_dist.errors import UserError
from hybrid_dist.files import read_object, write_atomic
from hybrid_dist.model.backbones import Features
from hybrid_dist.model.hybrid import Hybrid
from hybrid_dist.training.val_features import ValFeatures

if TYPE_CHECKING:
    from hybrid_dist.training.job import Job
    from hybrid_dist.training.phase import Length

FOLDER = "features"
MANIFEST = "manifest.json"
FORMAT = 1
AT_ONCE = 16
"""Micro batches that may wait to be written: past this many the disk is slower than the training."""

LEAVE = 60.0
"""Seconds that the thread has to write what it holds, when the phase goes no further."""


def views_of(phase: PhaseConfig, frozen: Sequence[str], length: Length) -> tuple[int | None, str | None]:
    """How many views the phase's samples have, None for one each turn; and why its `cache_features` can't pay.

    Args:
        frozen: The branches of which nothing trains.
    """
    views = phase.cache_features
    if views is None:
        return None, None
    key = f"phase {phase.name}: cache_features has no effect,"
    if not frozen:
        return None, f"{key} for no branch is wholly frozen in it"
    if length.total <= views * length.per_epoch:
        return None, f"{key} for in its {length.total} steps no picture comes more than {views} times"
    return views, None


def key_of(config: Config, phase: PhaseConfig) -> str:
    """The config's key that says how many views are kept."""
    return f"phases.{config.phases.index(phase)}.cache_features"


def make_places(config: Config, phase: PhaseConfig, rows: int) -> Places | None:
    """Room for where a phase's features lie, before anything else of them is known.

    Raises:
        UserError: the disk has no room even for the index of so many.
    """
    views = phase.cache_features
    if views is None:
        return None
    folder = config.folder / FOLDER / phase.name
    check_room(folder, key_of(config, phase), views * rows * INDEX.itemsize, _bytes_in(folder))
    return Places(views, rows)


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.*"))


def weights_sums(model: Hybrid) -> dict[str, str]:
    """By frozen branch, xxh3 of all that it holds; to be asked before an engine takes the model apart."""
    found = {}
    for part in model.frozen():
        digest = xxhash.xxh3_128()
        for name, value in model.branches()[part].state_dict().items():
            digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found[part] = digest.hexdigest()
    return found


def identity(config: Config, phase: PhaseConfig, data: dict[str, str], weights: dict[str, str]) -> dict[str, Any]:
    """All that a view's features, labels and pixels follow from, as JSON has it.

    Args:
        data: Sums of the tables, and of the classes that labels count in.
        weights: As `weights_sums` gives them.
    """
    augment = {"augment", "mixup", "cutmix", "mix_prob", "degrade"}
    branches = {"cnn": config.model.cnn, "transformer": config.model.transformer}
    return {
        "format": FORMAT,
        "seed": config.run.seed,
        "phase": phase.name,
        "views": phase.cache_features,
        "picture size": config.size(phase),
        "precision": config.train.precision,
        "augmentation": config.data.model_dump(mode="json", include=augment),
        "tasks": {
            name: task.model_dump(mode="json", include={"kind", "column", "sensitive_to"})
            for name, task in config.tasks.items()
        },
        "branches": {
            part: branch.model_dump(mode="json", include={"name", "kwargs"})
            for part, branch in branches.items()
            if branch is not None and part in weights
        },
        "data": data,
        "weights": weights,
    }


class Pixels:
    """A phase that keeps nothing: all branches run, always."""

    views: int | None = None
    filling = True
    """All branches run."""

    def __init__(self, folder: Path):
        """`folder`: the run's."""
        self.folder = folder / FOLDER

    def stretch(self, start: int, total: int) -> int:
        """Make ready for the phase's steps from `start` on, all ranks together; up to which, the same loader serves."""
        return total

    def recall(self) -> Recall | None:
        """What the loader's samples are to do with it, in this stretch."""
        return None

    def lacking(self, batches: Sequence[Batch]) -> list[int]:
        """For each micro step of a full step: whether this rank has to run the frozen branches, to be summed."""
        return []

    def agree(self, batches: list[Batch], lacking: Sequence[int]) -> list[Batch]:
        """The batches, told what the other ranks lack; `lacking`: the sums."""
        return batches

    def keep(self, batches: Sequence[Batch], step: int) -> None:
        """After the phase's step `step`, from 0: keep what the branches have given. Waits for no device."""

    def val_source(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """What a validation is to take its batches from, in place of `loader`."""
        return loader

    def validating(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """A validation's batches on their way to the model, which is asked about one before the next is taken."""
        return batches

    def flush(self) -> None:
        """What was to be kept is in the files, where a kill does not reach it."""

    def close(self) -> None:
        """The phase goes no further here."""

    def drop(self) -> None:
        """Rank 0: the phase has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _Given:
    """What a micro batch's frozen branches gave, on its way to the host."""

    batch: Batch
    view: int
    features: FeatureTensors
    arrives: Any
    """A CUDA event, or None."""

    def entries(self, entry: Entry) -> np.ndarray:
        """Those that are missing. Waits for the copy, in the thread that writes."""
        if self.arrives is not None:
            self.arrives.synchronize()
        batch = self.batch
        assert batch.known is not None and batch.digests is not None
        places = np.flatnonzero(batch.known.missing.numpy())
        records = np.zeros(len(places), entry.dtype())
        records["row"], records["view"] = batch.rows.numpy()[places], self.view
        records["digest"], records["share"], records["partner"] = batch.digests.numpy()[places], 1, -1
        for task, labels in batch.labels.items():
            records["own"][task] = labels.numpy()[places]
        if batch.mix is not None:
            records["share"] = batch.mix.shares.numpy()[places]
            records["partner"] = batch.mix.rows.numpy()[places]
            for task, labels in batch.mix.labels.items():
                records["other"][task] = labels.numpy()[places]
        entry.fill(records, self.features, places)
        return records


class FrozenFeatures(Pixels):
    """What the frozen branches of a phase have given, in RUN/features/PHASE."""

    def __init__(self, job: Job, phase: PhaseConfig, engine: Engine, entry: Entry, tokens: bool):
        """Open this rank's files in the folder, whose manifest fits.

        Args:
            tokens: Whether the fusion reads them.

        Raises:
            OSError: they can't be opened.
        """
        super().__init__(job.folder)
        assert phase.cache_features is not None and isinstance(engine.model, Hybrid)
        self.job, self.phase, self.model, self.entry, self.tokens = job, phase, engine.model, entry, tokens
        self.topology, self.views, self.turns = job.topology, phase.cache_features, phase.cache_features
        self.per_epoch = job.length(phase).per_epoch
        self.parts = self.model.frozen()
        place = self.folder / phase.name
        self.stored = Stored(place, entry, job.places(phase))
        self.log = Log(place, f"{self.topology.rank:05d}", entry)
        self.validation = ValFeatures(place, self.model, tokens, self.topology.control, job.terminal.say)
        self.filling = True
        self._kept: set[tuple[int, int]] = set()
        self._problem: str | None = None
        self._failure: Exception | None = None
        self._waiting: queue.Queue[_Given | None] = queue.Queue(AT_ONCE)
        self._thread = threading.Thread(target=self._write, daemon=True, name="features")
        self._thread.start()
        self.model.remembers = True

    def stretch(self, start: int, total: int) -> int:
        boundary = self.turns * self.per_epoch
        self.job.watch.beat("putting features on the disk")
        self.flush()
        with contextlib.suppress(OSError):  # it is there for other processes; after a power cut its sums tell
            self.log.sync()
        control = self.topology.control
        problems = [problem for problem in control.to_all(self._problem) if problem]
        if problems:
            self.job.terminal.say(
                f"warning: {problems[0]}; features are kept no longer there: what is missing is computed each time"
            )
            self._problem = self._problem and ""  # said; and nothing is written any more
        names = control.from_main([path.stem for path in self.stored.folder.glob("*.index")])
        self.stored.look(names)
        left = control.from_main(self.stored.size - self.stored.count())
        self.filling = start < boundary
        if self.filling:
            return min(boundary, total)
        if left == 0:
            return total
        what = f"{left:,} of {self.stored.size:,} views"
        self.job.terminal.say(f"phase {self.phase.name}: the features of {what} are missing, and are computed anew")
        return min((start // self.per_epoch + 1) * self.per_epoch, total)  # and read from their next turn on

    def recall(self) -> Recall | None:
        return Recall(self.stored, self.filling, pixels=len(self.parts) < len(self.model.branches()))

    def lacking(self, batches: Sequence[Batch]) -> list[int]:
        found = [int(batch.known is not None and not batch.known.features) for batch in batches]
        return found + [0] * (self.job.accumulation - len(found))

    def agree(self, batches: list[Batch], lacking: Sequence[int]) -> list[Batch]:
        return [
            replace(batch, known=replace(batch.known, in_step=ranks > 0)) if batch.known is not None else batch
            for batch, ranks in zip(batches, lacking, strict=False)
        ]

    def keep(self, batches: Sequence[Batch], step: int) -> None:
        given, self.model.remembered = self.model.remembered, []
        view = step // self.per_epoch % self.turns
        for batch, features in zip(batches, given, strict=True):
            if features and batch.known is not None and bool(batch.known.missing.any()):
                # Without its pixels, which would wait in the loaders' shared memory.
                batch = replace(batch, images=batch.images.new_empty(0))
                self._waiting.put(_Given(batch, view, *_to_host(features, self.tokens)))

    def _write(self) -> None:
        while (given := self._waiting.get()) is not None:
            try:
                if self._problem is None and self._failure is None:
                    self._append(given.entries(self.entry))
            except OSError as error:
                self._problem = f"{self.stored.folder}: {error.strerror}"
            except Exception as error:
                self._failure = error
            finally:
                del given
                self._waiting.task_done()

    def _append(self, records: np.ndarray) -> None:
        """Each view once: where a torn one is found in every turn, what was made anew counts from the next look on."""
        if not self.filling:
            keys = list(zip(records["view"].tolist(), records["row"].tolist(), strict=True))
            records = records[[place for place, key in enumerate(keys) if key not in self._kept]]
            self._kept.update(keys)
        self.log.append(records)

    def val_source(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        return self.validation.source(loader)

    def validating(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return self.validation.passing(batches)

    def flush(self) -> None:
        self._waiting.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        self.model.remembers, self.model.remembered = False, []
        with contextlib.suppress(queue.Full):  # after an error a device, or a disk, may hang
            self._waiting.put(None, timeout=LEAVE)
            self._thread.join(LEAVE)
        self.log.close()
        self.stored.close()
        self.validation.close()


def _to_host(features: dict[str, Features], tokens: bool) -> tuple[FeatureTensors, Any]:
    """The features, on their way into host memory, and what tells when they are there; waits for no device."""
    kept = _kept(features, tokens)
    host = {part: tuple(each.to("cpu", non_blocking=True) for each in tensors) for part, tensors in kept.items()}
    if not next(iter(kept.values()))[0].is_cuda:
        return host, None
    arrives = torch.cuda.Event()
    arrives.record()
    return host, arrives


def _kept(features: dict[str, Features], tokens: bool) -> FeatureTensors:
    return {part: tuple(each.detach() for each in given[: 1 + tokens]) for part, given in features.items()}


def on_device(batch: Batch, device: torch.device) -> dict[str, Any]:
    """What a model need not compute of a batch, as `Engine.forward` takes it."""
    if batch.known is None or not batch.known.features:
        return {}
    given = {
        part: _features([tensor.to(device, non_blocking=True) for tensor in tensors])
        for part, tensors in batch.known.features.items()
    }
    return {"features": given, "in_step": batch.known.in_step}


def _features(tensors: list[Tensor]) -> Features:
    """Of a fusion that reads no tokens, nothing stands for them."""
    pooled, *tokens = tensors
    return Features(pooled, tokens[0] if tokens else pooled.new_empty(len(pooled), 0, 0))


def open_features(
    job: Job, phase: PhaseConfig, engine: Engine, data: dict[str, str], weights: dict[str, str]
) -> Pixels:
    """What the phase keeps, if it is to keep anything; what does not fit it, of this phase or others, goes.

    Args:
        data, weights: As in `identity`; `weights` on rank 0.

    Raises:
        UserError: the disk has no room, or can't be written.
    """
    model, topology, folder = engine.model, job.topology, job.folder / FOLDER
    assert isinstance(model, Hybrid)
    views, _ = views_of(phase, model.frozen(), job.length(phase))
    if views is None:
        decide(topology, lambda: _only(folder, None))
        return Pixels(job.folder)
    tokens = model.fusion.reads_tokens
    entry = entry_of(_first_features(engine, job.config.size(phase), tokens), job.train_table.labels)
    size = views * len(job.train_table) * (entry.dtype().itemsize + INDEX.itemsize)
    size += len(job.val_table) * entry.dtype()["features"].itemsize

    def prepare() -> None:
        with _disk(folder):
            wanted = identity(job.config, phase, data, weights) | {"entry": json.loads(json.dumps(asdict(entry)))}
            _only(folder, phase.name)
            changed = _changed(folder / phase.name, wanted)
            if changed:
                job.terminal.say(f"phase {phase.name}: features are made anew, for {' and '.join(changed)} differ")
            check_room(folder / phase.name, key_of(job.config, phase), size, _bytes_in(folder / phase.name))
            _begin(folder / phase.name, wanted)

    decide(topology, prepare)

    def take() -> Pixels:
        with _disk(folder):
            return FrozenFeatures(job, phase, engine, entry, tokens)

    found = agree(topology, take)
    job.terminal.say(
        f"phase {phase.name}: {' and '.join(model.frozen())}: once over {views} views of each picture, then from"
        f" {folder / phase.name} ({gigabytes(size)})"
    )
    return found


@contextlib.contextmanager
def _disk(folder: Path) -> Any:
    """What the disk refuses in here is the user's to fix."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None


def _only(folder: Path, phase: str | None) -> None:
    """Rank 0: remove what other phases have left, cut off before their end."""
    if folder.is_dir():
        for other in [path for path in folder.iterdir() if path.name != phase]:
            shutil.rmtree(other, ignore_errors=True)
        if phase is None:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _changed(folder: Path, wanted: dict[str, Any]) -> list[str]:
    """Empty a folder that was made from something else; returns what differs."""
    found = read_object(folder / MANIFEST)
    changed = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if changed and folder.exists():
        shutil.rmtree(folder)
    return changed if found else []


def _begin(folder: Path, wanted: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        write_atomic(folder / MANIFEST, json.dumps(wanted, indent=1) + "\n")


@torch.no_grad()
def _first_features(engine: Engine, size: int, tokens: bool) -> FeatureTensors:
    """What the frozen branches give for a blank picture: sizes and dtypes, under the run's precision. All ranks."""
    model, topology = engine.model, engine.topology
    assert isinstance(model, Hybrid)
    model.train()
    model.remembers = True
    try:
        engine.forward(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=topology.device))
        return _kept(model.remembered[0], tokens)
    finally:
        model.remembers, model.remembered = False, []
