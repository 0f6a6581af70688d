"""Pictures of a run's validation, for pages."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hybrid_dist.data.annotations import filename_problem
from hybrid_dist.data.pictures import PictureError, decode_picture
from hybrid_dist.data.source import Source
from hybrid_dist.errors import UserError
from hybrid_dist.report.page import SIDE, small_copy


class Album:
    """Pictures by file name, from the first folder in which there is one."""

    def __init__(self, folders: Iterable[str]):
        """`folders` as in `data.val_images`."""
        self._sources = [Source(images) for images in dict.fromkeys(folders)]
        self._copies: dict[str, str | None] = {}

    def copy(self, filename: str) -> str | None:
        """A small copy as a data URI; None of what can't be shown."""
        if filename not in self._copies:
            pixels = self.pixels(filename, SIDE)
            self._copies[filename] = None if pixels is None else small_copy(pixels)
        return self._copies[filename]

    def pixels(self, filename: str, size: int) -> np.ndarray | None:
        """uint8 (height, width, 3), RGB, not much larger than `size` needs; None of what can't be read."""
        if filename_problem(filename):  # such as one that leaves the folder: training refuses it, this file is anyone's
            return None
        for source in self._sources:
            try:
                return decode_picture(source.read(filename), filename, size)
            except (PictureError, UserError):
                continue
        return None
