"""Mixup and CutMix: the pixels by their formulas, labels that stay true, and one trajectory whoever works."""

import numpy as np
import pytest
import torch
from PIL import Image

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.annotations import read_training
from hybrid_dist.data.augment import Augment, sample_key
from hybrid_dist.data.balance import Balance
from hybrid_dist.data.dataset import Samples
from hybrid_dist.data.loader import make_loader
from hybrid_dist.data.mix import WHOLE, Mixing, check_mixing, cutmix, kept, mixup
from hybrid_dist.data.order import PADDING, TrainSampler
from hybrid_dist.data.pictures import BACKGROUND
from hybrid_dist.errors import UserError

TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "airline": TaskConfig(kind="classification", column="airlinename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "age": TaskConfig(kind="regression", column="age", sensitive_to=[]),
}
ROWS, SIZE = 22, 48


def data(**changes):
    paths = dict.fromkeys(("train_csv", "train_images", "val_csv", "val_images"), "x")
    return DataConfig(**paths, image_size=SIZE, **{"mix_prob": 1.0, **changes})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """22 noisy pictures of several shapes; each third row lacks one label or another."""
    folder = tmp_path_factory.mktemp("split")
    lines = ["filename,typename,airlinename,clarity,age"]
    for row in range(ROWS):
        noise = np.random.default_rng(row).integers(0, 255, (20 + row, 60, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{row}.png")
        airline, age = "" if row % 3 == 1 else f"airline {row % 4}", "" if row % 3 == 2 else row / 50
        lines.append(f"{row}.png,type {row % 3},{airline},{row / 100},{age}")
    (folder / "train.csv").write_text("\n".join(lines))
    return read_training(folder / "train.csv", folder, TASKS)[0]


def samples(table, augment=True, balance=None, **changes):
    mixing = Mixing(data(**changes), TASKS, len(table), balance)
    return Samples(table, Augment(SIZE, TASKS, augment), 1, "a", digest=True, mixing=mixing)


def pictures(seed, shapes=((20, 44), (14, 40))):
    """Two squares with content of these shapes at different places, nowhere background."""
    rng, found = np.random.default_rng(seed), []
    for height, width in shapes:
        square = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
        top, left = rng.integers(0, SIZE - height + 1), rng.integers(0, SIZE - width + 1)
        square[top : top + height, left : left + width] = rng.integers(130, 255, (height, width, 3))
        found.append(square)
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.999, 1.0])
def test_mixup_is_the_formula(share):
    """Catches a sum that overflows 8 or 16 bits, rounding downwards, a label share that is not the pixels' own."""
    own, partner = (np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8) for seed in (0, 1))
    own[0, 0], partner[0, 0] = 255, 255
    mixed, told = mixup(own, partner, share)
    exact = told * own.astype(np.float64) + (1 - told) * partner
    assert (mixed == np.floor(exact + 0.5)).all()
    assert abs(told - share) <= 1 / 512
    assert (told * WHOLE).is_integer()


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_counts_what_can_be_seen(seed):
    """Catches a share of the bars, a patch that shows the partner's bars, one outside the picture, rounding to zero."""
    own, partner = pictures(seed)
    rng = np.random.default_rng(seed)
    share, place = rng.uniform(0.1, 0.95), tuple(rng.random(2))
    mixed, told = cutmix(own, partner, share, place)
    changed = (mixed != own).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    patch = mixed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    windows = np.lib.stride_tricks.sliding_window_view(partner, patch.shape)[:, :, 0]
    assert (windows == patch).all((2, 3, 4)).any(), "the patch is a piece of the partner"
    seen = (mixed != BACKGROUND).any(-1)
    inside = np.zeros_like(seen)
    inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    assert told == pytest.approx((seen & ~inside).sum() / seen.sum(), abs=1e-5)
    assert (told * WHOLE).is_integer()
    assert patch.shape[0] * patch.shape[1] <= (1 - share) * 20 * 44 + 33, "rounded sides"
    central, _ = cutmix(own, partner, 0.75, (0.5, 0.5))
    changed = central[(central != own).any(-1)]
    assert len(changed) >= 200 and (changed != BACKGROUND).any(-1).all(), "it shows the partner, wherever that stands"


def test_cutmix_of_whole_squares_is_the_papers():
    """Catches a patch whose area is its side's share."""
    own, partner = pictures(0, ((SIZE, SIZE), (SIZE, SIZE)))
    assert cutmix(own, partner, 0.75, (0.5, 0.5))[1] == pytest.approx(0.75, abs=1e-5)
    empty = np.full_like(own, BACKGROUND)
    for pair in ((own, empty), (empty, own)):
        mixed, told = cutmix(*pair, 0.5, (0.0, 0.0))
        assert (mixed == pair[0]).all() and told == 1.0


def test_labels_that_mixing_makes_a_lie_of():
    """Catches a clarity of two pictures, a block under a patch, a livery that shines through another, caution lost."""
    tasks = TASKS | {"block": TaskConfig(kind="regression", column="block"),
                     "rust": TaskConfig(kind="classification", column="rust")}  # fmt: skip
    assert kept("mixup", tasks) == {"type", "age"}
    assert kept("cutmix", tasks) == {"type", "airline", "age"}
    lock = {"lock": TaskConfig(kind="classification", column="lock", sensitive_to=["occlusion"])}
    assert kept("cutmix", lock) == set(), "it may be under the patch"
    hue = {"hue": TaskConfig(kind="regression", column="hue", sensitive_to=["colour"])}
    assert kept("cutmix", hue) == set(), "a colour's mean is a colour that is nowhere"
    (sentence,) = check_mixing(data(mixup=0.2, mix_prob=0.9), TASKS)
    assert "keep the labels of type, age" in sentence and "airline, clarity" in sentence
    assert check_mixing(data(), TASKS) == check_mixing(data(cutmix=1.0, mix_prob=0.0), {"rust": tasks["rust"]}) == []
    *_, warning = check_mixing(data(mixup=0.2, cutmix=1.0), TASKS)
    assert "mix_prob" in warning and "so clarity will never" in warning, "an airline has its label under CutMix"
    with pytest.raises(UserError, match=r"data\.cutmix: .*tasks\.rust\.sensitive_to"):
        check_mixing(data(cutmix=1.0), {"rust": tasks["rust"]})


