"""The aircraft types as data. In metres; `s` is the distance from the nose, `z` the height above the body's axis."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Body:
    """The fuselage: an ellipse `width` x `height` swept along `length`, with an upswept tail and maybe a hump."""

    length: float
    width: float
    height: float
    nose_top: float  # length of the nose's upper curve, in body heights
    nose_bottom: float
    nose_power: float  # < 0.5 blunt, > 0.5 pointed
    droop: float  # how far the tip lies below the axis, in body heights
    tail: float  # length of the tail cone, in body lengths
    hump: tuple[float, float, float] | None = None  # (from s, to s, height)
    decks: tuple[tuple[float, float, float], ...] = (
        (0.10, 0.82, 12.0),
    )  # window rows: (from t, to t, angle in degrees)
    title: tuple[float, float, float] = (0.13, 27.0, 62.0)  # the airline's name: (from t, from angle, to angle)


@dataclass(frozen=True)
class Surface:
    """A wing or a tailplane: both halves from the body's side outward. `sweep` is the leading edge's, in degrees."""

    s: float
    z: float
    span: float
    root: float
    tip: float
    sweep: float
    dihedral: float
    kink: float = 0.0  # part of the half span up to which the trailing edge stays straight across
    device: str = "plain"  # a key of `build.WINGTIPS`


@dataclass(frozen=True)
class Fin:
    s: float
    z: float
    height: float
    root: float
    tip: float
    sweep: float
    dorsal: float = 0.0  # length of the fillet ahead of the root


@dataclass(frozen=True)
class Engine:
    """One engine of a pair at +y and -y, or the single one in the fin at y = 0. `s` is the intake's lip."""

    s: float
    y: float
    z: float
    length: float
    radius: float
    mount: str = "wing"  # wing, tail, fin or prop
    flat: bool = False  # the flattened lower lip of the 737
    propeller: float = 0.0  # its diameter


@dataclass(frozen=True)
class Gear:
    nose: float  # s of the nose leg
    main: float  # s of the main legs
    track: float
    ground: float  # z of the ground, negative
    wheel: float  # wheel radius
    bogie: int = 1  # wheels one behind the other


@dataclass(frozen=True)
class Airframe:
    name: str
    body: Body
    wing: Surface
    stabilizer: Surface
    fin: Fin
    engines: tuple[Engine, ...]
    gear: Gear


