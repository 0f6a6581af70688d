"""wandb, as one more sink: a thread of its own follows metrics.jsonl and sends what wandb does not have yet.

The file is the queue: a slow or absent wandb costs no memory and loses no line, and what one start of the run could not
send, the next one does. A line's number is wandb's `_step`, so that a line is there once, whatever is tried twice; the
axes are `step` and `samples`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_dist.config import Config, without_logins
from hybrid_dist.tracking.nodes import node_facts
from hybrid_dist.tracking.offline import cut_back
from hybrid_dist.tracking.sink import HasId, Judgement, Position, Sink, Values

PROJECT = "hybrid-dist"
PATIENCE = 5.0
"""Seconds that the end of a run or a stop waits for wandb."""
UPLOAD = 120.0
"""Seconds that the end of a finished run waits for a server to take the model."""
TRIES = 8
PAUSE = 0.05
"""Seconds after a first failed try; each later one waits twice as long."""
HELD = 8
"""Validations whose pictures may wait for wandb; older ones are left out."""


class WandbError(Exception):
    """wandb did not do something, however often it was asked."""


def choose_mode(wanted: str) -> str:
    """`off`, `offline` or `online`, from `tracking.wandb`; `auto` follows WANDB_MODE, then whether there is a login."""
    if wanted != "auto":
        return wanted
    said = os.environ.get("WANDB_MODE", "").lower()
    if said:
        return {"disabled": "off", "online": "online", "run": "online", "shared": "online"}.get(said, "offline")
    return "online" if logged_in() else "offline"


def logged_in() -> bool:
    """Whether there is a key, without asking wandb, which would be loaded for it."""
    import configparser
    import netrc
    from urllib.parse import urlsplit

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):  # where wandb login --host puts it
        settings.read(Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser() / "settings")
    server = settings.get("default", "base_url", fallback="https://api.wandb.ai")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", server)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def project_of(config: Config) -> str:
    """wandb's project."""
    return config.tracking.project or os.environ.get("WANDB_PROJECT") or PROJECT


def find_id(folder: Path, state: HasId) -> None:
    """Give `state` the run's id: the checkpoint's, or that of a start whose checkpoint is gone, or a new one."""
    file = folder / "run-id"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        state.wandb_id = state.wandb_id or file.read_text(encoding="utf-8").strip() or None
    state.wandb_id = state.wandb_id or secrets.token_hex(4)
    folder.mkdir(exist_ok=True)
    file.write_text(state.wandb_id + "\n", encoding="utf-8")


@dataclass
class _News:
    """What the training tells the thread, beside metrics.jsonl; under a lock."""

    end: int
    """The length of metrics.jsonl up to which it may be read."""
    judged: dict[int, Judgement] = field(default_factory=dict)
    """Validations by step."""
    calls: list[Callable[[Any], None]] = field(default_factory=list)
    """To be made after the lines before them: alerts, the model. A run makes a handful."""
    closing: bool = False
    failed: bool = False


