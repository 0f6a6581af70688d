"""Bodies of revolution, more or less: fuselages, nacelles and fairings as a row of elliptic sections."""

from dataclasses import dataclass
from functools import cache
from math import cos, sin

import numpy as np

from hybrid_dist.data.synth.airframes import Body, Engine
from hybrid_dist.data.synth.camera import Shape
from hybrid_dist.data.synth.liveries import Colour

SHADING_BANDS = 10


@dataclass(frozen=True)
class Light:
    """Sun and sky. `direction` (3,) is a unit vector toward the sun, in the aircraft's space."""

    direction: tuple[float, float, float]
    ambient: float
    diffuse: float

    def on(self, normal: tuple[float, float, float]) -> float:
        """How bright a surface of that unit normal is; 1.0 shows the paint as it is."""
        facing = sum(a * b for a, b in zip(normal, self.direction, strict=True))
        sky = 0.5 + 0.5 * normal[2]
        return self.ambient * (0.62 + 0.38 * sky) + self.diffuse * max(0.0, facing)


@dataclass(frozen=True, eq=False)
class Tube:
    """Elliptic sections at the stations s: centre height z, half width and height, all (n,), at lateral offset y."""

    s: np.ndarray
    z: np.ndarray
    half_width: np.ndarray
    half_height: np.ndarray
    y: float
    middle: float  # the s that is x = 0: half of the aircraft's length

    def at(self, s: np.ndarray, degrees: np.ndarray) -> np.ndarray:
        """Points (n, 3) on the skin at stations s (n,) and angles (n,)."""
        angle = np.radians(degrees)
        y = self.y + np.interp(s, self.s, self.half_width) * np.cos(angle)
        z = np.interp(s, self.s, self.z) + np.interp(s, self.s, self.half_height) * np.sin(angle)
        return np.stack([self.middle - s, y, z], axis=1)

    def strip(self, low: float, high: float) -> np.ndarray:
        """The skin between two angles, as a polygon (2n, 3)."""
        low_angle, high_angle = np.radians(low), np.radians(high)
        x = self.middle - self.s
        points = np.empty((2 * len(x), 3))
        points[: len(x), 0], points[len(x) :, 0] = x, x[::-1]
        points[: len(x), 1] = self.y + self.half_width * np.cos(high_angle)
        points[: len(x), 2] = self.z + self.half_height * np.sin(high_angle)
        points[len(x) :, 1] = (self.y + self.half_width * np.cos(low_angle))[::-1]
        points[len(x) :, 2] = (self.z + self.half_height * np.sin(low_angle))[::-1]
        return points

    def paint(self, colour: Colour, facing: float) -> Shape:
        """The whole visible side, where `facing` is the angle that looks at the camera."""
        return Shape(self.strip(facing - 90, facing + 90), colour, 1.0)

    def shading(self, light: Light, facing: float, bands: int = SHADING_BANDS) -> list[Shape]:
        """Bands along the body that only shade, to be drawn after the paint and what is painted on it."""
        edges = np.radians(facing - 90 + 180 / bands * np.arange(bands + 1))
        lines = np.empty((bands + 1, len(self.s), 3))
        lines[..., 0] = self.middle - self.s
        lines[..., 1] = self.y + np.cos(edges)[:, None] * self.half_width
        lines[..., 2] = self.z + np.sin(edges)[:, None] * self.half_height
        strips = np.concatenate([lines[1:], lines[:-1, ::-1]], axis=1)  # (bands, 2n, 3)
        middles = ((edges[1:] + edges[:-1]) / 2).tolist()
        return [Shape(strip, None, light.on((0.0, cos(a), sin(a)))) for strip, a in zip(strips, middles, strict=True)]


def _smooth(x: np.ndarray, start: float, end: float) -> np.ndarray:
    """0 up to start, 1 from end, a smooth step between."""
    f = np.clip((x - start) / (end - start), 0.0, 1.0)
    return f * f * (3 - 2 * f)


@cache
def fuselage(body: Body) -> Tube:
    """The body as a tube of 34 stations, closest at the nose where the profile turns fastest."""
    nose, tail = body.nose_top * body.height, body.tail * body.length
    s = np.concatenate(
        [
            nose * np.linspace(0, 1, 14) ** 2,
            np.linspace(nose, body.length - tail, 9)[1:],
            body.length - tail + tail * np.linspace(0, 1, 13)[1:],
        ]
    )
    half = body.height / 2
    tip = -body.droop * body.height

    def rise(length: float) -> np.ndarray:
        return 1 - (1 - np.clip(s / length, 0, 1)) ** 1.9

    top = tip + (half - tip) * rise(nose) ** body.nose_power
    bottom = tip - (half + tip) * rise(body.nose_bottom * body.height) ** body.nose_power
    aft = np.clip((s - (body.length - tail)) / tail, 0, 1)
    top = top - 0.34 * half * aft**2.2
    bottom = bottom + (1.50 * half) * (0.35 * aft + 0.65 * aft**1.7)
    half_width = body.width / 2 * np.clip((top - bottom) / body.height, 0, 1) ** 0.9
    if body.hump is not None:
        start, end, height = body.hump
        top = top + height * _smooth(s, start, start + 4.5) * (1 - _smooth(s, end - 8.0, end))
    return Tube(s, (top + bottom) / 2, half_width, (top - bottom) / 2, 0.0, body.length / 2)


_NACELLE = np.array([[0.0, 0.84], [0.03, 0.93], [0.12, 0.99], [0.3, 1.0], [0.55, 0.95], [0.74, 0.80]])
_CORE = np.array([[0.70, 0.62], [0.86, 0.50], [0.92, 0.30], [1.0, 0.12]])
_PROP_NACELLE = np.array(
    [[0.0, 0.12], [0.05, 0.42], [0.11, 0.56], [0.12, 0.80], [0.35, 1.0], [0.65, 0.95], [1.0, 0.25]]
)
_FIN_DUCT = np.array([[0.0, 0.88], [0.04, 1.0], [0.2, 1.02], [0.6, 0.98], [0.85, 0.86], [1.0, 0.66]])


def _along(profile: np.ndarray, engine: Engine, side: int, middle: float, radius: float) -> Tube:
    s, half = engine.s + profile[:, 0] * engine.length, profile[:, 1] * radius
    # The 737's lower lip: the circle becomes an ellipse hanging from the same top.
    squash, lift = (0.86, 0.14 * radius) if engine.flat else (1.0, 0.0)
    z = np.full(len(s), engine.z + lift)
    return Tube(s, z, half, half * squash, side * engine.y, middle)


def nacelle(engine: Engine, side: int, middle: float) -> tuple[Tube, Tube | None]:
    """An engine's cowl and, for jets, the hot core that sticks out of it."""
    if engine.mount == "prop":
        return _along(_PROP_NACELLE, engine, side, middle, engine.radius), None
    if engine.mount == "fin":
        return _along(_FIN_DUCT, engine, side, middle, engine.radius), None
    return (
        _along(_NACELLE, engine, side, middle, engine.radius),
        _along(_CORE, engine, side, middle, engine.radius),
    )


def fairing(start: float, end: float, z: float, half_width: float, half_height: float, middle: float) -> Tube:
    """The bulge where a wing or the gear meets the belly."""
    f = np.linspace(0, 1, 9)
    swell = np.sin(np.pi * np.clip(f, 0.02, 0.98)) ** 0.55
    return Tube(start + f * (end - start), np.full(9, z), half_width * swell, half_height * swell, 0.0, middle)
