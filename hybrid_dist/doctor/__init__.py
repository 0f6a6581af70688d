"""What would fail in the queue, told before it: this machine, its disk, its processes together, the config's data."""

from hybrid_dist.doctor.examination import examine, failed
from hybrid_dist.doctor.line import Line

__all__ = ["Line", "examine", "failed"]
