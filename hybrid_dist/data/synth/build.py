"""An airframe in a livery as shapes in space, in the order they are painted (farthest first)."""

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from hybrid_dist.data.synth.airframes import Airframe, Engine, Surface
from hybrid_dist.data.synth.camera import Shape, View
from hybrid_dist.data.synth.emblems import EMBLEMS
from hybrid_dist.data.synth.liveries import Colour, Livery, Outline
from hybrid_dist.data.synth.titles import letter_cells
from hybrid_dist.data.synth.tubes import Light, Tube, fairing, fuselage, nacelle

GLASS: Colour = (28, 34, 44)
WING: Colour = (196, 200, 206)
METAL: Colour = (206, 208, 212)
DARK: Colour = (38, 38, 42)
TYRE: Colour = (30, 30, 32)
STRUT: Colour = (170, 172, 176)

# Wingtip outlines (n, 3) as (aft, outward, up) from the tip's leading edge, in tip chords.
WINGTIPS: dict[str, np.ndarray] = {
    "fence": np.array([[0.2, 0, 0], [1.1, 0, 0.95], [1.35, 0, 0.95], [1.05, 0, 0], [1.25, 0, -0.75], [1.0, 0, -0.75]]),
    "blended": np.array(
        [[0.1, 0, 0], [0.75, 0.2, 1.0], [1.35, 0.35, 1.9], [1.75, 0.35, 1.9], [1.35, 0.2, 0.8], [1.0, 0, 0]]
    ),
    "canted": np.array([[0.2, 0, 0], [0.95, 0.25, 0.85], [1.3, 0.25, 0.85], [1.0, 0, 0]]),
    "raked": np.array([[0.0, 0, 0], [1.5, 1.6, 0.2], [1.8, 1.6, 0.2], [1.0, 0, 0]]),
}


@dataclass(frozen=True)
class Pose:
    """What differs between two pictures of the same aircraft."""

    view: View
    light: Light
    gear_down: bool
    propeller: float  # degrees the propellers have turned

    @property
    def facing(self) -> float:
        return self.view.visible_middle()


def _colour_at(livery: Livery, t: float, degrees: float) -> Colour:
    """The paint on the body at one place."""
    colour = livery.body
    for outline, paint in livery.decals:
        # t is stretched to the angles' size: the test is in single precision.
        corners = np.array([(180 * at, angle) for at, angle in outline], np.float32)
        if cv2.pointPolygonTest(corners, (180 * t, degrees), False) >= 0:
            colour = paint
    return colour


@cache
def _dense(outline: Outline) -> np.ndarray:
    """An outline (n, 2) with points added along the edges, so that it follows a curved skin: (16 n, 2)."""
    corners = np.asarray(outline, float)
    following = np.roll(corners, -1, axis=0)
    f = np.linspace(0, 1, 16, endpoint=False)[None, :, None]
    return (corners[:, None] * (1 - f) + following[:, None] * f).reshape(-1, 2)


def _decal(tube: Tube, s: np.ndarray, degrees: np.ndarray, facing: float, colour: Colour, polygons: int = 1) -> Shape:
    """Paint on a tube's visible side; what would wrap around the edge ends there."""
    return Shape(tube.at(s, np.clip(degrees, facing - 90, facing + 90)), colour, None, polygons)


def _windows(plane: Airframe, tube: Tube, facing: float) -> list[Shape]:
    """Cabin windows (one shape a deck) and the cockpit's."""
    body = plane.body
    shapes = []
    size = 0.0055 * body.length
    for start, end, degrees in body.decks:
        s = np.arange(start, end, 0.026)[:, None] * body.length + np.array([0, size, size, 0])
        half = np.degrees(0.0065 * body.length / body.height * 2) * 0.6
        angle = np.broadcast_to(degrees + np.array([-half, -half, half, half]), s.shape)
        shapes.append(_decal(tube, s.ravel(), angle.ravel(), facing, GLASS, len(s)))
    nose = body.nose_top * body.height
    low, high = (30, 66) if body.hump else (20, 62)
    s = nose * np.array([0.26, 0.40, 0.80, 0.72])
    angle = np.array([high, low, low + 2, high - 16])
    shapes.append(_decal(tube, s, angle, facing, GLASS))
    return shapes


