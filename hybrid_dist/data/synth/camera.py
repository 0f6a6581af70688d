"""From shapes in space to pixels: the view, the frame around what it shows, and the filling of polygons."""

from dataclasses import dataclass
from math import cos, radians, sin
from typing import NamedTuple

import cv2
import numpy as np

SHIFT = 4  # cv2's sub-pixel bits: coordinates are in 1/16 pixel


class Shape(NamedTuple):
    """Polygons of equal length, one after the other in `points` (polygons * n, 3).

    Without a colour it only shades what is below it; without a shade it only paints.
    """

    points: np.ndarray
    colour: tuple[int, int, int] | None
    shade: float | None
    polygons: int = 1


@dataclass(frozen=True)
class View:
    """Where the camera stands. Space: x forward, y to the camera's side, z up, metres."""

    yaw: float  # degrees; positive: the nose comes toward the camera
    elevation: float  # degrees; positive: seen from above
    tilt: float  # degrees the nose is lifted in the picture
    distance: float  # metres to the middle of the aircraft
    facing: int  # +1 nose to the right, -1 to the left

    def project(self, points: np.ndarray) -> np.ndarray:
        """(n, 3) metres in space to (n, 2) metres in the picture's plane, x right, y down."""
        yaw, up, tilt = radians(self.yaw), radians(self.elevation), radians(self.tilt)
        axes = np.array(
            [
                [cos(yaw), -sin(yaw), 0.0],
                [sin(up) * sin(yaw), sin(up) * cos(yaw), -cos(up)],
                [cos(up) * sin(yaw), cos(up) * cos(yaw), sin(up)],
            ]
        )
        right, down, near = (points @ axes.T).T
        grow = self.distance / (self.distance - near)
        right, down = right * grow, down * grow
        turned = np.stack([right * cos(tilt) + down * sin(tilt), down * cos(tilt) - right * sin(tilt)], axis=1)
        turned[:, 0] *= self.facing
        return turned

    def visible_middle(self) -> float:
        """The angle around the body's axis, in degrees, that looks straight at the camera."""
        yaw, up = radians(self.yaw), radians(self.elevation)
        return float(np.degrees(np.arctan2(sin(up), cos(up) * cos(yaw))))


@dataclass(frozen=True)
class Frame:
    """The crop: pixel = (metre - origin) * scale."""

    width: int
    height: int
    origin: tuple[float, float]
    scale: float

    def pixels(self, plane: np.ndarray) -> np.ndarray:
        """(n, 2) metres in the picture's plane to (n, 2) pixels."""
        return (plane - np.asarray(self.origin)) * self.scale

    def enlarged(self, factor: int) -> "Frame":
        return Frame(self.width * factor, self.height * factor, self.origin, self.scale * factor)


def _fixed(pixels: np.ndarray) -> np.ndarray:
    """Pixel coordinates, pixel (0, 0) covering 0..1, as cv2's fixed-point ones, whose pixel centres are whole."""
    return np.rint((pixels - 0.5) * (1 << SHIFT)).astype(np.int32)


def fill(canvas: np.ndarray, pixels: np.ndarray, value: tuple[int, ...] | float) -> None:
    """Fill a polygon given as (n, 2) pixel coordinates."""
    cv2.fillPoly(canvas, [_fixed(pixels)], value, cv2.LINE_8, SHIFT)


def rasterize(shapes: list[Shape], pixels: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Paint (h, w, 3) uint8 and shade (h, w) uint8 of shapes whose projected points are `pixels` (all points, 2).

    Shade 128 leaves the paint as it is; 0 is where no shape lies, so the silhouette is shade > 0.
    """
    paint = np.zeros((*size, 3), np.uint8)
    shade = np.zeros(size, np.uint8)
    fixed = _fixed(pixels)
    start = 0
    for shape in shapes:
        part = fixed[start : start + len(shape.points)]
        start += len(shape.points)
        polygons = [part] if shape.polygons == 1 else list(part.reshape(shape.polygons, -1, 2))
        if shape.colour is not None:
            cv2.fillPoly(paint, polygons, shape.colour, cv2.LINE_8, SHIFT)
        if shape.shade is not None:
            value = min(255, max(1, round(shape.shade * 128)))
            cv2.fillPoly(shade, polygons, value, cv2.LINE_8, SHIFT)
    return paint, shade
