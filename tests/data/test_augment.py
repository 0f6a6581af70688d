"""Augmentation: true to the labels, the whole picture in view, and the same for the same sample everywhere."""

import random
from itertools import combinations

import cv2
import numpy as np
import pytest

from hybrid_dist.config import TaskConfig
from hybrid_dist.data.augment import EFFECTS, Augment, sample_key, sensitivity
from hybrid_dist.data.pictures import BACKGROUND

TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "airline": TaskConfig(kind="classification", column="airlinename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "block": TaskConfig(kind="regression", column="block"),
}
SIZE = 64
KEYS = [sample_key(0, "a", 0, row) for row in range(200)]
SUBSETS = [("type", *others) for count in range(4) for others in combinations(("airline", "block", "clarity"), count)]


@pytest.fixture(scope="module")
def augment():
    return Augment(SIZE, TASKS, train=True)


def is_background(pixels):
    return (pixels == BACKGROUND).all(-1)


def dots():
    """64×32 dots of eight colours and no other, so that whatever mixes neighbours tells dots of one colour apart."""
    colours = np.array([[r, g, b] for r in (40, 200) for g in (50, 190) for b in (60, 180)], np.uint8)
    which = np.random.default_rng(0).integers(0, 8, (32, 64))
    return colours[which], which


def mixes_dots(which, after):
    """Whether dots that were alike no longer are, erased ones apart; `after` may be flipped and shifted up or down."""
    rows = np.flatnonzero(~is_background(after).all(1))
    top = min(rows[0], SIZE - len(which))
    content = after[top : top + len(which)]
    kept = ~is_background(content)
    packed = content.astype(np.int64) @ [1 << 16, 1 << 8, 1]

    def alike(source):
        return len(np.unique((source << 24 | packed)[kept])) <= 8

    return not (alike(which) or alike(which[:, ::-1]))


def erased_inside(after):
    """Whether something is erased within the picture: background that doesn't touch the square's border."""
    count, parts = cv2.connectedComponents(is_background(after).astype(np.uint8), connectivity=4)
    border = set(parts[0]) | set(parts[-1]) | set(parts[:, 0]) | set(parts[:, -1])
    return any(part not in border for part in range(1, count))


def shifts_hue(after):
    """Whether a pure red picture, whose green and blue are equal, has lost that; any tone curve keeps it."""
    pixels = after[~is_background(after)].astype(int)
    return np.median(np.abs(pixels[:, 1] - pixels[:, 2])) > 3


@pytest.mark.parametrize("present", [subset for subset in SUBSETS if "clarity" in subset], ids="+".join)
def test_a_clarity_label_forbids_what_changes_sharpness(augment, present):
    """Catches blur, noise, compression, another scale or a turn on a picture that says how sharp it is."""
    picture, which = dots()
    assert not any(mixes_dots(which, augment(picture, present, key)) for key in KEYS)


@pytest.mark.parametrize("present", [subset for subset in SUBSETS if "block" in subset], ids="+".join)
def test_a_block_label_forbids_erasing(augment, present):
    """Catches a part erased from a picture that says how much of it is occluded."""
    picture = np.full((40, 60, 3), 250, np.uint8)
    assert not any(erased_inside(augment(picture, present, key)) for key in KEYS)


@pytest.mark.parametrize("present", [subset for subset in SUBSETS if "airline" in subset], ids="+".join)
def test_an_airline_label_forbids_colour_shifts(augment, present):
    """Catches a livery repainted in another airline's colours."""
    picture = np.full((40, 60, 3), (200, 60, 60), np.uint8)
    assert not any(shifts_hue(augment(picture, present, key)) for key in KEYS)


def test_a_blank_label_forbids_nothing(augment):
    """Catches augmentation switched off for all, which would pass the tests above."""
    red, white = np.full((40, 60, 3), (200, 60, 60), np.uint8), np.full((40, 60, 3), 250, np.uint8)
    picture, which = dots()
    for present in ((), ("type",)):
        assert sum(mixes_dots(which, augment(picture, present, key)) for key in KEYS) > 150
        assert sum(erased_inside(augment(white, present, key)) for key in KEYS) > 20
        assert sum(shifts_hue(augment(red, present, key)) for key in KEYS) > 40
    everything = [augment(picture, tuple(TASKS), key).tobytes() for key in KEYS]
    assert len(set(everything)) > 150, "flip, shift and light stay allowed for every sample"


