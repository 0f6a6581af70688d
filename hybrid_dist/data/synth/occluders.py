"""Things between the camera and the aircraft.

Each kind is a function of a size 0..1 that covers more as it grows, so that a wanted cover can be searched for. A piece
is a polygon (n, 2) in units of the picture's width and height (0..1, y down) and its colour; what is covered is the
union of the pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from hybrid_dist.data.synth.camera import fill
from hybrid_dist.data.synth.liveries import Colour, tinted

Piece = tuple[np.ndarray, Colour]

_CARS: tuple[Colour, ...] = (
    (232, 232, 228),
    (228, 196, 48),
    (60, 110, 170),
    (190, 60, 50),
    (92, 120, 92),
    (120, 124, 130),
)


@dataclass(frozen=True)
class Choice:
    """The random numbers of one occluder, drawn once, so that only its size changes during the search."""

    kind: str
    place: float  # 0..1
    colour: int
    flip: bool
    wobble: tuple[float, ...]  # 32 numbers in 0..1


def _box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])


_ANGLES = 2 * np.pi / 14 * np.arange(14)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)


def _disc(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    return _CIRCLE * (rx, ry) + (x, y)


def vehicle(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """A lorry or bus near the camera, standing on the picture's lower edge."""
    wide = 0.12 + 0.75 * size
    tall = min(0.95, (0.30 + 0.25 * choice.wobble[0]) * wide * aspect)
    left = choice.place * (1 - wide)
    base, top, right = 0.97, 0.97 - tall, left + wide
    colour = _CARS[choice.colour % len(_CARS)]
    cab = left + 0.24 * wide
    pieces: list[Piece] = [
        (_box(cab + 0.01 * wide, top, right, base - 0.14 * tall), colour),
        (
            np.array(
                [
                    [left, base - 0.14 * tall],
                    [left, base - 0.5 * tall],
                    [left + 0.05 * wide, base - 0.8 * tall],
                    [cab, base - 0.8 * tall],
                    [cab, base - 0.14 * tall],
                ]
            ),
            tinted(colour, 0.86),
        ),
        (_box(left, base - 0.2 * tall, right, base - 0.1 * tall), (52, 52, 56)),
        (
            np.array(
                [
                    [left + 0.02 * wide, base - 0.48 * tall],
                    [left + 0.06 * wide, base - 0.74 * tall],
                    [cab - 0.03 * wide, base - 0.74 * tall],
                    [cab - 0.03 * wide, base - 0.48 * tall],
                ]
            ),
            (48, 60, 72),
        ),
        (_box(cab + 0.01 * wide, base - 0.42 * tall, right, base - 0.36 * tall), tinted(colour, 0.62)),
    ]
    radius = 0.13 * tall
    pieces += [
        (_disc(left + part * wide, base - 0.08 * tall, radius / aspect, radius), (34, 34, 36))
        for part in (0.13, 0.62, 0.86)
    ]
    return pieces


