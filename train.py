"""accelerate's entry point: `accelerate launch --config_file launch/accelerate/NAME.yaml train.py --config …`."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from typing import NoReturn

from hybrid_dist.again import begin_anew, permit, times
from hybrid_dist.arguments import parse
from hybrid_dist.errors import UserError
from hybrid_dist.parent import ends_with_its_launcher
from hybrid_dist.training.stop import Stop

CRASHED = 1
AGAIN = -1
"""Memory ran out, and this process is to begin anew."""


def main() -> int:
    """As from the command line, but for the end of the process: returns the exit code."""
    stop = Stop()
    stop.listen()
    try:
        return _train(stop)
    finally:
        stop.close()


def _train(stop: Stop) -> int:
    topology = None
    try:
        with ends_with_its_launcher():
            config, arguments = parse(None, "Train a run: what is left of its phases, or of one of them.")
            from hybrid_dist.distributed import leave, start
            from hybrid_dist.machine import set_imports_aside
            from hybrid_dist.training.room import Again
            from hybrid_dist.training.run import run

            fresh = arguments.fresh and times() == 0
            same = {**config.alike(), "--phase": arguments.phase, "--fresh": fresh}
            train = config.train
            topology = start(train.precision, train.stall_timeout, same, train.deterministic, train.compile)
            set_imports_aside()
        try:
            code = run(config, topology, stop, arguments.phase, fresh)
        except Again:
            return AGAIN
        leave()
        if code == 0 and topology.is_main and config.tracking.report:
            from hybrid_dist.report.run.close import write_if_behind

            write_if_behind(config.folder, _say)
        return code
    except UserError as error:
        # What all ranks run into, rank 0 says; what one has met alone, it says itself. Before they have joined, each
        # machine has somebody in front of it.
        alone = "LOCAL_RANK" if topology is None else "RANK"
        if os.environ.get(alone, "0") == "0" or (topology is not None and not error.shared):
            _say(f"train.py: {error}")
        if topology is not None and error.shared:
            leave()
        return 2
    except Exception:
        # Said here and not by Python: nobody may wait for what this process still holds of a collective.
        _say(traceback.format_exc().rstrip())
        return CRASHED


def _say(text: str) -> None:
    """To standard error, which may be closed, or a pipe whose reader has gone: the exit code says the rest."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """End this process, whatever its threads are at.

    They may be in a library's code still, at a picture or a disk that does not answer. Python's own end would wait for
    some of them, and pull the ground from under others, which abort the process: a stop must end with its code.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


if __name__ == "__main__":
    permit()
    listening = Stop()
    listening.listen()
    result = _train(listening)
    if result == AGAIN:
        begin_anew()
    _leave(result)
