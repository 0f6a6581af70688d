"""The share of a step in which a rank does nothing but talk to the others: seen by a look at one step now and then."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.autograd.profiler import profile, record_function

from hybrid_dist.distributed import Topology
from hybrid_dist.training.profile import exported, marked, quiet
from hybrid_dist.training.profile_trace import COMMUNICATION, DEVICE_WORK, MARK, split

FIRST = 5
"""The step, counted from the last look or the phase's beginning in this process, before which there is none."""
BUDGET = 1e-3
"""What all looks may cost, as a share of the time."""
MOST = 8
"""Micro batches of a step that can be looked at: each one's trace takes tens of MB and a quarter of a second."""
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class Glance:
    """Looks at a step of a phase on rank 0, as a profile would, and again once what that cost is little of the time.

    Between looks a step costs a comparison. It asks for nothing but clocks: the training is the same to the bit.
    """

    def __init__(self, topology: Topology, wanted: bool, accumulation: int, say: Callable[[str], None]):
        """Nothing is seen yet.

        Args:
            wanted: Whether to look at all; where there is one process there is nothing to see.
            accumulation: Micro batches in a step of this rank.
            say: Told why it can't be seen.
        """
        self._topology, self._say = topology, say
        self._open = wanted and topology.is_main and topology.world_size > 1 and accumulation <= MOST
        self._made = 0
        """Steps since `_since`: the last look, or the beginning."""
        self._since = time.monotonic()
        self._rests_until = 0.0
        self._seen: float | None = None

    def step(self, number: int, pauses: bool) -> contextlib.AbstractContextManager[None]:
        """A context for a step, with the taking of its data. `pauses`: a validation or checkpoint is within it."""
        self._made += 1
        if not self._open or pauses or self._made < FIRST or time.monotonic() < self._rests_until:
            return _NOTHING
        return self._look(number)

    def take(self) -> float | None:
        """The share of the last step that has been looked at since this was asked; None if none has."""
        seen, self._seen = self._seen, None
        return seen

    @contextlib.contextmanager
    def _look(self, number: int) -> Iterator[None]:
        began = time.monotonic()
        usual = (began - self._since) / (self._made - 1)
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
            yield
            if on_cuda:
                torch.cuda.synchronize(device)
        ended = time.monotonic()
        if self._open:
            self._read(looking, number)
        now = time.monotonic()
        cost = max(now - began - usual, now - ended)
        self._made, self._since, self._rests_until = 0, now, now + cost / BUDGET

    def _read(self, looking: profile, number: int) -> None:
        on_cuda = self._topology.device.type == "cuda"
        try:
            with tempfile.TemporaryDirectory() as folder:
                events = exported(looking, Path(folder) / "trace.json")["traceEvents"]
        except (OSError, RuntimeError, ValueError) as error:
            self._give_up(error)
            return
        if on_cuda and not any(event.get("cat") in DEVICE_WORK for event in events):
            self._give_up("this GPU tells nothing of its work")
            return
        found = split(events, [number], on_cuda)
        self._seen = found.parts[COMMUNICATION] / found.steps[0]

    def _give_up(self, reason: object) -> None:
        self._open = False
        self._say(f"warning: perf/communication will be missing: {reason}")
