"""The CSV: what counts as a label, which mistakes are refused, and on which line."""

import json
import re

import numpy as np
import pyarrow as pa
import pytest

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.annotations import check_pictures, describe_unseen, read_table, read_training, untrained
from hybrid_dist.data.labels import ClassMap
from hybrid_dist.errors import UserError

TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "airline": TaskConfig(kind="classification", column="airlinename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "block": TaskConfig(kind="regression", column="block"),
}
TYPE = {"type": TASKS["type"]}
CLARITY = {"clarity": TASKS["clarity"]}
HEADER = "filename,typeid,typename,airlineid,airlinename,clarity,block,registration\n"


def write(folder, text, name="train.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def train(folder, text, tasks):
    return read_training(write(folder, text), folder, tasks)


def refused(folder, text, tasks, *parts):
    """The message with which the training split is refused; it holds all `parts`."""
    with pytest.raises(UserError) as caught:
        train(folder, text, tasks)
    message = str(caught.value)
    assert "train.csv" in message
    for part in parts:
        assert part in message, message
    return message


def test_blank_means_no_label_whatever_stands_beside_it(tmp_path):
    """Catches the earlier stages' two bugs: a blank airline read as airline 0, a blank clarity as 1.0."""
    table, maps = train(
        tmp_path,
        HEADER
        + "a.jpg,4,A320,0,,0.5,0,\n"
        + "b.jpg,4,A320,0,  ,,NaN,\n"
        + "c.jpg,9,B737,3,Blue, ,nan,\n"
        + "d.jpg,9,B737,,Blue,NA,null,D-ABC\n"
        + "e.jpg,9,B737,-1,,None, 0.25 ,\n",
        TASKS,
    )
    assert table.labels["airline"].tolist() == [-1, -1, 0, 0, -1]
    assert maps["airline"] == ClassMap(("Blue",), (3,))
    assert table.labels["type"].tolist() == [0, 0, 1, 1, 1]
    np.testing.assert_array_equal(table.labels["clarity"], np.float32([0.5, np.nan, np.nan, np.nan, np.nan]))
    np.testing.assert_array_equal(table.labels["block"], np.float32([0, np.nan, np.nan, np.nan, 0.25]))
    assert table.valid_counts() == {"type": 5, "airline": 2, "clarity": 1, "block": 2}


def test_labels_are_arrays_that_forked_workers_share(tmp_path):
    """Catches a Python object per row, whose reference counts would copy the table into every worker."""
    table, _ = train(tmp_path, HEADER + "a.jpg,4,A320,0,Blue,0.5,0,\n", TASKS)
    assert [table.labels[task].dtype for task in TASKS] == [np.int64, np.int64, np.float32, np.float32]
    assert isinstance(table.filenames, pa.LargeStringArray)
    assert (len(table), table.filename(0)) == (1, "a.jpg")


def test_an_id_column_alone_and_a_name_column_alone(tmp_path):
    """Catches tasks that need both columns, ids sorted as text, and pandas' 10.0 for 10."""
    table, maps = train(tmp_path, "filename,typeid\na,10.0\nb,2\nc,\nd,10\n", {"type": TASKS["type"]})
    assert table.labels["type"].tolist() == [1, 0, -1, 1]
    assert maps["type"] == ClassMap(("2", "10"), (2, 10))
    table, maps = train(tmp_path, "filename,typename\na,B\nb,A\nc,\nd, B \n", TYPE)
    assert table.labels["type"].tolist() == [1, 0, -1, 1]
    assert maps["type"] == ClassMap(("A", "B"), (0, 1), made=True)
    table, maps = train(
        tmp_path, "filename,livery\na,NA\nb,0\n", {"livery": TaskConfig(kind="classification", column="livery")}
    )
    assert maps["livery"].classes == ("0", "NA")


def test_the_class_file_rules_over_ids_and_order_of_names(tmp_path):
    """Catches a class count taken from the split instead of from the file beside it."""
    (tmp_path / "type_classes.json").write_text(json.dumps({"classes": ["Z", "A", "M"], "num_classes": 3}))
    table, maps = train(tmp_path, "filename,typename\na,A\nb,Z\n", TYPE)
    assert maps["type"].classes == ("Z", "A", "M")
    assert table.labels["type"].tolist() == [1, 0]
    refused(tmp_path, "filename,typename\na,A\nb,Q\n", TYPE, "not in type_classes.json", "line 3: 'Q'")
    refused(
        tmp_path, "filename,typeid,typename\na,0,A\n", TYPE, "contradict", "line 2: 'A' / '0' (the map has 'Z' as 0)"
    )


def test_val_uses_the_training_map_and_reports_strangers(tmp_path):
    """Catches classes counted per split, and a crash (or a wrong class) on a val class that training never saw."""
    _, maps = train(tmp_path, "filename,typeid,typename\na,5,B\nb,3,C\n", TYPE)
    val = write(tmp_path, "filename,typeid,typename\na,3,C\nb,9,New\nc,9,New\nd,,Other\n", "val.csv")
    table = read_table(val, tmp_path, TYPE, maps)
    assert table.labels["type"].tolist() == [0, -1, -1, -1]
    assert table.unseen == {"type": {"New": 2, "Other": 1}}
    assert table.valid_counts() == {"type": 1}
    assert list(describe_unseen(table.unseen)) == [
        "type: 3 rows of classes that training never saw count as unlabelled: New (2), Other (1)"
    ]
    only_ids = read_table(write(tmp_path, "filename,typeid\na,5\nb,77\n", "val.csv"), tmp_path, TYPE, maps)
    assert (only_ids.labels["type"].tolist(), only_ids.unseen) == ([1, -1], {"type": {"77": 1}})


def test_classes_of_the_file_that_training_lacks_are_found(tmp_path):
    """Catches a class that only `…_classes.json` knows passing for trained."""
    (tmp_path / "type_classes.json").write_text(json.dumps({"classes": ["A", "B", "C"], "num_classes": 3}))
    table, maps = train(tmp_path, "filename,typename\na,A\nb,B\n", TYPE)
    val = read_table(write(tmp_path, "filename,typename\na,C\nb,C\nc,A\n", "val.csv"), tmp_path, TYPE, maps)
    assert val.labels["type"].tolist() == [2, 2, 0]
    assert untrained(table, val, maps) == {"type": {"C": 2}}


def test_made_ids_are_not_compared_with_another_splits_own(tmp_path):
    """Catches a val split with an id column refused, or misread, where training had names alone."""
    _, maps = train(tmp_path, "filename,typename\na,A\nb,B\n", TYPE)
    val = write(tmp_path, "filename,typeid,typename\na,1,A\nb,0,B\n", "val.csv")
    assert read_table(val, tmp_path, TYPE, maps).labels["type"].tolist() == [0, 1]
    with pytest.raises(UserError, match="has typeid but no typename"):
        read_table(write(tmp_path, "filename,typeid\na,1\n", "val.csv"), tmp_path, TYPE, maps)


def test_ids_and_names_that_contradict_each_other(tmp_path):
    """Catches two classes merged or one split in two, in training as well as between the splits."""
    header = "filename,typeid,typename\n"
    refused(
        tmp_path,
        header + "a,1,A\nb,1,B\n",
        TYPE,
        "typeid 1 goes with more than one typename: 'A' (line 2), 'B' (line 3)",
    )
    refused(
        tmp_path, header + "a,1,A\nb,2,A\n", TYPE, "typename 'A' goes with more than one typeid: 1 (line 2), 2 (line 3)"
    )
    refused(tmp_path, header + "a,1,A\nb,,B\n", TYPE, "without a typeid", "line 3: 'B'")
    _, maps = train(tmp_path, header + "a,1,A\nb,2,B\n", TYPE)
    for row in ("x,2,A", "x,9,A", "x,1,New"):
        with pytest.raises(UserError, match=r"contradict.*line 2"):
            read_table(write(tmp_path, header + row + "\n", "val.csv"), tmp_path, TYPE, maps)


@pytest.mark.parametrize("bad", ["1.5", "x", "-1", "1e3", "²"])
def test_an_id_that_is_no_integer(tmp_path, bad):
    """Catches an id rounded, or read as another class."""
    refused(tmp_path, f"filename,typeid,typename\na,1,A\nb,{bad},B\n", TYPE, "typeid", f"line 3: 'B' / '{bad}'")


@pytest.mark.parametrize("bad", ["1.01", "-0.1", "50%", "1e999", "inf", "sharp", "0x1", "0,5", "0.5.1", "1_0"])
def test_a_score_that_is_no_number_between_0_and_1(tmp_path, bad):
    """Catches scores on another scale (percent) or text trained on as if they were labels, and a line off by one."""
    text = f'filename,clarity\na,0\nb,1\nc,"{bad}"\nd,1e-3\n'
    refused(tmp_path, text, CLARITY, "clarity must be a number in 0–1", f"line 4: '{bad}'")


def test_many_mistakes_are_counted_and_all_kinds_named(tmp_path):
    """Catches a message per row, or one kind of mistake hiding the others until the next try."""
    rows = "".join(f"../{i}.jpg,{2 + i},A\n" for i in range(5))
    message = refused(
        tmp_path, "filename,clarity,typename\n" + rows, {**CLARITY, **TYPE}, "line 4: '4' and 2 more", "leaves"
    )
    assert len(message.splitlines()) == 3


def test_line_numbers_are_an_editors(tmp_path):
    """Catches line = row + 2, which blank lines and line breaks within quotes put off."""
    text = 'filename,clarity,note\r\n\r\na,0.5,"two\r\nlines"\r\n\r\nb,7,\r\n'
    refused(tmp_path, text, CLARITY, "line 6: '7'")


@pytest.mark.parametrize(
    "name", ["", "  ", "/etc/x.jpg", "../x.jpg", "a/../../x.jpg", "a/..", "..\\x.jpg", "C:\\x.jpg", "C:/x", "a\0b"]
)
def test_a_filename_that_is_blank_or_leaves_its_folder(tmp_path, name):
    """Catches a CSV that reads any file of the machine."""
    refused(tmp_path, f"filename,clarity\nok.jpg,1\n{name},1\n", CLARITY, "filename", "line 3")


def test_filenames_that_only_look_odd_are_fine(tmp_path):
    """Catches a rule too broad: dots within names, subfolders, commas, spaces, other alphabets, the same file twice."""
    names = ["a..b.jpg", "x/..y/z.jpg", "sub/a.jpg", "a,b.jpg", "my plane.jpg", "日航.jpg", "a..b.jpg", "..."]
    table, _ = train(tmp_path, "filename,clarity\n" + "".join(f'"{name}",1\n' for name in names), CLARITY)
    assert [table.filename(row) for row in range(len(table))] == names


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ["is empty"]),
        (b"\n\n", ["is empty"]),
        (b"filename,clarity\n", ["header but no rows"]),
        (b"filename,clarity", ["header but no rows"]),
        (b"file,sharp\na,1\n", ["no column filename", "file, sharp"]),
        (b"filename,sharp\na,1\n", ["no column clarity for task clarity", "filename, sharp"]),
        (b"filename,clarity,clarity\na,1,0\n", ["column clarity", "more than once"]),
        (b"filename,clarity\na,1\nb\nc,1,2\nd,1\n", ["2 columns", "line 3 has 1, line 4 has 3"]),
        (b"filename,clarity\na,1\n\xe9.jpg,1\n", ["line 3", "not UTF-8"]),
        (b'filename,clarity,note\na,1,\nb,1,"x\nc,1,y\nd,1,z\n', ["line 3", "quote that is never closed"]),
        (b'filename,clarity,note\na,1,"x\nb,1,', ["line 2", "quote that is never closed"]),
        (b'filename,clarity,note\na,1,\nb,1,"x\nc,1,"y\nd,1,z\n', ["line 3", "quote that is never closed"]),
        (b"filename,clarity,note\na,1,x\nb,1,caf\xe9,y\n", ["line 3", "not UTF-8"]),
        (b"file,\x1b[2Jsharp\na,1\n", ["no column filename", r"file, \x1b[2Jsharp"]),
        (b"filename,clarity,note\na,1," + 200_000 * b"x" + b"\nb,1\n", ["3 columns", "line 3 has 2"]),
        ("filename,clarity\na,1\n".encode("utf-16"), ["not UTF-8"]),
        (b"filename,clarity\na,\nb, \n", ["no label for task clarity", "2 rows"]),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path, text, parts, monkeypatch):
    """Catches a traceback, Arrow's too, or an empty data set, where one sentence would do; text that drives a
    terminal."""
    tracebacks = []
    monkeypatch.setattr("sys.unraisablehook", tracebacks.append)
    assert refused(tmp_path, text, CLARITY, *parts).replace("\n", "").isprintable()
    assert not tracebacks


