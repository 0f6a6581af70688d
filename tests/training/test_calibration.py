"""Temperatures and calibration errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_dist.config import TaskConfig
from hybrid_dist.training.calibration import (
    FEWEST,
    calibrated,
    calibration_error,
    errors_told,
    fit,
    fit_temperature,
    tempered,
)
from hybrid_dist.training.tasks import make_tasks
from hybrid_dist.training.validate import Validated


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def drawn(temperature: float, count: int, seed: int = 0, classes: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a model that is as much too sure as this, and true classes."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, classes))
    target = (softmax(logits).cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    return softmax(logits * temperature), target


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_is_sklearns(temperature: float) -> None:
    """Catches: another optimum than that of the likelihood, or one by which logits are multiplied."""
    from sklearn.calibration import _TemperatureScaling

    probabilities, target = drawn(temperature, 4000)
    found = fit_temperature(probabilities, target)
    assert found == pytest.approx(temperature, rel=0.08)
    theirs = _TemperatureScaling().fit(np.log(probabilities.astype(np.float64)), target)
    assert found == pytest.approx(1 / theirs.beta_, rel=1e-3)


def test_a_few_labels_tell_none() -> None:
    """Catches: a temperature that follows from a handful of pictures, all of them right."""
    probabilities, _ = drawn(1, FEWEST - 1)
    assert fit_temperature(probabilities, probabilities.argmax(axis=1)) == 1


def test_all_right() -> None:
    """Catches: a temperature of nothing, or an overflow, where no answer is wrong."""
    probabilities, _ = drawn(1, 500)
    found = fit_temperature(probabilities, probabilities.argmax(axis=1))
    assert 0.04 < found < 1
    assert np.isfinite(tempered(probabilities, found)).all()


@given(st.floats(0.05, 20), st.integers(0, 100))
def test_what_is_most_probable_stays_so(temperature: float, seed: int) -> None:
    """Catches: a temperature that changes an answer; probabilities that are none."""
    probabilities, _ = drawn(3.0, 20, seed)
    told = tempered(probabilities, temperature)
    assert told.sum(axis=1) == pytest.approx(1, abs=1e-5)
    best = probabilities.argmax(axis=1)
    assert (told[np.arange(20), best] == told.max(axis=1)).all()


def test_tempered_is_of_the_logits() -> None:
    """Catches: a temperature on probabilities instead of logits."""
    logits = np.random.default_rng(0).normal(0, 3, (50, 7))
    np.testing.assert_allclose(tempered(softmax(logits), 1.7), softmax(logits / 1.7), atol=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
def test_calibration_error(pairs: list[tuple[float, bool]]) -> None:
    """Catches: a bin's border, or its weight. Against the definition, answer by answer."""
    sure, right = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs])
    expected = 0.0
    for low in range(10):
        own = [p for p in pairs if int(min(p[0] * 10, 9)) == low]
        if own:
            expected += abs(sum(p[0] for p in own) - sum(p[1] for p in own)) / len(pairs)
    assert calibration_error(sure, right) == pytest.approx(expected, abs=1e-9)


def test_of_a_validation() -> None:
    """Catches: blanks that count, a score that is tempered, an error that is no better where the model is too sure."""
    probabilities, target = drawn(3.0, 1200)
    target[::5] = -1
    configs = {
        "type": TaskConfig(kind="classification", column="typename"),
        "clarity": TaskConfig(kind="regression", column="clarity"),
    }
    tasks = make_tasks(configs, {"type": tuple(map(str, range(12)))})
    scores = np.linspace(0, 1, 1200, dtype=np.float32)
    result = Validated(
        np.arange(1200), {"type": probabilities, "clarity": scores}, {"type": target, "clarity": scores}, {}
    )
    temperatures, left = fit(result, tasks)
    assert set(temperatures) == {"type"}
    assert temperatures["type"] == fit_temperature(probabilities[target >= 0], target[target >= 0])
    before = tasks[0].metrics(probabilities[target >= 0], target[target >= 0])["ece"]
    assert before is not None and before > 0.1
    assert set(left) == {"val/type_ece_calibrated"}
    assert left["val/type_ece_calibrated"] < 0.5 * before
    told = calibrated(result, temperatures)
    assert (told.predictions["clarity"] == scores).all()
    assert told.predictions["type"] == pytest.approx(tempered(probabilities, temperatures["type"]))
    assert errors_told(result, tasks, {})["val/type_ece_told"] == before
    assert errors_told(result, tasks, temperatures)["val/type_ece_told"] < 0.5 * before
