"""On-policy representation distillation: pull a student's hidden states towards a teacher's, on the student's own text."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oprd.bridge import Bridge
    from oprd.training.config import OPRDConfig
    from oprd.training.trainer import OPRDTrainer

__version__ = version("oprd")
__all__ = ["Bridge", "OPRDConfig", "OPRDTrainer", "__version__"]

_HOMES = {
    "Bridge": "oprd.bridge",
    "OPRDConfig": "oprd.training.config",
    "OPRDTrainer": "oprd.training.trainer",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import oprd` and `oprd --help` must not wait for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'oprd' has no attribute {name!r}")
