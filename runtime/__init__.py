"""Plans at run time: `load_plan(path).attach(model)`, sets of plans, and planned attention as a function."""

from calibatt.runtime.adapters import Adapter, PlanMismatchError, UnknownModelError
from calibatt.runtime.attachment import Attachment, PipelineAttachment, attach
from calibatt.runtime.backends import UnsupportedBackendError
from calibatt.runtime.intercept import InterceptionLostError, OutsideForwardError
from calibatt.runtime.masks import plan_from_masks
from calibatt.runtime.ops import planned_attention
from calibatt.runtime.parallel import ParallelismError
from calibatt.runtime.plan import Plan, PlanSet, load_plan, load_plans
from calibatt.runtime.schedule import AttentionSchedule, ListedSchedule

__all__ = [
    "Adapter",
    "Attachment",
    "AttentionSchedule",
    "InterceptionLostError",
    "ListedSchedule",
    "OutsideForwardError",
    "ParallelismError",
    "PipelineAttachment",
    "Plan",
    "PlanMismatchError",
    "PlanSet",
    "UnknownModelError",
    "UnsupportedBackendError",
    "attach",
    "load_plan",
    "load_plans",
    "plan_from_masks",
    "planned_attention",
]
