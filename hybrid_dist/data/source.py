"""Where a split's pictures come from: a folder, or anything that fsspec opens, such as `s3://…` or a zip file."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_dist.data.pictures import PictureError
from hybrid_dist.errors import UserError

AT_ONCE = 16
"""Requests: a network disk answers many as quickly as one."""

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
            system, root = self._open()
            found: bytes = system.cat_file(f"{root}/{name}")
            return found
        except OSError as error:
            raise PictureError(name, f"can't be read: {error.strerror or error}") from None

    def stamps(self, names: Sequence[str]) -> list[str]:
        """For each file its size and time, or whatever else changes when it is written anew."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._stamp, names, chunksize=64))

    def _stamp(self, name: str) -> str:
        try:
            if not self.remote:
                found = os.stat(os.path.join(self.images, name))  # noqa: PTH116, PTH118 (ten million of them)
                return f"{found.st_size}/{found.st_mtime_ns}"
            system, root = self._open()
            facts: dict[str, Any] = system.info(f"{root}/{name}")
            return f"{facts.get('size')}/{next((facts[key] for key in _TIMES if key in facts), '')}"
        except OSError:
            return "-"

    def _open(self) -> tuple[Any, str]:
        """The file system, which fsspec keeps for the next time, and the folder in it."""
        import fsspec

        try:
            system, root = fsspec.core.url_to_fs(self.images)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.images}: {error}") from None
        return system, root.rstrip("/")
