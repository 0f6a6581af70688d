"""Pieces written by any number of ranks, read in any other cut; folders that are whole or not there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hybrid_dist.checkpoint import PieceReader, Store, write_shard
from hybrid_dist.checkpoint.store import MANIFEST, verify
from hybrid_dist.distributed import Control, Piece
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
        pieces = [Piece("w", a, {"weight": weight[a:b], "exp_avg": moment[a:b]}, 7) for a, b in mine]
        files.append(folder / f"shard-{rank}.safetensors")
        write_shard(files[-1], pieces, {"steps": torch.tensor(3)} if rank == 0 else {})
    reader = PieceReader(files)
    for a, b in cut(numel, read):
        assert torch.equal(reader("w", "weight", a, b - a), weight[a:b])
        assert torch.equal(reader("w", "exp_avg", a, b - a), moment[a:b])
    assert reader.step("w") == 7
    whole = reader.weights({"w": torch.Size([numel])})
    assert torch.equal(whole["w"], weight)
    assert whole["steps"] == 3
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


def make_store(folder: Path, keep: int) -> tuple[Store, list[str]]:
    said: list[str] = []
    return Store(folder / "checkpoints", keep, Control(0, 1), said.append), said


def save(store: Store, step: int) -> Path:
    def write(path: Path) -> None:
        write_shard(path, [Piece("w", 0, {"weight": torch.full((100,), float(step))}, None)], {})

    return store.save(f"a-{step}", {"step": step}, write, {"predictions_val.csv": "x\n"})


DAMAGE = {
    "shard cut short": lambda path: truncate(next(path.glob("shard*")), 50),
    "shard with a flipped bit": lambda path: flip(next(path.glob("shard*"))),
    "shard missing": lambda path: next(path.glob("shard*")).unlink(),
    "state changed": lambda path: (path / "state.json").write_text('{"step": 9}'),
    "predictions missing": lambda path: (path / "predictions_val.csv").unlink(),
    "manifest missing": lambda path: (path / MANIFEST).unlink(),
    "manifest cut short": lambda path: truncate(path / MANIFEST, 20),
    "manifest of another format": lambda path: (path / MANIFEST).write_text('{"format": "x", "files": {}}'),
    "manifest that points outside": lambda path: point_outside(path),
}


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def point_outside(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_used(name: str, tmp_path: Path) -> None:
    """Catches: a broken checkpoint that is taken for whole, or a whole one lost for a broken one."""
    store, said = make_store(tmp_path, keep=3)
    for step in (5, 9, 10):
        assert verify(save(store, step)) is None
    DAMAGE[name](tmp_path / "checkpoints" / "a-10")
    found = store.newest()
    assert found is not None
    assert found.state == {"step": 9}
    assert PieceReader(found.shards)("w", "weight", 0, 1).item() == 9
    assert len(said) == 1
    assert "a-10" in said[0]


def test_the_newest_stay(tmp_path: Path) -> None:
    """Catches: pruning by name (10 before 9), of too many, or of the one just written."""
    store, _ = make_store(tmp_path, keep=2)
    for step in (8, 9, 10, 11):
        save(store, step)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["a-10", "a-11"]


def test_half_written_is_not_there(tmp_path: Path) -> None:
    """Catches: a save that failed on the way and leaves something that looks like a checkpoint."""
    store, _ = make_store(tmp_path, keep=2)
    save(store, 1)

    def fail(path: Path) -> None:
        path.write_bytes(b"some")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        store.save("a-2", {"step": 2}, fail, {})
    found = store.newest()
    assert found is not None
    assert found.state == {"step": 1}
