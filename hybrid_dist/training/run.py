"""A run: phases in order, each from where it stands to its end."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file

from hybrid_dist.checkpoint import Damaged, Found, PieceReader, inspect
from hybrid_dist.config import Config, PhaseConfig
from hybrid_dist.data.annotations import describe_unseen, table_sums, untrained
from hybrid_dist.distributed import Engine, Topology, agree, decide, differences, explained, make_engine
from hybrid_dist.errors import UserError
from hybrid_dist.machine import forget_peak_memory, give_back_freed_memory
from hybrid_dist.model.hybrid import Hybrid, check_model, describe, fit_weights
from hybrid_dist.training.folder import check_shared, claim_folder, disk, open_folder
from hybrid_dist.training.frozen import Pixels, open_features, views_of, weights_sums
from hybrid_dist.training.guard import BAD_STEPS, TooManyBad, has_gone_back, note_went_back
from hybrid_dist.training.job import Job, make_job
from hybrid_dist.training.optim import param_groups, peak_rates
from hybrid_dist.training.phase import Layout, PhaseLoop
from hybrid_dist.training.profile import check_folder as check_profile_folder
from hybrid_dist.training.publish import best_is_there, checkpoint_name, find_best, publish_best, publish_model
from hybrid_dist.training.room import Again, look
from hybrid_dist.training.starts import note_start
from hybrid_dist.training.state import TrainState, check_own
from hybrid_dist.training.stop import EXIT_STOPPED, Stop, Stopped

DONE = 0


def run(config: Config, topology: Topology, stop: Stop, only: str | None, fresh: bool) -> int:
    """Train what is left of the run, or of its phase `only`. Returns the exit code.

    Args:
        stop: Listening.

    Raises:
        UserError: something is the user's to fix; if it is found before training begins, nothing has been written.
    """
    if topology.is_main:
        stop.look_for(config.folder / "STOP")
    job = make_job(config, topology, stop, look(config, topology, fresh))
    try:
        return _go(job, only, fresh)
    finally:
        job.watch.close()
        job.room.close()
        if not job.saver.busy():  # a save that an error has left behind keeps the lock until the process ends
            job.lock.release()


def _go(job: Job, only: str | None, fresh: bool) -> int:
    config, topology, terminal = job.config, job.topology, job.terminal
    check_shared(job)
    resumes = decide(topology, lambda: open_folder(job, only, fresh))
    found = _newest(job, lambda candidate: check_own(config, candidate)) if resumes else None
    job.saver.newest = found
    sums = _data_sums(job)
    state = agree(topology, lambda: _position(job, found, only, fresh, sums))
    if not (state.finished and state.phase == config.phases[-1].name):
        agree(topology, lambda: _start_loaders(job))
    # In a list, for the first phase to take it out: held here it would stay in memory through all the others.
    initial = [agree(topology, lambda: _first_model(job))] if found is None else []
    decide(topology, lambda: claim_folder(job, fresh, found))
    job.room.start(lambda reason: _begins_anew(job, reason))
    try:
        agree(topology, lambda: check_profile_folder(config))
        job.utilisation.begin()
        _report_unseen(job)
        _forget_lost_best(job, state)
        _train(job, state, found, only, initial)
        _finish(job, state)
        return DONE
    except Stopped as asked:
        job.status("stopped", state.phase, state.step, str(asked))
        job.sinks.ended("stopped", str(asked))
        job.stop.done(terminal.say)
        terminal.say(f"stopped at step {state.step} ({asked}); the same command goes on from there")
        return EXIT_STOPPED
    except Again as lack:
        _begins_anew(job, str(lack))
        raise
    except UserError as error:
        reason = str(error)
        if error.shared:
            job.status("failed", state.phase, state.step, reason)
        else:
            reason = job.status.failed(_at_rank(topology, reason))
        job.sinks.ended("failed", reason)
        raise
    except Exception as error:
        job.room.wait_for_news()
        reason = job.status.failed(_at_rank(topology, f"{type(error).__name__}: {error}"))
        job.sinks.ended("failed", reason)
        raise
    finally:
        job.utilisation.close()
        job.sinks.close()


def _start_loaders(job: Job) -> None:
    """While this process is small."""
    try:
        for pool in (job.train_pool, job.val_pool):
            pool.start()
    except OSError as error:
        raise UserError(f"data.workers: no more processes can be started ({error.strerror}); fewer would do") from None


def _begins_anew(job: Job, reason: str) -> None:
    """To those who watch it is a stop that somebody goes on from; if one was asked for, nobody does."""
    job.sinks.ended("stopped", reason)
    job.sinks.close()
    if job.stop.requested():
        job.stop.done(job.terminal.say)
        job.terminal.say(f"stopped ({job.stop.reason}); the same command goes on from the newest checkpoint")
        os._exit(EXIT_STOPPED)


def _at_rank(topology: Topology, reason: str) -> str:
    return f"rank {topology.rank}: {reason}" if topology.world_size > 1 else reason


def _first_model(job: Job) -> Hybrid:
    """The model as a new run begins with it; every phase's rule is tried on it."""
    _check_models(job.config)
    model = job.build(job.config.phases[0], load=True)
    for index, phase in enumerate(job.config.phases):
        try:
            model.set_trainable(phase.trainable)
        except UserError as error:
            raise UserError(f"phases.{index}.trainable: {error}") from None
        _, why_not = views_of(phase, model.frozen(), job.length(phase))
        if why_not is not None:
            job.terminal.say(why_not)
        try:
            peak_rates(model, phase)
        except UserError as error:
            raise UserError(f"phases.{index}.{error}") from None
    return model


