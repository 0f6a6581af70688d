"""Metrics, progress and status of a run: one interface, several sinks. Rank 0 alone has any."""

from hybrid_dist.tracking.files import Lines, Status, json_line
from hybrid_dist.tracking.terminal import Terminal

__all__ = ["Lines", "Status", "Terminal", "json_line"]