def trajectory(split, workers=0, **which):
    """Row, digest, share and partners' labels of all real samples that a loader yields, in order."""
    which = {"rank": 0, "world_size": 1, "micro_batch": 4, "start": 0, "end": 6} | which
    balance = split.mixing.balance
    order = TrainSampler(
        ROWS, 8, which["micro_batch"], which["rank"], which["world_size"], 1, "a", which["start"], which["end"], balance
    )
    found = []
    for batch in make_loader(split, order, workers, pin_memory=False):
        columns = [batch.rows, batch.digests, batch.mix.shares, batch.labels["airline"]]
        columns += [batch.mix.labels[task] for task in ("type", "airline")]
        columns.append(torch.nan_to_num(batch.mix.labels["age"], nan=-1.0))
        found += [entry for entry in zip(*(column.tolist() for column in columns), strict=True) if entry[0] != PADDING]
    return found


@pytest.mark.parametrize("balanced", [False, True])
def test_partners_do_not_depend_on_workers_ranks_micro_batch_or_resume(table, balanced):
    """Catches a partner taken from the micro batch, a share drawn from a worker's generator, repeats each epoch."""
    split = samples(table, mixup=0.8, cutmix=1.0, balance=Balance.of(table.labels["airline"]) if balanced else None)
    alone = trajectory(split)
    assert len({digest for _, digest, *_ in alone}) == len(alone) == 2 * ROWS
    assert trajectory(split, 2) == alone
    assert trajectory(split, start=2) == alone[16:]
    ranks = [trajectory(split, rank=rank, world_size=2, micro_batch=2) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(alone)


@pytest.mark.parametrize("augment", [True, False])
def test_a_mixed_sample_is_made_of_two_rows(table, augment):
    """Catches pixels of one partner beside labels of another, a sample mixed with itself, labels that should be gone,
    augmentation that a partner's label forbids."""
    split = samples(table, augment, mixup=1.0, cutmix=1.0, mix_prob=0.7)
    batch = split.__getitems__([(3, row) for row in range(ROWS)])
    kinds = set()
    for row in range(ROWS):
        draw = split.mixing.draw(row, sample_key(1, "a", 3, row, "mix"))
        own = [task for task, column in table.labels.items() if table.valid(task)[row]]
        if draw is None:
            assert batch.mix.shares[row] == 1
            assert all(batch.mix.labels[task][row] == -1 for task in ("type", "airline"))
            assert batch.labels["clarity"][row] == table.labels["clarity"][row]
            continue
        kinds.add(draw.kind)
        assert draw.partner != row
        stay = split.mixing.kept[draw.kind]
        other = [task for task in stay if table.valid(task)[draw.partner]]
        pixels = split.augment(split.picture(row), [task for task in own if task in stay], sample_key(1, "a", 3, row))
        theirs = split.augment(split.picture(draw.partner), other, draw.key)
        mixed, share = split.mixing.mix(draw, pixels, theirs)
        assert (batch.images[row].permute(1, 2, 0).numpy() == mixed).all()
        assert batch.mix.shares[row] == share
        for task, column in table.labels.items():
            none = torch.isnan if column.dtype.kind == "f" else (lambda value: value == -1)
            assert bool(none(batch.labels[task][row])) == (task not in stay or task not in own)
            assert bool(none(batch.mix.labels[task][row])) == (task not in other)
            if task in other:
                assert batch.mix.labels[task][row] == column[draw.partner]
    assert kinds == {"mixup", "cutmix"}
    assert 5 < (batch.mix.shares < 1).sum() < 20


def test_a_partner_that_cannot_be_read_is_reported_and_left_out(table, tmp_path):
    """Catches a run that ends for a partner, a sample mixed with nothing, a bad picture that nobody hears of."""
    for file in table.images.glob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes() if file.name != "4.png" else b"<html>")
    (tmp_path / "train.csv").write_text((table.images / "train.csv").read_text())
    broken = read_training(tmp_path / "train.csv", tmp_path, TASKS)[0]
    split, good = samples(broken, cutmix=1.0), samples(table, cutmix=1.0)
    met = 0
    for turn in range(6):
        for row in range(ROWS):
            draw = split.mixing.draw(row, sample_key(1, "a", turn, row, "mix"))
            if row != 4 and draw.partner != 4:
                continue
            batch = split.__getitems__([(turn, row)])
            assert list(batch.bad) == [4]
            assert batch.mix.shares.tolist() == [1.0]
            assert batch.mix.labels["type"].tolist() == [-1]
            if row != 4:
                met += 1
                assert batch.labels["clarity"].tolist() == pytest.approx([row / 100])
                assert batch.digests.tolist() != good.__getitems__([(turn, row)]).digests.tolist()
            else:
                assert batch.labels["type"].tolist() == [-1]
    assert met >= 2
