"""The share of a step in which a rank does nothing but talk to the others: seen by a look at one step now and then."""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd.profiler import profile, record_function

from hybrid_dist.distributed import Topology
from hybrid_dist.training.profile import exported, marked, quiet
from hybrid_dist.training.profile_trace import COMMUNICATION, DEVICE_WORK, MARK, split

FIRST = 4
"""Steps of a phase in this process before the first look is wished for."""
BUDGET = 1e-3
"""What looks may cost, as a share of the time, the first left aside."""
MOST = 8
"""Micro batches of a step that can be looked at: each one's trace takes tens of MB and a quarter of a second."""
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Glance:
    """Looks at a step of a phase, as a profile would, and again once what that cost is little of the time.

    Rank 0 says when, and reads what it has seen; all ranks trace that step, for one that is slowed alone is waited for
    and waits for nobody. Between looks a step costs a comparison. It asks for nothing but clocks: the training is the
    same to the bit.
    """

    def __init__(self, topology: Topology, wanted: bool, accumulation: int, say: Callable[[str], None]):
        """Nothing is seen yet.

        Args:
            wanted: Whether to look at all; where there is one process there is nothing to see.
            accumulation: Micro batches in a step of this rank.
            say: Told why it can't be seen.
        """
        self._topology, self._say = topology, say
        self._open = wanted and topology.world_size > 1 and accumulation <= MOST
        self._took: deque[float] = deque(maxlen=9)
        """Seconds of the last steps."""
        self._made = 0
        self._began = time.monotonic()
        self._rests_until = 0.0
        self._agreed = False
        self._seen: float | None = None

    def wish(self) -> int:
        """Whether this rank wants a look at a step soon; the ranks add it up, and `agree` is told the sum."""
        due = self._open and self._topology.is_main and self._made >= FIRST
        return int(due and time.monotonic() >= self._rests_until)

    def agree(self, wishes: int) -> None:
        """The next step is looked at if there is a wish; all ranks alike."""
        if wishes:
            self._agreed, self._rests_until = True, math.inf

    def step(self, number: int, pauses: bool) -> contextlib.AbstractContextManager[None]:
        """A context for a step, with the taking of its data. `pauses`: a validation or checkpoint is within it."""
        now = time.monotonic()
        if self._made:
            self._took.append(now - self._began)
        self._began = now
        self._made += 1
        agreed, self._agreed = self._agreed, False
        if agreed and pauses:  # another one, then
            self._rests_until = now
        return self._look(number) if agreed and not pauses and self._open else _NOTHING

    def take(self) -> float | None:
        """The share of the last step that has been looked at since this was asked; None if none has."""
        seen, self._seen = self._seen, None
        return seen

    @contextlib.contextmanager
    def _look(self, number: int) -> Iterator[None]:
        quiet()
        device = self._topology.device
        on_cuda = device.type == "cuda"
        looking = profile(use_kineto=True, use_device="cuda" if on_cuda else None)
        if on_cuda:  # the step before is not to be seen in this one
            torch.cuda.synchronize(device)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(looking)
            except RuntimeError as error:
                self._give_up(error)
            stack.enter_context(marked())
            stack.enter_context(record_function(f"{MARK}step {number}"))
            ready = time.monotonic()
            yield
            if on_cuda:
                torch.cuda.synchronize(device)
            ended = time.monotonic()
        if self._open and self._topology.is_main:
            self._read(looking, number)
        now, usual = time.monotonic(), statistics.median(self._took)
        slowed = min(max(ended - ready - usual, 0.0), usual)  # a step that waited for its data is none that was slowed
        self._rests_until = now + (ready - self._began + slowed + now - ended) / BUDGET

    def _read(self, looking: profile, number: int) -> None:
        on_cuda = self._topology.device.type == "cuda"
        try:
            with tempfile.TemporaryDirectory() as folder:
                events = exported(looking, Path(folder) / "trace.json")["traceEvents"]
            if on_cuda and not any(event.get("cat") in DEVICE_WORK for event in events):
                raise ValueError("this GPU tells nothing of its work")
            found = split(events, [number], on_cuda)
            self._seen = found.parts[COMMUNICATION] / found.steps[0]
        except Exception as error:  # whatever a trace lacks: it is no reason to end a training
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._open = False
        self._say(f"warning: perf/communication will be missing: {type(error).__name__}: {error}")