def _title(plane: Airframe, livery: Livery, tube: Tube, pose: Pose) -> Shape:
    """The airline's first word, to be read from left to right whichever way the aircraft faces."""
    start, low, high = plane.body.title
    cells = letter_cells(livery.name.split()[0].upper())
    rise = np.sin(np.radians([low, high]))
    # The letters keep their proportions as long as the height on screen is the height on the skin seen from the side.
    run = cells[..., 0] * (rise[1] - rise[0]) * plane.body.height / 2
    if pose.view.facing > 0:
        run = run.max() - run
    angle = np.degrees(np.arcsin(rise[0] + cells[..., 1] * (rise[1] - rise[0])))
    return _decal(tube, (start * plane.body.length + run).ravel(), angle.ravel(), pose.facing, livery.title, len(cells))


def _fuselage(plane: Airframe, livery: Livery, pose: Pose) -> list[Shape]:
    tube = fuselage(plane.body)
    shapes = [tube.paint(livery.body, pose.facing)]
    for outline, colour in livery.decals:
        dense = _dense(outline)
        shapes.append(_decal(tube, dense[:, 0] * plane.body.length, dense[:, 1], pose.facing, colour))
    shapes.append(_title(plane, livery, tube, pose))
    return shapes + _windows(plane, tube, pose.facing) + tube.shading(pose.light, pose.facing)


def _half_surface(
    surface: Surface, side: int, inner: float, plane: Airframe, pose: Pose, colour: Colour
) -> list[Shape]:
    """One half of a wing or tailplane, from y = inner outward: its two skins and the leading edge between them."""
    outer = surface.span / 2
    sweep, rise = np.tan(np.radians(surface.sweep)), np.tan(np.radians(surface.dihedral))
    kink = inner + surface.kink * (outer - inner)
    trailing = surface.s + surface.root
    tip_trailing = surface.s + outer * sweep + surface.tip
    knee = max(trailing, surface.s + kink * sweep + surface.tip) if surface.kink else None
    y = np.array([inner, outer, outer] + ([kink] if knee else []) + [inner])
    s = np.array(
        [surface.s + inner * sweep, surface.s + outer * sweep, tip_trailing] + ([knee] if knee else []) + [trailing]
    )
    thick = np.interp(y, [inner, outer], [0.055 * surface.root, 0.05 * surface.tip])
    sharp = np.array([1.0, 1.0] + [0.1] * (len(y) - 2))  # the trailing edge is thin
    z = surface.z + y * rise
    x = plane.body.length / 2 - s
    upper, lower = (np.stack([x, side * y, z + sign * thick * sharp], axis=1) for sign in (1, -1))
    edge = np.concatenate([upper[:2], lower[1::-1]])
    skins = [
        Shape(upper, colour, pose.light.on((0.0, 0.05 * side, 0.99))),
        Shape(edge, METAL, pose.light.on((0.9, 0.3, 0.3))),
        Shape(lower, colour, pose.light.on((0.0, 0.05 * side, -0.99))),
    ]
    seen_from_above = pose.view.elevation > side * surface.dihedral
    return skins[::-1] if seen_from_above else skins


def _wingtip(surface: Surface, side: int, plane: Airframe, pose: Pose, colour: Colour) -> list[Shape]:
    if surface.device not in WINGTIPS:
        return []
    outer = surface.span / 2
    s = surface.s + outer * np.tan(np.radians(surface.sweep))
    z = surface.z + outer * np.tan(np.radians(surface.dihedral))
    chord = surface.tip
    aft, out, up = WINGTIPS[surface.device].T
    points = np.stack([plane.body.length / 2 - s - aft * chord, side * (outer + out * chord), z + up * chord], axis=1)
    return [Shape(points, colour, pose.light.on((0.0, 0.9, 0.4)))]


def _pylon(engine: Engine, side: int, plane: Airframe) -> np.ndarray:
    """What holds an engine, as a polygon (4, 3): up to the wing, or across to the body."""
    front, back = plane.body.length / 2 - engine.s - np.array([0.22, 1.0]) * engine.length
    y = side * engine.y
    if engine.mount == "tail":
        z = engine.z + 0.15 * engine.radius
        return np.array([[front, y, z + 0.2], [back, y, z + 0.2], [back, 0, z - 0.25], [front, 0, z - 0.25]])
    wing = plane.wing
    under = wing.z + engine.y * np.tan(np.radians(wing.dihedral))
    top = engine.z + 0.75 * engine.radius
    return np.array(
        [[front, y, top], [front - 0.25 * engine.length, y, under + 0.1], [back - 1.0, y, under], [back, y, engine.z]]
    )


