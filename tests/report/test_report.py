"""The page about a run."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_score, recall_score

import train
from hybrid_dist import cli
from hybrid_dist.config import load_config
from hybrid_dist.inference.found import find_model
from hybrid_dist.inference.opened import OpenedModel, open_model
from hybrid_dist.report import plots
from hybrid_dist.report.page import write
from hybrid_dist.report.run import close
from hybrid_dist.report.run.history import POINTS, read_history
from hybrid_dist.report.run.looks import looks, overlay
from hybrid_dist.report.run.page import report_page
from hybrid_dist.report.run.report import make_report
from hybrid_dist.training.publish import PREDICTIONS
from tests.report.outline import Outline

NASTY = "<script>alert('x')</script> $x$"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A finished run of three phases, to change."""
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    return tmp_path / "run"


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`hybrid-dist report …`: exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["report", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "phase_c" / PREDICTIONS).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_figures_are_those_of_the_run(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a figure of another phase, step or picture; an interval beside its value; blanks counted as wrong."""
    code, out, _ = ask(run, "--json")
    found: dict[str, Any] = json.loads(out, parse_constant=pytest.fail)
    best = json.loads((run / "phase_c/best.json").read_text())
    assert code == 0
    assert (found["phase"], found["step"], found["finished"]) == ("c", best["step"], True)
    for name, figure in found["metrics"].items():
        # Scores have six digits in the file, and so near to each other are they here that a correlation needs more.
        digits = 1e-3 if name.endswith("_corr") else 2e-6
        assert figure["value"] == pytest.approx(best["metrics"][f"val/{name}"], abs=digits)
        assert figure["low"] is None or figure["low"] <= figure["value"] <= figure["high"]
    assert {name for name, figure in found["metrics"].items() if figure["low"] is not None} >= {"score", "type_acc1"}
    known = [row for row in rows_of(run) if row["type_label"]]
    labels, said = [row["type_label"] for row in known], [row["type_prediction"] for row in known]
    classes = found["tasks"]["type"]["classes"]
    assert found["tasks"]["type"]["labelled"] == len(known)
    names = sorted(set(labels))
    assert sorted(classes) == names
    expected = recall_score(labels, said, labels=names, average=None, zero_division=0)
    assert [classes[name]["recall"] for name in names] == pytest.approx(list(expected))
    expected = precision_score(labels, said, labels=names, average=None, zero_division=0)
    assert [classes[name]["precision"] for name in names] == pytest.approx(list(expected))
    ranges = found["tasks"]["clarity"]["ranges"]
    count = sum(one["labelled"] for one in ranges)
    assert count == found["tasks"]["clarity"]["labelled"] == sum(row["clarity_label"] != "" for row in rows_of(run))
    assert sum(one["mae"] * one["labelled"] for one in ranges) / count == pytest.approx(
        best["metrics"]["val/clarity_mae"], abs=2e-6
    )
    assert [phase["name"] for phase in found["phases"]] == ["a", "b", "c"]
    assert [phase["steps"] for phase in found["phases"]] == [4, 4, 4]
    assert [start["phase"] for start in found["starts"]] == ["a", "b", "c"]
    assert not (run / "report.html").exists(), "--json alone writes no page"


def test_page(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a request, a script, an id that stands twice, an element left open, a picture or a plot that is gone."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  goals: {}", "  goals: {score: 0.01, type_acc1: 1.5}"))
    code, out, _ = ask(run)
    assert code == 0
    assert out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    page = Outline(text)
    assert not page.open
    tags = [tag for tag, _ in page.elements]
    assert not {"script", "link", "iframe", "object"} & set(tags)
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), attributes
        assert not any(key.startswith("on") for key in attributes)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"} <= set(ids)
    pictures = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    mistakes = text.count('class="looks"')
    assert len(pictures) == 3 * mistakes >= 3 * 16, "as seen, and where each of two branches looked"
    assert len(set(pictures)) > 2 * mistakes
    assert tags.count("svg") == 7 + 2 * 2 + 2
    said = " ".join(page.texts)
    assert "Not every goal is reached." in said and "missed by" in said
    best = json.loads((run / "phase_c/best.json").read_text())["metrics"]
    for name in ("val/score", "val/type_acc1", "val/block_mae"):
        assert f"{best[name]:.4f}" in said
    assert len(text) < 3_000_000


def test_foreign_text(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a label, a file name or a config that becomes part of the page; a login that does."""
    for file in (run / "model/model.json", run / "phase_c" / PREDICTIONS):
        file.write_text(file.read_text().replace("A320", NASTY.replace('"', "")))
    table = (run / "phase_c" / PREDICTIONS).read_text()
    (run / "phase_c" / PREDICTIONS).write_text(table.replace(rows_of(run)[0]["filename"], "../<b>.jpg", 1))
    config = (run / "config.yaml").read_text()
    images = load_config(run / "config.yaml").data.val_images
    (run / "config.yaml").write_text(config.replace(images, "s3://key:hush@store/<b>"))
    code, _, said = ask(run)
    assert code == 0, said
    text = (run / "report.html").read_text()
    assert "<script" not in text and "<b>.jpg" not in text
    assert "hush" not in text
    assert "picture can&#39;t be read" in text.replace("can't", "can&#39;t")
    assert NASTY in "".join(Outline(text).texts)


def test_unfinished(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a run in the middle that has no page, or whose page does not say so."""
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "phase_c")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "c", "st')
    code, _, _ = ask(run, "--out", run / "page.html")
    assert code == 0
    text = (run / "page.html").read_text()
    assert "is not finished: this is the best so far of its phase b" in text
    assert not (run / "report.html").exists()


def test_what_is_no_run(run: Path, tmp_path: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a stack trace, or half a page, where there is nothing to tell."""
    code, _, said = ask(tmp_path / "nowhere")
    assert code == 2 and "no such folder" in said
    code, _, said = ask(run, "--out", tmp_path / "nowhere/page.html")
    assert code == 2 and "there is no folder" in said
    assert cli.main(["export", str(run), str(tmp_path / "export"), "--format", "safetensors"]) == 0
    code, _, said = ask(tmp_path / "export")
    assert code == 2 and "exported model" in said
    (run / "phase_c" / PREDICTIONS).unlink()
    code, _, said = ask(run)
    assert code == 2 and PREDICTIONS in said
    assert not (run / "report.html").exists()


def test_a_task_without_labels(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: figures under another task's name; a page that needs every task to have labels."""
    rows = rows_of(run)
    for row in rows:
        row["type_label"] = ""
    with (run / "phase_c" / PREDICTIONS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert ask(run)[0] == 0
    text = (run / "report.html").read_text()
    table = text[text.index('id="data"') : text.index('id="config"')]
    assert table.count("<th") == 2 + 4 and table.count("<td") == 2 * (2 + 4)
    split = json.loads((run / "model/model.json").read_text())["data"]["train"]["labels"]
    cells = [cell.split("<")[0] for cell in table.split("<tr><td>")[1].split('number">')[2:]]
    assert cells == [f"{split[task]:,}" for task in ("type", "airline", "clarity", "block")]


def test_goals_without_an_interval(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a goal that is said to be doubtful for want of an interval."""
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  goals: {}", "  goals: {loss: 1000}"))
    assert ask(run)[0] == 0
    assert "reached; it has no interval" in (run / "report.html").read_text()


def test_pictures_from_a_packed_copy(run: Path, tmp_path: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a page without pictures where training reads packed ones; one that does not say why it has none."""
    data = load_config(run / "config.yaml").data
    shutil.copytree(Path(data.val_csv).parent, tmp_path / "data")
    config = (run / "config.yaml").read_text().replace(str(Path(data.val_csv).parent), str(tmp_path / "data"))
    (run / "config.yaml").write_text(config)
    assert cli.main(["pack", "--config", str(run / "config.yaml")]) == 0
    shutil.rmtree(tmp_path / "data/val")
    assert ask(run)[0] == 0
    text = (run / "report.html").read_text()
    assert text.count('class="looks"') >= 16 and "can't be read from here" not in text.replace("&#39;", "'")
    shutil.rmtree(tmp_path / "data/val.packed-96")
    assert ask(run)[0] == 0
    text = (run / "report.html").read_text().replace("&#39;", "'")
    assert 'class="looks"' not in text and "data.val_images can't be read from here" in text


def test_what_is_no_answer(run: Path, ask: Callable[..., tuple[int, str, str]]) -> None:
    """Catches: a stack trace, or a NaN in JSON, for a file that training does not write."""
    file = run / "phase_c" / PREDICTIONS
    rows = rows_of(run)
    for column, what in (("clarity_prediction", "not a number"), ("type_probability", "not between 0 and 1")):
        old = rows[0][column]
        file.write_text(file.read_text().replace(old, "nan", 1))
        code, out, said = ask(run, "--json")
        assert (code, out) == (2, "") and what in said
        file.write_text(file.read_text().replace("nan", old, 1))


def test_many_curves() -> None:
    """Catches: a curve that is left out, or looks like another."""
    steps = np.arange(50.0)
    svg = plots.curves("many", {f"task {n}": (steps, steps * n) for n in range(9)}, {}, [])
    assert all(f"task {n}<" in svg for n in range(9))
    lines = [part.split('"')[0] for part in svg.split('style="fill: none; stroke')[1:]]
    assert len({line for line in lines if "#" in line}) >= 9


@pytest.fixture
def opened(run: Path) -> OpenedModel:
    return open_model(find_model(run), "cpu", "fp32")


@pytest.mark.parametrize("task", ["type", "clarity"])
def test_looks_follow_the_model(opened: OpenedModel, task: str) -> None:
    """Catches: gradients of another answer, a branch's map of another layout, places in another order."""
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 96, 96), dtype=torch.uint8, generator=draw)
    chosen = np.array([0, 2, 1]) if task == "type" else None
    found = looks(opened, images, task, chosen)
    # Independently: through the whole model, with timm's own maps caught on their way.
    caught: dict[str, torch.Tensor] = {}
    for part, branch in opened.model.branches().items():
        inner = branch.net.forward_features

        def catch(x: torch.Tensor, part: str = part, inner: Callable[..., torch.Tensor] = inner) -> torch.Tensor:
            caught[part] = inner(x).detach().requires_grad_()
            return caught[part]

        branch.net.forward_features = catch
    opened.model.zero_grad()
    answer = opened.model(images)[task]
    for n in range(3):
        value = answer[n] if chosen is None else answer[n, chosen[n]]
        for part, gradient in zip(caught, torch.autograd.grad(value, caught.values(), retain_graph=True), strict=True):
            features, slope = caught[part][n].detach(), gradient[n]
            if part == "transformer":  # Swin's maps have their channels last
                features, slope = features.permute(2, 0, 1), slope.permute(2, 0, 1)
            heat = torch.einsum("d,dhw->hw", slope.mean((1, 2)), features)
            heat = heat.abs() if chosen is None else heat.clamp(min=0)
            expected = heat / heat.max().clamp(min=1e-12)
            assert found[part].shape == (3, 3, 3)
            np.testing.assert_allclose(found[part][n], expected.numpy(), atol=1e-4)


def test_overlay_glows_where_it_should() -> None:
    """Catches: rows and columns exchanged, or a glow where there was nothing."""
    picture = np.full((96, 96, 3), 128, np.uint8)
    heat = np.zeros((3, 3), np.float32)
    heat[0, 2] = 1
    made = overlay(picture, heat).astype(int)
    assert (abs(made[60:, :30] - 128) <= 1).all()
    assert np.abs(made[5:20, 75:90] - 128).max() > 60


def history_lines() -> Iterator[dict[str, Any]]:
    for step in range(1, 2001):
        phase = "a" if step <= 500 else "b"
        pause = 1000 if step > 700 else 0
        yield {
            "phase": phase,
            "epoch": 1,
            "step": step,
            "samples": step,
            "time": 100.0 + step + pause,
            "train/loss": 1.0,
        }


def test_history(run: Path) -> None:
    """Catches: a pause between two starts that counts as training, a curve of more points than a page needs."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history_lines()) + '{"cut')
    starts = [
        {"time": 100.0, "phase": "a", "step": 0, "goes_on": False}, {"time": 600.0, "phase": "b", "step": 500},
        {"time": 1700.0, "phase": "b", "step": 650, "goes_on": True},
    ]  # fmt: skip
    (run / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    found = read_history(run, load_config(run / "config.yaml"))
    a, b = found.phases
    assert (a.begins, a.steps, b.begins, b.steps) == (1, 500, 501, 1500)
    assert (a.seconds, b.seconds) == (500, 200 + 1400)
    assert found.resumed == [650]
    curve = found.curve("train/loss")
    assert curve is not None
    assert len(curve[0]) == POINTS and curve[1] == pytest.approx(1)
    assert found.curve("val/nothing") is None


def test_large(run: Path, tmp_path: Path) -> None:
    """Catches: a page that grows with the number of pictures or classes."""
    rng = np.random.default_rng(0)
    header = list(rows_of(run)[0])
    names = [f"class {n}" for n in range(300)]
    classes = {"type": names, "airline": ["Blue Wings", "Red Air"]}
    described = json.loads((run / "model/model.json").read_text())
    lines = []
    for row in range(10_000):
        cells = {"filename": f"{row}.jpg"}
        for task, known in classes.items():
            cells |= {f"{task}_label": str(rng.choice(known)), f"{task}_prediction": str(rng.choice(known))}
            cells[f"{task}_probability"] = f"{rng.random():.6f}"
        for task in ("clarity", "block"):
            cells |= {f"{task}_label": f"{rng.random():.4f}", f"{task}_prediction": f"{rng.random():.6f}"}
        lines.append([cells[column] for column in header])
    with (run / "phase_c" / PREDICTIONS).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    assert described["labels"]["type"]
    report = make_report(run)
    for found in report.sections:
        if found.name == "type":
            found.mistakes.clear()  # the model has no such classes
    write(tmp_path / "page.html", report_page(report))
    assert (tmp_path / "page.html").stat().st_size < 3_000_000


def test_training_writes_it(tiny_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches: a finished run without its page, one that is made again for nothing, one that costs a run its 0."""
    phases = [{"name": "a", "trainable": ["all"], "steps": 2, "lr": 1e-3}]
    config = tiny_config(phases=phases, tracking={"report": True})
    page = config.parent / "runs/tiny/report.html"
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    monkeypatch.setattr("hybrid_dist.report.run.page.report_page", fail)
    assert train.main() == 0
    assert not page.exists()
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config)])
    assert train.main() == 0
    text = page.read_text()
    assert "best of phase a" in text
    stamp = page.stat().st_mtime_ns
    assert train.main() == 0
    assert page.stat().st_mtime_ns == stamp
    assert not close.is_behind(page.parent)
    stamp = page.stat().st_mtime
    os.utime(page.parent / "metrics.jsonl", (stamp + 1, stamp + 1))
    assert close.is_behind(page.parent), "as where it was looked at before the end"


def fail(*_: object) -> None:
    raise RuntimeError("no plots today")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_in_a_browser(run: Path, ask: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Catches: what a browser complains about; a page without its style or plots."""
    assert ask(run)[0] == 0
    for width, theme in ((1280, []), (390, ["--force-dark-mode", "--enable-features=WebContentsForceDark"])):
        shot = tmp_path / f"{width}.png"
        command = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--enable-logging=stderr", "--v=0", *theme, f"--window-size={width},1200", f"--screenshot={shot}",
            f"file://{run / 'report.html'}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0
        assert "CONSOLE" not in done.stderr, done.stderr
        assert shot.stat().st_size > 20_000
