"""Rendered aircraft pictures in the team's annotation format: a stand-in data set whose labels are true."""

from hybrid_dist.data.output import COLUMNS
from hybrid_dist.data.synth.picture import AIRLINE_NAMES, SPLITS, TYPE_NAMES, blur_sigma, render_picture
from hybrid_dist.data.synth.sheet import contact_sheet
from hybrid_dist.data.synth.write import is_rendered, render_dataset

__all__ = [
    "AIRLINE_NAMES",
    "COLUMNS",
    "SPLITS",
    "TYPE_NAMES",
    "blur_sigma",
    "contact_sheet",
    "is_rendered",
    "render_dataset",
    "render_picture",
]