def _check_models(config: Config) -> None:
    """One for each size of pictures."""
    seen: set[int] = set()
    for index, phase in enumerate(config.phases):
        size = config.size(phase)
        if size in seen:
            continue
        try:
            check_model(config.model, size)
        except UserError as error:
            if not seen:  # it need not be about the size
                raise
            raise UserError(f"phases.{index}.image_size: {error}") from None
        seen.add(size)


def _data_sums(job: Job) -> dict[str, str]:
    """SHA-256 of each split's CSV, and of the classes that its labels count in; the same on all ranks.

    Raises:
        UserError: they are not.
    """
    sums = table_sums(job.config.data)
    for name, classes in job.class_maps.items():
        text = json.dumps(classes.to_json(), sort_keys=True)
        sums[f"the classes of {name}"] = hashlib.sha256(text.encode()).hexdigest()
    found = differences(job.topology.control.to_all({"host": socket.gethostname(), "same": sums}))
    if found:
        raise UserError(found, shared=True)
    return sums


def _newest(job: Job, accept: Callable[[Found], None]) -> Found | None:
    """The checkpoint to go on from; rank 0 looks and decides, the others follow."""
    found = None
    if job.topology.is_main:
        found = job.store.newest(accept, job.terminal.say)
    return job.topology.control.from_main(found)


def _report_unseen(job: Job) -> None:
    for line in describe_unseen(job.val_table.unseen):
        job.terminal.say(f"warning: validation: {line}")
    for line in describe_unseen(untrained(job.train_table, job.val_table, job.class_maps)):
        job.terminal.say(f"warning: validation: {line}")


def _forget_lost_best(job: Job, state: TrainState) -> None:
    """After going back behind damaged checkpoints the best may be one that has been pruned since, and overwritten."""
    phase, step = state.phase, state.best_step
    if state.finished or step is None or decide(job.topology, lambda: best_is_there(job.folder, phase, step)):
        return
    job.terminal.say(f"warning: the best so far, of step {step}, is gone or damaged; it will be one from here on")
    state.best_score, state.best_step, state.best_metrics, state.best_temperature = None, None, {}, {}
    state.stale = 0


def _position(job: Job, found: Found | None, only: str | None, fresh: bool, sums: dict[str, str]) -> TrainState:
    """Where the run stands: at its newest checkpoint, or at its beginning.

    Raises:
        UserError: the data is not what the run was trained on; the phase `only` is not next.
    """
    names = [phase.name for phase in job.config.phases]
    if found is None:
        traces = [*job.folder.glob("phase_*/best.json"), *job.folder.glob("checkpoints/[!.]*")]
        if traces and not fresh:
            raise UserError(f"{job.folder}: there is {traces[0]}, but no valid checkpoint; --fresh would start over")
        state = TrainState(names[0], data=sums)
    else:
        state = TrainState.from_dict(found.state)
        changed = [key for key in sums if sums[key] != state.data.get(key)]
        if changed:
            raise UserError(f"{' and '.join(changed)}: not what {job.folder} was trained on; --fresh would start over")
    next_phase = names.index(state.phase) + (1 if state.finished else 0)
    if only is not None and names.index(only) > next_phase:
        before = names[names.index(only) - 1]
        raise UserError(f"--phase {only} needs phase {before} finished first; --phase {names[next_phase]} would do now")
    return state


def _train(job: Job, state: TrainState, found: Found | None, only: str | None, initial: list[Hybrid]) -> None:
    """Go through the phases that are left, or through `only`; `state` moves along."""
    names = [phase.name for phase in job.config.phases]
    for index, phase in enumerate(job.config.phases):
        if only not in (None, phase.name):
            continue
        at = names.index(state.phase)
        if index < at or (index == at and state.finished):
            job.terminal.say(f"phase {phase.name} is finished")
            continue
        if index > at:
            state.begin(phase.name)
        found = _run_guarded(job, phase, state, found, initial.pop() if initial else None)
        _let_go()