def test_sensitivity_follows_the_config_then_the_column_then_caution():
    """Catches a task named otherwise losing its protection, and a new column trained on without any."""

    def of(column, **more):
        return sensitivity(TaskConfig(kind="regression", column=column, **more))

    assert (of("clarity"), of("block"), of("airlineid")) == ({"sharpness"}, {"occlusion"}, {"colour"})
    assert (of("typename"), of("typeid"), of("rust")) == (set(), set(), EFFECTS)
    assert of("clarity", sensitive_to=[]) == set()
    assert of("typename", sensitive_to=["colour"]) == {"colour"}


@pytest.mark.parametrize("shape", [(100, 400), (150, 300), (300, 100), (90, 96), (32, 64)])
@pytest.mark.parametrize("present", [("airline", "block"), ("airline", "block", "clarity")], ids="+".join)
def test_all_four_corners_stay_in_view(shape, present):
    """Catches a crop, a shift past the edge, a turn that cuts corners, and a picture upside down."""
    height, width = shape
    picture = np.full((height, width, 3), 128, np.uint8)
    mark = max(shape) // 16
    augment = Augment(10 * 16, TASKS, train=True)
    colours = ((230, 20, 20), (20, 230, 20), (20, 20, 230), (230, 230, 20))
    corners = ((0, 0), (0, width - mark), (height - mark, 0), (height - mark, width - mark))
    for colour, (top, left) in zip(colours, corners, strict=True):
        picture[top : top + mark, left : left + mark] = colour
    expected = (10 * 0.75) ** 2  # pixels of a mark at the smallest scale and steepest turn
    for key in KEYS[:50]:
        out = augment(picture, present, key).astype(int)
        centres = []
        for colour in colours:
            high = np.array(colour) > 100
            found = out[..., high].min(-1) - out[..., ~high].max(-1) > 50
            assert found.sum() > 0.6 * expected, (key, colour)  # its rim blends with what is beside it
            centres.append(np.argwhere(found).mean(0))
        assert max(centres[0][0], centres[1][0]) < min(centres[2][0], centres[3][0])


def test_without_training_the_picture_is_centred_and_keeps_its_aspect():
    """Catches a validation that depends on the key, squeezes wide pictures, or puts them off centre."""
    out = Augment(SIZE, TASKS, train=False)(np.full((50, 200, 3), 255, np.uint8), (), 1)
    assert (out == Augment(SIZE, TASKS, train=False)(np.full((50, 200, 3), 255, np.uint8), tuple(TASKS), 2)).all()
    assert (out[24:40] == 255).all()
    assert is_background(out[:24]).all()
    assert is_background(out[40:]).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (1000, 1), (3, 700), (2000, 1500), (SIZE, SIZE)])
@pytest.mark.parametrize("train", [True, False])
def test_any_shape_becomes_the_square(shape, train):
    """Catches a side rounded to zero or past the square."""
    augment = Augment(SIZE, TASKS, train)
    picture = np.full((*shape, 3), 255, np.uint8)
    for key in KEYS[:20]:
        out = augment(picture, (), key)
        assert (out.shape, out.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert not is_background(out).all()


@pytest.mark.parametrize("side", [70, 90, 110, 127, 143, 190, 500])
def test_shrinking_does_not_alias(side):
    """Catches plain interpolation, which turns fine detail into coarse patterns: a blurred picture that looks sharp."""
    board = (np.indices((side, side)).sum(0) % 2 * 255).astype(np.uint8)
    out = Augment(SIZE, TASKS, train=False)(np.repeat(board[..., None], 3, 2), (), 0).astype(float)
    limit = 2 * cv2.resize(board, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(float).std() + 3
    assert out.std() < limit


def test_a_sample_depends_on_its_key_alone(augment):
    """Catches generators that go on from the sample before, or leak into Python's and NumPy's global ones."""
    picture = np.random.default_rng(0).integers(0, 255, (40, 80, 3), np.uint8)
    wanted = [(SUBSETS[index % len(SUBSETS)], key) for index, key in enumerate(KEYS)]
    first = {entry: augment(picture, *entry).tobytes() for entry in wanted}
    random.Random(1).shuffle(wanted)
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    fresh = Augment(SIZE, TASKS, train=True)
    assert all(fresh(picture, *entry).tobytes() == first[entry] for entry in wanted)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert len({augment(picture, (), key).tobytes() for key in KEYS}) == len(KEYS)


def test_keys_are_distinct_and_stay_what_they_were():
    """Catches epochs or phases that repeat their augmentation, and a key that Python's salted hash() went into."""
    which = [
        (seed, phase, epoch, row) for seed in (0, 1) for phase in "ab" for epoch in (0, 1, 11) for row in (0, 1, 10, 11)
    ]
    assert len({sample_key(*entry) for entry in which}) == len(which)
    assert sample_key(7, "b", 2, 5) == STORED


STORED = 214601733075205681966182926630625255204
