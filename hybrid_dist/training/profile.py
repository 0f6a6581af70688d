"""Where an optimizer step's time goes: torch.profiler over some steps of each phase, on every rank."""

from __future__ import annotations

import contextlib
import getpass
import gzip
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hybrid_dist.config import Config
from hybrid_dist.distributed import measured
from hybrid_dist.errors import UserError
from hybrid_dist.files import whole_file, write_atomic
from hybrid_dist.machine import peak_memory_gb
from hybrid_dist.training.profile_trace import MARK, allocated, joined, operations, split, stripped

if TYPE_CHECKING:
    from torch.profiler import profile

    from hybrid_dist.training.job import Job

FOLDER = "profile"
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def check_folder(config: Config) -> None:
    """Find out before anything is trained whether profiles can be written, if they are asked for. On each rank.

    Raises:
        UserError: they can't.
    """
    if config.train.profile is None:
        return
    folder = config.folder / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: can't be written: {error.strerror}; train.profile: null would do without") from None


def quiet() -> None:
    """Have Kineto say nothing of its own: of each trace's begin and end, and, as if it were an error, of no GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def marked() -> contextlib.AbstractContextManager[None]:
    """In here a trace has a range for each part of a step."""
    return measured(lambda part: torch.profiler.record_function(MARK + part))


def exported(profiler: Any, file: Path) -> dict[str, Any]:
    """A profiler's trace, by way of a file, which names the machine and so does not stay."""
    try:
        profiler.export_chrome_trace(str(file))
        trace: dict[str, Any] = json.loads(file.read_text(encoding="utf-8", errors="replace"), strict=False)
        return trace
    finally:
        file.unlink(missing_ok=True)


