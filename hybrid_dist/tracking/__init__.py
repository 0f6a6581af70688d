"""Metrics, progress and status of a run: one interface, several sinks. Rank 0 alone has any."""

from hybrid_dist.tracking.files import Lines, MetricsFile, Status, json_line
from hybrid_dist.tracking.nodes import NodeFacts
from hybrid_dist.tracking.sink import Judgement, Position, Sink, Sinks
from hybrid_dist.tracking.terminal import Terminal
from hybrid_dist.tracking.wandb_sink import Wandb, choose_mode, logged_in

__all__ = [
    "Judgement", "Lines", "MetricsFile", "NodeFacts", "Position", "Sink", "Sinks", "Status", "Terminal", "Wandb",
    "choose_mode", "json_line", "logged_in",
]  # fmt: skip
