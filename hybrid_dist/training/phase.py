"""One phase: the loop. Step, log, validate, checkpoint, and stop when asked."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hybrid_dist.checkpoint import Content, Found
from hybrid_dist.config import PhaseConfig
from hybrid_dist.data.mix import WHOLE
from hybrid_dist.data.order import steps_per_epoch
from hybrid_dist.distributed import DATA, Engine, span
from hybrid_dist.errors import UserError
from hybrid_dist.machine import peak_memory_gb
from hybrid_dist.tracking import Judgement, Lines, MetricsFile, Position, Sinks, json_line
from hybrid_dist.training import calibration
from hybrid_dist.training.bad import BadPictures
from hybrid_dist.training.feed import AskedToStop, Feed, Together, bad_count
from hybrid_dist.training.frozen import Pixels
from hybrid_dist.training.glance import Glance
from hybrid_dist.training.guard import Guard, TooManyBad
from hybrid_dist.training.objective import Objective
from hybrid_dist.training.optim import ema_decay, learning_rate
from hybrid_dist.training.profile import StepProfiler
from hybrid_dist.training.publish import PREDICTIONS, checkpoint_name
from hybrid_dist.training.state import TrainState
from hybrid_dist.training.step import LossLog, Made, label_counts, step_seed, trace_of, train_step
from hybrid_dist.training.stop import Stopped
from hybrid_dist.training.tasks import Metrics
from hybrid_dist.training.validate import Validated, metrics_of, predictions_csv, validate

if TYPE_CHECKING:
    from hybrid_dist.data.dataset import Batch
    from hybrid_dist.training.job import Job


BAD_PICTURES = "bad_pictures"


@dataclass(frozen=True)
class Length:
    """A phase's duration in optimizer steps: epochs and steps are converted here, once."""

    total: int
    per_epoch: int

    @classmethod
    def of(cls, phase: PhaseConfig, samples: int, global_batch: int) -> Length:
        per_epoch = steps_per_epoch(samples, global_batch)
        total = phase.steps if phase.steps is not None else max(1, round((phase.epochs or 0) * per_epoch))
        return cls(total, per_epoch)

    def ends_epoch(self, step: int) -> bool:
        """Whether the model is validated after this many steps."""
        return step % self.per_epoch == 0 or step == self.total

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that the step-th step belonged to."""
        return max(1, math.ceil(step / self.per_epoch))


@dataclass(frozen=True)
class Judged:
    """A validation's outcome, to go into the checkpoint of its step."""

    step: int
    score: float
    metrics: Metrics
    temperature: dict[str, float]
    """By classification task, what its logits are divided by."""
    files: dict[str, str]
    """Its predictions; rank 0 has them."""


@dataclass(frozen=True)
class Layout:
    """What a model's weights look like before an engine takes them apart."""

    shapes: dict[str, torch.Size]
    buffers: frozenset[str]
    """Names of the persistent buffers."""

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return cls(shapes, frozenset(model.state_dict().keys() - shapes.keys()))

    def held_buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """The persistent buffers' present values."""
        return {name: buffer for name, buffer in model.named_buffers() if name in self.buffers}


