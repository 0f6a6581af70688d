"""The command line of `train.py`, which scripts around it read too."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybrid_dist.config import Config


def parse(argv: list[str] | None, description: str) -> tuple[Config, argparse.Namespace]:
    """Read a command line and the config it names.

    Raises:
        UserError: the config is not as it must be.
    """
    from hybrid_dist.config import load_config

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file, such as configs/quickstart.yaml")
    parser.add_argument("--phase", metavar="NAME", help="only this phase, as a job of its own")
    parser.add_argument("--fresh", action="store_true", help="start over; the old run is kept under another name")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="change a key of the config")
    arguments = parser.parse_intermixed_args(argv)
    return load_config(arguments.config, arguments.overrides), arguments