class Wandb(Sink):
    """A run on wandb, offline or online. Nothing here waits, but `close`, and that not long."""

    def __init__(self, config: Config, mode: str, lengths: Mapping[str, int], warn: Callable[[str], None]):
        """Nothing is loaded yet.

        Args:
            lengths: Each phase's steps.
            warn: Told once what goes wrong.
        """
        self.config, self.mode, self.lengths, self._warn = config, mode, dict(lengths), warn
        self.folder = config.folder / "wandb"
        self._warned = self._uploads = False
        self._news = _News(0)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, state: HasId, keep: int) -> None:
        if self._thread is not None or self.mode == "off":
            return
        try:
            find_id(self.folder, state)
            _load(self.folder)
        except Exception as error:
            self.complain("can't be used", error)
            self.mode = "off"
            return
        assert state.wandb_id is not None
        self._news = _News(keep, calls=self._news.calls)  # what was told since the last end
        follower = _Follower(self, state.wandb_id, keep)
        self._thread = threading.Thread(target=self._run, args=(follower,), daemon=True, name="wandb")
        self._thread.start()

    def _run(self, follower: _Follower) -> None:
        try:
            follower.follow()
        except Exception as error:
            self.complain("has given up for this start; metrics.jsonl has it all, and the next start goes on", error)

    def complain(self, what: str, error: Exception) -> None:
        """Say what is wrong, the first time."""
        if not self._warned:
            self._warned = True
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._warn(f"warning: wandb {what} ({text})")

    def validated(self, judgement: Judgement) -> None:
        with self._lock:
            judged = self._news.judged
            judged[judgement.at.step] = judgement
            for step in sorted(judged)[:-HELD]:
                del judged[step]

    def metrics(self, at: Position, values: Values) -> None:
        self._look()

    def _look(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._news.end = (self.config.folder / "metrics.jsonl").stat().st_size
        self._wake.set()

    def published(self, folder: str, facts: Mapping[str, Any]) -> None:
        name, metadata = self.config.run.name, dict(facts)
        self._uploads = self.mode == "online"
        self._call(lambda run: _log_model(run, name, folder, metadata))

    def warned(self, text: str) -> None:
        title = f"{self.config.run.name} needs a look"
        self._call(lambda run: run.alert(title=title, text=text, level="WARN"))

    def ended(self, state: str, reason: str) -> None:
        with self._lock:
            self._news.failed = state in ("failed", "stuck")
        if state != "stopped":
            level = "INFO" if state == "finished" else "ERROR"
            title = f"{self.config.run.name} {'has crashed' if state == 'failed' else f'is {state}'}"
            self._call(lambda run: run.alert(title=title, text=reason, level=level))

    def _call(self, call: Callable[[Any], None]) -> None:
        with self._lock:
            self._news.calls.append(call)
        self._wake.set()

    def close(self) -> None:
        """Send what is left, but do not wait for it beyond `PATIENCE`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        online = self.mode == "online"
        with self._lock:
            self._news.closing = True
        self._wake.set()
        thread.join(UPLOAD if self._uploads else PATIENCE)
        if not thread.is_alive():
            return
        self.mode = "off"  # for whoever begins once more: two threads would send the same lines
        if not self._warned:
            self._warned = True
            more = f"; wandb sync {self.folder}/run-* sends the rest" if online else ""
            self._warn(f"warning: wandb does not answer and is left behind; metrics.jsonl has it all{more}")

    def news(self) -> _News:
        """All that there is; what is taken here is gone there."""
        with self._lock:
            found, self._news = self._news, _News(self._news.end)
            self._news.closing, self._news.failed = found.closing, found.failed
            return found

    def closing(self) -> bool:
        """Whether somebody waits for the end."""
        return self._news.closing

    def wait(self) -> None:
        """For more news."""
        self._wake.wait()
        self._wake.clear()


class _Follower:
    """What the thread does: all of wandb's calls are here."""

    def __init__(self, sink: Wandb, run_id: str, keep: int):
        self.sink, self.run_id, self.keep = sink, run_id, keep
        self.judged: dict[int, Judgement] = {}
        self.run: Any = None
        self.best: dict[str, Any] = {}
        self._at = self._line = self._first = 0

    def follow(self) -> None:
        """Until the end of the training."""
        file = self.sink.config.folder / "metrics.jsonl"
        self._first = cut_back(self.sink.folder, self.run_id, _count_lines(file, self.keep))
        self._begin()
        while True:
            news = self.sink.news()
            self.judged |= news.judged
            for line in self._read(file, news.end):
                self._send(line)
            for call in news.calls:
                self._optional(lambda: call(self.run))  # noqa: B023 (called at once)
            if news.closing:
                break
            self.sink.wait()
        self._try(lambda: self.run.finish(exit_code=1 if news.failed else 0))

    def _begin(self) -> None:
        import wandb

        sink, config = self.sink, self.sink.config
        wanted = {
            "project": project_of(config),
            "entity": config.tracking.entity,
            "dir": str(config.folder.absolute()),
            "id": self.run_id,
            "name": config.run.name,
            "mode": sink.mode,
            "resume": "allow",
            "reinit": "create_new",
            "config": _for_wandb(config, sink.lengths),
            "settings": wandb.Settings(**_QUIET),
        }
        # The mode for the process, too: offline it would prepare to send how it is used.
        everywhere = wandb.Settings(**{"mode": sink.mode, "silent": True})
        self._try(lambda: wandb.setup(settings=everywhere))
        self.run = self._try(lambda: wandb.init(**wanted))
        if sink.mode == "online":
            self._first = int(self.run.step or 0)  # the server tells what it has
        for definition in _definitions(config):
            self._try(lambda: self.run.define_metric(**definition))  # noqa: B023 (called at once)

    def _read(self, file: Path, end: int) -> Iterator[dict[str, Any]]:
        """The whole lines between where it stands and `end`."""
        if end <= self._at:
            return
        with file.open("rb") as lines:
            lines.seek(self._at)
            text = lines.read(end - self._at)
        for line in text.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            self._at += len(line)
            yield json.loads(line)

    def _send(self, line: dict[str, Any]) -> None:
        """A line, if it is not there yet; with its validation's pictures."""
        number, self._line = self._line, self._line + 1
        self._note_best(line)
        judgement = self.judged.pop(line["step"], None) if "val/score" in line else None
        if number < self._first:
            return
        row = {key: value for key, value in line.items() if value is not None and key != "time"}
        row |= {"phase_index": list(self.sink.lengths).index(line["phase"]), "_timestamp": line["time"]}
        row |= node_facts(self.sink.folder)
        shown: dict[str, Any] = {}
        if judgement is not None:
            from hybrid_dist.tracking.media import media

            shown = self._optional(lambda: media(judgement)) or {}
        try:
            self._try(lambda: self.run.log(row | shown, step=number, commit=True))
        except WandbError as error:
            if not shown:
                raise
            self.sink.complain("has not taken a validation's pictures", error)
            self._try(lambda: self.run.log(row, step=number, commit=True))
        if "val/score" in line and self.best:
            self._optional(lambda: self.run.summary.update(self.best))

    def _note_best(self, line: Mapping[str, Any]) -> None:
        """The best over all starts: wandb's own `summary="max"` knows those of this start alone, offline."""
        score = line.get("val/score")
        if score is not None and score > self.best.get("best/val/score", float("-inf")):
            own = {f"best/{key}": value for key, value in line.items() if key.startswith("val/") and value is not None}
            self.best = {**own, "best/step": line["step"], "best/phase": line["phase"]}

    def _try(self, call: Callable[[], Any]) -> Any:
        """Make a call, again where it fails.

        Raises:
            WandbError: it goes on failing.
        """
        for count in range(TRIES):
            try:
                return call()
            except Exception as error:
                if count == TRIES - 1:
                    raise WandbError(f"{type(error).__name__}: {error}") from error
                time.sleep(PAUSE if self.sink.closing() else PAUSE * 2**count)
        raise AssertionError

    def _optional(self, call: Callable[[], Any]) -> Any:
        """The same for what a run's lines can do without."""
        try:
            return self._try(call)
        except WandbError as error:
            self.sink.complain("has not taken something", error)
            return None


# No console, no command line, no machine's or user's name, no list of packages, no git remote, no code.
_QUIET: dict[str, Any] = {
    "console": "off", "silent": True, "host": "", "program": "", "disable_git": True, "disable_code": True,
    "x_disable_meta": True, "x_save_requirements": False,
    # Seconds: after a kill no more than this is missing, where it would be 15.
    "x_transaction_log_flush_interval": 0.2,
}  # fmt: skip


def _load(folder: Path) -> None:
    """Import wandb, here and now: a loader process forked in the middle of an import might wait for it forever."""
    os.environ.setdefault("WANDB_DATA_DIR", str((folder / "data").absolute()))  # pictures of tables are staged there
    os.environ.setdefault("WANDB_CACHE_DIR", str((folder / "cache").absolute()))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # Another program's wandb process would outlive a killed training, and say that the run is in use.
    os.environ.pop("WANDB_SERVICE", None)
    from hybrid_dist.tracking.media import load

    load()


def _count_lines(file: Path, keep: int) -> int:
    try:
        with file.open("rb") as lines:
            return lines.read(keep).count(b"\n")
    except OSError:
        return 0


def _for_wandb(config: Config, lengths: Mapping[str, int]) -> dict[str, Any]:
    """The resolved config, without what stands before an @ in an address; and the steps at which the phases begin, if
    those before them don't end early."""
    values: dict[str, Any] = json.loads(without_logins(json.dumps(config.model_dump(mode="json"))))
    begins, at = {}, 0
    for name, length in lengths.items():
        begins[name] = at + 1
        at += length
    return {**values, "phase_begins": begins, "steps": at}


def _definitions(config: Config) -> Iterator[dict[str, Any]]:
    """Axes, and which value of a metric the summary shows. Each names its axis: a definition replaces another."""
    for axis in ("step", "samples"):
        yield {"name": axis, "hidden": True}
    for name in ("train/*", "val/*", "val_raw/*", "perf/*", "node/*", "phase_index", "epoch"):
        yield {"name": name, "step_metric": "step"}
    for name, better in config.metrics().items():
        yield {"name": f"val/{name}", "step_metric": "step", "summary": "max" if better > 0 else "min"}


def _log_model(run: Any, name: str, folder: str, metadata: dict[str, Any]) -> None:
    """The final model, from where it lies: wandb makes no copy of it."""
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="model", metadata=metadata)
    for file in sorted(Path(folder).iterdir()):
        artifact.add_file(str(file), policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=["best", "latest"])
