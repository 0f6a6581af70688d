"""A run's folder: whose it is, and that all machines see it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from hybrid_dist.checkpoint import Found
from hybrid_dist.config import Config, load_config
from hybrid_dist.distributed import agree, decide
from hybrid_dist.errors import UserError
from hybrid_dist.files import write_atomic
from hybrid_dist.training.description import DESCRIPTION
from hybrid_dist.training.job import Job
from hybrid_dist.training.publish import publish_best

SHARED = 10.0
"""Seconds for a network disk to show another machine's file."""


def _check_folder(config: Config, only: str | None, fresh: bool) -> bool:
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


def _is_used(folder: Path) -> bool:
    """Whether there is a run in it, or anything else but what a start that was cut off at once has left."""
    return folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir())


def check_shared(job: Job) -> None:
    """Every machine writes its own part of a checkpoint, so all must see one disk: a file that rank 0 lays there."""
    topology, folder = job.topology, job.folder
    if topology.world_size == topology.local_world_size:
        return

    def lay() -> Path:
        place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        file = place / f".{folder.name}.seen-by-all-{os.getpid()}-{time.time_ns():x}"
        with disk(place):
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


def open_folder(job: Job, only: str | None, fresh: bool) -> bool:
    """Rank 0: keep other jobs off a folder that is there already, and see whether it holds this very run.

    What a save that was cut off has left is put in order first: it may be the newest checkpoint.
    """
    resumes = _check_folder(job.config, only, fresh)
    if job.folder.is_dir():
        with disk(job.folder):
            job.lock.take()
            resumes = _check_folder(job.config, only, fresh)  # another job may have been here until just now
            if resumes:
                job.store.sweep()
    return resumes


def claim_folder(job: Job, fresh: bool, found: Found | None) -> None:
    """Make the run's folder, with its config; under `--fresh` an old one keeps everything under another name.

    In a folder that goes on, a best that an earlier start was cut off in comes out.
    """
    folder = job.folder
    with disk(folder):
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
def disk(folder: Path) -> Iterator[None]:
    """What the disk refuses in here is the user's to fix."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None
