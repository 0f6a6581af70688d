"""check-data: every kind of thing that is wrong with a data set is found and told; a good one is left in peace."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML

from hybrid_dist import cli
from hybrid_dist.data.check import EXAMPLES, Finding, pictures
from hybrid_dist.data.check.duplicates import DISTANCE, near_pairs, same_looking
from hybrid_dist.data.check.findings import KINDS, Example, Place
from hybrid_dist.data.check.pictures import Facts, facts_of, measure
from hybrid_dist.data.pictures import decode_picture
from hybrid_dist.data.synth.picture import render_picture
from hybrid_dist.report.data_text import printable
from tests.conftest import AIRLINES, TYPES, environment, scene, tiny_values, write_rows

COUNTS = {"train": 60, "val": 18}


def save(pixels: np.ndarray, path: Path, **options: int) -> None:
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set without a fault: 60 and 18 pictures, every class in both splits, no two alike, some labels blank."""
    folder = tmp_path_factory.mktemp("clean")
    for number, (split, count) in enumerate(COUNTS.items()):
        (folder / split).mkdir()
        rows = []
        for i in range(count):
            save(scene(1000 * number + i), folder / split / f"{i:03d}.png")
            rows.append({
                "filename": f"{i:03d}.png", "typeid": i % 3, "typename": TYPES[i % 3],
                "airlineid": "" if i % 5 == 4 else i % 2, "airlinename": "" if i % 5 == 4 else AIRLINES[i % 2],
                "clarity": "" if i % 7 == 6 else i / count, "block": i / count,
            })  # fmt: skip
        write_rows(folder / f"{split}.csv", rows)
    return folder


