"""Before the processes need each other: who has come, and whether all were started alike.

A collective that one rank does not reach, or reaches with something else in its hands, waits until its time-out and
then says little. So the ranks first tell each other what they are, through the store that they all start from anyway.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from hybrid_dist.again import times
from hybrid_dist.errors import UserError

PATIENCE = 300.0
"""Seconds for all ranks to come: a cold network disk may need minutes to hand out the framework."""
NEWS = 20.0
"""Seconds between two lines about those who are missing."""
CONNECT = 60.0
"""Seconds for the connections between ranks that have met."""
ELSEWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737)."""
_POLL = 0.05


def meet(same: Mapping[str, Any], problem: str | None) -> None:
    """Wait for all ranks, and compare.

    Args:
        same: What must be equal on all ranks, by name.
        problem: Why this rank can't take part, if so.

    Raises:
        UserError: some did not come, or they differ, or one has a problem. All ranks raise the same, as far as they
            can be told.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "problem": problem, "same": dict(same)}
    store = _open_store(rank, world_size)
    try:
        verdict = _exchange(store, rank, world_size, mine)
    except _LOST:
        raise UserError(
            f"rank {rank} on {mine['host']}: {_address()}, the head, has gone; what it has said is above, or there"
        ) from None
    if verdict:
        raise UserError(verdict, shared=True)


def _exchange(store: Any, rank: int, world_size: int, mine: dict[str, Any]) -> str:
    """Say what this rank is, and hear what is wrong with all together; nothing if all is well."""
    text = json.dumps(mine, sort_keys=True)
    there = store.compare_set(f"rank/{rank}", "", text).decode()
    if there != text:
        other = json.loads(there)
        raise UserError(
            f"rank {rank} on {mine['host']}: process {other['pid']} on {other['host']} is rank {rank} already. Two jobs"
            f" on one port ({_address()}), or two machines with one rank: another --main_process_port, or"
            " --machine_rank, would do"
        )
    store.add("count", 1)
    if rank == 0:
        verdict = _judge(store, world_size)
        store.set("verdict", verdict)
        _wait(lambda: store.add("heard", 0) == world_size - 1, 5.0)  # this process may be the store's host
        return verdict
    return _hear(store, rank)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


_LOST = (dist.DistNetworkError, dist.DistStoreError)


def _open_store(rank: int, world_size: int) -> Any:
    """The launcher's, or one that rank 0 holds; torch's own start reaches the same one later."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    holds = rank == 0 and not of_launcher
    # A launcher's was there before this process was; rank 0's may come late.
    until = time.monotonic() + (NEWS if of_launcher else PATIENCE)
    while True:
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, world_size, holds, timedelta(seconds=NEWS), wait_for_workers=False, multi_tenant=True
            )
            break
        except _LOST as error:
            reason = str(error).splitlines()[0]
            what = f"rank {rank} on {socket.gethostname()}: {_address()}, the head, can't be reached: {reason}"
            if holds or time.monotonic() > until:
                raise UserError(what) from None
            _say(f"{what}; still trying")
    _KEPT.append(store)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"hybrid-dist/{attempt}", store)  # type: ignore[attr-defined]


def starting_point() -> dict[str, Any]:
    """Arguments of torch's start, after a meeting: nothing for the usual one.

    Ranks that have begun anew under the same launcher find the addresses of before where torch keeps them.
    """
    if times() == 0:
        return {}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"begun-anew/{attempt}", _KEPT[-1])  # type: ignore[attr-defined]
    return {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}


_KEPT: list[Any] = []
"""Rank 0's store must outlive the meeting: torch's start shares it."""


def _wait(test: Any, seconds: float, news: Any = None) -> bool:
    """Until `test` holds; `news` is called now and then meanwhile. False after `seconds`."""
    began = told = time.monotonic()
    while not test():
        now = time.monotonic()
        if now - began > seconds:
            return False
        if news is not None and now - told > NEWS:
            news()
            told = now
        time.sleep(_POLL)
    return True


