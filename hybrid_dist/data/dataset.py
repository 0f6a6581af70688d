"""Samples as batches: decode, augment, label, told nothing but `(turn, row)` keys."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, get_worker_info

from hybrid_dist.config import Config
from hybrid_dist.data.annotations import Table
from hybrid_dist.data.augment import Augment, sample_key
from hybrid_dist.data.balance import Balance
from hybrid_dist.data.degrade import Degrade
from hybrid_dist.data.features import FeatureTensors, Places, Recall
from hybrid_dist.data.mix import Draw, Mixing, alphas
from hybrid_dist.data.order import PADDING, Key
from hybrid_dist.data.packed import Packed
from hybrid_dist.data.pictures import BACKGROUND, PictureError, read_picture


@dataclass(frozen=True)
class Mix:
    """What a batch's samples are mixed with.

    labels: per task (m,), the partners', as in `Batch`: none where a sample is not mixed.
    shares: float32 (m,), in 0–1: the own picture's; 1 where a sample is not mixed.
    rows: int64 (m,), the partners' rows of the CSV, -1 where a sample is not mixed.
    """

    labels: dict[str, torch.Tensor]
    shares: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Known:
    """What is kept of a batch's samples: see data/features.py.

    features: of all of them; empty where one of them is missing, or they are only being made.
    missing: bool (m,), those that there is no entry for yet.
    in_step: other ranks lack some of theirs in this micro step, and compute them.
    """

    features: FeatureTensors
    missing: torch.Tensor
    in_step: bool = False


@dataclass(frozen=True)
class Batch:
    """A micro batch of `m` places.

    images: uint8 (m, 3, S, S), RGB, channels-last in memory; padding is zeros. (m, 3, 0, 0) where nothing wants pixels.
    labels: per task (m,): int64 with -1 for none, or float32 with NaN for none; padding has none.
    rows: int64 (m,), row of the CSV, -1 for padding.
    digests: int64 (m,), a hash of each picture's augmented pixels, 0 where there is none; None unless asked for.
    bad: why the pictures of these rows can't be used. A sample's own: it is plain background, and without labels. The
        one that a sample was to be mixed with: it is not mixed.
    mix: None unless samples are mixed at all.
    known: None unless features are kept.
    """

    images: torch.Tensor
    labels: dict[str, torch.Tensor]
    rows: torch.Tensor
    digests: torch.Tensor | None = None
    bad: dict[int, str] = field(default_factory=dict)
    mix: Mix | None = None
    known: Known | None = None

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the loader calls it where it was told to pin."""
        mix, known = self.mix, self.known
        return replace(
            self,
            images=self.images.pin_memory(),
            labels=_pinned(self.labels),
            rows=self.rows.pin_memory(),
            mix=None if mix is None else Mix(_pinned(mix.labels), mix.shares.pin_memory(), mix.rows),
            known=None if known is None else replace(known, features=_pinned_features(known.features)),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the worker queue a tensor goes as a shared memory file with a descriptor: only pixels and features are
        # worth that.
        digests = None if self.digests is None else self.digests.numpy()
        mix = None if self.mix is None else (_arrays(self.mix.labels), self.mix.shares.numpy(), self.mix.rows.numpy())
        known = None if self.known is None else (self.known.features, self.known.missing.numpy())
        return _rebuild, (self.images, _arrays(self.labels), self.rows.numpy(), digests, self.bad, mix, known)


def _pinned_features(features: FeatureTensors) -> FeatureTensors:
    return {part: tuple(tensor.pin_memory() for tensor in tensors) for part, tensors in features.items()}


def _pinned(labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {task: values.pin_memory() for task, values in labels.items()}


def _arrays(labels: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {task: values.numpy() for task, values in labels.items()}


def _tensors(labels: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {task: torch.from_numpy(values) for task, values in labels.items()}


def _rebuild(
    images: torch.Tensor,
    labels: dict[str, np.ndarray],
    rows: np.ndarray,
    digests: np.ndarray | None,
    bad: dict[int, str],
    mix: tuple[dict[str, np.ndarray], np.ndarray, np.ndarray] | None,
    known: tuple[FeatureTensors, np.ndarray] | None,
) -> Batch:
    return Batch(
        images,
        _tensors(labels),
        torch.from_numpy(rows),
        None if digests is None else torch.from_numpy(digests),
        bad,
        None if mix is None else Mix(_tensors(mix[0]), torch.from_numpy(mix[1]), torch.from_numpy(mix[2])),
        None if known is None else Known(known[0], torch.from_numpy(known[1])),
    )


class Whereabouts:
    """Which row each loader process is at, in memory that they share: for whoever finds one of them stuck or dead."""

    def __init__(self, workers: int) -> None:
        self._rows = RawArray("q", [PADDING] * max(workers, 1))
        self._pids = RawArray("q", max(workers, 1))

    def set(self, row: int) -> None:
        """This process is at `row` from now on; `PADDING`: at none."""
        info = get_worker_info()
        place = 0 if info is None else info.id
        self._rows[place], self._pids[place] = row, os.getpid()

    def row(self, worker: int) -> int:
        """Where that one is."""
        return int(self._rows[worker])

    def busy(self) -> list[tuple[int, int, int]]:
        """Number, process id and row of those that are at one."""
        return [
            (worker, pid, row)
            for worker, (pid, row) in enumerate(zip(self._pids, self._rows, strict=True))
            if row != PADDING
        ]


class Samples(Dataset[Batch]):
    """A split's samples. Indexed with a list of keys `(turn, row)`, it returns a whole `Batch`."""

    def __init__(
        self,
        table: Table,
        augment: Augment,
        seed: int,
        phase: str,
        digest: bool = False,
        packed: Packed | None = None,
        mixing: Mixing | None = None,
        degrade: Degrade | None = None,
    ) -> None:
        """All views of each sample, of which nothing is kept: `see` says otherwise, of what lies in `places`."""
        self.table = table
        self.packed = packed
        self.augment = augment
        self.seed = seed
        self.phase = phase
        self.digest = digest
        self.mixing = mixing
        self.degrade = degrade
        self.views: int | None = None
        self.recall: Recall | None = None
        self.places: Places | None = None
        self.whereabouts = Whereabouts(0)

    def __len__(self) -> int:
        return len(self.table)

    def see(self, views: int | None, recall: Recall | None) -> None:
        """From here on all that is random begins anew after so many turns (None: never), and this is kept of them."""
        self.views = views
        if recall is not None and self.recall is not None and recall.number == self.recall.number:
            return
        if self.recall is not None:
            self.recall.stored.close()
        if recall is not None:
            assert self.places is not None
            recall.stored.places = self.places
        self.recall = recall

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[Key]) -> Batch:
        """Decode, augment and label the samples of `keys`, or read what is kept of them; row -1 is padding."""
        recall = self.recall
        if recall is None:
            return self._load(keys)
        records, missing = self._read(recall, keys)
        whole = not (recall.filling or missing.any())
        batch = self._recalled(keys, records) if whole and not recall.pixels else self._load(keys)
        features = recall.stored.entry.tensors(records) if whole else {}
        return replace(batch, known=Known(features, torch.from_numpy(missing)))

    def _read(self, recall: Recall, keys: Sequence[Key]) -> tuple[np.ndarray, np.ndarray]:
        """Entries of (m,) samples, zeros where there is none, and bool (m,): which are missing."""
        records = np.zeros(len(keys), recall.stored.entry.dtype())
        missing = np.zeros(len(keys), np.bool_)
        for place, (turn, row) in enumerate(keys):
            if row != PADDING:
                self.whereabouts.set(row)
                missing[place] = not recall.stored.read(self._view(turn), row, records[place : place + 1])
        self.whereabouts.set(PADDING)
        return records, missing

    def _recalled(self, keys: Sequence[Key], records: np.ndarray) -> Batch:
        """A batch without pixels. Bad pictures were told of when the entries were made, and have no labels there."""
        rows = np.array([row for _, row in keys], np.int64)

        def labels(kind: str) -> dict[str, torch.Tensor]:
            columns = self.table.labels.items()
            found = ((task, _none(column), records[kind][task]) for task, column in columns)
            return {
                task: torch.from_numpy(np.where(rows == PADDING, none, values).astype(values.dtype))
                for task, none, values in found
            }

        mix = None
        if self.mixing is not None:
            shares = np.where(rows == PADDING, np.float32(1), records["share"])
            partners = np.where(rows == PADDING, PADDING, records["partner"])
            mix = Mix(labels("other"), torch.from_numpy(shares), torch.from_numpy(partners))
        digests = torch.from_numpy(records["digest"].copy())
        nothing = torch.empty(len(keys), 3, 0, 0, dtype=torch.uint8)
        return Batch(nothing, labels("own"), torch.from_numpy(rows), digests, mix=mix)

    def _load(self, keys: Sequence[Key]) -> Batch:
        size = self.augment.image_size
        rows = np.array([row for _, row in keys], np.int64)
        labels = self._labels(rows)
        partners = self._labels(np.full_like(rows, PADDING)) if self.mixing is not None else {}
        shares, others = np.ones(len(keys), np.float32), np.full_like(rows, PADDING)
        images = np.zeros((len(keys), size, size, 3), np.uint8)
        digests = np.zeros(len(keys), np.int64)
        summed = self.digest or self.recall is not None  # what is read later has no pixels to take it from
        bad: dict[int, str] = {}
        for place, (turn, row) in enumerate(keys):
            if row == PADDING:
                continue
            self.whereabouts.set(row)
            try:
                picture = self.picture(row)
            except PictureError as error:
                bad[row] = error.reason
                images[place] = BACKGROUND
                _Labels(labels, place).keep(())
                continue
            own, other = _Labels(labels, place), _Labels(partners, place)
            images[place], shares[place], others[place] = self._sample(picture, (turn, row), own, other, bad)
            if summed:
                digests[place] = pixel_digest(images[place])
        self.whereabouts.set(PADDING)
        return Batch(
            torch.from_numpy(images).permute(0, 3, 1, 2),  # (m, S, S, 3) → (m, 3, S, S), a view
            _tensors(labels),
            torch.from_numpy(rows),
            torch.from_numpy(digests) if summed else None,
            bad,
            None
            if self.mixing is None
            else Mix(_tensors(partners), torch.from_numpy(shares), torch.from_numpy(others)),
        )

    def _sample(
        self, picture: np.ndarray, key: Key, own: _Labels, other: _Labels, bad: dict[int, str]
    ) -> tuple[np.ndarray, float, int]:
        """A sample's pixels, its own picture's share in them, and its partner's row; sees to the labels of both.

        The labels that a mixed sample goes without no longer forbid its augmentation anything.
        """
        turn, row = key
        found = self._partner(turn, row, bad)
        if found is not None:
            kept = found.mixing.kept[found.draw.kind]
            own.keep(kept)
            other.take({task: column[found.draw.partner] for task, column in self.table.labels.items() if task in kept})
        harm = None
        if found is None and self.degrade is not None:
            harm = self.degrade.draw(own.values(), self._key(turn, row, "degrade"))
            if harm is not None:
                own.take(harm.labels)
                own.keep(own.arrays.keys() - harm.lost)
        pixels = self.augment(picture, own.present(), self._key(turn, row, "sample"), harm)
        if found is None:
            return pixels, 1.0, PADDING
        augmented = self.augment(found.picture, other.present(), found.draw.key)
        return *found.mixing.mix(found.draw, pixels, augmented), found.draw.partner

    def _partner(self, turn: int, row: int, bad: dict[int, str]) -> _Partner | None:
        """What a sample is mixed with; None for nothing, or for a picture that can't be used."""
        if self.mixing is None:
            return None
        draw = self.mixing.draw(row, self._key(turn, row, "mix"))
        if draw is None:
            return None
        self.whereabouts.set(draw.partner)
        try:
            return _Partner(self.mixing, draw, self.picture(draw.partner))
        except PictureError as error:
            bad[draw.partner] = error.reason
            return None

    def _key(self, turn: int, row: int, purpose: str) -> int:
        return sample_key(self.seed, self.phase, self._view(turn), row, purpose)

    def _view(self, turn: int) -> int:
        return turn if self.views is None else turn % self.views

    def picture(self, row: int) -> np.ndarray:
        """The row's picture, no smaller than the augmentation needs it: uint8 (height, width, 3), RGB."""
        if self.packed is not None:
            return self.packed.picture(row)
        return read_picture(self.table.images / self.table.filename(row), self.augment.image_size)

    def _labels(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {
            task: np.where(rows == PADDING, _none(column), column[rows]).astype(column.dtype)
            for task, column in self.table.labels.items()
        }


@dataclass(frozen=True)
class _Partner:
    """The picture that a sample is mixed with."""

    mixing: Mixing
    draw: Draw
    picture: np.ndarray


@dataclass(frozen=True)
class _Labels:
    """One sample's labels, in place: arrays by task, and the sample's place in them."""

    arrays: dict[str, np.ndarray]
    place: int

    def present(self) -> list[str]:
        """The tasks that it has a label for."""
        values = ((task, array, array[self.place]) for task, array in self.arrays.items())
        return [task for task, array, value in values if (value == value if array.dtype.kind == "f" else value >= 0)]

    def values(self) -> dict[str, float]:
        """Those that it has."""
        return {task: self.arrays[task][self.place].item() for task in self.present()}

    def keep(self, tasks: Collection[str]) -> None:
        """Go without those of other tasks."""
        for task, array in self.arrays.items():
            if task not in tasks:
                array[self.place] = _none(array)

    def take(self, values: Mapping[str, Any]) -> None:
        """Have these."""
        for task, value in values.items():
            self.arrays[task][self.place] = value


def _none(labels: np.ndarray) -> float:
    """What stands for no label."""
    return np.nan if labels.dtype.kind == "f" else -1


def pixel_digest(pixels: np.ndarray) -> int:
    """64 bits of a picture's pixels, signed, as int64 holds them."""
    digest = xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)
    return digest - (1 << 64) if digest >> 63 else digest


def training_samples(
    config: Config,
    table: Table,
    image_size: int,
    phase: str,
    packed: Packed | None,
    balance: Balance | None = None,
) -> Samples:
    """The training split's samples as a config wants them: augmented, mixed, degraded.

    Args:
        balance: How likely a row is to be another's partner.
    """
    data = config.data
    mixing = Mixing(data, config.tasks, len(table), balance) if alphas(data) else None
    degrade = Degrade(data.degrade, config.tasks) if data.degrade else None
    augment = Augment(image_size, config.tasks, train=data.augment)
    return Samples(table, augment, config.run.seed, phase, config.debug.trace, packed, mixing, degrade)
