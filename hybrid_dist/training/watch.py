"""Finding a run that is stuck: who has stopped moving, where every rank stands, and an end to it."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hybrid_dist.distributed import Control, listed

EXIT_STUCK = 70
"""As sysexits.h has it for an internal error. A launcher makes 1 of it."""


class Watch:
    """A thread that looks whether the loop still moves; after `timeout` seconds without a `beat` it ends the process.

    Where one rank stops, the others soon wait for it, so every rank's watch finds out by itself and writes its own
    stacks, `stacks/rank-00000.txt` in the run's folder. The rank that has got least far is the one to look at.

    A rank that is frozen as a whole, or hangs with Python's lock in its hands, can't write its own; the others name it,
    and the launcher ends it after them. Time in which the whole job was suspended does not count.
    """

    def __init__(self, run: Path, place: tuple[int, int], timeout: float | None, ended: Callable[[str], None]):
        """Nothing is watched yet.

        Args:
            place: Rank and number of ranks.
            timeout: Seconds; None never finds anything.
            ended: Told the reason by one rank, before the process ends.
        """
        self.folder = run / "stacks"
        self.rank, self.world_size = place
        self.timeout, self.ended = timeout, ended
        self._token = ""
        self._beats = 0
        self._doing: str | Callable[[], str] = "starting"
        self._closing = threading.Event()

    def start(self, control: Control) -> None:
        """From now on the loop has to move; all ranks together. Nothing happens if it was so before."""
        if self.timeout is not None and not self._token:
            # The same on all ranks, and another at each start: stacks of an earlier one may lie there.
            self._token = control.from_main(f"{time.time_ns():x}")
            threading.Thread(target=self._look, args=(self.timeout,), daemon=True, name="watch").start()

    def beat(self, doing: str | Callable[[], str] | None = None) -> None:
        """The loop has moved; `doing` is what it begins with now, or says so when it matters. Costs nothing.

        Every rank calls it in the same places, so that the counts tell who is behind.
        """
        self._beats += 1
        if doing is not None:
            self._doing = doing

    def close(self) -> None:
        """The run is over."""
        self._closing.set()

    def _look(self, timeout: float) -> None:
        interval = min(timeout / 20, 5.0)
        seen, still, at = self._beats, 0.0, time.monotonic()
        while not self._closing.wait(interval):
            now = time.monotonic()
            # A thread that was suspended with its process wakes up late, and must not count the time as its loop's.
            still, at = still + min(now - at, 2 * interval), now
            if self._beats != seen:
                seen, still = self._beats, 0.0
            elif still >= timeout:
                self._end(timeout)

    def _end(self, timeout: float) -> None:
        """Write this rank's stacks, wait a moment for the others', say who is stuck, and leave."""
        report = threading.Thread(target=self._report, args=(timeout,), daemon=True)
        report.start()
        report.join(30.0)  # it may be the disk that hangs
        os._exit(EXIT_STUCK)

    def _report(self, timeout: float) -> None:
        self._write(timeout)
        self._wait_for_others(min(timeout, 10.0))
        self._say(timeout)

    def _write(self, timeout: float) -> None:
        self.folder.mkdir(exist_ok=True)
        facts = {"rank": self.rank, "start": self._token, "host": socket.gethostname(), "pid": os.getpid()}
        doing = self._doing if isinstance(self._doing, str) else self._doing()
        facts |= {"beats": self._beats, "doing": doing, "seconds": round(timeout)}
        partial = self.folder / f".{self._file(self.rank).name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        partial.replace(self._file(self.rank))

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.txt"

    def _wait_for_others(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(self._facts()) < self.world_size:
            time.sleep(0.2)

    def _facts(self) -> dict[int, dict[str, object]]:
        """What the ranks have written about themselves by now."""
        found = {}
        for rank in range(self.world_size):
            try:
                facts = json.loads(self._file(rank).read_text(encoding="utf-8").partition("\n")[0])
                if facts["start"] == self._token:
                    found[rank] = facts
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def _say(self, timeout: float) -> None:
        found = self._facts()
        if self.rank != min(found, default=self.rank):
            return
        missing = [rank for rank in range(self.world_size) if rank not in found]
        if missing:
            who = f"{listed('rank', missing)} (frozen or gone: it wrote no stack)"
        else:
            least = min(int(str(facts["beats"])) for facts in found.values())
            behind = [rank for rank, facts in found.items() if facts["beats"] == least]
            where = found[behind[0]]
            who = f"{listed('rank', behind)} ({where['doing']}, on {where['host']})"
        reason = f"stuck: no progress for {timeout:.0f} s at {who}; every rank's stacks are in {self.folder}"
        print(f"train.py: {reason}", file=sys.stderr, flush=True)
        self.ended(reason)
