"""What a config needs of each GPU's memory and how long it takes, told before the job is queued and without a GPU."""

from hybrid_dist.plan.answer import Choice, Plan, Row, Scale
from hybrid_dist.plan.choose import Planner
from hybrid_dist.plan.fit import Fit, fit, largest
from hybrid_dist.plan.strategies import strategy_of

__all__ = ["Choice", "Fit", "Plan", "Planner", "Row", "Scale", "fit", "largest", "strategy_of"]
