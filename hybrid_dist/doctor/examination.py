"""The whole examination."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from hybrid_dist.config import Config
from hybrid_dist.data.annotations import table_sums
from hybrid_dist.doctor.host import host_lines
from hybrid_dist.doctor.inputs import data_lines, parameters_of, weights_lines
from hybrid_dist.doctor.line import Line, fail
from hybrid_dist.doctor.memory import memory_lines
from hybrid_dist.doctor.storage import storage_lines
from hybrid_dist.doctor.together import Place, local_line, together_lines


def examine(config: Config | None, doing: Callable[[str], None]) -> list[Line] | None:
    """Every check that can be made here. Under srun each task looks at its own host, and rank 0 has all lines.

    Args:
        config: Without one, what depends on it is left out.
        doing: Told what is looked at.

    Returns:
        None on the tasks that have nothing to say.
    """
    place = Place.under_srun()
    processes = max(torch.cuda.device_count(), 1)
    lines = list(_own(config, processes, doing))
    if place is None:
        doing("all-reduce")
        return [*lines, local_line(max(processes, 2))]
    doing("rendezvous")
    return together_lines(place, lines, _same(config))


def _same(config: Config | None) -> dict[str, Any]:
    """What must be equal on all hosts; a table that can't be read has its own line."""
    if config is None:
        return {}
    try:
        return {**config.alike(), **table_sums(config.data)}
    except OSError:
        return config.alike()


def _own(config: Config | None, processes: int, doing: Callable[[str], None]) -> Iterator[Line]:
    doing("this machine")
    yield from host_lines(config, processes)
    if config is None:
        return
    checks: dict[str, Callable[[], Iterable[Line]]] = {
        "weights": lambda: weights_lines(config),
        "disk": lambda: storage_lines(config, parameters_of(config)),
        "data": lambda: data_lines(config),
        "memory": lambda: memory_lines(config),
    }
    for what, check in checks.items():
        doing(what)
        try:
            yield from check()
        except OSError as error:
            yield fail(what, f"{error.filename or ''}: {error.strerror or error}", "see that this machine reaches it")


def failed(lines: Iterable[Line]) -> bool:
    """Whether something would not run."""
    return any(line.state == "fail" for line in lines)
