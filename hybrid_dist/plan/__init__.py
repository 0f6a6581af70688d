"""What a config needs of each GPU's memory and how long it takes, told before the job is queued and without a GPU."""

from hybrid_dist.plan.answer import Choice, Plan, Row, Scale
from hybrid_dist.plan.choose import Planner
from hybrid_dist.plan.fit import Fit, fit

__all__ = ["Choice", "Fit", "Plan", "Planner", "Row", "Scale", "fit"]
