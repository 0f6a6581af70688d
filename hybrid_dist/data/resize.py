"""How a picture comes to the size that the model takes, with nothing cut and no detail that was not there."""

from __future__ import annotations

import math

import cv2
import numpy as np

LINEAR_LIMIT = 1.25
"""How much linear interpolation alone may shrink."""


def bounds(height: float, width: float, angle: float) -> tuple[float, float]:
    """Height and width of the upright box around a rectangle turned by `angle` degrees."""
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return height * cos + width * sin, width * cos + height * sin


def fitted(picture: np.ndarray, size: int, scale: float, angle: float) -> tuple[int, int]:
    """Height and width at which the picture, turned by `angle`, takes `scale` of a square's side and fits into it."""
    height, width = picture.shape[:2]
    factor = scale * size / max(bounds(height, width, angle))
    return _floor(height * factor), _floor(width * factor)


def _floor(length: float) -> int:
    # Rounded down, for half a pixel more would not fit; the bit on top forgives what floating point lost.
    return max(1, int(length + 1e-6))


def shrink(picture: np.ndarray, size: int) -> np.ndarray:
    """The picture no larger than a square of `size`; one that fits stays as it is.

    A step of its own before any chance comes in: a data set that is packed has it behind it, once for all epochs.
    """
    height, width = picture.shape[:2]
    if max(height, width) <= size:
        return picture
    height, width = fitted(picture, size, 1.0, 0.0)
    return resize(picture, width, height)


def resize(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize; shrinking averages over every pixel, so that fine detail can't alias into false sharpness.

    INTER_AREA is fast for whole factors alone (3 to 6 times), so the picture is first brought linearly to a near
    multiple of the size. Linear interpolation misses nothing as long as it shrinks by little.
    """
    if picture.shape[:2] == (height, width):
        return picture
    factor = max(1, math.ceil(max(picture.shape[1] / width, picture.shape[0] / height) / LINEAR_LIMIT))
    near = cv2.resize(picture, (width * factor, height * factor), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(near, (width, height), interpolation=cv2.INTER_AREA) if factor > 1 else near
