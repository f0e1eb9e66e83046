"""See a plan: ``calibatt-inspect FILE``, the same as ``python tools/inspect_plan FILE``."""
