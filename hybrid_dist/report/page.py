"""What pages share: templates in which everything is escaped, small copies of pictures, a file that is whole."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hybrid_dist.errors import UserError
from hybrid_dist.files import write_atomic

SIDE = 128
"""Pixels of the longer side of a picture on a page."""

_QUALITY = 78


def render(template: str, **values: Any) -> str:
    """A page's HTML from a file of `templates/`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template).render(**values)


def write(path: Path, text: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        UserError: the file can't be written.
    """
    try:
        write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


def check_writable(path: Path, option: str) -> None:
    """Find out before the work whether there is a folder to write to.

    Raises:
        UserError: there is none; `option` names what asked for the file.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UserError(f"{option} {path}: can't be written: it is a folder")


def small_copy(pixels: np.ndarray) -> str:
    """uint8 (height, width, 3), RGB, as a data URI of at most `SIDE` pixels a side."""
    scale = SIDE / max(pixels.shape[:2])
    if scale < 1:
        size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
