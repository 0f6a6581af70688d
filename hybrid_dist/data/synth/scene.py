"""Backgrounds: skies for the aircraft in flight, an airfield for the one on the ground."""

from dataclasses import dataclass

import cv2
import numpy as np

from hybrid_dist.data.synth.liveries import Colour, tinted

Canvas = np.ndarray


@dataclass(frozen=True)
class Weather:
    name: str
    zenith: Colour
    horizon: Colour
    clouds: float  # 0..1, the part of the sky they take
    haze: float  # how much of the horizon's colour lies over the aircraft
    tone: tuple[float, float, float]  # the light's colour, over the whole picture
    ambient: float
    diffuse: float


WEATHERS: tuple[Weather, ...] = (
    Weather("clear", (74, 132, 205), (176, 208, 236), 0.0, 0.00, (1.00, 0.99, 0.96), 0.60, 0.55),
    Weather("fair", (96, 148, 208), (190, 214, 234), 0.4, 0.02, (1.00, 1.00, 0.98), 0.64, 0.48),
    Weather("cloudy", (150, 158, 168), (200, 204, 208), 0.8, 0.04, (0.96, 0.98, 1.00), 0.80, 0.20),
    Weather("hazy", (178, 190, 198), (216, 216, 208), 0.1, 0.13, (1.00, 0.98, 0.94), 0.74, 0.28),
    Weather("dusk", (92, 104, 156), (238, 186, 140), 0.3, 0.04, (0.97, 0.90, 0.83), 0.62, 0.46),
)


