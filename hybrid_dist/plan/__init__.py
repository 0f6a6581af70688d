"""What a config needs of each GPU's memory, phase by phase, told before the job is queued and without a GPU."""

from hybrid_dist.plan.choose import Choice, Plan, Planner, Row
from hybrid_dist.plan.fit import Fit, fit

__all__ = ["Choice", "Fit", "Plan", "Planner", "Row", "fit"]
