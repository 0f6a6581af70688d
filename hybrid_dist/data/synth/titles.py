"""The airline's name on the fuselage: letters as small rectangles that follow the skin like any other paint."""

from functools import cache

import cv2
import numpy as np


@cache
def letter_cells(word: str) -> np.ndarray:
    """Rectangles (k, 4, 2) of a word: x in letter heights from its left edge, y 0 at the bottom and 1 at the top."""
    (width, tall), _ = cv2.getTextSize(word, cv2.FONT_HERSHEY_PLAIN, 0.9, 1)
    mask = np.zeros((tall + 4, width + 4), np.uint8)
    cv2.putText(mask, word, (2, tall + 2), cv2.FONT_HERSHEY_PLAIN, 0.9, 255, 1, cv2.LINE_8)
    lit = np.argwhere(mask)
    (top, left), (bottom, _) = lit.min(axis=0), lit.max(axis=0)
    mask = np.pad(mask[top : bottom + 1, left:] > 0, ((0, 0), (1, 1)))
    rows = len(mask)
    cells = []
    for row, line in enumerate(mask):
        # Runs of lit pixels become one rectangle each.
        edges = np.flatnonzero(np.diff(line.astype(np.int8)))
        for start, end in edges.reshape(-1, 2):
            low, high = (rows - row - 1) / rows, (rows - row) / rows
            cells.append([[start / rows, low], [end / rows, low], [end / rows, high], [start / rows, high]])
    return np.array(cells)