@dataclass(frozen=True)
class Place:
    """Where things are in the picture, in pixels of the canvas. On the ground: the line the wheels stand on."""

    horizon: float
    ground: float | None  # None in flight


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Smooth noise (h, w) float32 in 0..1, of about `cells` bumps."""
    coarse = rng.random(cells, dtype=np.float32)
    return np.clip(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), 0, 1)  # cubic overshoots


def sky(rng: np.random.Generator, weather: Weather, size: tuple[int, int], horizon: float) -> Canvas:
    """A gradient from zenith to horizon with clouds, (h, w, 3) uint8."""
    # Everything up there is soft: a quarter of the resolution is enough.
    height, width = max(8, size[0] // 4), max(8, size[1] // 4)
    down = np.clip(np.linspace(0, size[0] / max(horizon, 1.0), height, dtype=np.float32), 0, 1)[:, None, None]
    start = rng.uniform(0.0, 0.5)
    mix = start + (1 - start) * down
    picture = np.asarray(weather.zenith, np.float32) * (1 - mix) + np.asarray(weather.horizon, np.float32) * mix
    picture = np.repeat(picture, width, axis=1)
    if weather.clouds:
        shape = _noise(rng, (4, 7), (height, width)) * 0.65 + _noise(rng, (9, 18), (height, width)) * 0.35
        cover = np.clip((shape - (0.85 - 0.6 * weather.clouds)) * 3.5, 0, 0.85)[..., None]
        white = np.asarray(weather.horizon, np.float32) * 0.25 + 185.0
        picture = picture * (1 - cover) + white * cover
    return cv2.resize(np.clip(picture, 0, 255).astype(np.uint8), size[::-1], interpolation=cv2.INTER_LINEAR)


def _rect(canvas: Canvas, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
    cv2.rectangle(canvas, (round(left), round(top)), (round(right), round(bottom)), colour, -1)


def _tree_line(canvas: Canvas, rng: np.random.Generator, base: float, height: float) -> None:
    """A ragged dark-green strip standing on the line y = base."""
    width = canvas.shape[1]
    steps = rng.integers(18, 40)
    x = np.linspace(0, width, steps)
    y = base - height * rng.uniform(0.35, 1.0, steps)
    outline = np.concatenate([np.stack([x, y], axis=1), [[width, base + 1], [0, base + 1]]])
    green = tinted((66, 92, 62), rng.uniform(0.7, 1.25))
    cv2.fillPoly(canvas, [np.rint(outline).astype(np.int32)], green)


def _building(canvas: Canvas, rng: np.random.Generator, base: float, height: float) -> None:
    """A terminal or hangar with a row or two of windows."""
    width = canvas.shape[1]
    left, wide = rng.uniform(-0.2, 0.8) * width, rng.uniform(0.2, 0.6) * width
    grey = rng.integers(120, 205)
    colour = (int(grey), int(grey - rng.integers(0, 14)), int(grey - rng.integers(0, 26)))
    _rect(canvas, left, base - height, left + wide, base, colour)
    _rect(canvas, left, base - height, left + wide, base - 0.88 * height, tinted(colour, 0.8))
    step = max(6.0, wide / rng.integers(6, 16))
    for row in range(int(rng.integers(1, 3))):
        top = base - height * (0.72 - 0.36 * row)
        for x in np.arange(left + 0.2 * step, left + wide - 0.8 * step, step):
            _rect(canvas, x, top, x + 0.6 * step, top + 0.2 * height, (86, 98, 112))


def _back_fence(canvas: Canvas, rng: np.random.Generator, base: float, height: float) -> None:
    """A fence behind the aircraft: thin posts and two rails."""
    colour = tinted((150, 152, 150), rng.uniform(0.7, 1.2))
    for x in np.arange(rng.uniform(0, 20), canvas.shape[1], rng.uniform(14, 30)):
        _rect(canvas, x, base - height, x, base, colour)
    for part in (0.95, 0.5):
        _rect(canvas, 0, base - part * height, canvas.shape[1], base - part * height, colour)


def ground(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """An apron or a runway from the horizon down, with what stands on the horizon, drawn over a sky."""
    assert place.ground is not None, "in flight there is no ground to draw"
    height, width = canvas.shape[:2]
    base = place.horizon
    tall = rng.uniform(0.10, 0.24) * height
    for draw in rng.permutation(3)[: rng.integers(1, 4)]:
        (_tree_line, _building, _back_fence)[draw](
            canvas, rng, base, tall * (0.4 if draw == 2 else rng.uniform(0.5, 1.0))
        )
    grass = tinted((112, 132, 78), rng.uniform(0.75, 1.15))
    asphalt = tinted((140, 140, 142), rng.uniform(0.65, 1.15))
    _rect(canvas, 0, base, width, height, grass)
    edge = base + rng.uniform(0.05, 0.5) * max(1.0, place.ground - base)
    _rect(canvas, 0, edge, width, height, asphalt)
    line = place.ground + rng.uniform(0.2, 1.0) * max(2.0, height - place.ground)
    if rng.random() < 0.6:
        paint = (222, 200, 80) if rng.random() < 0.5 else (226, 226, 222)
        _rect(canvas, 0, line, width, line + max(1, height // 90), paint)
    rows = canvas[int(base) :]
    if len(rows) > 2:
        grain = _noise(rng, (max(3, len(rows) // 3), width // 10), rows.shape[:2])
        rows[:] = cv2.add(rows, cv2.merge([(grain * 16).astype(np.uint8)] * 3))


def distant_land(canvas: Canvas, rng: np.random.Generator, horizon: float) -> None:
    """Trees and fields far below an aircraft on approach."""
    _tree_line(canvas, rng, horizon, 0.05 * canvas.shape[0])
    _rect(canvas, 0, horizon, canvas.shape[1], canvas.shape[0], tinted((120, 132, 96), rng.uniform(0.8, 1.1)))


def shadow(canvas: Canvas, outline: np.ndarray) -> None:
    """Darken the ground under the aircraft: outline (n, 2) in pixels."""
    mask = np.zeros(canvas.shape[:2], np.uint8)
    cv2.fillPoly(mask, [np.rint(outline).astype(np.int32)], 110)
    canvas[:] = cv2.multiply(canvas, cv2.merge([255 - cv2.blur(mask, (9, 5))] * 3), scale=1 / 255)