class Data:
    """A copy of the clean data set, to break."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        YAML().dump(tiny_values(folder, folder), self.config)

    def rows(self, split: str = "train") -> list[dict[str, str]]:
        with (self.folder / f"{split}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def edit(self, row: int, split: str = "train", **cells: str) -> None:
        rows = self.rows(split)
        rows[row].update(cells)
        write_rows(self.folder / f"{split}.csv", rows)

    def add(self, name: str, split: str = "train", like: int = 0, **cells: str) -> Path:
        """A new last row, with the labels of another; where its picture belongs."""
        rows = self.rows(split)
        write_rows(self.folder / f"{split}.csv", [*rows, rows[like] | {"filename": name} | cells])
        return self.folder / split / name

    def add_picture(self, name: str, pixels: np.ndarray, split: str = "train", like: int = 0, **cells: str) -> None:
        save(pixels, self.add(name, split, like, **cells))

    def drop(self, keep: Callable[[dict[str, str]], bool], split: str) -> None:
        write_rows(self.folder / f"{split}.csv", [row for row in self.rows(split) if keep(row)])
        named = {row["filename"] for row in self.rows(split)}
        for path in (self.folder / split).iterdir():
            if path.name not in named:
                path.unlink()

    def picture(self, row: int, split: str = "train") -> np.ndarray:
        return np.array(Image.open(self.folder / split / f"{row:03d}.png"))


@pytest.fixture
def data(clean: Path, tmp_path: Path) -> Data:
    folder = tmp_path / "data"
    shutil.copytree(clean, folder)
    return Data(folder)


@pytest.fixture
def check(data: Data, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs `hybrid-dist check-data --json` in this process: exit code and answer."""

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        code = cli.main(["check-data", "--config", str(data.config), "--workers", "0", "--json", *arguments])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_a_good_data_set(data: Data, check: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a false alarm, a figure that is off, and anything written into the data set."""
    before = sorted(path.name for path in data.folder.rglob("*"))
    code, answer = check()
    assert answer["findings"] == []
    assert code == 0 and answer["ok"]
    train = answer["splits"]["train"]
    assert (train["rows"], train["pictures"], train["usable"]) == (60, 60, 60)
    assert train["width"] == {"min": 120, "median": 120, "mean": 120, "max": 120}
    assert train["aspect"]["max"] == 2
    assert train["formats"] == {"PNG": 60}
    assert train["tasks"]["type"] == {
        "kind": "classification", "labelled": 60, "blank_rate": 0, "classes": dict.fromkeys(TYPES, 20),
    }  # fmt: skip
    assert train["tasks"]["airline"]["blank_rate"] == 0.2
    assert sum(train["tasks"]["block"]["histogram"]) == 60
    assert cli.main(["check-data", "--config", str(data.config), "--workers", "0"]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    assert sorted(path.name for path in data.folder.rglob("*")) == before


def table(data: Data) -> None:
    (data.folder / "train.csv").unlink()


def ragged(data: Data) -> None:
    with (data.folder / "train.csv").open("a") as file:
        file.write("060.png,1\n")


def column(data: Data) -> None:
    path = data.folder / "train.csv"
    path.write_text(path.read_text().replace("clarity", "sharpness", 1))


def class_file(data: Data) -> None:
    (data.folder / "type_classes.json").write_text("{")


def filename(data: Data) -> None:
    data.edit(3, filename="../val/003.png")
    (data.folder / "train/003.png").unlink()


def score(data: Data) -> None:
    data.edit(4, clarity="1.5")


def class_clash(data: Data) -> None:
    data.edit(5, typename="B737-800")


def no_label(data: Data) -> None:
    rows = data.rows()
    write_rows(data.folder / "train.csv", [row | {"block": ""} for row in rows])


def folder(data: Data) -> None:
    (data.folder / "val").rename(data.folder / "elsewhere")


def missing(data: Data) -> None:
    (data.folder / "train/007.png").rename(data.folder / "train/007.PNG")


def not_a_file(data: Data) -> None:
    os.mkfifo(data.add("fifo.jpg"))


def unreadable(data: Data) -> None:
    path = data.add("cut.png")
    path.write_bytes((data.folder / "train/000.png").read_bytes()[:2000])


def repeated_otherwise(data: Data) -> None:
    data.add("./008.png", like=9)


def copy_otherwise(data: Data) -> None:
    data.add_picture("copy.bmp", data.picture(10), like=11)


def leak(data: Data) -> None:
    row = data.rows()[12]
    data.add_picture("copy.bmp", data.picture(12), "val", **{key: row[key] for key in row if key != "filename"})


def reencoded(data: Data, row: int, name: str, split: str = "train", **cells: str) -> None:
    save(data.picture(row), data.add(name, split, like=row % 6, **cells), quality=60)


def near_leak(data: Data) -> None:
    reencoded(data, 12, "near.jpg", "val")


def near_otherwise(data: Data) -> None:
    reencoded(data, 12, "near.jpg", typeid="1", typename=TYPES[1])


def unseen(data: Data) -> None:
    data.edit(2, "val", typeid="9", typename="Concorde")
    data.edit(5, "val", typeid="9", typename="Concorde")


def untrained(data: Data) -> None:
    (data.folder / "type_classes.json").write_text(json.dumps({"classes": [*TYPES, "Concorde"], "num_classes": 4}))
    data.edit(2, "val", typeid="3", typename="Concorde")


def val_no_label(data: Data) -> None:
    write_rows(data.folder / "val.csv", [row | {"clarity": ""} for row in data.rows("val")])


def one_class(data: Data) -> None:
    for split in COUNTS:
        rows = [row | ({"airlineid": "0", "airlinename": "Red Air"}) for row in data.rows(split)]
        write_rows(data.folder / f"{split}.csv", rows)


def tiny(data: Data) -> None:
    data.add_picture("dot.png", scene(5005, 97, 1))


def stretched(data: Data) -> None:
    data.add_picture("long.png", scene(5006, 200, 20))


def one_colour(data: Data) -> None:
    for split in COUNTS:
        data.add_picture("flat.jpg", np.full((60, 120, 3), (9, 90, 200 - len(split)), np.uint8), split)


def extra(data: Data) -> None:
    (data.folder / "train/sub").mkdir()
    (data.folder / "train/sub/forgotten.png").touch()


def extension(data: Data) -> None:
    Image.fromarray(scene(5007)).save(data.add("webp.jpg"), "WEBP", lossless=True)


def link(data: Data) -> None:
    save(scene(5008), data.folder / "outside.png")
    data.add("link.png").symlink_to("../outside.png")


def repeated(data: Data) -> None:
    data.add("012.png", like=12)


def copy(data: Data) -> None:
    data.add_picture("copy.bmp", data.picture(13), like=13)


def near(data: Data) -> None:
    reencoded(data, 12, "near.jpg", clarity="0.9")


def small(data: Data) -> None:
    data.add_picture("small.png", scene(5009, 80, 40))


def few(data: Data) -> None:
    for split in COUNTS:
        data.edit(2, split, typeid="3", typename="Concorde")


def not_validated(data: Data) -> None:
    data.drop(lambda row: row["typename"] != TYPES[2], "val")


def one_value(data: Data) -> None:
    rows = [row | {"clarity": "1.0"} for row in data.rows()]
    write_rows(data.folder / "train.csv", rows)


def unlabelled(data: Data) -> None:
    blank = dict.fromkeys(("typeid", "typename", "airlineid", "airlinename", "clarity", "block"), "")
    data.edit(4, "val", **blank)


# What is done; the kind that is found, and nothing else; the words that its text or its first example holds.
BROKEN: dict[str, tuple[Callable[[Data], None], list[str]]] = {
    "table": (table, ["no annotations", "train.csv"]),
    "ragged": (ragged, ["7 columns", "line 62 has 2"]),
    "column": (column, ["no column clarity for task clarity", "sharpness"]),
    "class-file": (class_file, ["type_classes.json", "JSON"]),
    "filename": (filename, ["line 5", "'../val/003.png'", "leaves the folder"]),
    "score": (score, ["line 6", "'004.png'", "'1.5'", "0–1"]),
    "class": (class_clash, ["typeid", "typename", "line"]),
    "no-label": (no_label, ["no label for task block", "60 rows"]),
    "folder": (folder, ["val", "No such file"]),
    "missing": (missing, ["1 of 60", "line 9", "'007.png'", "there is '007.PNG'"]),
    "not-a-file": (not_a_file, ["line 62", "'fifo.jpg'", "FIFO"]),
    "unreadable": (unreadable, ["line 62", "'cut.png'", "cut off or damaged"]),
    "repeated-otherwise": (repeated_otherwise, ["line 10: '008.png' = line 62", f"type: '{TYPES[0]}', '{TYPES[2]}'"]),
    "copy-otherwise": (copy_otherwise, ["line 12: '010.png' = line 62: 'copy.bmp'", "type: "]),
    "leak": (leak, ["val.csv line 20: 'copy.bmp' = ", "train.csv line 14: '012.png'"]),
    "near-leak": (near_leak, ["val.csv line 20: 'near.jpg' = ", "train.csv line 14: '012.png'"]),
    "near-otherwise": (near_otherwise, ["line 14: '012.png' = line 62: 'near.jpg'", f"'{TYPES[0]}'"]),
    "unseen": (unseen, ["2 lines", "val.csv line 4", "'Concorde' / '9'"]),
    "untrained": (untrained, ["1 row of 1 class", "line 4: '002.png': 'Concorde'"]),
    "val-no-label": (val_no_label, ["clarity", "val.csv"]),
    "one-class": (one_class, ["airline", "'Red Air'"]),
    "tiny": (tiny, ["line 62: 'dot.png': 97 × 1"]),
    "stretched": (stretched, ["line 62: 'long.png': 200 × 20"]),
    "one-colour": (one_colour, ["'flat.jpg'"]),
    "extra": (extra, ["1 file", "train/sub/forgotten.png"]),
    "extension": (extension, ["line 62: 'webp.jpg': is WEBP"]),
    "link": (link, ["line 62: 'link.png'", "outside.png"]),
    "repeated": (repeated, ["line 14: '012.png' = line 62: '012.png'"]),
    "copy": (copy, ["line 15: '013.png' = line 62: 'copy.bmp'"]),
    "near": (near, ["line 14: '012.png' = line 62: 'near.jpg'"]),
    "small": (small, ["line 62: 'small.png': 80 × 40"]),
    "few": (few, ["1 class of task type", "'Concorde', 1 row"]),
    "not-validated": (not_validated, [f"'{TYPES[2]}'"]),
    "one-value": (one_value, ["clarity is 1 in all 60"]),
    "unlabelled": (unlabelled, ["1 row", "line 6"]),
}
# Unavoidable beside it: what a split has that can't be read is not there for the other either.
BESIDE = {
    "table": {"extra"},
    "missing": {"extra"},
    "untrained": {"few"},
}


def shown(finding: dict[str, Any]) -> str:
    """A finding with its first example, as the terminal words it."""
    examples = [
        Example(tuple(Place(**place) for place in example["places"]), example["detail"])
        for example in finding["examples"][:1]
    ]
    return " ".join([finding["what"], *(example.text() for example in examples)])


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_is_found(kind: str, data: Data, check: Callable[..., Any]) -> None:
    """Catches: a kind of fault passed over, told without its place or under another name, or drowned in false ones."""
    breaks, words = BROKEN[kind]
    breaks(data)
    code, answer = check()
    found = [finding for finding in answer["findings"] if finding["kind"] == kind]
    assert found, [shown(finding) for finding in answer["findings"]]
    assert {finding["kind"] for finding in answer["findings"]} <= {kind} | BESIDE.get(kind, set())
    texts = [shown(finding) for finding in found]
    assert not [word for word in words if not any(word in text for text in texts)], texts
    assert found[0]["severity"] == KINDS[kind].severity
    assert code == (0 if found[0]["severity"] == "note" else 3)
    assert answer["ok"] == (code == 0)


def test_every_kind_is_provoked() -> None:
    """Catches: a kind that nothing finds any more, or that no test knows."""
    assert set(BROKEN) == set(KINDS)


def test_everything_is_told_at_once(data: Data, check: Callable[..., Any]) -> None:
    """Catches: one fault hiding the others until the next try."""
    for breaks in (score, class_clash, unreadable, missing, leak, unseen, repeated_otherwise, ragged, column):
        breaks(data)
    code, answer = check()
    kinds = {finding["kind"] for finding in answer["findings"]}
    assert code == 3
    # The clarity column is gone, and with it the score that is out of range.
    assert kinds >= {"class", "unreadable", "missing", "leak", "ragged", "column", "unseen", "repeated-otherwise"}
    order = [finding["severity"] for finding in answer["findings"]]
    assert order == sorted(order, key=["error", "warning", "note"].index)


def test_lines_after_a_ragged_one(data: Data, check: Callable[..., Any]) -> None:
    """Catches: lines miscounted, for a record with a cell too few is no row."""
    path = data.folder / "train.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:10], "short,1", "", *lines[10:]]) + "\n")
    data_row = lines.index(next(line for line in lines if line.startswith("030.png")))
    (data.folder / "train/030.png").unlink()
    _, answer = check()
    (finding,) = [finding for finding in answer["findings"] if finding["kind"] == "missing"]
    assert finding["examples"][0]["places"][0]["line"] == data_row + 3


def test_lines_of_a_table_with_an_endless_cell(data: Data, check: Callable[..., Any]) -> None:
    """Catches: a traceback for what Arrow reads and Python's own reader refuses."""
    data.add("gone.png")
    path = data.folder / "train.csv"
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header + ",note", lines[0] + "," + "x" * 200_000, *(line + "," for line in lines[1:])]))
    _, answer = check()
    (finding,) = answer["findings"]
    assert finding["examples"][0]["places"][0]["line"] == 62


