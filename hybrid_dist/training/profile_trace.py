"""What a trace of torch.profiler's tells: which part of a step its time goes to, the costliest operations; and the
trace without anything that names a machine or its user."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid_dist.distributed import DATA, PARTS

COMMUNICATION, OTHER = "communication", "other"
SPLIT = (*PARTS, COMMUNICATION, OTHER)
"""What each moment of a step counts to one of."""
MARK = "hybrid-dist: "
"""What this project's own ranges in a trace begin with: the parts, and `step N`."""
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
TOP = 15

Event = dict[str, Any]
Spans = NDArray[np.float64]
"""(n, 2): begin and end of each, in µs."""


@dataclass(frozen=True)
class Split:
    """Where the time of some steps went; in seconds."""

    steps: list[float]
    """Each step's."""
    parts: dict[str, float]
    """By `SPLIT`, a step's mean; together they are the mean of `steps`."""
    in_flight: float
    """A step's mean of the time in which some collective was under way, hidden behind computing or not."""


def split(events: Sequence[Event], steps: Sequence[int], on_cuda: bool) -> Split:
    """Give each moment of the steps to one part.

    On a CPU a moment belongs to the part that the training thread is in, unless a collective is under way and no
    operation computes beside it: then to communication. (Waiting for the other ranks' data counts as data.) On a GPU it
    belongs to the part that has launched what the device computes, else to communication if a collective runs there,
    else, the device being idle, to the part that the training thread is in.

    Args:
        events: A chrome trace's, of one process, with ranges named by `MARK`.
        steps: Those to look at.
    """
    own = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)]
    ranges = {name: _spans(event for event in own if event["name"] == MARK + name) for name in PARTS}
    each = [_spans(event for event in own if event["name"] == f"{MARK}step {step}") for step in steps]
    kernels = [event for event in events if event.get("cat") in DEVICE_WORK] if on_cuda else []
    sent, computed = _on_device(kernels) if on_cuda else _on_host(events)
    edges = np.unique(np.concatenate([span.ravel() for span in (*ranges.values(), *each, sent, computed)]))
    # Of the training thread; the later of two that stand within each other is meant.
    part = np.full(len(edges) - 1, SPLIT.index(OTHER))
    for index, name in enumerate(PARTS):
        part[_covered(edges, ranges[name])] = index
    sending, computing = _covered(edges, sent), _covered(edges, computed)
    owner = part.copy()
    owner[sending & ~computing & (on_cuda | (part != SPLIT.index(DATA)))] = SPLIT.index(COMMUNICATION)
    if on_cuda:
        begun = part[np.clip(np.searchsorted(edges, _launched(events, kernels), "right") - 1, 0, len(part) - 1)]
        busy = _spans(kernels)
        compute = np.array([not _sends(kernel) for kernel in kernels], bool)
        for index in range(len(SPLIT)):
            owner[_covered(edges, busy[compute & (begun == index)])] = index
    widths, inside = np.diff(edges) / 1e6, _covered(edges, np.concatenate(each))
    totals = [float(widths[inside & (owner == index)].sum()) for index in range(len(SPLIT))]
    flight = float(widths[inside & sending & (on_cuda | (part != SPLIT.index(DATA)))].sum())
    parts = {name: total / len(steps) for name, total in zip(SPLIT, totals, strict=True)}
    return Split([float((span[0, 1] - span[0, 0]) / 1e6) for span in each], parts, flight / len(steps))


def _spans(events: Iterable[Event]) -> Spans:
    found = [(event["ts"], event["ts"] + event["dur"]) for event in events]
    return np.array(found, np.float64).reshape(-1, 2)


def _covered(edges: NDArray[np.float64], spans: Spans) -> NDArray[np.bool_]:
    """(edges - 1,): whether each piece between two edges lies within a span; the spans begin and end at edges."""
    depth = np.zeros(len(edges), np.int64)
    np.add.at(depth, np.searchsorted(edges, spans[:, 0]), 1)
    np.add.at(depth, np.searchsorted(edges, spans[:, 1]), -1)
    return np.cumsum(depth)[:-1] > 0


def _on_host(events: Iterable[Event]) -> tuple[Spans, Spans]:
    """Gloo's collectives, in its own threads or where they are begun; and ATen's operations in any thread."""
    sent, computed = [], []
    for event in events:
        kind, name = event.get("cat"), event["name"]
        if kind == "cpu_op" and name.startswith("aten::"):
            computed.append(event)
        elif name == "record_param_comms" or name.startswith("gloo:") or (kind == "cpu_op" and name[:6] == "c10d::"):
            sent.append(event)
    return _spans(sent), _spans(computed)


def _on_device(kernels: Iterable[Event]) -> tuple[Spans, Spans]:
    kernels = list(kernels)
    return _spans(filter(_sends, kernels)), _spans(kernel for kernel in kernels if not _sends(kernel))


def _sends(kernel: Event) -> bool:
    return kernel["name"].startswith("nccl")


