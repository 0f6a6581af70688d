"""The data set on disk: rendered beside its place, moved there in one step, recognised when it is already there."""

import json
import logging
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from hybrid_dist.data.output import (
    check_whole_number,
    in_order,
    write_annotations,
    write_classes,
    write_jpeg,
    write_json,
)
from hybrid_dist.data.synth.picture import AIRLINE_NAMES, SPLITS, TYPE_NAMES, render_picture
from hybrid_dist.errors import UserError
from hybrid_dist.files import whole_or_nothing

log = logging.getLogger(__name__)

# Goes up when the pictures of a seed change, so that a data set of an older renderer is not taken for a current one.
RENDERER = 2
RECORD = "synth.json"
JPEG_QUALITY = 92
CHUNK = 25  # pictures a worker renders before it reports


@dataclass(frozen=True)
class Job:
    """Some pictures of one split, start <= index < stop."""

    folder: str
    split: str
    start: int
    stop: int
    seed: int


def _render_chunk(job: Job) -> list[dict[str, str]]:
    """Write a chunk's pictures and return their rows."""
    rows = []
    for index in range(job.start, job.stop):
        picture, row = render_picture(job.split, index, job.seed)
        write_jpeg(Path(job.folder, row["filename"]), picture, JPEG_QUALITY)
        rows.append(row)
    return rows


def _render_into(
    folder: Path, counts: dict[str, int], seed: int, workers: int, progress: Callable[[int], None] | None
) -> None:
    """Both splits with pictures and CSV, the class files, and last the record."""
    jobs = []
    for split, count in counts.items():
        (folder / split).mkdir()
        jobs += [Job(str(folder / split), split, at, min(at + CHUNK, count), seed) for at in range(0, count, CHUNK)]
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in counts}
    done = 0
    with closing(in_order(_render_chunk, jobs, workers)) as rendered:
        for job, made in zip(jobs, rendered, strict=True):
            rows[job.split] += made
            done += len(made)
            if progress is not None:
                progress(done)
    for split in counts:
        write_annotations(folder, split, rows[split])
    write_classes(folder, "type", TYPE_NAMES)
    write_classes(folder, "airline", AIRLINE_NAMES)
    write_json(folder / RECORD, _record(counts, seed))


def _record(counts: dict[str, int], seed: int) -> dict[str, int]:
    return {"renderer": RENDERER, **counts, "seed": seed}


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        check_whole_number(name, value, least=0 if name == "seed" else 1)


def _read_record(path: Path) -> object:
    """What the record says, or None where there is none to be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_rendered(out: Path, train: int, val: int, seed: int) -> bool:
    """Whether `out` already holds just this data set; ValueError where it holds anything else."""
    _check_numbers(train=train, val=val, seed=seed)
    counts = dict(zip(SPLITS, (train, val), strict=True))
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file; name a folder that does not exist yet")
    if not any(out.iterdir()):
        return False
    wanted, found = _record(counts, seed), _read_record(out / RECORD)
    if found is None:
        raise UserError(
            f"{out} exists and holds something that is not a rendered data set; name another folder or empty it"
        )
    if found != wanted:
        raise UserError(
            f"{out} holds another data set: found {json.dumps(found)}, wanted {json.dumps(wanted)}; "
            "name another folder or delete it"
        )
    _check_complete(out, counts)
    return True


def _check_complete(out: Path, counts: dict[str, int]) -> None:
    """Refuse a data set that lost files since it was rendered."""
    for split, count in counts.items():
        pictures = sum(1 for _ in (out / split).glob("*.jpg"))
        if pictures != count or not (out / f"{split}.csv").is_file():
            raise UserError(
                f"{out} was rendered with {count} pictures in {split} but has {pictures} or no {split}.csv; "
                "delete it to render it again"
            )


def render_dataset(
    out: Path, train: int, val: int, seed: int, workers: int = 1, progress: Callable[[int], None] | None = None
) -> None:
    """Render `train` + `val` pictures with their annotations into the folder `out`.

    The bytes depend on the numbers and the seed, not on `workers`. `progress` is told how many pictures are done so
    far. What is already there with the same numbers is left as it is; a folder with anything else in it is a
    ValueError.
    """
    _check_numbers(workers=workers)
    out = Path(out).resolve()
    if is_rendered(out, train, val, seed):
        log.info("%s is already rendered with these numbers; nothing to do", out)
        if progress is not None:
            progress(train + val)
        return
    try:
        with whole_or_nothing(out) as building:
            _render_into(building, dict(zip(SPLITS, (train, val), strict=True)), seed, workers, progress)
    except OSError:
        # Another process that was faster with the same data set is fine.
        if not is_rendered(out, train, val, seed):
            raise
