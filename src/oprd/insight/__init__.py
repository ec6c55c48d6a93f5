"""Before a run and after it: what it would take (`plan`), what it looked like (plots, tables, the report)."""

from typing import Any

__all__ = ["plan"]


def __getattr__(name: str) -> Any:
    if name == "plan":  # on demand: tables and charts need no transformers
        from oprd.insight.planner import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
