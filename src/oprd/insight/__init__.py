"""Before a run and after it: what it would take (`plan`), what two models have in common (`diagnose`), what it looked like
(plots, tables, the report)."""

from importlib import import_module
from typing import Any

HOMES = {
    "Prompts": "cases",
    "case_of_models": "cases",
    "case_of_run": "cases",
    "diagnose": "diagnosis",
    "plan": "planner",
}
__all__ = ["Prompts", "case_of_models", "case_of_run", "diagnose", "plan"]


def __getattr__(name: str) -> Any:
    if name in HOMES:  # on demand: tables and charts need no transformers
        return getattr(import_module(f"oprd.insight.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
