"""A split's CSV as a table: file names and labels, checked, in arrays that forked workers share without a copy.

Columns come in as text through Arrow and are dictionary-encoded there, so that every rule below looks at distinct
values, not at rows: ten million rows cost seconds. Blank means «no label» everywhere, never class 0 or a perfect score.
"""

from __future__ import annotations

import contextlib
import csv as csv_module
import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.labels import ClassMap, label_columns, read_class_file
from hybrid_dist.errors import UserError

SHOWN = 3
"""Offending lines that a message names before it only counts."""

_BLANK_NUMBERS = frozenset({"", "nan", "na", "null", "none"})
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
# pandas writes an integer column that has blanks as 0.0, 1.0, …
_ID = re.compile(r"[+-]?(\d{1,18})(\.0*)?", re.ASCII)
_RAGGED = "CSV parse error: Expected"
"""How Arrow begins to say that a row has not as many columns as the header."""
_FILENAME_RULES = (
    (r"^\s*$", "is blank"),
    (r"^/|^[A-Za-z]:", "is absolute: give it relative to {images}"),
    (r"\\", "has a backslash: write folders with /"),
    (r"[\x00-\x1f]", "has a control character, such as a line break"),
    (r"(^|/)\.\.(/|$)", "leaves the folder {images}"),
)


@dataclass(frozen=True, eq=False)
class Table:
    """One split. Row `i` is the CSV's i-th data row.

    `labels` has one array of shape (rows,) per task: int64 with -1 for no label (classification), or float32 with NaN
    for no label (regression). `unseen` counts, per task, the labels of classes that the class map doesn't know; they
    stand as «no label» in `labels`.
    """

    csv: Path
    images: Path
    filenames: pa.LargeStringArray
    labels: dict[str, np.ndarray]
    unseen: dict[str, dict[str, int]]

    def __len__(self) -> int:
        return len(self.filenames)

    def filename(self, row: int) -> str:
        """The row's picture, relative to `images`."""
        return str(self.filenames[row].as_py())

    def line(self, row: int) -> int:
        """The CSV's line that the row starts on, as an editor counts."""
        return int(self._lines[row])

    @cached_property
    def _lines(self) -> np.ndarray:
        return line_numbers(self)

    def valid(self, task: str) -> np.ndarray:
        """Bool, shape (rows,): which rows carry the task's label."""
        values = self.labels[task]
        return ~np.isnan(values) if values.dtype.kind == "f" else values >= 0

    def valid_counts(self) -> dict[str, int]:
        """Labelled rows per task."""
        return {task: int(np.count_nonzero(self.valid(task))) for task in self.labels}

    def class_counts(self, task: str, class_map: ClassMap) -> np.ndarray:
        """Labelled rows of each class: int64 (K,); 0 for a class that no row carries."""
        return np.bincount(self.labels[task][self.valid(task)], minlength=len(class_map))


@dataclass(frozen=True, eq=False)
class Problem:
    """One thing that is wrong with a table.

    kind: `table`, `ragged`, `column`, `class-file`, `filename`, `score`, `class`, `no-label`; `unseen` from a survey
        alone, for training goes on without these labels.
    complaint: what is wrong, without the lines.
    texts: what training is refused with, lines included; made on request, for it takes a pass over the file.
    rows: int64 (n,), the rows that it is about; none where it is about the file as a whole.
    cell: what to show of one of them.
    """

    kind: str
    complaint: str
    texts: Callable[[], list[str]]
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    cell: Callable[[int], str] = str


class Problems:
    """What was found wrong with a CSV so far. Training is refused with it; a check collects it and reads on."""

    def __init__(self, csv: Path, collect: bool = False) -> None:
        self.csv = csv
        self.collect = collect
        self.found: list[Problem] = []

    def add(self, problem: Problem) -> None:
        """Note a problem, unless it is noted already."""
        if all((problem.kind, problem.complaint) != (other.kind, other.complaint) for other in self.found):
            self.found.append(problem)

    def refuse(self, kind: str, error: UserError) -> None:
        """What training stops at, whatever else there may be.

        Raises:
            UserError: `error`, unless problems are collected.
        """
        if not self.collect:
            raise error
        self.add(Problem(kind, str(error), lambda: [str(error)]))

    def settle(self) -> None:
        """The point past which training does not go with problems.

        Raises:
            UserError: there are some, and they are not collected.
        """
        texts = [] if self.collect else [text for problem in self.found for text in problem.texts()]
        if texts:
            several = [""] if len(texts) > 1 else []
            raise UserError(f"{self.csv}: " + "\n  ".join(several + texts))