def _let_go() -> None:
    """Give back what a phase held, to be called when nothing names its model any more: the next lays its own out.

    Under DeepSpeed module, engine and parameters lead to each other in circles, with all weights and moments.
    """
    gc.collect()
    give_back_freed_memory()


def _run_guarded(job: Job, phase: PhaseConfig, state: TrainState, found: Found | None, model: Hybrid | None) -> Found:
    """As `_run_phase`; after too many bad steps in a row once more, from the last good checkpoint."""
    try:
        return _run_phase(job, phase, state, found, model)
    except TooManyBad as error:
        reason, since = f"phase {phase.name}: {error}", error.since
    del model
    _let_go()
    good = _go_back(job, phase, state, reason, since)
    try:
        return _run_phase(job, phase, state, good, None)
    except TooManyBad as error:
        raise UserError(_no_way_on(f"phase {phase.name}: {error}"), shared=True) from None


def _no_way_on(reason: str) -> str:
    return (
        f"{reason}. Going back to the last good checkpoint has not helped: {BAD_STEPS} names the steps and their"
        " samples; other pictures or labels there, or a lower learning rate in a new run, would do"
    )


def _go_back(job: Job, phase: PhaseConfig, state: TrainState, reason: str, since: int) -> Found:
    """Put `state`, and the disk, to the last good checkpoint before step `since`, once; all ranks together.

    Raises:
        UserError: the phase has gone back already, or there is nothing to go back to.
    """
    job.watch.beat("going back to the last good checkpoint")
    if decide(job.topology, lambda: has_gone_back(job.folder, phase.name)):
        raise UserError(_no_way_on(reason), shared=True)
    good = _newest(job, lambda candidate: _check_good(job, phase, since, candidate))
    if good is None:
        none = "There is no good checkpoint to go back to; other pictures, labels or weights, or a lower learning rate"
        raise UserError(f"{reason}. {none} in a new run, would do", shared=True)
    abandoned = state.step
    state.become(TrainState.from_dict(good.state))

    def tidy() -> None:
        with disk(job.folder):
            job.store.drop_after(good.state["step"])  # a stop before they are made anew must not find them
            note_went_back(job.folder, phase.name, abandoned, good.path.name)
            Pixels(job.folder).drop()  # what a disk or a device gave may be what was bad
            publish_best(job.folder, good, job.watch.beat, verify=True)

    decide(job.topology, tidy)
    _forget_lost_best(job, state)
    if state.phase != phase.name:
        state.begin(phase.name)
    job.saver.newest = good
    job.sinks.close()  # they begin once more, with metrics.jsonl cut back; what they were told of the steps may be lost
    job.sinks.warned(f"{reason}; back to {good.path.name}, once")
    return good


def _check_good(job: Job, phase: PhaseConfig, since: int, found: Found) -> None:
    """Raises `Damaged` for what is not to be gone back to: it stands among bad steps, or before another phase."""
    check_own(job.config, found)
    state = TrainState.from_dict(found.state)
    names = [each.name for each in job.config.phases]
    if state.phase == phase.name and (state.bad_streak > 0 or state.step >= since):
        raise Damaged("it is of a step among the bad ones, or after them")
    if state.phase != phase.name and not (state.finished and names.index(state.phase) + 1 == names.index(phase.name)):
        raise Damaged(f"it is not what phase {phase.name} begins with")


def _run_phase(job: Job, phase: PhaseConfig, state: TrainState, found: Found | None, model: Hybrid | None) -> Found:
    """Take one phase from `state` to its end; `found` is the newest checkpoint, this phase's or the one's before."""
    job.watch.beat("building the model")
    job.sinks.begin(state, state.positions.get("metrics", 0))
    forget_peak_memory(job.topology.device)
    resumed = found is not None and found.state["phase"] == phase.name
    if model is None:
        assert found is not None
        model = job.build(phase, load=False)
        model.load_state_dict(fit_weights(job.config.model, _weights(job, phase, found, Layout.of(model)), model))
    model.set_trainable(phase.trainable)
    _announce(job, phase, state, model)
    layout = Layout.of(model)
    weights = weights_sums(model) if phase.cache_features is not None and job.topology.is_main else {}
    optimizer = found.reader() if found is not None and resumed else _carried(job, phase, found, layout)
    peaks, updates = peak_rates(model, phase), optimizer.step if optimizer is not None else None
    groups = param_groups(model, job.config.train.weight_decay, updates, peaks)
    job.watch.beat("building the engine")
    with job.room.guarded(phase.name, state), _engine(job, model, groups) as engine:
        if optimizer is not None:
            engine.load_optimizer(optimizer)
        if resumed:
            engine.load_extra_state(state.engine)
            engine.load_average(optimizer)
        frozen = open_features(job, phase, engine, state.data, weights)
        # What comes before may take its time: kernels are compiled, a cluster's disk wakes up. A signal to all ranks
        # shall not find some of them before this line and some behind it.
        job.topology.control.barrier()
        job.stop.wait_for_the_loop()
        job.watch.start(job.topology.control)
        job.status("running", state.phase, state.step, job.topology.label)
        with explained():
            last = PhaseLoop(job, phase, state, engine, layout, max(peaks.values()), frozen).run()
        if job.topology.is_main:
            frozen.drop()
        return last


