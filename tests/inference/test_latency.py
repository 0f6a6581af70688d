"""`hybrid-dist bench latency`: figures that scripts can read, of a model or of a config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import half

Call = Callable[..., tuple[int, str, str]]


def test_figures(trained: Path, call: Call) -> None:
    """Catches: a batch's time told as a picture's, a ratio of other figures, another precision than the model's."""
    code, said, heard = call("bench", "latency", trained, "--batch", 1, 4, "--repeats", 6, "--json")
    assert code == 0, heard
    result = json.loads(said)
    assert (result["precision"], result["image_size"], result["device"]) == (half(), 96, "cpu")
    assert [row["batch"] for row in result["batches"]] == [1, 4]
    for row in result["batches"]:
        assert row["turns"] == 6
        assert all(0 < row[name]["p50_ms"] <= row[name]["p95_ms"] for name in ("end_to_end", "model", "backbones"))
        assert row["ratio"] == pytest.approx(row["model"]["p50_ms"] / row["backbones"]["p50_ms"])
    one, four = result["batches"]
    assert four["backbones"]["p50_ms"] < 2 * one["backbones"]["p50_ms"]


def test_of_a_config(tiny_config: Callable[..., Path], call: Call) -> None:
    """Catches: a key=value that is taken for a model, or asked for with nothing to measure."""
    command = ["bench", "latency", "--config", tiny_config(), "--batch", 1, "--repeats", 1]
    code, said, heard = call(*command, "train.precision=bf16", "data.image_size=96")
    assert code == 0, heard
    assert f"{half()} on cpu" in said and "model / bare" in said
    code, said, heard = call("bench", "latency", "--config", tiny_config(), "train.precision=bf16", "--batch", 1,
                             "--repeats", 1)  # fmt: skip
    assert code == 0 and half() in said
    for arguments, words in (([], "MODEL"), ([*command[2:], "--seconds", 0], "--seconds 0"), (["nowhere"], "nowhere")):
        code, said, heard = call("bench", "latency", *arguments)
        assert (code, said) == (2, "") and words in heard