def fence(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """A low wall across the picture with railings on top."""
    top = 1.0 - 0.92 * size
    colour = tinted(
        ((186, 180, 166), (158, 98, 78), (104, 120, 140), (204, 204, 204))[choice.colour % 4],
        0.8 + 0.3 * choice.wobble[0],
    )
    pieces: list[Piece] = [(_box(0, top, 1, 1), colour), (_box(0, top, 1, top + 0.02), tinted(colour, 0.7))]
    panels = 5 + choice.colour % 5
    rail = max(0.0, top - 0.10)
    for i in range(panels + 1):
        x = (i + choice.place) / panels
        pieces.append((_box(x, rail, x + 0.008, top), (96, 98, 100)))
        pieces.append((_box(x, top, x + 0.004, 1), tinted(colour, 0.8)))
    pieces.append((_box(0, rail, 1, rail + 0.015), (96, 98, 100)))
    return pieces


def post(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """Up to three poles from bottom to top, lit from one side."""
    count = 1 + choice.colour % 3
    wide = 0.008 + 0.30 * size / count
    pieces: list[Piece] = []
    for i in range(count):
        x = (choice.place + i / count) % 1.0 * (1 - wide)
        grey = int(80 + 70 * choice.wobble[i])
        pieces.append((_box(x, 0, x + wide, 1), (grey, grey, grey - 6)))
        pieces.append((_box(x + 0.62 * wide, 0, x + wide, 1), (grey - 34, grey - 34, grey - 38)))
    return pieces


def building(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """A building's edge coming in from one side, with rows of windows."""
    edge = size
    colour = tinted(
        ((176, 164, 148), (150, 96, 80), (150, 156, 164), (196, 192, 184))[choice.colour % 4],
        0.8 + 0.3 * choice.wobble[0],
    )
    pieces: list[Piece] = [(_box(0, 0, edge, 1), colour), (_box(edge - 0.02, 0, edge, 1), tinted(colour, 0.75))]
    step = 0.05 + 0.04 * choice.wobble[1]
    for row in range(3):
        y = 0.08 + 0.32 * row
        pieces += [
            (_box(edge - x, y, edge - x + 0.55 * step, y + 0.17), (62, 74, 88))
            for x in np.arange(0.03 + step, edge, step)
        ]
    return pieces


def bridge(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """A jet bridge reaching in from one side on its leg."""
    reach = 0.12 + 0.75 * size
    tall = 0.22 + 0.25 * choice.wobble[0]
    top = 0.22 + 0.25 * choice.place
    body = tinted((206, 206, 204), 0.75 + 0.3 * choice.wobble[1])
    pieces: list[Piece] = [
        (_box(0.55 * reach, top + 0.7 * tall, 0.55 * reach + 0.03, 1), (110, 112, 116)),
        (np.array([[0, top - 0.06], [reach, top], [reach, top + tall], [0, top + tall - 0.06]]), body),
        (
            np.array(
                [
                    [0, top + 0.2 * tall - 0.06],
                    [0.8 * reach, top + 0.2 * tall],
                    [0.8 * reach, top + 0.5 * tall],
                    [0, top + 0.5 * tall - 0.06],
                ]
            ),
            (78, 100, 116),
        ),
        (_box(reach - 0.09, top - 0.05, reach, top + tall + 0.05), tinted(body, 0.72)),
    ]
    return pieces


def fin(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """The tail of another aircraft, nearer to the camera, rising from the lower edge."""
    tall = 0.35 + 0.85 * size
    root, lean = (0.10 + 0.50 * size), (0.08 + 0.30 * size)
    left = choice.place * (1 - root)
    colour = _CARS[choice.colour % len(_CARS)]
    outline = np.array(
        [[left, 1.0], [left + lean, 1 - tall], [left + lean + 0.45 * root, 1 - tall], [left + 1.05 * root, 1.0]]
    )
    rudder = np.array([outline[2], outline[2] - [0.12 * root, 0], outline[3] - [0.3 * root, 0], outline[3]])
    hull = _disc(left + 0.55 * root, 1.02, 0.95 * root, 0.12)
    return [(outline, colour), (rudder, tinted(colour, 0.75)), (hull, (198, 200, 204))]


def foliage(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """A bush growing from the lower edge: overlapping clumps of leaves."""
    pieces: list[Piece] = []
    spread, tall = 0.10 + 0.42 * size, 0.25 + 0.80 * size
    for i in range(20):
        a, b = choice.wobble[i], choice.wobble[(i * 7 + 3) % 32]
        x = choice.place + (a - 0.5) * 2 * spread * (1 - 0.5 * b)
        y = 1.0 - tall * b * 0.85
        radius = (0.16 + 0.12 * choice.wobble[(i * 5 + 1) % 32]) * tall
        pieces.append(
            (
                _disc(x, y, radius / aspect * 1.3, radius),
                tinted((74, 104, 56), 0.6 + 0.75 * choice.wobble[(i * 3 + 2) % 32]),
            )
        )
    return pieces


# Kind: its function and the largest part of the aircraft it is asked to cover.
KINDS: dict[str, tuple[Callable[[Choice, float, float], list[Piece]], float]] = {
    "post": (post, 0.25),
    "vehicle": (vehicle, 0.50),
    "fin": (fin, 0.50),
    "bridge": (bridge, 0.45),
    "foliage": (foliage, 0.60),
    "fence": (fence, 0.75),
    "building": (building, 0.75),
}


def choose(rng: np.random.Generator, cover: float) -> Choice:
    """A kind that can cover that part of the aircraft, and its random numbers."""
    able = [kind for kind, (_, most) in KINDS.items() if cover <= most]
    return Choice(
        kind=able[rng.integers(len(able))],
        place=float(rng.random()),
        colour=int(rng.integers(60)),
        flip=bool(rng.random() < 0.5),
        wobble=tuple(rng.random(32).tolist()),
    )


def pieces(choice: Choice, size: float, aspect: float) -> list[Piece]:
    """The occluder's polygons at that size, for a picture `aspect` times as wide as high."""
    made = KINDS[choice.kind][0](choice, size, aspect)
    if not choice.flip:
        return made
    return [(points * [-1, 1] + [1, 0], colour) for points, colour in made]


def draw(made: list[Piece], canvas: np.ndarray | None, mask: np.ndarray) -> None:
    """Paint the pieces on the canvas (h, w, 3), if any, and set their pixels in the mask (h, w) to 255."""
    extent = np.array([mask.shape[1], mask.shape[0]], float)
    for points, colour in made:
        if canvas is not None:
            fill(canvas, points * extent, colour)
        fill(mask, points * extent, 255.0)


def fit(choice: Choice, silhouette: np.ndarray, cover: float) -> list[Piece]:
    """The occluder in the size that covers about `cover` of the silhouette (h, w) uint8 0 or 255, by bisection."""
    height, width = silhouette.shape
    total = max(1, cv2.countNonZero(silhouette))
    low, high = 0.0, 1.0
    for _ in range(6):
        size = (low + high) / 2
        mask = np.zeros((height, width), np.uint8)
        draw(pieces(choice, size, width / height), None, mask)
        if cv2.countNonZero(cv2.bitwise_and(mask, silhouette)) / total < cover:
            low = size
        else:
            high = size
    return pieces(choice, (low + high) / 2, width / height)