@contextlib.contextmanager
def _engine(job: Job, model: Hybrid, groups: list[dict[str, Any]]) -> Iterator[Engine]:
    engine = make_engine(job.topology, model, groups, job.config.train, job.micro_batch, job.accumulation)
    try:
        yield engine
    finally:
        engine.close()


def _weights(job: Job, phase: PhaseConfig, found: Found, layout: Layout) -> dict[str, torch.Tensor]:
    """The weights that a phase goes on from: its own checkpoint's, or the best or last of the phase before, which are
    means if it kept any."""
    before = found.state["phase"]
    if before == phase.name:
        return found.reader().weights(layout.shapes)
    if phase.start == "last":
        shapes = {name: torch.Size(shape) for name, shape in found.state["shapes"].items()}  # of its own size
        return found.reader().weights(shapes, averaged=True)
    return load_file(decide(job.topology, lambda: find_best(job.folder, before, found.state["best_step"])))


def _carried(job: Job, phase: PhaseConfig, found: Found | None, layout: Layout) -> PieceReader | None:
    """The optimizer's state that a phase begins with, if it is to have any: as it was at the weights it begins with.

    A table of positions that has another shape in this phase begins anew: its moments belong to other places.
    """
    begins = _begins_at(job, phase, found) if found is not None and phase.carry_optimizer else None
    if begins is None:
        return None
    shapes = begins.state["shapes"]
    reader = begins.reader()
    reader.forget_steps(name for name, shape in layout.shapes.items() if shapes.get(name) != list(shape))
    return reader


def _begins_at(job: Job, phase: PhaseConfig, found: Found) -> Found | None:
    """The checkpoint of the weights that a phase begins with; `found` is the last one of the phase before."""
    if phase.start == "last" or found.state["best_step"] == found.state["step"]:
        return found
    path, best = job.store.folder / checkpoint_name(found.state["phase"], found.state["best_step"]), None
    if job.topology.is_main:
        try:
            best = inspect(path)
        except Damaged as reason:
            job.terminal.say(f"warning: phase {phase.name} begins without the optimizer's state of {path}: {reason}")
    return job.topology.control.from_main(best)


def _announce(job: Job, phase: PhaseConfig, state: TrainState, model: Hybrid) -> None:
    length, counts = job.length(phase), describe(model)["all"]
    at = f", from step {state.phase_step}" if state.phase_step else ""
    job.terminal.say(
        f"phase {phase.name}: {', '.join(phase.trainable)}"
        f" ({counts['trainable'] / 1e6:.1f} of {counts['total'] / 1e6:.1f} M parameters) for {length.total} steps"
        f" of {job.config.train.global_batch_size} on {job.topology.label}{at}"
    )
    if job.topology.is_main:
        note_start(job.folder, state, job.topology)


def _publish(job: Job, state: TrainState) -> None:
    with disk(job.folder):
        publish_model(job.folder, state.phase, state.best_step, job.describe())
    Pixels(job.folder).drop()  # the last phase may have been cut off right at its end


def _finish(job: Job, state: TrainState) -> None:
    """Say what is left; after the last phase, make `model/`."""
    names = [phase.name for phase in job.config.phases]
    left = names[names.index(state.phase) + (1 if state.finished else 0) :]
    if left:
        reason = f"phase {state.phase} is finished" if state.finished else f"phase {state.phase} is not finished yet"
        reason += f", {' and '.join(left)} left"
    else:
        reason = "all phases are finished"
        decide(job.topology, lambda: _publish(job, state))
        facts = {"step": state.best_step, "metrics": state.best_metrics}
        job.sinks.published(str(job.folder.absolute() / "model"), facts)
    if state.finished:
        job.status("finished", state.phase, state.step, reason)
        job.sinks.ended("finished", reason)
    job.terminal.say(f"{reason}: {job.folder}")
