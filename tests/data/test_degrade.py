"""Pictures made worse: their new labels, held against rendered pictures, whose blur and cover are known."""

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hybrid_dist.config import DataConfig, TaskConfig
from hybrid_dist.data.annotations import read_training
from hybrid_dist.data.augment import Augment, sample_key
from hybrid_dist.data.dataset import Samples
from hybrid_dist.data.degrade import Degrade, check_degrade
from hybrid_dist.data.resize import fitted, resize, shrink
from hybrid_dist.data.synth.picture import draw_sample, plan_picture
from hybrid_dist.errors import UserError

TASKS = {
    "type": TaskConfig(kind="classification", column="typename"),
    "clarity": TaskConfig(kind="regression", column="clarity"),
    "block": TaskConfig(kind="regression", column="block"),
    "rust": TaskConfig(kind="classification", column="rust"),
}
SIZE = 96


def drawn(labels, tasks=TASKS, share=1.0, count=200):
    degrade = Degrade(share, tasks)
    return [degrade.draw(labels, sample_key(0, "a", 0, row, "degrade")) for row in range(count)]


def at_size(picture):
    picture = shrink(picture, SIZE)
    height, width = fitted(picture, SIZE, 1.0, 0.0)
    return resize(picture, width, height)


def test_a_blurred_picture_has_the_clarity_that_rendering_it_so_has():
    """Catches blurs whose widths are added instead of their squares, a sigma of the wrong side, clarity that rises."""
    chance, nearest = random.Random(0), []
    for index in range(12):
        plan = replace(plan_picture("train", index, 7), clarity=round(chance.uniform(0.5, 1.0), 3), cover=0.0)
        harm = next(harm for harm in drawn({"clarity": plan.clarity}) if harm.labels["clarity"] < plan.clarity - 0.1)
        degraded = harm(at_size(draw_sample(plan).picture)).astype(float)
        offsets = (-0.12, -0.06, 0.0, 0.06, 0.12)
        rendered = [draw_sample(replace(plan, clarity=max(0.0, harm.labels["clarity"] + by))).picture for by in offsets]
        nearest.append(offsets[int(np.argmin([((at_size(one) - degraded) ** 2).mean() for one in rendered]))])
    assert abs(np.mean(nearest)) < 0.03
    assert np.count_nonzero(nearest) <= 3


@pytest.mark.parametrize("cover", [0.0, 0.4])
def test_a_fence_hides_of_any_aircraft_what_its_label_says(cover):
    """Catches a cover of the picture that is none of the aircraft, and one that counts what was hidden before."""
    wrong = []
    for index, harm in enumerate(drawn({"block": 0.5}, count=60)):
        sample = draw_sample(replace(plan_picture("train", index, 6), cover=cover))
        fence = harm.fence
        hidden = fence.mask(*sample.silhouette.shape) | sample.occluder
        label = sample.block + (1 - sample.block) * fence.cover
        assert harm.labels["block"] == pytest.approx(0.5 + 0.5 * fence.cover)
        wrong.append((hidden & sample.silhouette).sum() / sample.silhouette.sum() - label)
    assert abs(np.mean(wrong)) < 0.01
    assert np.abs(wrong).mean() < 0.03
    assert fence.mask(40, 90).shape == (40, 90) and fence.mask(90, 40).mean() == pytest.approx(fence.cover, abs=0.05)


def test_the_pixels_are_the_fences_and_the_blur():
    """Catches a fence that is drawn elsewhere than it counts, sharp edges in a blurred picture, another size."""
    picture = np.full((40, 90, 3), 250, np.uint8)
    sharp = next(harm for harm in drawn({"block": 0.0}) if harm.fence is not None)
    out = sharp(picture)
    assert ((out == 250).all(-1) == ~sharp.fence.mask(40, 90)).all()
    assert (out[sharp.fence.mask(40, 90)] == sharp.fence.colour).all()
    soft = [harm for harm in drawn({"clarity": 0.2, "block": 0.0}) if harm.fence is not None]
    assert {len(np.unique(harm(picture)[..., 0])) > 8 for harm in soft} == {True}
    assert {harm(picture).shape for harm in soft} == {(40, 90, 3)}