def test_missing_csv_and_missing_id_or_name_column(tmp_path):
    """Catches a crash on a wrong path, and a message that asks for one column where either would do."""
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "no.csv"))):
        read_table(tmp_path / "no.csv", tmp_path, TYPE, {})
    with pytest.raises(UserError, match="can't be read"):
        read_table(tmp_path, tmp_path, TYPE, {})
    refused(
        tmp_path,
        "filename,clarity\na,1\n",
        TYPE,
        "no column typename or typeid for task type; there are filename, clarity",
    )


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_byte_order_mark_line_endings_and_quotes(tmp_path, ending):
    """Catches a first column named `\\ufefffilename` and values with a carriage return on them."""
    text = ending.join(["\ufefffilename,typename", '"a,b.jpg","A ""x"""', "c.jpg,B"])
    table, maps = train(tmp_path, text, TYPE)
    assert table.filename(0) == "a,b.jpg"
    assert maps["type"].classes == ('A "x"', "B")


def test_missing_pictures_are_counted_with_their_lines(tmp_path):
    """Catches a run that dies at its first missing picture, hours in, and folders or dead links taken for pictures."""
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "dead.jpg").symlink_to("nothing.jpg")
    text = "filename,clarity\na.jpg,1\nsub/b.jpg,1\n./a.jpg,1\nlink.jpg,1\n"
    table, _ = train(tmp_path, text, CLARITY)
    check_pictures(table)
    table, _ = train(tmp_path, text + "A.JPG,1\nsub,1\ndead.jpg,1\nno/c.jpg,1\n", CLARITY)
    with pytest.raises(UserError, match=r"4 of 8 pictures are missing .*line 6: 'A.JPG', line 7: 'sub', .* and 1 more"):
        check_pictures(table)
    with pytest.raises(UserError, match="no such folder"):
        check_pictures(read_table(table.csv, tmp_path / "elsewhere", CLARITY, {}))