class PhaseLoop:
    """Takes a phase from where `state` stands to its end."""

    def __init__(
        self,
        job: Job,
        phase: PhaseConfig,
        state: TrainState,
        engine: Engine,
        layout: Layout,
        peak_lr: float,
        frozen: Pixels,
    ):
        """`peak_lr`: of the phase, the highest of its rates. `frozen`: what is kept of its frozen branches."""
        self.job, self.phase, self.state, self.engine, self.layout = job, phase, state, engine, layout
        self.frozen = frozen
        self.config, self.topology, self.control = job.config, job.topology, job.topology.control
        self.saver, self.watch = job.saver, job.watch
        self.together = Together(self.control, job.stop, job.saver, job.watch)
        self.length = job.length(phase)
        self.objective = Objective(job.tasks)
        self.losses = LossLog(state.pending)
        self.guard = Guard(
            job.folder,
            state,
            self.objective,
            job.train_table,
            self.config.train.max_bad_steps,
            self.control,
            job.sinks.warned,
        )
        self.files = {name: self._lines(name) for name in ("metrics", "trace")} if self.topology.is_main else {}
        first = [MetricsFile(self.files["metrics"])] if self.files else []
        self.sinks = Sinks([*first, job.sinks])  # what reads the file is told after it
        self.bad = self._bad_pictures()
        if self.bad.lines is not None:
            self.files[BAD_PICTURES] = self.bad.lines
        self.profile = StepProfiler(job, phase.name)
        wanted = self.config.tracking.communication
        self.glance = Glance(self.topology, wanted, job.accumulation, job.terminal.say)
        self.begun_at = state.step
        self._waited = self._worked = 0.0
        self._seen = 0
        self.lr, self.peak_lr = 0.0, peak_lr
        self._judged: Judged | None = None
        self._ended = False

    def _lines(self, name: str) -> Lines:
        keep = self.state.positions.get(name, 0)
        return Lines(self.job.folder / f"{name}.jsonl", keep, self.job.terminal.say)

    def _bad_pictures(self) -> BadPictures:
        job, keep = self.job, self.state.positions.get(BAD_PICTURES, 0)
        path, limit = job.folder / f"{BAD_PICTURES}.csv", self.config.data.max_bad
        return BadPictures(path, keep, job.tables, limit, self.control, job.terminal.say)

    def run(self) -> Found:
        """Make the phase's steps. Returns its last checkpoint.

        Raises:
            Stopped: someone asked; a checkpoint is written.
            TooManyBad: the loss or the gradients were no numbers for too many steps in a row.
            UserError: too many pictures can't be used, the last checkpoint can't be written.
        """
        self.val = self.job.val_loader(self.phase)
        try:
            while not self._ended:
                self._stretch()
        except AskedToStop:
            self._stop()
        except TooManyBad:
            self.saver.finish()
            raise
        except UserError as error:
            if error.shared:  # all ranks are here: what is being written shall not be lost
                self.saver.finish()
            raise
        finally:
            self.frozen.close()
            self.job.terminal.end()
            self.profile.close()
            for file in self.files.values():
                file.close()
        assert self.saver.newest is not None
        return self.saver.newest

    def _stretch(self) -> None:
        """The steps that one loader serves: all that are left, but where features begin to be read."""
        start = self.state.phase_step
        end = self.frozen.stretch(start, self.length.total)
        feed = Feed(self.job.train_loader(self.phase, start, end, self.frozen), ahead=self.job.accumulation)
        try:
            if self.state.validation_due:
                self._validate()
            self._begin()
            while not self._ended and self.state.phase_step < end:
                step = self.state.phase_step + 1
                looks = self.profile if self.profile.covers(step) else self.glance
                with looks.step(step, self._pauses_after(step)):
                    self._make_step(feed)
                self._after_step()
        finally:
            feed.close()

    def _begin(self) -> None:
        label, later = f"phase {self.phase.name}", self.job.steps_after(self.phase)
        self.job.terminal.start(label, self.state.phase_step, self.length.total, later)

    def _make_step(self, feed: Feed) -> None:
        began = time.monotonic()
        with span(DATA):
            batches, counts = self._take(feed)
        self._waited += time.monotonic() - began
        self._step(batches, counts)
        self._worked += time.monotonic() - began
        step = self.state.phase_step
        if self.length.ends_epoch(step) or step % self.config.tracking.log_every == 0:
            self._log()

    def _take(self, feed: Feed) -> tuple[list[Batch], dict[str, float]]:
        """This rank's micro batches of the next step, and the global batch's labels by task."""
        tasks = self.job.tasks
        batches, sums = self.together.take(feed, self.job.accumulation, self._facts)
        (*counts, samples, bad, looks), lacking = sums[: len(tasks) + 3], sums[len(tasks) + 3 :]
        self.glance.agree(looks)
        if bad:
            self._met_bad("train", batches)
        batches = self.frozen.agree(batches, lacking)
        self.state.samples += samples
        self._seen += samples
        return batches, {task.name: count / WHOLE for task, count in zip(tasks, counts, strict=True)}

    def _facts(self, found: list[Batch]) -> list[int]:
        own = [bad_count(found), self.glance.wish()]
        return [*label_counts(self.job.tasks, found), *own, *self.frozen.lacking(found)]

    def _look_ahead(self) -> None:
        if not self._pauses_after(self.state.phase_step + 1):
            with span(DATA):
                self.together.look_ahead(self.job.accumulation, self._facts)

    def _met_bad(self, split: str, batches: list[Batch]) -> None:
        self.bad.note(split, {row: reason for batch in batches for row, reason in batch.bad.items()})

    def _step(self, batches: list[Batch], counts: dict[str, float]) -> None:
        done = self.state.phase_step
        self.lr = learning_rate(done, self.length.total, self.peak_lr, self.phase.warmup)
        self.engine.set_lr(self.lr)
        seed = step_seed(self.config.run.seed, self.phase.name, done)
        device, beat = self.topology.device, self.watch.beat
        losses = train_step(self.engine, self.objective, batches, counts, seed, device, beat, self._look_ahead)
        self.frozen.keep(batches, done)
        if self.config.train.ema is not None:
            self.engine.update_ema(ema_decay(done + 1, self.config.train.ema))
        self.state.phase_step += 1
        self.state.step += 1
        self.losses.add(self.state.step, losses, batches)
        if self.config.debug.trace:
            self._trace(batches)

    def _trace(self, batches: list[Batch]) -> None:
        traced = trace_of(batches, self.control)
        loss = self._settle()[-1].losses[0]
        if traced is not None:
            rows, digest = traced
            position = {"phase": self.phase.name, "step": self.state.step}
            self.files["trace"].write(json_line({**position, "sample_ids": rows, "digest": digest, "loss": loss}))

    def _settle(self) -> list[Made]:
        """Judge the steps whose losses are still on the device; waits for it. All ranks together."""
        made = self.losses.settle()
        self.losses.kept += [one.losses for one in made if self.guard.is_good(one)]
        return made

    def _pauses_after(self, step: int) -> bool:
        """Whether a validation or a checkpoint follows a step of the phase."""
        every = self.config.checkpoint.every_steps
        return self.length.ends_epoch(step) or (every is not None and step % every == 0)

    def _after_step(self) -> None:
        step = self.state.phase_step
        self.state.validation_due = self.length.ends_epoch(step)
        self.job.terminal.advance(step)
        if self.state.validation_due:
            self._validate()
            self._begin()
        elif self._pauses_after(step):
            self._save(wait=False)

    def _at(self) -> Position:
        epoch = self.length.epoch(self.state.phase_step)
        return Position(self.phase.name, epoch, self.state.step, self.state.samples)

    def _write_metrics(self, values: dict[str, Any]) -> None:
        if self.topology.is_main:
            self.sinks.metrics(self._at(), values)

    def _log(self) -> None:
        began = time.monotonic()
        self._settle()
        # A GPU runs behind the loop; here the loop has waited for it.
        self._worked += time.monotonic() - began
        self.guard.check()
        names = ["train/loss", *(f"train/loss_{task.name}" for task in self.job.tasks)]
        mean = self.losses.take_mean()
        values: dict[str, Any] = dict(zip(names, mean, strict=True)) if mean else dict.fromkeys(names)
        values |= {"train/lr": self.lr, "train/grad_norm": self.engine.grad_norm()}
        if self._worked > 0:
            speed = self._seen / self._worked
            values["perf/images_per_s"] = speed
            values["perf/images_per_s_per_gpu"] = speed / self.topology.world_size
            utilisation = self.job.utilisation.of(self.phase.name, speed)
            if utilisation is not None and self.frozen.filling:  # it counts what frozen branches do
                values["perf/mfu"] = utilisation
            values["perf/data_wait"] = self._waited / self._worked
        communication = self.glance.take()
        if communication is not None:
            values["perf/communication"] = communication
        values["perf/peak_memory_gb"] = peak_memory_gb(self.topology.device)
        self._waited = self._worked = 0.0
        self._seen = 0
        self._write_metrics(values)
        self.job.status("running", self.phase.name, self.state.step, self.topology.label)

    def _validate(self) -> None:
        """Validate, and save the result; if asked to stop on the way, nothing of it has happened.

        Raises:
            TooManyBad: the model's answers are no numbers.
        """
        job = self.job
        result = self._judge_averaged()
        temperature: dict[str, float] = {}
        metrics: Metrics = {}
        ruined = result.not_finite() if result is not None else []
        if result is not None and not ruined:
            temperature, errors = calibration.fit(result, job.tasks)
            metrics = metrics_of(result, job.tasks) | errors
        metrics, temperature, ruined = self.control.from_main((metrics, temperature, ruined))
        if ruined:
            of = f"step {self.state.step}: the model's answers for {' and '.join(ruined)}"
            raise TooManyBad(f"validation after {of} are no numbers", self.state.step)
        score = metrics["val/score"] or 0.0
        ends = self._ends_with(score)
        raw = self._judge_raw() if ends and self.config.train.ema is not None else {}
        self.state.validation_due, self._ended = False, ends
        files: dict[str, str] = {}
        if result is not None:
            names = [job.val_table.filename(int(row)) for row in result.rows]
            picture = functools.partial(job.val_picture, job.config.size(self.phase))
            result = calibration.calibrated(result, temperature)
            files[PREDICTIONS] = predictions_csv(result, job.tasks, names)
            self.sinks.validated(Judgement(self._at(), metrics, result, job.tasks, names, picture))
        self._judged = Judged(self.state.step, score, metrics, temperature, files)
        self._write_metrics(metrics | raw)
        self._save(wait=ends)

    def _better(self, score: float) -> bool:
        return self.state.best_score is None or score > self.state.best_score

    def _ends_with(self, score: float) -> bool:
        """Whether this step's validation, with that score, is the phase's last; the same on all ranks."""
        if self.state.phase_step == self.length.total:
            return True
        patience, stale = self.phase.patience, 0 if self._better(score) else self.state.stale + 1
        if patience is None or stale < patience:
            return False
        self.job.terminal.say(
            f"phase {self.phase.name} ends at step {self.state.phase_step} of {self.length.total}:"
            f" {stale} validations in a row brought no better score than {self.state.best_score:.4f}"
        )
        return True

    def _judge_averaged(self) -> Validated | None:
        """Validate the weights' running mean, if one is kept, else the weights."""
        asked, result = None, None
        with self.engine.averaged():
            try:
                result = self._run_validation()
            except AskedToStop as request:  # all ranks are here; a checkpoint wants the weights back in their place
                asked = request
        if asked is not None:
            raise asked
        return result

    def _judge_raw(self) -> Metrics:
        """What the weights would have scored themselves; rank 0 knows."""
        result = self._run_validation()
        if result is None or result.not_finite():
            return {}
        metrics = metrics_of(result, self.job.tasks)
        return {f"val_raw/{key}": metrics[f"val/{key}"] for key in ("score", "loss")}

    def _run_validation(self) -> Validated | None:
        job, feed = self.job, Feed(self.frozen.val_source(self.val))
        job.terminal.start("validation", 0, len(job.val_table))
        seen = 0

        def tick(samples: int) -> None:
            nonlocal seen
            seen += samples * self.topology.world_size
            job.terminal.advance(min(seen, len(job.val_table)))

        try:
            batches = self.together.each(feed, lambda found: self._met_bad("val", found))
            passing = self.frozen.validating(batches)
            return validate(self.engine, job.tasks, passing, self.control, self.topology.device, tick)
        finally:
            feed.close()
            job.terminal.end()

    def _take_best(self) -> tuple[dict[str, str], Callable[[], None]]:
        """If this step's validation is the best so far, note it. Returns the files that belong to it, and a way back:
        a best whose checkpoint can't be written is none, for its weights are lost."""
        state, judged = self.state, self._judged
        before = state.best_score, state.best_step, state.best_metrics, state.best_temperature
        stale = state.stale

        def back() -> None:
            state.best_score, state.best_step, state.best_metrics, state.best_temperature = before
            state.stale = stale

        if judged is None or judged.step != state.step:
            return {}, back
        if not self._better(judged.score):
            state.stale += 1
            return {}, back
        state.stale = 0
        state.best_score, state.best_step, state.best_metrics = judged.score, judged.step, judged.metrics
        state.best_temperature = judged.temperature
        return judged.files, back

    def _save(self, wait: bool) -> None:
        """Begin a checkpoint, which is written behind the loop, or `wait` for all of it.

        Raises:
            UserError: it can't be written, and waiting was asked for.
        """
        self.watch.beat("in a checkpoint")
        self.saver.finish()
        self.frozen.flush()  # a resume from here on reads what was kept before
        self.state.finished = self._ended
        self._settle()
        self.state.pending = self.losses.kept
        self.state.engine = self.engine.extra_state()
        files, back = self._take_best()
        problem = None
        try:
            self.state.positions = {name: file.position() for name, file in self.files.items()}
        except OSError as error:
            problem = str(error)
        state = self.state.state_dict() | {"topology": self.topology.label, "config": self.config.identity()}
        state["shapes"] = {name: list(shape) for name, shape in self.layout.shapes.items()}
        content = Content(checkpoint_name(self.phase.name, self.state.step), state, files, self._sync, back)
        buffers = self.layout.held_buffers(self.engine.model) if self.topology.is_main else {}
        problem = self.saver.begin(content, self.engine.pieces(), buffers, wait, problem)
        if wait:
            problem = problem or self.saver.finish()
            if problem is not None:
                raise UserError(f"{problem}; {self._kept()}", shared=True)

    def _sync(self) -> None:
        for file in self.files.values():
            file.sync()

    def _kept(self) -> str:
        newest = self.saver.newest
        if newest is None:
            return "there is none before it, so the same command begins anew"
        return f"the same command goes on from {newest.path.name}"

    def _stop(self) -> None:
        """Make sure that this very step is in a checkpoint, and leave."""
        self.saver.finish()
        newest = self.saver.newest
        here = newest is not None and newest.state["phase"] == self.phase.name
        if self.state.step != (newest.state["step"] if newest is not None and here else self.begun_at):
            self._save(wait=True)
        reasons = [reason for reason in self.control.to_all(self.job.stop.reason) if reason]
        raise Stopped(reasons[0] if reasons else "asked to stop")
