"""The airlines as data. The names are invented. Colours are RGB, 0..255.

A decal's outline is in the body's own coordinates: `t`, 0 at the nose and 1 at the tail, and the angle around the axis
in degrees, 0 at the side, 90 on top. It reaches past -90 and 90 where it should wrap around belly and crown.
"""

from dataclasses import dataclass

Colour = tuple[int, int, int]
Outline = tuple[tuple[float, float], ...]

WHITE: Colour = (240, 241, 243)
SILVER: Colour = (158, 164, 172)
BLACK: Colour = (38, 38, 44)
RED: Colour = (212, 22, 34)
CRIMSON: Colour = (200, 24, 100)
PINK: Colour = (236, 70, 170)
ROSE: Colour = (246, 150, 182)
PURPLE: Colour = (120, 40, 165)
NAVY: Colour = (20, 36, 102)
BLUE: Colour = (25, 80, 205)
AZURE: Colour = (30, 150, 205)
CYAN: Colour = (70, 196, 226)
GREEN: Colour = (20, 150, 70)
FOREST: Colour = (16, 92, 66)
LIME: Colour = (206, 224, 120)
YELLOW: Colour = (250, 208, 32)
GOLD: Colour = (232, 182, 40)
ORANGE: Colour = (246, 122, 16)
SAND: Colour = (224, 198, 152)
BROWN: Colour = (124, 74, 36)
UMBER: Colour = (92, 52, 24)


def tinted(colour: Colour, factor: float) -> Colour:
    """A lighter (factor > 1) or darker tone of a colour."""
    red, green, blue = (int(min(255, part * factor)) for part in colour)
    return red, green, blue


def band(low: float, high: float, start: float = 0.0, end: float = 1.0) -> Outline:
    """A stripe along the body between two angles."""
    return ((start, low), (end, low), (end, high), (start, high))


def rear(bottom: float, top: float) -> Outline:
    """The rear of the body behind a slanted edge that meets the belly at t = bottom and the crown at t = top."""
    return ((bottom, -150.0), (1.0, -150.0), (1.0, 150.0), (top, 150.0))


def front(bottom: float, top: float) -> Outline:
    """The nose ahead of a slanted edge."""
    return ((0.0, -150.0), (bottom, -150.0), (top, 150.0), (0.0, 150.0))


@dataclass(frozen=True)
class Livery:
    name: str
    body: Colour
    decals: tuple[tuple[Outline, Colour], ...]
    tail: Colour
    emblem: str  # a key of `build.EMBLEMS`
    emblem_colour: Colour
    engine: Colour
    tip: Colour  # winglets
    title: Colour


# fmt: off
LIVERIES: tuple[Livery, ...] = (
    Livery("Aurora Air", WHITE, ((band(-150, -22), GREEN),), GREEN, "disc", WHITE, GREEN, WHITE, FOREST),
    Livery("Bluewater", WHITE, ((band(-8, 26), BLUE), (band(-24, -15), BLUE)), BLUE, "chevron",
           WHITE, WHITE, BLUE, BLUE),
    Livery("Cinnabar", WHITE, ((rear(0.48, 0.76), RED),), RED, "star", YELLOW, RED, RED, RED),
    Livery("Dunes", SAND, ((band(-150, -30), BROWN),), BROWN, "bars", SAND, BROWN, BROWN, UMBER),
    Livery("Eclipse", BLACK, ((band(-30, -20), GOLD),), GOLD, "ring", BLACK, BLACK, GOLD, GOLD),
    Livery("Fjordfly", CYAN, ((band(-150, -35), WHITE),), WHITE, "waves", AZURE, WHITE, CYAN, NAVY),
    Livery("Goldwing", YELLOW, ((band(-150, -40), NAVY),), NAVY, "disc", YELLOW, NAVY, NAVY, NAVY),
    Livery("Harbour", WHITE, ((band(-150, 6), NAVY), (band(6, 16), RED)), WHITE, "flag", RED, NAVY, RED, NAVY),
    Livery("Iris", WHITE, ((rear(0.70, 0.52), PURPLE), (front(0.05, 0.10), PURPLE)), PURPLE, "split",
           PINK, PINK, PINK, PURPLE),
    Livery("Juniper", FOREST, ((band(-2, 5), LIME),), LIME, "leaf", FOREST, LIME, LIME, LIME),
    Livery("Kestrel", SILVER, ((rear(0.80, 0.72), ORANGE),), ORANGE, "checks", BLACK, ORANGE, ORANGE, BLACK),
    Livery("Lotus", ROSE, ((rear(0.62, 0.80), CRIMSON), (band(-150, -48), WHITE)), WHITE, "flower",
           CRIMSON, WHITE, CRIMSON, CRIMSON),
)
# fmt: on