AIRFRAMES: tuple[Airframe, ...] = (
    Airframe(
        "A320",
        Body(37.6, 3.95, 4.14, 1.25, 0.85, 0.46, 0.10, 0.30),
        Surface(12.0, -1.1, 34.0, 7.0, 1.6, 28, 5, 0.36, "fence"),
        Surface(32.0, 0.9, 12.5, 3.8, 1.4, 33, 6),
        Fin(29.6, 1.9, 6.0, 6.0, 2.1, 41),
        (Engine(10.0, 5.75, -2.15, 4.6, 1.25),),
        Gear(5.0, 17.8, 7.6, -3.8, 0.58),
    ),
    Airframe(
        "B737-800",
        Body(39.5, 3.76, 4.0, 1.75, 1.25, 0.60, 0.16, 0.31),
        Surface(13.4, -1.1, 34.3, 7.2, 1.6, 29, 6, 0.34, "blended"),
        Surface(33.4, 0.9, 14.3, 4.0, 1.3, 35, 7),
        Fin(30.9, 1.8, 7.2, 6.0, 2.0, 38, 6.5),
        (Engine(9.8, 4.83, -1.75, 4.4, 1.12, flat=True),),
        Gear(4.2, 19.6, 5.7, -3.3, 0.56),
    ),
    Airframe(
        "A380",
        Body(
            70.4,
            7.14,
            8.41,
            1.15,
            0.75,
            0.42,
            0.17,
            0.33,
            None,
            ((0.09, 0.84, -6.0), (0.10, 0.78, 38.0)),
            (0.13, 1.0, 27.0),
        ),
        Surface(21.5, -2.6, 78.0, 17.7, 4.0, 36, 6, 0.38, "fence"),
        Surface(58.6, 2.0, 30.4, 10.0, 3.8, 38, 6),
        Fin(53.0, 3.8, 13.6, 14.0, 5.0, 42),
        (Engine(22.0, 14.9, -3.9, 6.6, 1.85), Engine(31.5, 25.7, -2.5, 6.6, 1.85)),
        Gear(6.0, 34.0, 12.4, -6.4, 0.75, 3),
    ),
    Airframe(
        "B747-400",
        Body(
            68.6,
            6.5,
            6.8,
            1.5,
            0.95,
            0.52,
            0.12,
            0.34,
            (2.2, 23.5, 1.75),
            ((0.07, 0.83, 2.0), (0.07, 0.27, 47.0)),
            (0.37, 20.0, 58.0),
        ),
        Surface(19.5, -2.0, 62.0, 14.5, 4.0, 41, 7, 0.40, "canted"),
        Surface(56.5, 1.8, 22.2, 8.6, 2.6, 42, 7),
        Fin(51.6, 3.0, 10.6, 12.0, 4.1, 48),
        (Engine(21.5, 11.7, -3.4, 5.8, 1.45), Engine(30.0, 20.8, -2.2, 5.8, 1.45)),
        Gear(7.6, 32.0, 8.5, -5.5, 0.65, 2),
    ),
    Airframe(
        "B777-300ER",
        Body(73.1, 6.2, 6.2, 1.45, 0.95, 0.52, 0.12, 0.30),
        Surface(24.0, -1.9, 62.0, 14.0, 2.2, 34, 6, 0.38, "raked"),
        Surface(61.0, 1.4, 21.5, 7.2, 2.4, 39, 7),
        Fin(57.0, 2.7, 10.2, 10.2, 3.7, 45),
        (Engine(22.5, 9.7, -3.3, 7.6, 2.15),),
        Gear(5.9, 36.8, 11.0, -5.4, 0.68, 3),
    ),
    Airframe(
        "A340-600",
        Body(73.5, 5.64, 5.64, 1.3, 0.9, 0.46, 0.10, 0.27),
        Surface(25.0, -1.8, 61.0, 12.4, 2.7, 33, 6, 0.38, "canted"),
        Surface(62.5, 1.3, 21.5, 6.8, 2.5, 36, 6),
        Fin(59.5, 2.5, 9.4, 9.0, 3.4, 44),
        (Engine(25.0, 9.4, -3.0, 5.6, 1.45), Engine(32.2, 19.3, -2.0, 5.6, 1.45)),
        Gear(6.7, 38.5, 10.7, -5.0, 0.68, 2),
    ),
    Airframe(
        "MD-11",
        Body(57.6, 6.02, 6.02, 1.35, 0.95, 0.50, 0.10, 0.27),
        Surface(20.0, -1.8, 49.5, 12.4, 2.8, 37, 6, 0.36, "canted"),
        Surface(48.8, 0.9, 18.0, 7.0, 2.6, 38, 9),
        Fin(48.2, 5.6, 6.9, 8.2, 3.6, 38),
        (Engine(19.2, 8.2, -3.2, 6.2, 1.5), Engine(43.6, 0.0, 4.35, 14.0, 1.6, "fin")),
        Gear(6.6, 32.0, 10.6, -5.3, 0.66, 2),
    ),
    Airframe(
        "CRJ-900",
        Body(36.0, 2.69, 2.69, 1.75, 1.3, 0.56, 0.12, 0.22, None, ((0.13, 0.66, 14.0),)),
        Surface(14.8, -0.9, 23.4, 5.0, 1.3, 27, 3, 0.36, "canted"),
        Surface(32.7, 5.1, 8.6, 2.5, 1.3, 30, -2),
        Fin(29.9, 1.1, 4.1, 4.4, 2.8, 40, 1.2),
        (Engine(24.4, 2.25, 0.72, 4.5, 0.86, "tail"),),
        Gear(4.0, 20.0, 4.1, -2.35, 0.42),
    ),
    Airframe(
        "ATR72",
        Body(27.2, 2.77, 2.77, 1.6, 1.1, 0.52, 0.08, 0.34, None, ((0.18, 0.76, 14.0),)),
        Surface(11.1, 1.55, 27.0, 2.7, 1.6, 3, 1, 0.0, "plain"),
        Surface(24.1, 5.3, 7.4, 1.9, 1.2, 8, 0),
        Fin(21.9, 1.1, 4.3, 4.0, 2.3, 27, 4.2),
        (Engine(8.9, 4.05, 1.1, 4.9, 0.72, "prop", propeller=3.93),),
        Gear(2.9, 13.3, 4.1, -2.25, 0.42),
    ),
    Airframe(
        "BAe146-300",
        Body(30.0, 3.56, 3.56, 1.35, 1.0, 0.50, 0.12, 0.32, None, ((0.14, 0.78, 12.0),)),
        Surface(11.3, 1.75, 26.3, 4.6, 1.6, 18, -3, 0.3, "plain"),
        Surface(26.0, 6.0, 11.0, 2.8, 1.3, 22, 0),
        Fin(23.3, 1.5, 4.7, 5.0, 3.7, 32, 1.6),
        (Engine(9.9, 4.3, 0.72, 3.1, 0.88), Engine(11.2, 7.8, 0.55, 3.1, 0.88)),
        Gear(2.6, 14.0, 4.7, -2.6, 0.45),
    ),
)