class StepProfiler:
    """Profiles a phase's steps `train.profile.start` and on, and writes what it has seen of them, once.

    While it does not, a step costs a comparison. It asks for nothing but clocks: the training is the same to the bit.
    """

    def __init__(self, job: Job, phase: str):
        """Nothing is recorded yet."""
        self.job, self.phase, self.config, self.topology = job, phase, job.config, job.topology
        asked = job.config.train.profile
        self._first, self._last = (asked.start, asked.start + asked.steps - 1) if asked is not None else (0, -1)
        self._profiler: profile | None = None
        self._marks = contextlib.ExitStack()
        self._made: list[int] = []
        self._traces: list[dict[str, Any]] = []
        """One for each row of steps without a pause: a trace that goes on over a validation would hold that, too, and
        one that is halted and taken up again (`toggle_collection_dynamic`) makes each operation 20 times as slow."""
        self._recording = self._closed = False

    def step(self, number: int, pauses: bool) -> contextlib.AbstractContextManager[None]:
        """A context for a step of the phase, counted from 1, with the taking of its data; all ranks alike.

        Args:
            pauses: A validation or checkpoint follows, which is not to be in the profile.
        """
        return self._step(number, pauses) if self.covers(number) else _NOTHING

    def covers(self, number: int) -> bool:
        """Whether a step is profiled, or made ready for."""
        return not self._closed and self._first - 1 <= number <= self._last

    @contextlib.contextmanager
    def _step(self, number: int, pauses: bool) -> Iterator[None]:
        self._prepare()
        if number < self._first:  # in it the tracing of a GPU gets ready, which takes its time
            yield
            return
        self._record()
        with torch.profiler.record_function(f"{MARK}step {number}"):
            yield
            if self.topology.device.type == "cuda" and (pauses or number == self._last):
                torch.cuda.synchronize(self.topology.device)
        self._made.append(number)
        if number == self._last:
            self.close()
        elif pauses:
            self._halt()

    def _prepare(self) -> None:
        if self._profiler is not None:
            return
        quiet()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.topology.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.prepare_trace()

    def _record(self) -> None:
        if not self._recording:
            assert self._profiler is not None
            self._profiler.start_trace()
            self._recording = True
            self._marks.enter_context(marked())

    def _halt(self) -> None:
        """Record no more for now."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._marks.close()
        recorded, self._recording = self._recording, False
        with self._complaining():
            if not recorded:
                profiler.start_trace()  # what is prepared and never begun would disturb the next one
            profiler.stop_trace()
            if recorded:
                self._traces.append(exported(profiler, self._path(f"-rank-{self.topology.rank:05d}.partial")))

    def close(self) -> None:
        """Record no more, and write what has been; the phase ends, or so many steps are made."""
        if self._profiler is None and not self._traces:
            return
        self.job.watch.beat("writing a profile")
        self._halt()
        if self._made and not self._closed:
            with self._complaining():
                self._write()
        self._closed = True

    @contextlib.contextmanager
    def _complaining(self) -> Iterator[None]:
        """A disk that takes no profile is no reason to end a training."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            self._closed = True
            self.job.terminal.say(f"warning: the profile of phase {self.phase} can't be written: {error}")

    def _path(self, ending: str) -> Path:
        return self.config.folder / FOLDER / f"{self.phase}{ending}"

    def _write(self) -> None:
        trace, rank = joined(self._traces), self.topology.rank
        self._traces = []
        with (
            whole_file(self._path(f"-rank-{rank:05d}.trace.json.gz")) as beside,
            gzip.open(beside, "wt", encoding="utf-8") as out,
        ):
            json.dump(stripped(trace, rank, _secrets()), out)
        if self.topology.is_main:
            facts = self._facts(trace["traceEvents"])
            write_atomic(self._path(".json"), json.dumps(facts, indent=1) + "\n")
            self.job.terminal.say(describe(facts, self._path(".json")))

    def _facts(self, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
        topology, train = self.topology, self.config.train
        on_cuda = topology.device.type == "cuda"
        found = split(events, self._made, on_cuda)
        bytes_allocated = allocated(events, on_cuda)
        return {
            "phase": self.phase, "topology": topology.label, "precision": train.precision,
            "global_batch_size": train.global_batch_size, "micro_batch_size": self.job.micro_batch,
            "steps": self._made, "step_seconds": found.steps, "seconds": sum(found.steps) / len(found.steps),
            "split": found.parts, "communication_in_flight": found.in_flight,
            "operations": operations(events, self._made, on_cuda),
            "peak_memory_gb": peak_memory_gb(topology.device),
            "allocated_gb": bytes_allocated / 1e9 if bytes_allocated is not None else None,
        }  # fmt: skip


def _secrets() -> list[str]:
    """What names this machine and its user."""
    host = socket.gethostname()
    found = [host, host.partition(".")[0], str(Path.home()), *sys.argv]
    with contextlib.suppress(KeyError, OSError):  # a container's user may have no name
        found.append(getpass.getuser())
    return found


def describe(facts: dict[str, Any], file: Path) -> str:
    """A phase's profile, which is in `file`, as lines of text."""
    steps, whole, allocated_gb = facts["steps"], facts["seconds"], facts["allocated_gb"]
    rows = [("", "ms a step", "share")]
    rows += [(name, f"{1e3 * taken:.2f}", f"{taken / whole:.1%}") for name, taken in facts["split"].items()]
    lines = [
        f"profile of phase {facts['phase']}, steps {steps[0]} to {steps[-1]}, {facts['topology']}: "
        f"{1e3 * whole:.2f} ms a step; {file}",
        *(f"  {name:15}{taken:>12}{share:>8}" for name, taken, share in rows),
        f"  collectives were under way for {1e3 * facts['communication_in_flight']:.2f} ms a step; "
        f"peak memory {facts['peak_memory_gb']:.2f} GB"
        + (f", {allocated_gb:.2f} GB of tensors" if allocated_gb is not None else ""),
        f"  {'operation, its own time':52}{'calls':>8}{'ms a step':>12}{'share':>8}",
    ]
    for row in facts["operations"]:
        share = f"{row['seconds'] / whole:.1%}"
        lines.append(f"  {row['name'][:50]:52}{row['calls']:8.1f}{1e3 * row['seconds']:12.2f}{share:>8}")
    return "\n".join(lines)