@dataclass(frozen=True, eq=False)
class Survey:
    """All that could be read of a split, and all that is wrong with it. No table: nothing could be read."""

    table: Table | None
    class_maps: dict[str, ClassMap]
    problems: tuple[Problem, ...]


def read_training(csv: Path, images: Path, tasks: Mapping[str, TaskConfig]) -> tuple[Table, dict[str, ClassMap]]:
    """Read the training split and make the class maps that every other split is read with.

    A task's ids come from `…_classes.json` beside the CSV, else from the id column, else from the sorted names.

    Raises:
        UserError: the CSV can't be used, as in `read_table`; a class is missing
            from `…_classes.json`; or a task has no label.
    """
    return _read_training(csv, images, tasks, Problems(csv))


def _read_training(
    csv: Path, images: Path, tasks: Mapping[str, TaskConfig], problems: Problems
) -> tuple[Table, dict[str, ClassMap]]:
    sheet = _read_sheet(csv, tasks, problems)
    class_maps: dict[str, ClassMap] = {}
    for name, task in sheet.tasks.items():
        if task.kind == "classification":
            cells = _class_cells(sheet, name, task.column)
            before = len(problems.found)
            class_maps[name] = _make_class_map(sheet, cells, task.column)
            if len(problems.found) > before:
                # A map made of contradictions would only make more of them.
                class_maps[name] = _map_of_names(cells)
    problems.settle()
    table = _build(sheet, images, class_maps, training=True)
    for name, count in table.valid_counts().items():
        if count == 0:
            column = tasks[name].column
            error = f"{csv}: no label for task {name}: {column} is blank in all {len(table)} rows"
            problems.refuse("no-label", UserError(error))
    return table, class_maps


def read_table(csv: Path, images: Path, tasks: Mapping[str, TaskConfig], class_maps: Mapping[str, ClassMap]) -> Table:
    """Read a split with the class maps of the training split.

    Raises:
        UserError: no CSV, not UTF-8 or ragged, a column missing or twice, no rows, a file name blank or outside the
            folder, a score that is no number in 0–1, an id that is no integer, or ids and names that contradict each
            other or the class map. Names the lines as an editor counts them.
    """
    return _read_table(csv, images, tasks, class_maps, Problems(csv))[0]


def _read_table(
    csv: Path, images: Path, tasks: Mapping[str, TaskConfig], class_maps: Mapping[str, ClassMap], problems: Problems
) -> tuple[Table, dict[str, ClassMap]]:
    sheet = _read_sheet(csv, tasks, problems)
    maps = dict(class_maps)
    for name, task in sheet.tasks.items():
        if problems.collect and task.kind == "classification" and name not in maps:
            maps[name] = _map_of_names(_class_cells(sheet, name, task.column))
    return _build(sheet, images, maps, training=False), maps


def tasks_in(csv: Path, tasks: Mapping[str, TaskConfig]) -> dict[str, TaskConfig]:
    """Those of the tasks that the CSV has a column for.

    Raises:
        UserError: there is no CSV, or it has none for any of them.
    """
    header = _read_header(csv)
    found = {name: task for name, task in tasks.items() if set(_columns_of(task)) & set(header)}
    if not found:
        wanted = ", ".join(column for task in tasks.values() for column in _columns_of(task))
        raise UserError(f"{csv}: no column for any task ({wanted}); there are {', '.join(header)}")
    return found


def survey_training(csv: Path, images: Path, tasks: Mapping[str, TaskConfig]) -> Survey:
    """As `read_training`, but never raises a UserError: what is wrong is told with what can be read all the same."""
    problems = Problems(csv, collect=True)
    return _surveyed(lambda: _read_training(csv, images, tasks, problems), problems)


