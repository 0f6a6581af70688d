"""How long check-data takes with tables of 100,000 rows, and for their near duplicates.

The pictures are empty files, for nothing here opens them; what decoding takes depends on the pictures alone.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from hybrid_dist.config import Config, parse_config
from hybrid_dist.data.check.duplicates import same_looking
from hybrid_dist.data.check.folders import folder_findings, named_files
from hybrid_dist.data.check.tables import read_splits, table_findings

ROWS = {"train": 100_000, "val": 20_000}
Result = TypeVar("Result")


def main() -> None:
    """Print a line for each thing that is measured."""
    with tempfile.TemporaryDirectory() as name:
        config = make(Path(name))
        splits = timed("reading both tables", lambda: read_splits(config))
        files, _ = timed("missing files", lambda: named_files(splits))
        timed("labels and classes", lambda: list(table_findings(splits, config.tasks)))
        timed("extra, linked and repeated files", lambda: list(folder_findings(splits, files)))
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 1 << 63, 100_000, dtype=np.uint64) * np.uint64(2)
    thumbs = rng.integers(0, 256, (100_000, 192), dtype=np.uint8)
    timed("near duplicates of 100,000 different pictures", lambda: same_looking(looks, thumbs))
    # Pictures of one motif: each within 4 bits of one of 200, far worse than aircraft before a sky.
    alike = looks[rng.integers(0, 200, 100_000)]
    for _ in range(4):
        alike ^= np.uint64(1) << rng.integers(0, 64, 100_000, dtype=np.uint64)
    timed("near duplicates of 100,000 pictures of 200 motifs", lambda: same_looking(alike, thumbs))
    timed("the same, all of them copies", lambda: same_looking(alike, thumbs * 0 + thumbs[0]))
    timed(
        "near duplicates of 100,000 equal pictures", lambda: same_looking(looks * np.uint64(0), thumbs * 0 + thumbs[0])
    )
    timed("near duplicates of 100,000 of equal hash alone", lambda: same_looking(looks * np.uint64(0), thumbs))


def timed(what: str, work: Callable[[], Result]) -> Result:
    start = time.perf_counter()
    result = work()
    print(f"{what}: {time.perf_counter() - start:.2f} s", flush=True)
    return result


def make(folder: Path) -> Config:
    """Tables with four tasks; one file in a thousand is missing, one is extra, one is named twice."""
    rng = np.random.default_rng(0)
    for split, rows in ROWS.items():
        (folder / split).mkdir()
        lines = ["filename,typeid,typename,airlineid,airlinename,clarity,block"]
        for row in range(rows):
            kind, airline = rng.integers(0, (100, 30))
            name = f"{row // 1000:03d}/{row - (row % 1000 == 7):06d}.jpg"
            lines.append(f"{name},{kind},type {kind},{airline},airline {airline},{rng.random():.3f},")
            if row % 1000 == 0:
                (folder / split / f"{row // 1000:03d}").mkdir()
            if row % 1000 != 5:
                (folder / split / name).touch()
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return parse_config(values(folder), "benchmark")


def values(folder: Path) -> dict[str, object]:
    """A config, as plain values."""
    data = {f"{split}_csv": str(folder / f"{split}.csv") for split in ROWS}
    data |= {f"{split}_images": str(folder / split) for split in ROWS}
    return {
        "run": {"name": "benchmark"},
        "data": data,
        "model": {"cnn": {"name": "convnext_atto"}, "transformer": None},
        "tasks": {
            "type": {"kind": "classification", "column": "typename"},
            "airline": {"kind": "classification", "column": "airlinename"},
            "clarity": {"kind": "regression", "column": "clarity"},
            "block": {"kind": "regression", "column": "block"},
        },
    }


if __name__ == "__main__":
    main()