def _launched(events: Iterable[Event], kernels: Sequence[Event]) -> NDArray[np.float64]:
    """(kernels,): when the host has begun each, in whatever thread; where that is not told, when it ran."""
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    found = [launches.get(kernel.get("args", {}).get("correlation"), kernel["ts"]) for kernel in kernels]
    return np.array(found, np.float64)


def operations(events: Sequence[Event], steps: Sequence[int], on_cuda: bool) -> list[dict[str, Any]]:
    """The `TOP` operations by their own time within the steps, without that of the operations that they call.

    On a GPU it is the time of their kernels. Plain values: `name`, and of a step's mean `calls` and `seconds`.
    """
    names = {f"{MARK}step {step}" for step in steps}
    windows = _spans(event for event in events if event.get("cat") == "user_annotation" and event["name"] in names)
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for event, own in _of_kernels(events) if on_cuda else _of_operations(events):
        if ((windows[:, 0] <= event["ts"]) & (event["ts"] < windows[:, 1])).any():
            calls[event["name"]] += 1
            seconds[event["name"]] += own / 1e6
    most = sorted(seconds, key=lambda name: -seconds[name])[:TOP]
    count = len(steps)
    return [{"name": name, "calls": calls[name] / count, "seconds": seconds[name] / count} for name in most]


def _of_operations(events: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each operation with its own µs."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["tid"]].append(event)
    for thread in threads.values():
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        own = [event["dur"] for event in thread]
        around: list[int] = []
        for index, event in enumerate(thread):
            while around and thread[around[-1]]["ts"] + thread[around[-1]]["dur"] <= event["ts"]:
                around.pop()
            if around:
                own[around[-1]] -= event["dur"]
            around.append(index)
        yield from zip(thread, own, strict=True)


def _of_kernels(events: Sequence[Event]) -> Iterator[tuple[Event, float]]:
    """Each kernel under the name of the operation that it belongs to, at the time of that, with its µs."""
    by_id = {event["args"].get("External id"): event for event in events if event.get("cat") == "cpu_op"}
    for event in events:
        if event.get("cat") in DEVICE_WORK:
            yield by_id.get(event.get("args", {}).get("External id"), event), event["dur"]


def allocated(events: Iterable[Event], on_cuda: bool) -> int | None:
    """Bytes of tensors at the peak; of those on a CPU, that were made since the trace began. None: it was not noted."""
    kind = 1 if on_cuda else 0
    noted = (event["args"] for event in events if event["name"] == "[memory]")
    return max((args["Total Allocated"] for args in noted if args.get("Device Type") == kind), default=None)


def joined(traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Traces of one process, in order, as one. They have one clock; the numbers that tie events together are moved."""
    events = []
    for index, trace in enumerate(traces):
        for event in trace["traceEvents"]:
            if "id" in event:
                event["id"] += index * _APART
            if "External id" in event.get("args", {}):
                event["args"]["External id"] += index * _APART
            events.append(event)
    return {**traces[0], "traceEvents": events}


_APART = 10**9
KEPT = ("schemaVersion", "deviceProperties", "displayTimeUnit", "baseTimeNanoseconds", "profile_memory")
WORDS = frozenset({"Collective name", "dtype", "labels"})
"""Arguments of events whose text says nothing of the machine."""
_PATH = re.compile(r"(?:/[^\s/:'\"]+){2,}/?")


def stripped(trace: dict[str, Any], rank: int, secrets: Iterable[str]) -> dict[str, Any]:
    """The trace with what is known to be harmless, and nothing else: no host, user, command line or path.

    Args:
        rank: Names the process instead.
        secrets: Texts that a range's name must not have either.
    """
    hidden = [re.compile(rf"\b{re.escape(text)}\b") for text in secrets if text]
    world = trace.get("distributedInfo", {})
    facts = {key: world[key] for key in ("backend", "rank", "world_size") if key in world}
    events = [_stripped(event, rank, hidden) for event in trace["traceEvents"]]
    kept = {key: trace[key] for key in KEPT if key in trace}
    return {**kept, **({"distributedInfo": facts} if facts else {}), "traceEvents": events}


def _stripped(event: Event, rank: int, hidden: Sequence[re.Pattern[str]]) -> Event:
    event = dict(event)
    if event.get("ph") == "M":
        if event["name"] == "process_name":
            return event | {"args": {"name": f"rank {rank}"}}
        if event["name"] == "thread_name":
            # Threads of torch's have names of their own, others that of the command.
            known = re.search(r"\((pt_\w+)\)", str(event["args"].get("name")))
            return event | {"args": {"name": f"thread {event['tid']}" + (f" ({known[1]})" if known else "")}}
    if event.get("cat") != "cpu_op":  # those are named in torch's own code, ranges by whoever opens one
        event["name"] = _PATH.sub("…", event["name"])
        for secret in hidden:
            event["name"] = secret.sub("…", event["name"])
    if "args" in event:
        event["args"] = {key: value for key, value in event["args"].items() if key in WORDS or _is_number(value)}
    return event


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list) and all(map(_is_number, value)))