def survey_table(
    csv: Path, images: Path, tasks: Mapping[str, TaskConfig], class_maps: Mapping[str, ClassMap]
) -> Survey:
    """As `read_table`, but never raises a UserError; what `class_maps` lacks is read by the split's own names."""
    problems = Problems(csv, collect=True)
    return _surveyed(lambda: _read_table(csv, images, tasks, class_maps, problems), problems)


def _surveyed(read: Callable[[], tuple[Table, dict[str, ClassMap]]], problems: Problems) -> Survey:
    try:
        table, class_maps = read()
    except UserError as error:
        problems.refuse("table", error)
        return Survey(None, {}, tuple(problems.found))
    return Survey(table, class_maps, tuple(problems.found))


def line_numbers(table: Table) -> np.ndarray:
    """The line of the CSV that each row starts on, as an editor counts: int64 (rows,)."""
    lines, end = 0, b""
    with table.csv.open("rb") as file:
        while block := file.read(1 << 24):
            lines, end = lines + block.count(b"\n"), block[-1:]
    if lines + (end != b"\n") == len(table) + 1:
        return np.arange(len(table)) + 2
    # Blank lines and quoted line breaks shift the count.
    records = ((line, len(record)) for line, record in _records(table.csv))
    found = np.fromiter(records, np.dtype((np.int64, 2)))  # (records, 2): line and number of cells, header first
    if len(found) != len(table) + 1:
        # A survey leaves out the records that have too many or too few cells.
        found = found[found[:, 1] == found[0, 1]]
    return found[1 : len(table) + 1, 0]