def _propeller(engine: Engine, side: int, plane: Airframe, pose: Pose) -> Shape:
    """Six twisted blades as thin quads: (24, 3)."""
    angle = np.radians(pose.propeller + 60.0 * np.arange(6))[:, None]
    radius = np.array([0.12, 1.0, 1.0, 0.12]) * engine.propeller / 2
    offset = np.array([-0.13, -0.13, 0.13, 0.13])
    y = side * engine.y + radius * np.cos(angle) - offset * np.sin(angle)
    z = engine.z + radius * np.sin(angle) + offset * np.cos(angle)
    x = np.broadcast_to(plane.body.length / 2 - engine.s - 0.3 - offset, y.shape)
    return Shape(np.stack([x, y, z], axis=2).reshape(-1, 3), DARK, 1.0, polygons=6)


def _engine(engine: Engine, side: int, plane: Airframe, livery: Livery, pose: Pose) -> list[Shape]:
    cowl, core = nacelle(engine, side, plane.body.length / 2)
    facing, light = pose.facing, pose.light
    shapes = []
    if engine.mount in ("wing", "tail"):
        shapes.append(Shape(_pylon(engine, side, plane), WING, light.on((0.0, 0.9, 0.0))))
    if core is not None:
        shapes.append(Shape(core.strip(facing - 90, facing + 90), (92, 88, 84), 0.8))
    shapes.append(cowl.paint(livery.engine, facing))
    if engine.mount != "prop":
        lip = engine.s + engine.length * np.array([0.0, 0.07, 0.07, 0.07, 0.0, 0.0])
        shapes.append(_decal(cowl, lip, facing + np.array([90, 90, 0, -90, -90, 0]), facing, METAL))
    shapes += cowl.shading(light, facing, bands=5)
    if engine.mount == "prop":
        shapes.append(_propeller(engine, side, plane, pose))
    elif pose.view.yaw > 0:
        ring = np.linspace(0, 360, 14, endpoint=False)
        shapes.append(Shape(cowl.at(np.full(14, engine.s), ring), METAL, 0.9))
        inside = cowl.at(np.full(14, engine.s), ring)
        centre = inside.mean(axis=0)
        shapes.append(Shape(centre + 0.84 * (inside - centre), DARK, 0.9))
    return shapes


def _fin(plane: Airframe, livery: Livery, pose: Pose) -> list[Shape]:
    """The fin with its dorsal fillet and the airline's emblem."""
    fin, middle = plane.fin, plane.body.length / 2
    slope = fin.height * np.tan(np.radians(fin.sweep))

    def on_fin(points: np.ndarray) -> np.ndarray:
        """(n, 2) as (along the chord, up the fin) in 0..1 to (n, 3)."""
        along, up = points.T
        s = fin.s + up * slope + along * (fin.root + up * (fin.tip - fin.root))
        return np.stack([middle - s, np.zeros(len(s)), fin.z + up * fin.height], axis=1)

    shade = pose.light.on((0.0, 0.98, 0.1))
    shapes = []
    if fin.dorsal:
        crown = fin.z - 0.02 * fin.height
        fillet = np.array([[middle - fin.s + fin.dorsal, 0, crown], [middle - fin.s - 1.0, 0, crown]])
        shapes.append(Shape(np.concatenate([fillet, on_fin(np.array([[0.1, 0.26], [0.0, 0.26]]))]), livery.tail, shade))
    shapes.append(Shape(on_fin(np.array([[0, -0.15], [0, 1], [1, 1], [1, -0.15]], float)), livery.tail, shade))
    return shapes + [Shape(on_fin(polygon), livery.emblem_colour, None) for polygon in EMBLEMS[livery.emblem]]


