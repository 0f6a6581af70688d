"""Where a split's pictures come from: a folder, or anything that fsspec opens, such as `s3://…` or a zip file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

from hybrid_dist.data.pictures import PictureError
from hybrid_dist.errors import UserError

AT_ONCE = 16
"""Requests: a network disk answers many as quickly as one."""

SLICE = 256
"""Names that a thread looks up in one go."""
MISSING = "-"

_TIMES = ("mtime", "ETag", "etag", "LastModified", "last_modified", "created", "CRC", "md5")
"""What file systems tell beside the size; the first that there is."""


def is_remote(images: str) -> bool:
    """Whether `data.…_images` is no folder."""
    return "://" in images or "::" in images


@dataclass(frozen=True)
class Source:
    """`images` as in the config."""

    images: str

    @property
    def remote(self) -> bool:
        """Whether it is no folder."""
        return is_remote(self.images)

    def there(self) -> bool:
        """Whether its pictures can be looked at here and now, at a cost that a start may have."""
        return not self.remote and Path(self.images).is_dir()

    def read(self, name: str) -> bytes:
        """A file's bytes.

        Raises:
            PictureError: it can't be read.
        """
        try:
            if not self.remote:
                path = Path(self.images) / name
                if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for for ever
                    raise PictureError(name, "is no file")
                return path.read_bytes()
            return self._fetch(name)
        except OSError as error:
            raise PictureError(name, f"can't be read: {error.strerror or error}") from None

    def _fetch(self, name: str) -> bytes:
        system, root = self._open()
        try:
            found: bytes = system.cat_file(f"{root}/{name}")
        except OSError:
            raise
        except Exception as error:  # of whichever kind the file system's library has
            raise OSError(f"{type(error).__name__}: {error}") from None
        return found

    def check(self) -> None:
        """Raises UserError where there is no such folder: not each picture of it is missing, but all at once."""
        if not self.remote:
            if not Path(self.images).is_dir():
                raise UserError(f"{self.images}: no such folder of pictures")
            return
        system, root = self._open()
        try:
            there = system.isdir(root)
        except Exception as error:
            raise UserError(f"{self.images}: can't be reached: {error}") from None
        if not there:
            raise UserError(f"{self.images}: there are no pictures")

    def stamps(self, names: Sequence[str]) -> list[str]:
        """For each file its size and time, or whatever else changes when it is written anew; `MISSING` for none."""
        slices = [names[start : start + SLICE] for start in range(0, len(names), SLICE)]
        with ThreadPoolExecutor(AT_ONCE if self.remote else 4) as pool:
            return list(chain.from_iterable(pool.map(lambda some: [self._stamp(name) for name in some], slices)))

    def _stamp(self, name: str) -> str:
        try:
            if not self.remote:
                found = os.stat(os.path.join(self.images, name))  # noqa: PTH116, PTH118 (ten million of them)
                return f"{found.st_size}/{found.st_mtime_ns}"
            system, root = self._open()
            facts: dict[str, Any] = system.info(f"{root}/{name}")
            return f"{facts.get('size')}/{next((facts[key] for key in _TIMES if key in facts), '')}"
        except OSError:
            return MISSING

    def _open(self) -> tuple[Any, str]:
        """The file system, and the folder in it.

        Raises:
            UserError: it can't be opened.
        """
        try:
            return _file_system(self.images)
        except Exception as error:  # of whichever kind the file system's library has
            raise UserError(f"{self.images}: can't be opened: {error}") from None


@lru_cache(maxsize=8)
def _file_system(images: str) -> tuple[Any, str]:
    """Opened once in a process: a zip file's directory would be read again for each picture."""
    import fsspec

    system, root = fsspec.core.url_to_fs(images)
    return system, root.rstrip("/")