def test_only_what_can_be_labelled_anew_is_done():
    """Catches a blank label that gets a value, a label past 0–1, one that stays though it is no longer true."""
    assert drawn({}) == drawn({"type": 1, "rust": 0}) == [None] * 200
    assert drawn({"clarity": 0.5}, share=0.0) == [None] * 200
    assert 60 < sum(harm is not None for harm in drawn({"clarity": 0.5}, share=0.5)) < 140
    for harm in drawn({"clarity": 0.5, "type": 0}):
        assert harm.labels.keys() == {"clarity"} and harm.fence is None and 0 <= harm.labels["clarity"] <= 0.5
        assert harm.lost == {"rust"}
    both = [harm.labels.keys() for harm in drawn({"clarity": 0.5, "block": 0.9})]
    assert all(sum(keys == wanted for keys in both) > 40 for wanted in ({"clarity"}, {"block"}, {"clarity", "block"}))
    assert max(harm.labels.get("block", 0) for harm in drawn({"clarity": 0.0, "block": 1.0})) <= 1
    careful = TASKS | {
        "clarity": TaskConfig(kind="regression", column="clarity", sensitive_to=["sharpness", "occlusion"])
    }
    covered = [harm for harm in drawn({"clarity": 0.5, "block": 0.1}, careful) if harm.fence is not None]
    assert covered and all("clarity" in harm.lost and "clarity" not in harm.labels for harm in covered)


def test_what_there_is_no_label_for_is_refused():
    """Catches a share that changes nothing, and labels that are gone without a word."""
    paths = dict.fromkeys(("train_csv", "train_images", "val_csv", "val_images"), "x")
    data = DataConfig(**paths, degrade=0.3)
    with pytest.raises(UserError, match=r"data\.degrade: 0 would do"):
        check_degrade(data, {"type": TASKS["type"]})
    assert check_degrade(DataConfig(**paths), {"type": TASKS["type"]}) == []
    (sentence,) = check_degrade(data, TASKS)
    assert sentence.endswith("labels of rust")


def test_samples_carry_the_new_labels_beside_the_new_pixels(tmp_path):
    """Catches labels of the table beside changed pixels, a sample that depends on its batch, a changed table."""
    lines = ["filename,typename,clarity,block,rust"]
    for row in range(24):
        noise = np.random.default_rng(row).integers(0, 255, (30, 60, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{row}.png")
        lines.append(f"{row}.png,A,{'' if row % 3 == 0 else 0.8},{'' if row % 2 else 0.25},{'yes' if row % 4 else ''}")
    (tmp_path / "train.csv").write_text("\n".join(lines))
    table = read_training(tmp_path / "train.csv", tmp_path, TASKS)[0]
    for augment in (Augment(SIZE, TASKS, True), Augment(SIZE, TASKS, False)):
        split = Samples(table, augment, 1, "a", digest=True, degrade=Degrade(0.6, TASKS))
        keys = [(2, row) for row in range(24)]
        batch = split.__getitems__(keys)
        done = 0
        for row in range(24):
            alone = split.__getitems__([(2, row)])
            assert alone.digests[0] == batch.digests[row]
            labels = {"clarity": table.labels["clarity"][row], "block": table.labels["block"][row]}
            known = {task: float(value) for task, value in labels.items() if value == value}
            harm = split.degrade.draw(known, sample_key(1, "a", 2, row, "degrade"))
            expected = labels | (harm.labels if harm else {})
            for task, value in expected.items():
                np.testing.assert_allclose(batch.labels[task][row], value, rtol=1e-6)
            gone = harm is not None or row % 4 == 0
            assert (batch.labels["rust"][row] == -1) == gone
            done += harm is not None
            present = [task for task in TASKS if table.valid(task)[row] and not (gone and task == "rust")]
            pixels = augment(split.picture(row), present, sample_key(1, "a", 2, row), harm)
            assert (batch.images[row].permute(1, 2, 0).numpy() == pixels).all()
        assert 6 < done < 20
    assert table.labels["clarity"][1] == np.float32(0.8)