def _leg(s: float, y: float, plane: Airframe, bogie: int) -> list[Shape]:
    gear, middle = plane.gear, plane.body.length / 2
    wide = 0.28 * gear.wheel
    top, axle = -0.3 * plane.body.height, gear.ground + gear.wheel
    strut = np.array([[-wide, y, top], [wide, y, top], [wide, y, axle], [-wide, y, axle]]) + np.array(
        [middle - s, 0, 0]
    )
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    centres = (np.arange(bogie) - (bogie - 1) / 2) * 2.05 * gear.wheel
    x = middle - s + centres[:, None] + gear.wheel * np.cos(angle)
    z = np.broadcast_to(axle + gear.wheel * np.sin(angle), x.shape)
    wheels = np.stack([x, np.full(x.shape, y), z], axis=2).reshape(-1, 3)
    return [Shape(strut, STRUT, 0.85), Shape(wheels, TYRE, 1.0, polygons=bogie)]


def _wing_side(plane: Airframe, livery: Livery, pose: Pose, side: int) -> list[Shape]:
    """A wing half with what hangs under it, ordered for a camera above or below."""
    wing = plane.wing
    inner = 0.0 if wing.z > 0 else 0.36 * plane.body.width
    skin = _half_surface(wing, side, inner, plane, pose, WING) + _wingtip(wing, side, plane, pose, livery.tip)
    mounted = [engine for engine in plane.engines if engine.mount in ("wing", "prop")]
    # Going away from the camera, the far side's outermost engine is the farthest one.
    mounted.sort(key=lambda engine: side * engine.y)
    hung = [shape for engine in mounted for shape in _engine(engine, side, plane, livery, pose)]
    # A propeller's nacelle reaches ahead of and above its wing: it is never behind it.
    below_wing = pose.view.elevation > side * wing.dihedral and mounted and mounted[0].mount != "prop"
    return hung + skin if below_wing else skin + hung


def _belly(plane: Airframe, livery: Livery, pose: Pose) -> list[Shape]:
    """The fairing under a low wing, or the pods that take a high-wing aircraft's gear."""
    wing, body = plane.wing, plane.body
    low = wing.z < 0
    start, end = wing.s - 0.15 * wing.root, wing.s + (1.2 if low else 1.6) * wing.root
    if not low:
        start, end = plane.gear.main - 2.8, plane.gear.main + 2.8
    tube = fairing(start, end, -0.33 * body.height, 0.53 * body.width, 0.21 * body.height, body.length / 2)
    colour = _colour_at(livery, 0.45, -60.0)
    return [tube.paint(colour, pose.facing), *tube.shading(pose.light, pose.facing, bands=5)]


def _tail_engines(plane: Airframe, livery: Livery, pose: Pose, side: int) -> list[Shape]:
    return [s for engine in plane.engines if engine.mount == "tail" for s in _engine(engine, side, plane, livery, pose)]


def build_aircraft(plane: Airframe, livery: Livery, pose: Pose) -> list[Shape]:
    """All shapes of one aircraft, ready to be projected and painted in this order."""
    gear = plane.gear
    t_tail = plane.stabilizer.z > 0.8 * (plane.fin.z + plane.fin.height)
    far_stab, near_stab = (_half_surface(plane.stabilizer, side, 0.0, plane, pose, WING) for side in (-1, 1))
    fin = _fin(plane, livery, pose)
    for engine in plane.engines:
        if engine.mount == "fin":
            fin += _engine(engine, 1, plane, livery, pose)
    legs = (
        [_leg(gear.main, side * gear.track / 2, plane, gear.bogie) for side in (-1, 1)] if pose.gear_down else [[], []]
    )
    nose_leg = _leg(gear.nose, 0.0, plane, 1) if pose.gear_down else []
    above = pose.view.elevation > 0
    tail = far_stab + fin + near_stab if t_tail else fin
    shapes = [] if t_tail else list(far_stab)
    shapes += _wing_side(plane, livery, pose, -1) + legs[0] + nose_leg + _tail_engines(plane, livery, pose, -1)
    shapes += ([] if above else tail) + _fuselage(plane, livery, pose) + (tail if above else [])
    shapes += [] if t_tail else near_stab
    shapes += _tail_engines(plane, livery, pose, 1) + _belly(plane, livery, pose)
    return shapes + legs[1] + _wing_side(plane, livery, pose, 1)
