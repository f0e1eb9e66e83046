"""Plans at run time: `load_plan(path).attach(model)`, and planned attention as a function."""

from calibatt.runtime.adapters import UnknownModelError
from calibatt.runtime.backends import UnsupportedBackendError
from calibatt.runtime.intercept import InterceptionLostError
from calibatt.runtime.ops import planned_attention
from calibatt.runtime.plan import Attachment, Plan, PlanMismatchError, load_plan
from calibatt.runtime.schedule import LayerSchedule

__all__ = [
    "Attachment",
    "InterceptionLostError",
    "LayerSchedule",
    "Plan",
    "PlanMismatchError",
    "UnknownModelError",
    "UnsupportedBackendError",
    "load_plan",
    "planned_attention",
]
