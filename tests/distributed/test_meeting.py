"""Ranks tell each other what they are, before they need the same: what is wrong has a name."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
import torch

from hybrid_dist.distributed import launch, listed, meeting
from hybrid_dist.errors import UserError


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of two, and holds the store itself, as under a launcher that has none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    facts = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in facts.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(meeting, "_KEPT", [])


@pytest.mark.usefixtures("rank_0")
def test_a_rank_that_does_not_come(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches: a wait without a word or an end; a message that does not say which rank it is."""
    monkeypatch.setattr(meeting, "PATIENCE", 1.0)
    monkeypatch.setattr(meeting, "NEWS", 0.3)
    with pytest.raises(UserError, match=r"rank 1 of 2 not there; the others are on \S+\. Waited 1 s") as raised:
        meeting.meet({}, None)
    assert raised.value.shared
    assert "train.py: waiting: rank 1 of 2 not there" in capfd.readouterr().err


@pytest.mark.usefixtures("rank_0")
def test_a_problem_of_one_is_said_to_all() -> None:
    """Catches: a rank that can't take part and leaves the others waiting; a name that is not said."""
    raised: list[UserError] = []

    def rank_1() -> None:
        store = None
        while store is None:
            store = meeting._KEPT[0] if meeting._KEPT else None
            time.sleep(0.01)
        shared = torch.distributed.PrefixStore("hybrid-dist/0", store)
        shared.set("rank/1", '{"host": "other", "pid": 1, "problem": "no room", "same": {}}')
        shared.add("count", 1)
        try:
            if text := meeting._hear(shared, 1):
                raise UserError(text)
        except UserError as error:
            raised.append(error)

    thread = threading.Thread(target=rank_1)
    thread.start()
    with pytest.raises(UserError, match=r"^rank 1 on other: no room$"):
        meeting.meet({}, None)
    thread.join(10)
    assert [str(error) for error in raised] == ["rank 1 on other: no room"]


def test_differences_name_those_who_differ() -> None:
    """Catches: a difference that is not found, such as a key that only one has; ranks that do not."""
    one = {"host": "a", "same": {"torch": "2.9", "lr": 1}}
    two = {"host": "b", "same": {"torch": "2.8", "lr": 1, "more": True}}
    assert meeting.differences([one, one]) == ""
    text = meeting.differences([one, one, two, two])
    assert text.startswith("ranks 2, 3 on b and rank 0 on a were not started alike: ")
    assert "torch is '2.9' on rank 0 and '2.8' there" in text
    assert "more is None on rank 0 and True there" in text
    assert "lr" not in text
    assert listed("rank", list(range(20))) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, …"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: two processes on one GPU, or a CUDA error, where fewer GPUs are there than asked for.

    There is none here: the count is made up, the arithmetic is what is tested.
    """
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    said = launch._problem("fp32", has_cuda=True)
    assert said == "8 processes for 4 GPUs on this machine; 4 a machine would do"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launch._problem("fp32", has_cuda=True) is None


def test_interface_that_leads_to_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: the interface of the machine's own name, which may be a loopback one; a choice that is the user's."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "before")  # or what is set here would stay
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    meeting.choose_interface("127.0.0.1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    meeting.choose_interface("127.0.0.1", 29500)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
