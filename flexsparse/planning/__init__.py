"""`flexsparse plan`: what a step of a model costs, from shapes alone; no weights, no GPU. See `docs/plan.md`."""

from flexsparse.planning.counting import PlanError
from flexsparse.planning.measured import Measured, measure
from flexsparse.planning.plan import Plan, evaluate, plan
from flexsparse.planning.settings import Settings

__all__ = ["Measured", "Plan", "PlanError", "Settings", "evaluate", "measure", "plan"]