def _judge(store: Any, world_size: int) -> str:
    """Rank 0: what is wrong with those who came; nothing if all is well."""

    def missing() -> str:
        ranks = [rank for rank in range(world_size) if not store.check([f"rank/{rank}"])]
        hosts = sorted({json.loads(store.get(f"rank/{rank}"))["host"] for rank in set(range(world_size)) - {*ranks}})
        return f"{listed('rank', ranks)} of {world_size} not there; the others are on {', '.join(hosts)}"

    if not _wait(lambda: store.add("count", 0) >= world_size, PATIENCE, lambda: _say(f"waiting: {missing()}")):
        return f"{missing()}. Waited {PATIENCE:.0f} s; what they have said, if anything, is above or on their machines"
    found = [json.loads(text) for text in store.multi_get([f"rank/{rank}" for rank in range(world_size)])]
    return _problems(found) or differences(found)


def _hear(store: Any, rank: int) -> str:
    """Any other rank: what rank 0 found."""
    patience = PATIENCE + 2 * NEWS  # rank 0 comes to its end first, if it is there
    if not _wait(lambda: store.check(["verdict"]), patience, lambda: _say(f"rank {rank} is waiting for rank 0")):
        raise UserError(f"rank {rank} on {socket.gethostname()}: rank 0 has not come, or has gone")
    verdict: str = store.get("verdict").decode()
    store.add("heard", 1)
    return verdict


def _problems(found: list[dict[str, Any]]) -> str:
    for rank, facts in enumerate(found):
        if facts["problem"]:
            return str(facts["problem"]) if len(found) == 1 else f"rank {rank} on {facts['host']}: {facts['problem']}"
    return ""


def differences(found: list[dict[str, Any]]) -> str:
    """Where ranks are not as rank 0 is: who, and in what. Nothing if all are alike.

    Args:
        found: Each rank's `host`, and `same`: what must be equal, by name.
    """
    first = found[0]
    for rank, facts in enumerate(found):
        here, there = first["same"], facts["same"]
        keys = [key for key in {**here, **there} if here.get(key) != there.get(key)]
        if keys:
            alike = [other for other in range(rank, len(found)) if found[other]["same"] == there]
            shown = [f"{key} is {here.get(key)!r} on rank 0 and {there.get(key)!r} there" for key in keys[:4]]
            more = f"; and {len(keys) - 4} more" if len(keys) > 4 else ""
            return (
                f"{listed('rank', alike)} on {facts['host']} and rank 0 on {first['host']} were not started alike:"
                f" {'; '.join(shown)}{more}. The same versions, config, tables and arguments everywhere would do"
            )
    return ""


def listed(noun: str, numbers: list[int]) -> str:
    """`rank 3`, `ranks 3, 4, 5`; the first eight of many."""
    shown = ", ".join(str(number) for number in numbers[:8])
    return f"{noun}{'s' if len(numbers) > 1 else ''} {shown}{', …' if len(numbers) > 8 else ''}"


def choose_interface(head: str, port: int) -> None:
    """Let gloo use the way that leads to the head node, unless the user has said which.

    By itself it takes the address that the machine's own name stands for, which on many systems is a loopback one.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = _own_address(head, port)
    if address is not None and ipaddress.ip_address(address).is_loopback and head not in (address, "localhost"):
        # The head itself, whose name stands for a loopback address there: the way to everywhere else then.
        address = _own_address(ELSEWHERE, port)
    names = [name for name, entries in psutil.net_if_addrs().items() if any(e.address == address for e in entries)]
    if names:
        os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def _own_address(head: str, port: int) -> str | None:
    """This machine's address as the head node sees it; nothing is sent."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(head, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


@contextmanager
def connecting() -> Iterator[None]:
    """Ranks that have met connect in here, which takes a moment or does not work at all.

    Raises:
        UserError: it does not. Where it would take until a collective's time-out to say so, the process ends.
    """
    what = (
        f"rank {os.environ['RANK']} on {socket.gethostname()} has met the others at {_address()}, but has no connection"
        f" with them over {os.environ.get('GLOO_SOCKET_IFNAME', 'the default interface')}"
    )
    remedy = (
        "A firewall between the machines, or the wrong interface: GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME,"
        " choose another"
    )

    def give_up() -> None:
        _say(f"{what} after {CONNECT:.0f} s. {remedy}")
        os._exit(2)

    timer = threading.Timer(CONNECT, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:  # gloo's are no others
        if "onnect" not in str(error):
            raise
        raise UserError(f"{what}: {str(error).splitlines()[0]}. {remedy}") from None
    finally:
        timer.cancel()


def _say(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)
