"""Tail emblems: polygons (n, 2) on the fin as (along the chord, up the fin), each in 0..1."""

import numpy as np


def _disc(x: float, y: float, rx: float, ry: float, points: int = 18) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def _star(x: float, y: float, rx: float, ry: float, rays: int, inner: float) -> np.ndarray:
    angle = np.pi / 2 + np.linspace(0, 2 * np.pi, 2 * rays, endpoint=False)
    radius = np.where(np.arange(2 * rays) % 2, inner, 1.0)
    return np.stack([x + rx * radius * np.cos(angle), y + ry * radius * np.sin(angle)], axis=1)


def _bar(low: float, high: float, left: float = 0.0, right: float = 1.0) -> np.ndarray:
    return np.array([[left, low], [right, low], [right, high], [left, high]])


def _ring() -> np.ndarray:
    """A ring as one polygon: out around the disc, back around the hole."""
    outer, inner = _disc(0.5, 0.52, 0.40, 0.30), _disc(0.5, 0.52, 0.20, 0.15)
    return np.concatenate([outer, outer[:1], inner[:1], inner[::-1]])


def _wave(low: float) -> np.ndarray:
    x = np.linspace(0, 1, 12)
    y = low + 0.05 * np.sin(x * 2 * np.pi)
    return np.concatenate([np.stack([x, y], axis=1), np.stack([x, y + 0.13], axis=1)[::-1]])


EMBLEMS: dict[str, list[np.ndarray]] = {
    "disc": [_disc(0.5, 0.52, 0.34, 0.26)],
    "chevron": [np.array([[0.0, 0.15], [1.0, 0.5], [0.0, 0.85], [0.0, 0.6], [0.4, 0.5], [0.0, 0.4]])],
    "star": [_star(0.5, 0.52, 0.44, 0.34, 5, 0.42)],
    "bars": [_bar(0.18, 0.34), _bar(0.48, 0.64), _bar(0.78, 0.92)],
    "ring": [_ring()],
    "waves": [_wave(0.14), _wave(0.42), _wave(0.70)],
    "flag": [_bar(0.0, 0.34), _bar(0.67, 1.0)],
    "split": [np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.05]])],
    "leaf": [np.array([[0.15, 0.12], [0.2, 0.55], [0.5, 0.82], [0.88, 0.92], [0.86, 0.5], [0.6, 0.22]])],
    "checks": [_bar(0.1, 0.37, 0.0, 0.5), _bar(0.37, 0.64, 0.5, 1.0), _bar(0.64, 0.91, 0.0, 0.5)],
    "flower": [_star(0.5, 0.52, 0.46, 0.36, 8, 0.55)],
}