def test_one_folder_for_both_splits(data: Data, check: Callable[..., Any]) -> None:
    """Catches: the other split's pictures called extra, and a file that both splits name passed over."""
    for path in (data.folder / "val").iterdir():
        path.rename(data.folder / "train" / f"v{path.name}")
    rows = [row | {"filename": f"v{row['filename']}"} for row in data.rows("val")]
    write_rows(data.folder / "val.csv", rows)
    both = f"data.val_images={data.folder / 'train'}"
    assert check(both) == (0, check(both)[1])
    assert check(both)[1]["findings"] == []
    data.edit(0, "val", filename="003.png")
    code, answer = check(both)
    assert code == 3
    assert [finding["kind"] for finding in answer["findings"]] == ["leak", "copy-otherwise", "extra"]


def test_json_is_stable(data: Data, check: Callable[..., Any]) -> None:
    """Catches: keys that come and go, an order that follows from chance or from the number of processes."""
    for breaks in (leak, near, unreadable, extra, unseen):
        breaks(data)
    code, answer = check()
    assert code == 3
    assert list(answer) == ["ok", "counts", "findings", "most_examples", "splits"]
    for finding in answer["findings"]:
        assert list(finding) == ["kind", "severity", "split", "what", "remedy", "count", "examples"]
        for example in finding["examples"]:
            assert list(example) == ["places", "detail"]
            assert [list(place) for place in example["places"]] == [["split", "csv", "line", "file"]] * len(
                example["places"]
            )
    assert check("--workers", "2")[1] == answer


