"""ZeRO 3: which weights are whole at what time, and what is on its way."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.plan.activations import Trace, Visit
from hybrid_dist.plan.fake import Parameter
from hybrid_dist.plan.strategies import PERSISTENT, Buffers

FP32, LOW = 4, 2
GLOO_THREADS = 2
"""Torch has as many."""


@dataclass
class _Buffer:
    """Weights on their way together."""

    bytes: int
    members: tuple[int, ...]
    unfetched: set[int]
    arrived: bool = False


class Gatherer:
    """Follows DeepSpeed through a micro batch whose order of modules it knows from the one before.

    A module's weights are gathered before it runs, and at each module those of the next ones, up to `prefetch`
    elements, set off: into a buffer, in the type of the communication, from which all its fp32 weights are made when
    the first is needed. Weights that come again within `reuse` elements are not let go before.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        trace: Trace,
        buffers: Buffers,
        low_precision: bool,
        processes: int,
        copied: bool = False,
    ) -> None:
        """Arguments that don't say it themselves:

        Args:
            low_precision: Autocast is on; weights of linear and convolution layers then travel in its type.
            copied: What comes is put together in other memory first, as gloo's threads do it.
        """
        self.trace = trace
        self.copied = copied
        self.under_way: list[int] = []
        """Bytes of each buffer that has not arrived."""
        self.copies = 0
        """Bytes of gloo's."""
        self.buffers = buffers
        self.processes = processes
        self.numel = [parameter.numel for parameter in parameters]
        self.travels = [LOW if low_precision and parameter.low_precision else FP32 for parameter in parameters]
        self.small = {index for index, numel in enumerate(self.numel) if numel <= PERSISTENT}
        self.whole: set[int] = set()
        self.sent: tuple[list[int], list[int]] = ([], [])
        """Bytes of each buffer that set off in the forward and in the backward pass."""
        self.gathered = [0, 0]
        """Elements in these."""
        self.coming: dict[int, _Buffer] = {}
        self.available = 0
        self.ahead = 0
        self.changes = np.zeros(len(trace.live) + 1, np.int64)
        self.spikes = np.zeros(len(trace.live) + 1, np.int64)
        graph = {index for _, index in trace.gradients}
        ahead = [visit for visit in trace.visits if visit.operation < trace.backward_at]
        forward = [visit.parameters for visit in ahead if visit.begins]
        self.backward = [own for own in reversed(forward) if graph.intersection(own)]
        self.visits = [*ahead, *self._backward_visits()]
        order = [visit.parameters for visit in self.visits if visit.begins]
        self.queue = [(step, index) for step, own in enumerate(order) for index in own]
        self.passed = np.cumsum([0, *(sum(self.numel[index] for index in own) for own in order)])
        self.uses: dict[int, list[int]] = {}
        for step, index in self.queue:
            self.uses.setdefault(index, []).append(step)

    def run(self) -> NDArray[np.float64]:
        """(operations,) bytes of gathered weights and of buffers, without the small weights that are always whole."""
        step = 0
        for visit in self.visits:
            if visit.begins:
                step += 1
                self._fetch(visit.operation, step, visit.parameters)
            else:
                self._release(visit.operation, step, visit.parameters)
        return (np.cumsum(self.changes) + self.spikes)[:-1].astype(np.float64)

    def _backward_visits(self) -> list[Visit]:
        """A module's backward ends with the last gradient of its own weights, and the next one's begins.

        What is computed again is visited once more before its backward, block by block.
        """
        at = {index: operation for operation, index in self.trace.gradients}
        again = [visit for visit in self.trace.visits if visit.operation >= self.trace.backward_at]
        ready = {visit.parameters: visit.operation for visit in again}
        begin = self.trace.backward_at
        found = []
        for own in self.backward:
            begin = max(begin, ready.get(own, begin))
            end = max(begin, *(at.get(index, begin) for index in own))
            found += [Visit(begin, True, own), Visit(end, False, own)]
            begin = end
        return sorted([*again, *found], key=lambda visit: visit.operation)

    def _fetch(self, operation: int, step: int, own: tuple[int, ...]) -> None:
        """`step` counts the modules until now, this one too."""
        now = [index for index in own if index not in self.whole and index not in self.coming]
        self._send(operation, [index for index in now if index not in self.small])
        for index in own:
            buffer = self.coming.get(index)
            if buffer is None:
                continue
            if not buffer.arrived:
                self._arrive(operation, buffer)
            buffer.unfetched.discard(index)
            del self.coming[index]
            if not buffer.unfetched:
                self.changes[operation] -= buffer.bytes
        while self.ahead < len(self.queue) and self.queue[self.ahead][0] < step:
            self.ahead += 1
        self._prefetch(operation)

    def _prefetch(self, operation: int) -> None:
        limit = min(self.buffers.live - self.available, self.buffers.prefetch)
        chosen: dict[int, None] = {}
        numel = 0
        while self.ahead < len(self.queue) and numel < limit:
            _, index = self.queue[self.ahead]
            self.ahead += 1
            if index in self.small or index in self.whole or index in self.coming or index in chosen:
                continue
            chosen[index] = None
            numel += self.numel[index]
        self._send(operation, list(chosen))

    def _send(self, operation: int, members: list[int]) -> None:
        if not members:
            return
        buffer = _Buffer(
            sum(self.travels[index] * self.numel[index] for index in members), tuple(members), set(members)
        )
        self.coming.update(dict.fromkeys(members, buffer))
        self.available += sum(self.numel[index] for index in members)
        self.changes[operation] += buffer.bytes
        self.under_way.append(buffer.bytes)
        self._copy(operation)
        later = operation >= self.trace.backward_at
        self.sent[later].append(buffer.bytes)
        self.gathered[later] += sum(self.numel[index] for index in members)
        # This process's parts are cast, all of them, before they go.
        self._spike(operation, sum(LOW * self._low(index) for index in members) // self.processes)

    def _arrive(self, operation: int, buffer: _Buffer) -> None:
        buffer.arrived = True
        self.under_way.remove(buffer.bytes)
        self._copy(operation)
        self.whole.update(buffer.members)
        self.changes[operation] += FP32 * sum(self.numel[index] for index in buffer.members)
        # Each is put together in the type that it came in before it becomes fp32.
        self._spike(operation, LOW * max(map(self._low, buffer.members)))

    def _copy(self, operation: int) -> None:
        """Each thread of gloo's has one buffer at work; the others wait."""
        before, self.copies = self.copies, sum(sorted(self.under_way)[-GLOO_THREADS:]) if self.copied else 0
        self.changes[operation] += self.copies - before

    def _low(self, index: int) -> int:
        """Elements that travel in autocast's type."""
        return self.numel[index] if self.travels[index] == LOW else 0

    def _spike(self, operation: int, size: int) -> None:
        self.spikes[operation] = max(self.spikes[operation], size)

    def _release(self, operation: int, step: int, own: tuple[int, ...]) -> None:
        for index in own:
            if index in self.whole and index not in self.coming and not self._comes_again(index, step):
                self.whole.discard(index)
                self.available -= self.numel[index]
                self.changes[operation] -= FP32 * self.numel[index]

    def _comes_again(self, index: int, step: int) -> bool:
        """Whether it is used within `reuse` elements from the module that follows."""
        uses = self.uses[index]
        after = bisect_left(uses, step)
        return after < len(uses) and bool(self.passed[uses[after]] - self.passed[step] < self.buffers.reuse)
