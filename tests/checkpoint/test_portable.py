"""Pieces written by any number of ranks, read in any other cut."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hybrid_dist.checkpoint import PieceReader, write_shard
from hybrid_dist.distributed import Piece
from hybrid_dist.errors import UserError


def cut(numel: int, points: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, numel, *(point % numel for point in points)})
    return list(itertools.pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(
    numel=st.integers(1, 60),
    written=st.lists(st.integers(0, 999), max_size=6),
    read=st.lists(st.integers(0, 999), max_size=6),
    ranks=st.integers(1, 4),
)
def test_any_cut_reads_any_other(
    numel: int, written: list[int], read: list[int], ranks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Catches: an element lost, doubled or misplaced where pieces meet."""
    folder = tmp_path_factory.mktemp("pieces")
    weight, moment = torch.randn(numel), torch.randn(numel)
    runs = cut(numel, written)
    files = []
    for rank in range(ranks):
        mine = runs[rank::ranks]
        pieces = [
            Piece("w", a, {"weight": weight[a:b], "exp_avg": moment[a:b], "exp_avg_sq": moment[a:b]}, 7)
            for a, b in mine
        ]
        files.append(folder / f"shard-{rank}.safetensors")
        facts = write_shard(files[-1], pieces, {"steps": torch.tensor(3)} if rank == 0 else {})
        data = files[-1].read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reader = PieceReader(files)
    for a, b in cut(numel, read):
        assert torch.equal(reader("w", "weight", a, b - a), weight[a:b])
        assert torch.equal(reader("w", "exp_avg", a, b - a), moment[a:b])
    assert reader.step("w") == 7
    whole = reader.weights({"w": torch.Size([numel])})
    assert torch.equal(whole["w"], weight)
    assert whole["steps"] == 3
    assert reader.missing({"w": [numel]}) is None
    assert reader.missing({"w": [numel + 1]}) == "w"
    assert reader.missing({"w": [numel], "x": [1]}) == "x"
    reader.write_weights(folder / "whole.safetensors", {"w": torch.Size([numel])})
    written_whole = load_file(folder / "whole.safetensors")
    assert torch.equal(written_whole["w"], weight)
    assert written_whole["steps"] == 3


def test_a_gap_is_named(tmp_path: Path) -> None:
    """Catches: elements that no rank wrote, read as zeros or as whatever memory held."""
    write_shard(tmp_path / "a.safetensors", [Piece("w", 0, {"weight": torch.ones(4)}, None)], {})
    write_shard(tmp_path / "b.safetensors", [Piece("w", 6, {"weight": torch.ones(4)}, None)], {})
    reader = PieceReader(sorted(tmp_path.iterdir()))
    with pytest.raises(UserError, match="elements 4 to 10 of w"):
        reader("w", "weight", 0, 10)
    with pytest.raises(UserError, match="no exp_avg"):
        reader("w", "exp_avg", 0, 2)
    assert reader.missing({"w": [10]}) == "w"


def test_a_view_is_written_as_it_was(tmp_path: Path) -> None:
    """Catches: pieces of one flat buffer refused as shared memory; a header that safetensors reads otherwise."""
    flat = torch.arange(10.0)
    buffers = {"count": torch.tensor(3), "mask": torch.tensor([True, False]), "half": torch.ones(2, 3).bfloat16()}
    write_shard(tmp_path / "a.safetensors", [Piece("w", 0, {"weight": flat[:5], "exp_avg": flat[5:]}, 1)], buffers)
    assert PieceReader([tmp_path / "a.safetensors"])("w", "exp_avg", 0, 5).tolist() == [5, 6, 7, 8, 9]
    found = load_file(tmp_path / "a.safetensors")
    for name, values in buffers.items():
        assert found[f"buffer/{name}"].dtype == values.dtype
        assert torch.equal(found[f"buffer/{name}"], values)