def test_many_examples_are_counted(data: Data, check: Callable[..., Any]) -> None:
    """Catches: a page per missing picture, and a count that stops where the examples do."""
    rows = data.rows()
    write_rows(data.folder / "train.csv", rows + [rows[0] | {"filename": f"gone/{i}.png"} for i in range(1500)])
    _, answer = check()
    (finding,) = answer["findings"]
    assert (finding["count"], len(finding["examples"])) == (1500, EXAMPLES)


@pytest.mark.timeout(120)
def test_what_folders_may_hold(data: Data, check: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a crash or a hang at a bomb, a folder, a FIFO, a dead link, a link in a circle, a name of any bytes."""
    images = data.folder / "train"
    data.add("folder.jpg").mkdir()
    os.mkfifo(data.add("fifo.jpg"))
    data.add("dead.jpg").symlink_to("nowhere")
    data.add("circle.jpg").symlink_to("circle.jpg")
    data.add("x" * 300 + "/y" * 2200 + ".jpg")
    (images / "loop").symlink_to(".")
    Image.new("1", (20_000, 20_000)).save(data.add("bomb.png"))
    data.add("page.jpg").write_text("<html>")
    data.add("empty.jpg").touch()
    data.add("noise.tif").write_bytes(b"II*\0" + bytes(range(256)) * 9)
    Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9\x1b[31m\n.jpg")).touch()
    code, answer = check()
    assert code == 3
    found = {finding["kind"]: finding for finding in answer["findings"]}
    assert set(found) == {"missing", "not-a-file", "unreadable", "extra"}
    details = {e["places"][0]["file"]: e["detail"] for kind in found for e in found[kind]["examples"]}
    assert (details["folder.jpg"], details["fifo.jpg"]) == ("is a folder", "is a FIFO")
    assert (details["dead.jpg"], details["circle.jpg"]) == ("is a link to nothing", "is a link to nothing")
    assert "89,478,485 pixels" in details["bomb.png"]
    assert found["missing"]["count"] == 1
    assert found["unreadable"]["count"] == 4
    assert found["extra"]["examples"][0]["places"][0]["file"].endswith("caf\\xe9\x1b[31m\n.jpg")
    assert cli.main(["check-data", "--config", str(data.config), "--workers", "0"]) == 3
    said = capsys.readouterr().out
    assert "\x1b" not in said, "a name must not speak to the terminal"
    assert "caf\\\\xe9\\x1b[31m\\n.jpg" in said


def test_facts_of_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a FIFO that is opened after all, an unreadable file, a file of any size read into memory."""
    os.mkfifo(tmp_path / "fifo")
    assert facts_of(str(tmp_path / "fifo")).problem == "is no regular file"
    assert facts_of(str(tmp_path / "nothing")).problem == "can't be read: No such file or directory"
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(pictures.LARGEST_FILE + 1)
    assert "bytes, more than any picture" in facts_of(str(tmp_path / "huge.png")).problem

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "locked.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert facts_of(str(tmp_path / "locked.png")).problem == "can't be read: Permission denied"


def deadly(paths: list[str]) -> list[Facts]:
    """Stands for a decoder that crashes: it takes the process with it."""
    if any("deadly" in path for path in paths):
        os.kill(os.getpid(), signal.SIGKILL)
    return [Facts("", "PNG", int(Path(path).name), 1) for path in paths]


def test_a_picture_that_kills_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a hang or a crash where a decoder crashes, and other pictures blamed for it or lost."""
    monkeypatch.setattr(pictures, "_facts_of_all", deadly)
    paths = [f"/x/{i}" for i in range(1, 80)]
    paths[37] = "/deadly/38"
    done: list[int] = []
    found = measure(paths, workers=2, progress=done.append)
    assert [i for i, problem in enumerate(found.problem) if problem] == [37]
    assert found.problem[37] == "kills the process that decodes it"
    assert np.delete(found.width, 37).tolist() == [i for i in range(1, 80) if i != 38]
    assert done[-1] == 79


def test_an_interrupt_ends_it(data: Data) -> None:
    """Catches: Ctrl-C that waits for the pictures, another exit code, a traceback, processes left behind."""
    save(np.zeros((8000, 8000, 3), np.uint8), data.folder / "train/large.png", compress_level=1)
    rows = data.rows()
    for i in range(200):
        os.link(data.folder / "train/large.png", data.folder / f"train/large{i}.png")
        rows.append(rows[0] | {"filename": f"large{i}.png"})
    write_rows(data.folder / "train.csv", rows)
    # The tests themselves may run in the background, where a shell has SIGINT ignored.
    code = "import signal, sys; signal.signal(2, signal.default_int_handler); "
    code += "from hybrid_dist.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "check-data", "--config", str(data.config), "--workers", "2"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    parent = psutil.Process(process.pid)
    while len(children := parent.children()) < 3:  # two that decode, and Python's own tracker of resources
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in said
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "CONFIG", "data.image_sise=96"], "did you mean image_size"),
        (["--config", "CONFIG", "--workers", "-1"], "--workers"),
        (["--config", "CONFIG", "--html", "nowhere/page.html"], "nowhere"),
    ],
)
def test_a_wrong_command(arguments: list[str], words: str, data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a mistake in the command taken for one in the data, or told after an hour of decoding."""
    arguments = [str(data.config) if argument == "CONFIG" else argument for argument in arguments]
    assert cli.main(["check-data", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("hybrid-dist: ") and "Traceback" not in said


def test_neither_torch_nor_plots_for_a_check(data: Data) -> None:
    """Catches: seconds of imports that a look at a table does not need."""
    code = (
        "import sys; from hybrid_dist.cli import main; main(); "
        "print([name for name in ('torch', 'matplotlib', 'jinja2', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check-data", "--config", str(data.config), "--workers", "0"],
        env=environment(), capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_text_for_a_terminal() -> None:
    """Catches: a class name that clears the screen, or that breaks one thing into two lines."""
    assert printable("a\x1b[2Jb\nc\u202ed é 日") == "a\\x1b[2Jb c\\u202ed é 日"
    finding = Finding(
        "leak", "both", "what", 1, (Example((Place("val", "v", 2, "\x1b"), Place("train", "t", 3, "b"))),)
    )
    assert finding.examples[0].text() == "v line 2: '\\x1b' = t line 3: 'b'"


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.sets(st.integers(0, 63), max_size=9)), max_size=30),
    st.integers(0, 9),
)
def test_near_pairs_against_brute_force(seeds: list[int], flips: list[tuple[int, set[int]]], distance: int) -> None:
    """Catches: a pair lost between bands, told twice, or told though it is too far apart."""
    values = seeds + [seeds[at % len(seeds)] ^ sum(1 << bit for bit in bits) for at, bits in flips]
    hashes = np.array(values, np.uint64)
    found = [(int(a), int(b)) for pair in near_pairs(hashes, distance) for a, b in zip(*pair, strict=True)]
    expected = [
        (a, b) for a in range(len(values)) for b in range(a + 1, len(values))
        if (values[a] ^ values[b]).bit_count() <= distance
    ]  # fmt: skip
    assert sorted(found) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 63), max_size=7), st.integers(0, 2)), max_size=25))
