"""One job at a time in a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from hybrid_dist.errors import UserError

LOCK = ".lock"
WAY_OUT = "wait for it, stop it with a file named STOP in that folder, or take another run.name"


class RunLock:
    """A record lock on a file in the run's folder; the system gives it back when its holder dies, however it dies.

    A record lock, not `flock`: it belongs to the process, so that loader processes, which outlive a killed parent by
    some seconds, do not hold it, and NFS knows it. The file stays: to remove it would free the way for a third.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None], way_out: str = WAY_OUT):
        """Nothing is locked yet; `way_out` tells those who are refused what would do."""
        self.way_out = way_out
        self.path = folder / LOCK
        self.warn = warn
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._handle is not None

    def take(self) -> None:
        """Lock the folder, which exists; nothing is done if it is locked here already.

        Raises:
            UserError: another job has it.
        """
        if self._handle is not None:
            return
        for last in (False, False, True):
            if self._lock(last):
                return

    def _lock(self, last: bool) -> bool:
        """False if the folder was renamed meanwhile: what is locked then is not what stands there now.

        The `last` attempt is taken as it is, for some file systems number a file anew each time.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = os.read(handle, 4096).decode(errors="replace").strip()
                os.close(handle)
                raise UserError(f"{self.path.parent} is in use by {_describe(holder)}; {self.way_out}") from None
            self.warn(f"warning: {self.path} can't be locked ({error.strerror}): see that no other job uses this run")
        if not last and not _is_at(handle, self.path):
            os.close(handle)
            return False
        self._handle = handle
        self._sign()
        return True

    def _sign(self) -> None:
        """Say who holds it, for those who are refused."""
        assert self._handle is not None
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        if "SLURM_JOB_ID" in os.environ:
            facts["job"] = os.environ["SLURM_JOB_ID"]
        try:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps(facts).encode() + b"\n", 0)
        except OSError:
            return  # a full disk: the lock holds without a name on it

    def release(self) -> None:
        """Give it back; safe to call twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _describe(holder: str) -> str:
    try:
        facts = json.loads(holder)
        job = f", job {facts['job']}" if "job" in facts else ""
        return f"process {facts['pid']} on {facts['host']}{job}, since {facts['since']}"
    except (ValueError, KeyError, TypeError):
        return "another job"
