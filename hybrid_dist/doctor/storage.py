"""The disk that runs are kept on: room, speed, and a clock that agrees with this machine's."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from hybrid_dist.config import Config
from hybrid_dist.doctor.line import Line, fail, ok, warn
from hybrid_dist.files import blocks

BYTES_A_PARAMETER = 12
"""Of a checkpoint: weight and two moments, fp32."""
BYTES_A_MEAN = 4
"""More with `train.ema`."""
PROBE_BYTES = 128 << 20
SKEW = 2.0
"""Seconds: within them file times and log lines of several machines still tell what came first."""


def storage_lines(config: Config, parameters: int) -> Iterator[Line]:
    """What a run of that many parameters finds at its folder."""
    place = next(path for path in (config.folder, *config.folder.absolute().parents) if path.is_dir())
    size = parameters * (BYTES_A_PARAMETER + (BYTES_A_MEAN if config.train.ema is not None else 0))
    # Those that stay, the one being written before one may go, and per phase and at the end the weights alone.
    needed = size * (config.checkpoint.keep + 1) + parameters * 4 * (len(config.phases) + 1)
    free = shutil.disk_usage(place).free
    text = (
        f"{free / 1e9:.1f} GB free at {place}, a run needs up to {needed / 1e9:.1f} GB ({size / 1e9:.2f} a checkpoint)"
    )
    if free < needed:
        yield fail("disk", text, "make room, or take another run.dir, or a smaller checkpoint.keep")
    else:
        yield ok("disk", text)
    yield from _probe(place, size, free)


def _probe(place: Path, size: int, free: int) -> Iterator[Line]:
    probe = place / f".hybrid-dist-doctor.{os.getpid()}"
    data = memoryview(os.urandom(1 << 20))
    count = min(PROBE_BYTES, free // 4) >> 20
    if not count:
        return
    try:
        began = time.perf_counter()
        with probe.open("wb") as file:
            for _ in range(count):
                for block in blocks(data):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        took = time.perf_counter() - began
        skew = probe.stat().st_mtime - time.time()
    except OSError as error:
        yield fail("disk speed", f"{place} can't be written: {error.strerror}", "take another run.dir")
        return
    finally:
        probe.unlink(missing_ok=True)
    rate = (count << 20) / max(took, 1e-9)
    text = f"{rate / 1e6:.0f} MB/s: a checkpoint of {size / 1e9:.2f} GB takes {size / rate:.0f} s, behind the training"
    yield ok("disk speed", text)
    if abs(skew) > SKEW:
        yield warn("clock", f"the disk's is {skew:+.0f} s off this machine's", "have both follow an NTP server")