def test_groups_against_brute_force(made: list[tuple[int, set[int], int]]) -> None:
    """Catches: pictures left apart that look the same through a third one, or joined though their colours differ."""
    bases = np.random.default_rng(0).integers(0, 2**63, 4).tolist()
    values = [bases[base] ^ sum(1 << bit for bit in bits) for base, bits, _ in made]
    hashes = np.array(values, np.uint64)
    kinds = np.random.default_rng(1).integers(0, 256, (3, 192), dtype=np.uint8)
    thumbs = kinds[[kind for *_, kind in made]] if made else np.zeros((0, 192), np.uint8)
    group = list(range(len(made)))
    for a in range(len(made)):
        for b in range(a):
            if made[a][2] == made[b][2] and (values[a] ^ values[b]).bit_count() <= DISTANCE:
                group = [group[a] if number == group[b] else number for number in group]
    found = same_looking(hashes, thumbs)
    assert [[a == b for b in group] for a in group] == (found[:, None] == found[None, :]).tolist()


def test_degenerate_hashes_do_not_blow_up() -> None:
    """Catches: n × n pairs where one hash stands for thousands of pictures, equal ones or not."""
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 256, (30_000, 192), dtype=np.uint8)
    hashes = np.zeros(len(thumbs), np.uint64)
    assert len(np.unique(same_looking(hashes, np.broadcast_to(thumbs[:1], thumbs.shape)))) == 1
    assert len(np.unique(same_looking(hashes, thumbs))) == len(thumbs)


def altered(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Copies as they come about: saved again, shrunk, brightened."""
    _, jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])
    size = (round(pixels.shape[1] * 0.9), round(pixels.shape[0] * 0.9))
    return {
        "JPEG, quality 60": decode_picture(jpeg.tobytes(), "copy"),
        "0.9×": cv2.resize(pixels, size, interpolation=cv2.INTER_AREA),
        "brightened": cv2.convertScaleAbs(pixels, alpha=1.1, beta=8),
    }


def test_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    """Catches: a threshold that misses copies, or that takes aircraft before a sky for one another.

    The figures for photographs stand beside the threshold; here 120 rendered aircraft and 360 copies of them.
    """
    paths = []
    for i in range(120):
        pixels = render_picture("train", i, 0)[0]
        for j, picture in enumerate([pixels, *altered(pixels).values()]):
            paths.append(str(tmp_path / f"{i}_{j}.png"))
            cv2.imwrite(paths[-1], picture[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
    found = measure(paths, workers=0)
    groups = same_looking(found.look, found.thumb).reshape(120, 4)
    assert len(np.unique(groups[:, 0])) == 120, "no two aircraft are one"
    assert (groups == groups[:, :1]).mean() > 0.99
