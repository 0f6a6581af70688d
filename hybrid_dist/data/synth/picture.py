"""One picture: what is on it is decided by (split, index, seed) alone, then drawn, blurred and labelled."""

from dataclasses import dataclass

import cv2
import numpy as np

from hybrid_dist.data.output import COLUMNS
from hybrid_dist.data.synth import occluders, scene
from hybrid_dist.data.synth.airframes import AIRFRAMES
from hybrid_dist.data.synth.build import Pose, build_aircraft
from hybrid_dist.data.synth.camera import Frame, Shape, View, rasterize
from hybrid_dist.data.synth.liveries import LIVERIES
from hybrid_dist.data.synth.tubes import Light
from hybrid_dist.errors import UserError

SPLITS = ("train", "val")
TYPE_NAMES = tuple(airframe.name for airframe in AIRFRAMES)
AIRLINE_NAMES = tuple(livery.name for livery in LIVERIES)
SUPERSAMPLE = 3  # the canvas is that much larger than the picture: smooth edges without anti-aliased masks
WIDEST_BLUR = 0.02  # of the picture's width: the blur's sigma at clarity 0
NO_AIRLINE, NO_CLARITY, NO_BLOCK = 0.15, 0.10, 0.10  # parts of the pictures without that label
UNBLOCKED = 0.40


@dataclass(frozen=True)
class Plan:
    """Everything about a picture that its labels and its drawing follow from."""

    key: tuple[int, int, int]  # (seed, split's number, index)
    type_id: int
    airline_id: int
    clarity: float
    cover: float  # the part of the aircraft to be covered; the label is what was measured
    airline_known: bool
    clarity_known: bool
    block_known: bool
    registration: str


@dataclass(frozen=True)
class Sample:
    """A drawn picture with what its labels were measured from."""

    picture: np.ndarray  # (h, w, 3) uint8, RGB
    silhouette: np.ndarray  # (h, w) bool: the aircraft, whether covered or not
    occluder: np.ndarray  # (h, w) bool
    block: float  # covered silhouette pixels / silhouette pixels, to 3 decimals
    row: dict[str, str]


def blur_sigma(clarity: float, width: int) -> float:
    """The Gaussian's sigma in pixels: falls from WIDEST_BLUR * width at clarity 0 to none at 1.

    The exponent below 1 spends the label's upper end on blurs that survive when the picture is shrunk for a network.
    """
    return WIDEST_BLUR * width * (1.0 - clarity) ** 0.75


def _rng(key: tuple[int, int, int], purpose: int) -> np.random.Generator:
    """Each purpose has its own stream: a change in one does not shift the others."""
    return np.random.default_rng([*key, purpose])