def filename_problem(name: str) -> str | None:
    """What the format has against this `filename`, or None where it may stand in a CSV."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return "is not UTF-8 text"
    for pattern, complaint in _FILENAME_RULES:
        if re.search(pattern, name):
            return complaint.format(images="the split's folder")
    return None


def untrained(train: Table, other: Table, class_maps: Mapping[str, ClassMap]) -> dict[str, dict[str, int]]:
    """Rows of `other` per class that the map has (from a `…_classes.json`) but no training row carries, per task."""
    found: dict[str, dict[str, int]] = {}
    for task, class_map in class_maps.items():
        known, counts = (table.class_counts(task, class_map) for table in (train, other))
        indices = np.flatnonzero((known == 0) & (counts > 0))
        if len(indices):
            found[task] = {class_map.classes[i]: int(counts[i]) for i in indices}
    return found


def table_sums(data: DataConfig) -> dict[str, str]:
    """SHA-256 of each split's CSV, by key of the config."""
    sums = {}
    for key, path in (("data.train_csv", data.train_csv), ("data.val_csv", data.val_csv)):
        with Path(path).open("rb") as file:
            sums[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def check_pictures(table: Table, max_bad: float = 0.0) -> str | None:
    """Check that the pictures are there, with one listing per folder instead of a look per file.

    Args:
        max_bad: The share that may be missing.

    Returns:
        A sentence on those that are missing, if there are any.

    Raises:
        UserError: the folder or too many pictures are missing, or one is a pipe; names the first few with their lines,
            and the count.
    """
    if not table.images.is_dir():
        raise UserError(f"{table.images}: no such folder of pictures (for {table.csv})")
    missing = missing_pictures(table)
    if len(missing):
        shown = _shown(table.csv, missing, lambda row: repr(table.filename(row)))
        sentence = f"{table.images}: {len(missing)} of {len(table)} pictures are missing ({table.csv}: {shown})"
        if len(missing) > max_bad * len(table):
            raise UserError(sentence)
        waiting = [row for row in missing if _is_special(table.images / table.filename(row))]
        if waiting:
            shown = _shown(table.csv, np.array(waiting), lambda row: repr(table.filename(row)))
            raise UserError(
                f"{table.images}: pipes or devices, which a reader may wait for for ever ({table.csv}: {shown})"
            )
        return sentence
    return None


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def missing_pictures(table: Table) -> np.ndarray:
    """Rows whose picture is not a file in the folder: int64 (n,). The folder has to be there."""
    names = table.filenames.cast(pa.large_binary())
    folders = pc.unique(pc.replace_substring_regex(table.filenames, r"[^/]*$", "")).to_pylist()
    there = pa.chunked_array(_listed(table.images, folders), type=pa.large_binary())
    return np.flatnonzero(~pc.is_in(names, value_set=there).to_numpy(zero_copy_only=False))


def _listed(images: Path, folders: Sequence[str]) -> Iterator[pa.Array]:
    """Files in `folders` as the CSV spells them, in Arrow chunks: bytes, for not every name on disk is UTF-8."""
    for folder in folders:
        path = images / folder
        prefix = folder.encode()
        names: list[bytes] = []
        # A folder that isn't there, can't be listed or has a name too long has no picture that could be read.
        with contextlib.suppress(OSError), os.scandir(os.fsencode(path)) as entries:
            for entry in entries:
                if _is_file(entry):
                    names.append(prefix + entry.name)
                if len(names) == 100_000:
                    yield pa.array(names, pa.large_binary())
                    names = []
        yield pa.array(names, pa.large_binary())


def _is_file(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself; the folder's other files are there all the same
        return False


@dataclass(frozen=True)
class _Column:
    """A column's distinct cells, stripped, and which of them each row holds: `codes` is int32 (rows,)."""

    codes: np.ndarray
    cells: pa.Array


@dataclass(frozen=True)
class _Sheet:
    """The columns of a CSV that the tasks need, as text, and what was found wrong with them so far.

    `tasks` are those whose columns are there: all of them, unless problems are collected.
    """

    csv: Path
    header: list[str]
    data: pa.Table
    tasks: dict[str, TaskConfig]
    problems: Problems

    def column(self, name: str) -> _Column | None:
        if name not in self.header:
            return None
        cells = self.data[name].unify_dictionaries().combine_chunks()
        return _Column(cells.indices.to_numpy(), pc.utf8_trim_whitespace(cells.dictionary))

    def report(self, kind: str, rows: np.ndarray, complaint: str, cell: Callable[[int], str]) -> None:
        """Note a complaint about `rows`, showing the first few of them."""
        self.problems.add(Problem(kind, complaint, partial(_with_lines, complaint, self.csv, rows, cell), rows, cell))


def _with_lines(complaint: str, csv: Path, rows: np.ndarray, cell: Callable[[int], str]) -> list[str]:
    return [f"{complaint}: {_shown(csv, rows, cell)}"]


def _shown(csv: Path, rows: np.ndarray, cell: Callable[[int], str]) -> str:
    first = [int(row) for row in rows[:SHOWN]]
    parts = [f"line {line}: {cell(row)}" for row, line in zip(first, _lines(csv, first), strict=True)]
    return ", ".join(parts) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def _records(csv: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it starts on, the header too; blank lines are none, as for Arrow."""
    with csv.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        csv_module.field_size_limit(sys.maxsize)  # Arrow takes cells of any length
        reader = csv_module.reader(file)
        line = 1
        for record in reader:
            if record:
                yield line, record
            line = reader.line_num + 1


def _lines(csv: Path, rows: Sequence[int]) -> list[int]:
    """Line numbers of data rows. Counted only for a message: blank lines and quoted line breaks shift them."""
    wanted = set(rows)
    found: dict[int, int] = {}
    for row, (line, _) in enumerate(_records(csv), start=-1):
        if row in wanted:
            found[row] = line
            if len(found) == len(wanted):
                break
    return [found.get(row, row + 2) for row in rows]


def _read_header(csv: Path) -> list[str]:
    try:
        _, header = next(_records(csv), (0, []))
    except FileNotFoundError:
        raise UserError(f"no annotations {csv}; a path is taken from where the command is given, or absolute") from None
    except (OSError, csv_module.Error) as error:
        raise UserError(f"{csv}: can't be read: {error}") from None
    if not header:
        raise UserError(f"{csv}: is empty; its first line names the columns: filename,typename,…")
    if any("\0" in name or _undecodable(name) for name in header):
        raise UserError(f"{csv}: line 1: not UTF-8 text; save it as «CSV UTF-8»")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{csv}: line 1: column {', '.join(twice)} stands there more than once")
    return header


def _needed(
    csv: Path, header: list[str], tasks: Mapping[str, TaskConfig], problems: Problems
) -> tuple[list[str], dict[str, TaskConfig]]:
    """The header's columns that hold file names and the tasks' labels, and the tasks that have theirs."""
    if "filename" not in header:
        raise UserError(f"{csv}: no column filename; there are {', '.join(header)}")
    needed = {"filename": None}
    found: dict[str, TaskConfig] = {}
    for name, task in tasks.items():
        either = _columns_of(task)
        present = [column for column in either if column in header]
        if present:
            found[name] = task
            needed.update(dict.fromkeys(present))
        else:
            error = f"{csv}: no column {' or '.join(either)} for task {name}; there are {', '.join(header)}"
            problems.refuse("column", UserError(error))
    return list(needed), found


def _columns_of(task: TaskConfig) -> list[str]:
    """The columns that a task's labels may stand in."""
    columns = label_columns(task.column)
    return [columns.name, columns.id] if task.kind == "classification" and columns.id else [task.column]


def _read_sheet(csv: Path, tasks: Mapping[str, TaskConfig], problems: Problems) -> _Sheet:
    header = _read_header(csv)
    needed, found = _needed(csv, header, tasks, problems)
    try:
        data, ragged = _read_columns(csv, needed)
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error) or (_RAGGED in str(error) and _first_undecodable(csv)):
            raise UserError(f"{csv}: {_first_undecodable(csv)}not UTF-8 text; save it as «CSV UTF-8»") from None
        if "cannot infer number of columns" in str(error):
            raise UserError(f"{csv}: has a header but no rows") from None
        raise UserError(f"{csv}: can't be read as CSV: {error}") from None
    except OSError as error:
        raise UserError(f"{csv}: can't be read: {error}") from None
    if ragged:
        problems.refuse("ragged", UserError(f"{csv}: {_ragged(csv, len(header), ragged)}"))
    if data.num_rows == 0:
        raise UserError(f"{csv}: has a header but no rows")
    _check_quotes(csv, data.num_rows + ragged + 1)
    return _Sheet(csv, header, data, found, problems)


def _read_columns(csv: Path, needed: Sequence[str]) -> tuple[pa.Table, int]:
    """These columns, and how many rows are left out because they have more or fewer than the header.

    Raises:
        pa.ArrowInvalid: it is no CSV, or not UTF-8 text in one of the columns or in a row to be left out.
        OSError: it can't be read.
    """
    text = pa.dictionary(pa.int32(), pa.string())
    ragged = 0

    def skip(_: Any) -> str:
        nonlocal ragged
        ragged += 1
        return "skip"

    with _without_traceback():
        data = pa_csv.read_csv(
            csv,
            read_options=pa_csv.ReadOptions(block_size=4 << 20),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(
                include_columns=needed,
                column_types={column: pa.large_string() if column == "filename" else text for column in needed},
            ),
        )
    return data, ragged


@contextlib.contextmanager
def _without_traceback() -> Iterator[None]:
    """In here Arrow decodes a row for its handler. Where it can't, it refuses the file, but Python writes what happened
    to standard error as well."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda failed: None if failed.exc_type is UnicodeDecodeError else before(failed)
    try:
        yield
    finally:
        sys.unraisablehook = before


def _check_quotes(csv: Path, records: int) -> None:
    """Refuse a quote that is never closed: Arrow takes the rows after it for part of the value, without a word."""
    newlines = returns = quotes = 0
    end = b""
    with csv.open("rb") as file:
        while block := file.read(1 << 24):
            newlines += block.count(b"\n")
            returns += block.count(b"\r")
            quotes += block.count(b'"')
            end = block[-1:]
    if not quotes or (newlines or returns) + (end not in b"\r\n") <= records:
        return
    # More lines than records: blank lines, or line breaks within quotes, which only Python's slow reader checks.
    line = 0
    with csv.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        reader = csv_module.reader(text, strict=True)
        try:
            for _ in reader:
                line = reader.line_num
        except csv_module.Error:
            raise UserError(
                f"{csv}: line {line + 1}: a quote that is never closed, or text after a closing one"
            ) from None


def _first_undecodable(csv: Path) -> str:
    for line, record in _records(csv):
        if any(_undecodable(cell) for cell in record):
            return f"line {line}: "
    return ""


def _undecodable(text: str) -> bool:
    """Whether `surrogateescape` had to stand in for bytes that aren't UTF-8."""
    return any("\udc80" <= char <= "\udcff" for char in text)


def _ragged(csv: Path, width: int, count: int) -> str:
    odd: list[str] = []
    for line, record in _records(csv):
        if len(record) != width:
            odd.append(f"line {line} has {len(record)}")
        if len(odd) == min(SHOWN, count):
            break
    more = f" and {count - len(odd)} more" if count > len(odd) else ""
    return f"the header has {width} columns, {', '.join(odd)}{more}; a value with a comma needs quotes around it"


def _build(sheet: _Sheet, images: Path, class_maps: Mapping[str, ClassMap], training: bool) -> Table:
    filenames = sheet.data["filename"].combine_chunks()
    _check_filenames(sheet, filenames, images)
    labels: dict[str, np.ndarray] = {}
    unseen: dict[str, dict[str, int]] = {}
    for name, task in sheet.tasks.items():
        if task.kind == "regression":
            labels[name] = _scores(sheet, task.column)
            continue
        labels[name], strangers = _class_labels(sheet, name, task.column, class_maps[name], training)
        if strangers:
            unseen[name] = strangers
    sheet.problems.settle()
    return Table(sheet.csv, images, filenames, labels, unseen)


def _check_filenames(sheet: _Sheet, filenames: pa.LargeStringArray, images: Path) -> None:
    # One pass for the usual case, that all is well; which rule it was matters only afterwards.
    everything = "|".join(pattern for pattern, _ in _FILENAME_RULES)
    if not pc.any(pc.match_substring_regex(filenames, everything)).as_py():
        return
    for pattern, complaint in _FILENAME_RULES:
        rows = np.flatnonzero(pc.match_substring_regex(filenames, pattern).to_numpy(zero_copy_only=False))
        if len(rows):
            words = "filename " + complaint.format(images=images)
            sheet.report("filename", rows, words, lambda row: repr(filenames[row].as_py()))


def _scores(sheet: _Sheet, column: str) -> np.ndarray:
    """A regression column as float32 (rows,), NaN where blank; what isn't a number in 0–1 is reported."""
    found = sheet.column(column)
    assert found is not None  # _needed has seen to it
    blank = pc.is_in(pc.utf8_lower(found.cells), value_set=pa.array(sorted(_BLANK_NUMBERS)))
    number = pc.match_substring_regex(found.cells, _NUMBER)
    values = pc.if_else(number, found.cells, None).cast(pa.float64()).to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        bad = ~blank.to_numpy(zero_copy_only=False) & ~((values >= 0) & (values <= 1))
    if bad.any():
        rows = np.flatnonzero(bad[found.codes])
        complaint = f"{column} must be a number in 0–1, or blank"
        sheet.report("score", rows, complaint, lambda row: repr(found.cells[found.codes[row]].as_py()))
    return np.asarray(np.where(bad, np.nan, values).astype(np.float32)[found.codes])


@dataclass(frozen=True)
class _ClassCells:
    """Distinct (name, id) pairs of a task's columns; `codes` int (rows,) says which pair a row holds.

    A name or an id is None where the CSV has no such column, and "" where the cell is blank.
    """

    name_column: str | None
    id_column: str | None
    names: list[str | None]
    ids: list[str | None]
    codes: np.ndarray

    def rows(self, pair: int) -> np.ndarray:
        return np.flatnonzero(self.codes == pair)

    def labelled(self, pair: int) -> bool:
        """The name decides where there is one: an id beside a blank name is somebody's default, not a label."""
        name = self.names[pair]
        return bool(name) if name is not None else bool(self.ids[pair])

    def text(self, pair: int) -> str:
        """The pair as a message shows it."""
        return " / ".join(repr(part) for part in (self.names[pair], self.ids[pair]) if part)

    def number(self, pair: int) -> int | None:
        """The pair's id; None where blank, absent or no integer."""
        match = _ID.fullmatch(self.ids[pair] or "")
        return int(match[1]) if match and not match[0].startswith("-") else None


def _class_cells(sheet: _Sheet, task: str, column: str) -> _ClassCells:
    columns = label_columns(column)
    name, number = sheet.column(columns.name), sheet.column(columns.id) if columns.id else None
    id_cells = [] if number is None else [_blank_id(cell) for cell in number.cells.to_pylist()]
    if name is None:
        assert number is not None  # _needed has seen to it
        cells = _ClassCells(None, columns.id, [None] * len(id_cells), list(id_cells), number.codes)
    elif number is None:
        cells = _ClassCells(columns.name, None, name.cells.to_pylist(), [None] * len(name.cells), name.codes)
    else:
        both = pa.array(name.codes.astype(np.int64) * len(id_cells) + number.codes).dictionary_encode()
        pairs = both.dictionary.to_numpy()
        names = name.cells.to_pylist()
        cells = _ClassCells(
            columns.name,
            columns.id,
            [names[pair // len(id_cells)] for pair in pairs],
            [id_cells[pair % len(id_cells)] for pair in pairs],
            both.indices.to_numpy(),
        )
    return cells


def _blank_id(cell: str) -> str:
    return "" if cell.lower() in _BLANK_NUMBERS else cell


def _make_class_map(sheet: _Sheet, cells: _ClassCells, column: str) -> ClassMap:
    """The training split's class map; what contradicts itself is reported, and the map is then of no use."""
    try:
        from_file = read_class_file(sheet.csv, column)
    except UserError as error:
        sheet.problems.refuse("class-file", error)
        from_file = None
    if from_file is not None:
        return from_file[1]
    labelled = [pair for pair in range(len(cells.ids)) if cells.labelled(pair)]
    numbered = {pair: number for pair in labelled if (number := cells.number(pair)) is not None}
    if not numbered:
        return ClassMap.from_names(name for pair in labelled if (name := cells.names[pair]))
    _check_consistent(sheet, cells)
    known = {cells.names[pair] for pair in numbered}
    orphans = [pair for pair in labelled if not cells.ids[pair] and cells.names[pair] not in known]
    if orphans:
        complaint = f"{cells.name_column} without a {cells.id_column} on any line; fill it in, or drop that column"
        rows = np.flatnonzero(np.isin(cells.codes, orphans))
        sheet.report("class", rows, complaint, lambda row: cells.text(cells.codes[row]))
    return ClassMap.from_ids({number: cells.names[pair] or str(number) for pair, number in numbered.items()})


def _map_of_names(cells: _ClassCells) -> ClassMap:
    """A map to count by where the real one can't be had."""
    labelled = [pair for pair in range(len(cells.ids)) if cells.labelled(pair)]
    if cells.name_column is None:
        return ClassMap.from_ids({n: str(n) for pair in labelled if (n := cells.number(pair)) is not None})
    return ClassMap.from_names(name for pair in labelled if (name := cells.names[pair]))


def _check_consistent(sheet: _Sheet, cells: _ClassCells) -> None:
    """Report ids that go with two names and names that go with two ids within one split."""
    if cells.name_column is None or cells.id_column is None:
        return
    by_id: dict[int, dict[str, int]] = {}
    by_name: dict[str, dict[int, int]] = {}
    for pair, name in enumerate(cells.names):
        number = cells.number(pair)
        if name and number is not None:
            by_id.setdefault(number, {}).setdefault(name, pair)
            by_name.setdefault(name, {}).setdefault(number, pair)
    _report_clashes(sheet, cells, by_id, cells.id_column, cells.name_column)
    _report_clashes(sheet, cells, by_name, cells.name_column, cells.id_column)


def _report_clashes(
    sheet: _Sheet, cells: _ClassCells, seen: Mapping[Any, Mapping[Any, int]], this: str, that: str
) -> None:
    clashes = {key: others for key, others in seen.items() if len(others) > 1}
    if not clashes:
        return
    rows = np.array([int(cells.rows(pair)[0]) for others in clashes.values() for pair in others.values()], np.int64)
    complaint = f"one {this} goes with more than one {that}"
    texts = partial(_clash_texts, sheet.csv, cells, clashes, this, that)
    sheet.problems.add(Problem("class", complaint, texts, rows, lambda row: cells.text(cells.codes[row])))


def _clash_texts(
    csv: Path, cells: _ClassCells, clashes: Mapping[Any, Mapping[Any, int]], this: str, that: str
) -> list[str]:
    texts: list[str] = []
    for key, others in list(clashes.items())[:SHOWN]:
        first = sorted((int(cells.rows(pair)[0]), other) for other, pair in others.items())
        lines = _lines(csv, [row for row, _ in first[:SHOWN]])
        shown = ", ".join(f"{other!r} (line {line})" for (_, other), line in zip(first, lines, strict=False))
        texts.append(f"{this} {key!r} goes with more than one {that}: {shown}")
    if len(clashes) > SHOWN:
        texts.append(f"and {len(clashes) - SHOWN} more {this} values go with more than one {that}")
    return texts


def _class_labels(
    sheet: _Sheet, task: str, column: str, class_map: ClassMap, training: bool
) -> tuple[np.ndarray, dict[str, int]]:
    """A classification task as int64 (rows,), -1 for none, and how often each class stands there that the map lacks."""
    cells = _class_cells(sheet, task, column)
    if cells.name_column is None and class_map.made:
        complaint = f"has {cells.id_column} but no {label_columns(column).name}, and the training split had names alone"
        sheet.problems.add(Problem("class", complaint, partial(list, [complaint])))
    _check_consistent(sheet, cells)
    index_of = np.full(len(cells.ids), -1, np.int64)
    wrong: dict[str, list[int]] = {}
    strangers: list[int] = []
    for pair in range(len(cells.ids)):
        if not cells.labelled(pair):
            continue
        index_of[pair], complaint = _look_up(cells, pair, class_map)
        if complaint:
            wrong.setdefault(complaint, []).append(pair)
        elif index_of[pair] < 0:
            strangers.append(pair)
    if strangers and training:
        wrong[f"not in {label_columns(column).stem}_classes.json, which has {len(class_map)} classes"] = strangers
        strangers = []
    if strangers and sheet.problems.collect:
        rows = np.flatnonzero(np.isin(cells.codes, strangers))
        complaint = f"{column} of a class that training never saw"
        sheet.report("unseen", rows, complaint, lambda row: cells.text(cells.codes[row]))
    for complaint, pairs in wrong.items():
        rows = np.flatnonzero(np.isin(cells.codes, pairs))
        sheet.report("class", rows, f"{column} {complaint}", lambda row: _beside(cells, cells.codes[row], class_map))
    return index_of[cells.codes], _count(cells, strangers)


def _count(cells: _ClassCells, pairs: Sequence[int]) -> dict[str, int]:
    """Rows per class name (or id, where there are no names) that hold one of `pairs`."""
    rows = np.bincount(cells.codes, minlength=len(cells.ids))
    counts: dict[str, int] = {}
    for pair in pairs:
        name = cells.names[pair] or str(cells.number(pair))
        counts[name] = counts.get(name, 0) + int(rows[pair])
    return counts


def _look_up(cells: _ClassCells, pair: int, class_map: ClassMap) -> tuple[int, str]:
    """The class index of a labelled pair (-1: not in the map) and what is wrong with the pair, if anything."""
    name, number = cells.names[pair], cells.number(pair)
    if cells.ids[pair] and number is None:
        return -1, f"has an id that is no integer from 0 on (in {cells.id_column})"
    by_id = -1 if number is None else class_map.by_id.get(number, -1)
    if name is None:
        return by_id, ""
    by_name = class_map.by_name.get(name, -1)
    if by_name < 0 and class_map.nameless:
        return by_id, ""
    # Ids that were made from sorted names say nothing about another split's own numbering: there the name decides.
    if number is not None and not class_map.made and by_id != by_name:
        return -1, "and its id contradict the class map of the training split"
    return by_name, ""


def _beside(cells: _ClassCells, pair: int, class_map: ClassMap) -> str:
    """A pair, with the class that the map has under its id."""
    index = class_map.by_id.get(-1 if (number := cells.number(pair)) is None else number)
    known = "" if index is None or class_map.made else f" (the map has {class_map.classes[index]!r} as {number})"
    return cells.text(pair) + known


def describe_unseen(unseen: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    """A line per task for the log: which classes the split has that training never saw, and in how many rows."""
    for task, counts in unseen.items():
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())[:10])
        more = f" and {len(counts) - 10} more" if len(counts) > 10 else ""
        rows = sum(counts.values())
        yield f"{task}: {rows} rows of classes that training never saw count as unlabelled: {shown}{more}"
