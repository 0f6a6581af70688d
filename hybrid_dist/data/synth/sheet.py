"""A contact sheet: one row a type (or an airline), several pictures each, the name beside it and the labels below."""

from dataclasses import replace

import cv2
import numpy as np

from hybrid_dist.data.synth.picture import AIRLINE_NAMES, TYPE_NAMES, Plan, draw_sample, plan_picture
from hybrid_dist.errors import UserError

CELL = (72, 210)  # height, width of a picture's place
LABEL, CAPTION, MARGIN = 104, 13, 5
INK = (40, 40, 40)


def _fitted(picture: np.ndarray) -> np.ndarray:
    """A picture scaled into a cell on white, (CELL, 3)."""
    factor = min(CELL[0] / picture.shape[0], CELL[1] / picture.shape[1])
    size = (round(picture.shape[1] * factor), round(picture.shape[0] * factor))
    scaled = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC)
    cell = np.full((*CELL, 3), 255, np.uint8)
    left = (CELL[1] - size[0]) // 2
    cell[CELL[0] - size[1] :, left : left + size[0]] = scaled
    return cell


def _write(sheet: np.ndarray, text: str, left: int, base: int, size: float) -> None:
    cv2.putText(sheet, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, size, INK, 1, cv2.LINE_AA)


def _cell_plan(row: int, column: int, columns: int, seed: int, by: str, plain: int) -> Plan:
    """The row's class with the other one cycling; the first `plain` columns sharp and uncovered."""
    place = row * columns + column
    plan = plan_picture("val", place, seed)
    if by == "type":
        plan = replace(plan, type_id=row, airline_id=(place + row) % len(AIRLINE_NAMES))
    else:
        plan = replace(plan, airline_id=row, type_id=(place + row) % len(TYPE_NAMES))
    return replace(plan, clarity=1.0, cover=0.0) if column < plain else plan


def contact_sheet(columns: int = 6, seed: int = 0, by: str = "type", plain: int = 4) -> np.ndarray:
    """(h, w, 3) uint8 RGB; `by` is "type" or "airline", `plain` the number of columns without blur and occluders."""
    if by not in ("type", "airline"):
        raise UserError(f"by is {by!r}; it must be 'type' or 'airline'")
    if columns < 1:
        raise UserError(f"columns is {columns}; a sheet needs at least 1")
    names = TYPE_NAMES if by == "type" else AIRLINE_NAMES
    height, width = CELL[0] + CAPTION + MARGIN, CELL[1] + MARGIN
    sheet = np.full((len(names) * height + MARGIN, LABEL + columns * width, 3), 255, np.uint8)
    for row, name in enumerate(names):
        top = MARGIN + row * height
        _write(sheet, name, MARGIN, top + CELL[0] // 2 + 8, 0.45)
        for column in range(columns):
            plan = _cell_plan(row, column, columns, seed, by, plain)
            sample = draw_sample(plan)
            left = LABEL + column * width
            sheet[top : top + CELL[0], left : left + CELL[1]] = _fitted(sample.picture)
            other = AIRLINE_NAMES[plan.airline_id] if by == "type" else TYPE_NAMES[plan.type_id]
            caption = f"{other}  clarity {plan.clarity:.2f}  block {sample.block:.2f}"
            _write(sheet, caption, left + 2, top + CELL[0] + 10, 0.32)
    return sheet
