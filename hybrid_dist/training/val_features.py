"""What a phase's frozen branches give for the validation pictures: the same each time, so they are asked once.

Unlike those of training these features are made anew by each process: a resumed run's first validation gives the same
bits. They lie in a file without a name, which is gone when the process is.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hybrid_dist.data.dataset import Batch, Known
from hybrid_dist.data.features import FeatureTensors
from hybrid_dist.distributed import Control
from hybrid_dist.files import write_at
from hybrid_dist.model.backbones import Features
from hybrid_dist.model.hybrid import Hybrid


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file."""

    at: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class _Kept:
    """A batch without pixels, and its features by branch."""

    batch: Batch
    features: Mapping[str, tuple[_Place, ...]]


class ValFeatures:
    """This rank's batches of a phase's validation, in order, with what its frozen branches gave for them.

    All ranks together: a first validation that one of them can't keep is kept by none.
    """

    def __init__(self, folder: Path, model: Hybrid, tokens: bool, control: Control, say: Callable[[str], None]) -> None:
        """Open the file, in `folder`.

        Args:
            tokens: Whether the fusion reads them.

        Raises:
            OSError: it can't be opened.
        """
        self.folder, self.model, self.tokens, self.control, self.say = folder, model, tokens, control, say
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        self._end = 0
        self._kept: list[_Kept] | None = None
        self._lost = False

    def source(self, loader: Iterable[Batch]) -> Iterable[Batch]:
        """What the next validation takes its batches from: no pictures are loaded where nothing wants to see them."""
        if self._kept is None or len(self.model.frozen()) < len(self.model.branches()):
            return loader
        return [kept.batch for kept in self._kept]

    def passing(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches` on their way to the model, which is asked about one before the next is taken.

        The first time all the way through, what its frozen branches give is kept; from then on the batches carry it.
        """
        first = self._kept is None and not self._lost
        before, self.model.remembers = self.model.remembers, first
        try:
            if first:
                yield from self._first(batches)
            elif self._kept is not None:
                for batch, kept in zip(batches, self._kept, strict=True):
                    yield self._carrying(batch, kept)
            else:
                yield from batches
        finally:
            self.model.remembers = before

    def _carrying(self, batch: Batch, kept: _Kept) -> Batch:
        # A picture that could not be had the first time has another one's features, also if it can be had by now.
        bad = {**kept.batch.bad, **batch.bad}
        missing = torch.zeros(len(batch.rows), dtype=torch.bool)
        return replace(batch, bad=bad, known=Known(self._read(kept.features), missing))

    def _first(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        found: list[_Kept] = []
        problem = None
        self._end = 0
        for batch in batches:
            yield batch
            (given,), self.model.remembered = self.model.remembered, []
            try:
                if problem is None:
                    found.append(_Kept(_without_pixels(batch), self._write(given)))
            except OSError as error:
                problem = f"{self.folder}: {error.strerror}"
            del given  # on its device until then
        problems = [each for each in self.control.to_all(problem) if each]
        if problems:
            self.say(f"warning: {problems[0]}; frozen branches run in each validation")
            self._lost = True
            with contextlib.suppress(OSError):
                self._file.truncate(0)  # a full disk needs the room
        else:
            self._kept = found

    def _write(self, given: Mapping[str, Features]) -> dict[str, tuple[_Place, ...]]:
        return {
            part: tuple(self._put(each) for each in features[: 1 + self.tokens]) for part, features in given.items()
        }

    def _put(self, tensor: Tensor) -> _Place:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        place = _Place(self._end, tensor.shape, tensor.dtype)
        write_at(self._file.fileno(), data, place.at)
        self._end += data.nbytes
        return place

    def _read(self, places: Mapping[str, tuple[_Place, ...]]) -> FeatureTensors:
        return {part: tuple(self._get(place) for place in each) for part, each in places.items()}

    def _get(self, place: _Place) -> Tensor:
        raw = bytearray(place.shape.numel() * place.dtype.itemsize)
        if os.preadv(self._file.fileno(), [raw], place.at) != len(raw):
            raise OSError(f"{self.folder}: the features of validation can't be read")
        return torch.frombuffer(raw, dtype=place.dtype).view(place.shape)

    def close(self) -> None:
        """The file goes."""
        with contextlib.suppress(OSError):
            self._file.close()


def _without_pixels(batch: Batch) -> Batch:
    """A copy that holds nothing of the batch's memory, which may be shared with its loader process, or page-locked."""
    labels = {task: values.clone() for task, values in batch.labels.items()}
    return replace(batch, images=batch.images[:, :, :0, :0].clone(), labels=labels, rows=batch.rows.clone())
