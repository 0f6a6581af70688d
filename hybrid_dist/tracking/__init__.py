"""Metrics, progress and status of a run: one interface, several sinks. Rank 0 alone has any."""

from hybrid_dist.tracking.files import JsonLines, Status
from hybrid_dist.tracking.terminal import Terminal

__all__ = ["JsonLines", "Status", "Terminal"]
