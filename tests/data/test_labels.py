"""Class maps: which class has which index, and that it stays so."""

import json

import pytest

from hybrid_dist.data.labels import ClassMap, label_columns, read_class_file
from hybrid_dist.errors import UserError


def test_ids_with_gaps_take_their_place_in_id_order():
    """Catches the id itself used as index, which overflows the head, and names in another order than ids."""
    class_map = ClassMap.from_ids({40: "A320", 7: "B737", 12: "A350"})
    assert (class_map.classes, class_map.ids) == (("B737", "A350", "A320"), (7, 12, 40))
    assert class_map.by_id[40] == class_map.by_name["A320"] == 2


def test_json_keeps_the_format_and_everything_else():
    """Catches a saved map that the earlier stages can't read, or that comes back with other ids."""
    dense, gaps, made = (
        ClassMap.from_ids({0: "a", 1: "b"}),
        ClassMap.from_ids({0: "a", 5: "b"}),
        ClassMap.from_names("ba"),
    )
    assert dense.to_json() == {"classes": ["a", "b"], "num_classes": 2}
    assert gaps.to_json() == {"classes": ["a", "b"], "num_classes": 2, "ids": [0, 5]}
    for class_map in (dense, gaps, made):
        assert ClassMap.from_json(json.loads(json.dumps(class_map.to_json())), "x") == class_map


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "expected"),
        ({"classes": []}, "expected"),
        ({"classes": ["a", " "]}, "expected"),
        ({"classes": "ab"}, "expected"),
        ({"classes": ["a", "b"], "num_classes": 3}, "num_classes is 3"),
        ({"classes": ["a", "a"], "num_classes": 2}, "class 'a' stands there twice"),
        ({"classes": ["a", "b"], "num_classes": 2, "ids": [1]}, "ids has 1"),
        ({"classes": ["a", "b"], "num_classes": 2, "ids": [2, 1]}, "must rise"),
        ({"classes": ["a", "b"], "num_classes": 2, "ids": [0, True]}, "integers"),
    ],
)
def test_a_wrong_class_file_is_named_and_refused(tmp_path, values, message):
    """Catches a damaged class file taken for a smaller or shifted set of classes."""
    (tmp_path / "type_classes.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
        read_class_file(tmp_path / "train.csv", "typeid")
    assert "type_classes.json" in str(caught.value)


def test_columns_that_belong_together():
    """Catches `typeid` and `typename` looking for different class files, and `id` alone losing its stem."""
    assert label_columns("typename") == label_columns("typeid")
    assert (label_columns("typeid").stem, label_columns("typeid").name) == ("type", "typename")
    assert label_columns("livery").name == label_columns("livery").stem == "livery"
    assert label_columns("livery").id is None
    assert label_columns("id").stem == "id"