def _cycled(seed: int, split: int, index: int, classes: int, purpose: int) -> int:
    """A class that comes up once in each run of `classes` pictures, in a new order every run."""
    order = np.random.default_rng([seed, split, index // classes, purpose]).permutation(classes)
    return int(order[index % classes])


def plan_picture(split: str, index: int, seed: int) -> Plan:
    """Decide what picture `index` of a split shows."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise UserError(f"index and seed must not be negative, got index {index} and seed {seed}")
    number = SPLITS.index(split)
    key = (seed, number, index)
    rng = _rng(key, 0)
    cover = 0.0 if rng.random() < UNBLOCKED else 0.02 + 0.68 * rng.random() ** 1.7
    clarity = 1.0 - rng.random() ** 1.9
    # Only every second cycle of airlines may lose its label, at twice the rate: the first names each of them once.
    may_lose = index // len(LIVERIES) % 2 == 1
    letters = "".join(rng.choice(list("ABCDEFGHJKLMNPQRSTUVWXYZ"), 3))
    return Plan(
        key=key,
        type_id=_cycled(seed, number, index, len(AIRFRAMES), 1),
        airline_id=_cycled(seed, number, index, len(LIVERIES), 2),
        clarity=round(float(clarity), 3),
        cover=float(cover),
        airline_known=not (may_lose and rng.random() < 2 * NO_AIRLINE),
        clarity_known=bool(rng.random() >= NO_CLARITY),
        block_known=bool(rng.random() >= NO_BLOCK),
        registration=f"X{letters[0]}-{letters}{rng.integers(10)}",
    )


def _view(rng: np.random.Generator, grounded: bool, length: float) -> View:
    return View(
        yaw=float(rng.uniform(-8, 8)),
        elevation=float(rng.uniform(-1, 4) if grounded else rng.uniform(-7, 5)),
        tilt=float(rng.uniform(-1, 1) if grounded else rng.uniform(-3, 5)),
        distance=float(length * rng.uniform(2.5, 6.0)),
        facing=1 if rng.random() < 0.5 else -1,
    )


def _light(rng: np.random.Generator, weather: scene.Weather) -> Light:
    direction = np.array([rng.uniform(-0.6, 0.6), rng.uniform(0.1, 0.9), rng.uniform(0.5, 1.0)])
    direction /= np.linalg.norm(direction)
    return Light(tuple(direction.tolist()), weather.ambient, weather.diffuse)


def _frame(rng: np.random.Generator, plane: np.ndarray) -> Frame:
    """A crop around the projected points (n, 2) with a small margin, between 2:1 and 4:1 and 160 to 320 pixels wide."""
    low, high = plane.min(axis=0), plane.max(axis=0)
    extent = high - low
    before, after = rng.uniform(0.02, 0.06, 2) * extent[0], rng.uniform(0.02, 0.06, 2) * extent[0]
    wide, tall = extent + before + after
    aspect = min(3.85, max(2.1, wide / tall))
    more = np.array([max(0.0, aspect * tall - wide), max(0.0, wide / aspect - tall)])
    origin = low - before - more * rng.uniform(0.25, 0.75, 2)
    width = int(rng.integers(160, 321))
    return Frame(width, round(width / aspect), tuple(origin.tolist()), width / (wide + more[0]))


def _shadow_outline(length: float, span: float, ground: float) -> np.ndarray:
    """The shadow's outline on the ground, (n, 3) metres: a slim body and the wings across it."""
    half, side = length / 2, span / 2
    right = np.array([[0.95, 0.03], [0.12, 0.06], [-0.18, 0.75], [-0.30, 0.75], [-0.18, 0.06], [-0.9, 0.03]])
    outline = np.concatenate([right, right[::-1] * [1, -1]])
    return np.column_stack([outline * [half, side], np.full(len(outline), ground)])


def _background(
    rng: np.random.Generator, weather: scene.Weather, size: tuple[int, int], place: scene.Place
) -> np.ndarray:
    canvas = scene.sky(rng, weather, size, place.horizon)
    if place.ground is not None:
        scene.ground(canvas, rng, place)
    elif place.horizon < size[0]:
        scene.distant_land(canvas, rng, place.horizon)
    return canvas


def _composite(canvas: np.ndarray, paint: np.ndarray, shade: np.ndarray, weather: scene.Weather) -> None:
    """Put the shaded aircraft over the background, behind the air's haze."""
    lit = cv2.multiply(paint, cv2.cvtColor(shade, cv2.COLOR_GRAY2RGB), scale=(1 - weather.haze) / 128)
    if weather.haze:
        lit = cv2.add(lit, np.array([*weather.horizon, 0.0]) * weather.haze)
    cv2.copyTo(lit, shade, canvas)


def _shrink(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A canvas mask (h, w) uint8 to the picture's pixels, 255 where at least half of the pixel is set."""
    _, full = cv2.threshold(mask, 0, 255, cv2.THRESH_BINARY)
    return cv2.threshold(cv2.resize(full, size[::-1], interpolation=cv2.INTER_AREA), 127, 255, cv2.THRESH_BINARY)[1]


def _develop(rng: np.random.Generator, picture: np.ndarray, weather: scene.Weather, clarity: float) -> np.ndarray:
    """Blur by the label, then what a camera adds: tone, exposure, vignette and sensor noise. (h, w, 3) uint8."""
    height, width = picture.shape[:2]
    sigma = blur_sigma(clarity, width)
    floating = picture.astype(np.float32)
    if sigma > 0.05:
        cv2.GaussianBlur(floating, (0, 0), sigma, dst=floating, borderType=cv2.BORDER_REFLECT_101)
    gain = np.asarray(weather.tone, np.float32) * np.float32(rng.uniform(0.86, 1.08))
    contrast, lift = rng.uniform(0.9, 1.08), rng.uniform(-6, 6)
    x, y = np.linspace(-1, 1, width, dtype=np.float32), np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    vignette = 1 - np.float32(rng.uniform(0, 0.14)) * (x * x + y * y) / 2
    floating *= vignette[..., None] * gain * np.float32(contrast)
    # Two bytes a value: triangular noise is as good as normal here and ten times as fast. 104.5 is the sum's deviation.
    first, second = rng.integers(0, 256, (2, *floating.shape), dtype=np.uint8).astype(np.float32)
    strength = np.float32(rng.uniform(0.5, 2.0) / 104.5)
    floating += (first + second - 255) * strength + np.float32(lift + 128 * (1 - contrast) + 0.5)
    return np.clip(floating, 0, 255).astype(np.uint8)


def _row(plan: Plan, block: float, area: int) -> dict[str, str]:
    airline = plan.airline_known
    values = (
        f"{plan.key[2]:06d}.jpg",
        str(plan.type_id),
        TYPE_NAMES[plan.type_id],
        str(plan.airline_id) if airline else "",
        AIRLINE_NAMES[plan.airline_id] if airline else "",
        f"{plan.clarity:.3f}" if plan.clarity_known else "",
        f"{block:.3f}" if plan.block_known else "",
        plan.registration,
        str(area),
        "",
    )
    return dict(zip(COLUMNS, values, strict=True))


@dataclass(frozen=True)
class Setting:
    """The drawn choices of a scene: where the camera, the light and the ground are."""

    weather: scene.Weather
    pose: Pose
    frame: Frame
    shapes: list[Shape]
    plane: np.ndarray  # all shapes' points in the picture's plane, (n, 2) metres
    place: scene.Place  # on the supersampled canvas


def _set_up(plan: Plan) -> Setting:
    rng = _rng(plan.key, 3)
    airframe = AIRFRAMES[plan.type_id]
    weather = scene.WEATHERS[rng.integers(len(scene.WEATHERS))]
    grounded = bool(rng.random() < 0.45)
    view = _view(rng, grounded, airframe.body.length)
    gear_down = grounded or bool(rng.random() < 0.4)
    pose = Pose(view, _light(rng, weather), gear_down, float(rng.uniform(0, 60)))
    shapes = build_aircraft(airframe, LIVERIES[plan.airline_id], pose)
    plane = view.project(np.concatenate([shape.points for shape in shapes]))
    frame = _frame(rng, plane)
    canvas = frame.enlarged(SUPERSAMPLE)
    if grounded:
        wheels = np.array([[0.0, 0.0, airframe.gear.ground]])
        ground = float(canvas.pixels(view.project(wheels))[0, 1])
        horizon = ground - canvas.height * rng.uniform(0.12, 0.45)
        place = scene.Place(max(4.0, horizon), ground)
    else:
        place = scene.Place(canvas.height * rng.uniform(0.86, 1.6), None)
    return Setting(weather, pose, frame, shapes, plane, place)


def _draw_aircraft(plan: Plan, setting: Setting, canvas: np.ndarray) -> np.ndarray:
    """Shadow and aircraft onto the canvas; returns the shade (h, w), 0 where there is no aircraft."""
    airframe, frame, view = AIRFRAMES[plan.type_id], setting.frame.enlarged(SUPERSAMPLE), setting.pose.view
    if setting.place.ground is not None:
        outline = _shadow_outline(airframe.body.length, airframe.wing.span, airframe.gear.ground)
        scene.shadow(canvas, frame.pixels(view.project(outline)))
    paint, shade = rasterize(setting.shapes, frame.pixels(setting.plane), canvas.shape[:2])
    _composite(canvas, paint, shade, setting.weather)
    return shade


def draw_sample(plan: Plan) -> Sample:
    """Draw what was planned and measure its labels."""
    setting = _set_up(plan)
    size = (setting.frame.height, setting.frame.width)
    canvas = _background(
        _rng(plan.key, 4), setting.weather, (size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE), setting.place
    )
    shade = _draw_aircraft(plan, setting, canvas)
    silhouette = _shrink(shade, size)
    cover_mask = np.zeros(canvas.shape[:2], np.uint8)
    if plan.cover > 0:
        choice = occluders.choose(_rng(plan.key, 5), plan.cover)
        occluders.draw(occluders.fit(choice, silhouette, plan.cover), canvas, cover_mask)
    occluder = _shrink(cover_mask, size) if plan.cover > 0 else np.zeros(size, np.uint8)
    area = cv2.countNonZero(silhouette)
    block = round(cv2.countNonZero(cv2.bitwise_and(silhouette, occluder)) / max(1, area), 3)
    small = cv2.resize(canvas, size[::-1], interpolation=cv2.INTER_AREA)
    picture = _develop(_rng(plan.key, 6), small, setting.weather, plan.clarity)
    return Sample(picture, silhouette > 0, occluder > 0, block, _row(plan, block, area))


def render_picture(split: str, index: int, seed: int) -> tuple[np.ndarray, dict[str, str]]:
    """Picture `index` of a split, (h, w, 3) uint8 RGB, and its row of the CSV, independent of all other pictures."""
    sample = draw_sample(plan_picture(split, index, seed))
    return sample.picture, sample.row
