"""CalibAtt: calibrated sparse attention for video diffusion transformers.

    plan = calibatt.load_plan("plans/demo.plan")
    with calibatt.attach(pipe, plan):
        video = pipe(prompt).frames

What stands here is imported when it is first used: `import calibatt` alone needs neither torch nor diffusers.
"""

from importlib import import_module
from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibatt.runtime import attach, load_plan, load_plans, plan_from_masks, planned_attention
    from calibatt.tools.calibrate.pipeline import PipelineSampler

__version__ = "0.2.0"
# Imported from a checkout, this folder lacks the other packages, which are installed elsewhere.
__path__ = extend_path(__path__, __name__)

__all__ = [
    "PipelineSampler",
    "__version__",
    "attach",
    "load_plan",
    "load_plans",
    "plan_from_masks",
    "planned_attention",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "calibatt.tools.calibrate.pipeline" if name == "PipelineSampler" else "calibatt.runtime"
    try:
        value = globals()[name] = getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        what = import_module("calibatt.plans.command").told(error)
        raise ModuleNotFoundError(f"calibatt.{name}: {what}", name=error.name) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
