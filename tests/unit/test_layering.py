"""Arrows point down only: what a wing may import, read off the syntax trees."""

import ast
from pathlib import Path

import pytest

import oprd

ROOT = Path(oprd.__file__).parent
# From the ground up. A wing imports those named for it, itself, and libraries.
GROUND = {"objectives", "models", "model_files", "records", "prompts", "yaml_file"}
ALLOWED = {
    "objectives": set(),
    "records": set(),
    "models": set(),
    "model_files": set(),
    "yaml_file": set(),
    "prompts": {"models", "records"},
    "_compat": set(),
    "states": {"objectives", "models"},
    "evaluation": {"models", "model_files", "prompts", "records"},
    "bridge": {"objectives", "models", "records", "states", "evaluation"},
    "lineage": {"models", "model_files", "records", "yaml_file", "evaluation"},
    "serving": {"objectives", "models", "model_files", "records", "states", "bridge"},
    "durability": {"records", "lineage"},
    "compression": GROUND | {"states", "evaluation", "bridge", "lineage", "durability"},
    "training": GROUND | {"_compat", "states", "evaluation", "bridge", "lineage", "serving", "durability"},
    "insight": GROUND | {"states", "evaluation", "bridge", "lineage", "training"},
    "miniature": GROUND | {"states", "evaluation", "bridge", "lineage", "training", "insight"},
    "commands": {
        "records",
        "bridge",
        "lineage",
        "serving",
        "durability",
        "compression",
        "training",
        "insight",
        "miniature",
    },
    "cli": {"commands"},
    "__main__": {"cli"},
    "__init__": {"bridge", "training"},
}
# Pure files: no transformers, no config object. (standard library aside)
PURE = {
    "objectives": {"torch"},
    "records.py": set(),
    "states/views.py": {"torch"},
    "states/alignment.py": set(),
    "states/prefixes.py": {"torch", "numpy"},
    "bridge/moments.py": {"torch"},
    "bridge/solve.py": {"torch"},
    "bridge/report.py": {"torch"},
    "bridge/fit.py": {"torch"},
    "evaluation/metrics.py": {"numpy"},
    "evaluation/summary.py": {"numpy"},
    "evaluation/grading.py": set(),
    "evaluation/equivalence.py": set(),
    "lineage/hashing.py": set(),
    "lineage/machine.py": set(),
    "yaml_file.py": {"yaml"},
    "lineage/gates.py": set(),
    "lineage/registry.py": {"filelock"},
    "durability/trees.py": {"torch", "numpy", "safetensors"},
    "durability/random_numbers.py": {"torch", "numpy"},
    "training/options.py": set(),
    "commands": set(),
    "miniature/task.py": set(),
    "insight/tables.py": set(),
}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path, *, top_level_only=False):
    """Dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wing_of(path):
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    wing = wing_of(path)
    used = {name.split(".")[1] for name in imports(path) if name.startswith("oprd.")}
    assert used <= ALLOWED[wing] | {wing}


@pytest.mark.parametrize("pure", PURE)
def test_pure_files_stay_pure(pure):
    import sys

    target = ROOT / pure
    for path in sorted(target.rglob("*.py")) if target.is_dir() else [target]:
        outside = {name.split(".")[0] for name in imports(path, top_level_only=True)}
        outside -= set(sys.stdlib_module_names) | {"oprd"}
        assert outside <= PURE[pure], path


def test_only_the_trainer_touches_trl_internals():
    for path in FILES:
        private = [
            n for n in imports(path) if n.startswith("trl.") and n.count(".") > 1
        ]  # trl.x is public, trl.x.y not
        assert not private or path.name == "_compat.py", f"{path}: {private}"


def test_files_stay_small():
    assert {p.name: n for p in FILES if (n := len(p.read_text().splitlines())) > 400} == {}


def test_public_names():
    from oprd import Bridge, OPRDConfig, OPRDTrainer  # noqa: F401
    from oprd.bridge import Bridge as FromItsWing
    from oprd.bridge import BridgeFitter  # noqa: F401
    from oprd.evaluation import avg_at_k, best_at_k, distinct_n, extract_boxed, grade, pass_at_k  # noqa: F401
    from oprd.objectives import (  # noqa: F401
        full_vocab_loss,
        logit_mse_loss,
        map_layers,
        representation_loss,
        sampled_token_loss,
        select_layers,
        select_positions,
        top_k_loss,
    )
    from oprd.states import align_ends, token_byte_ends  # noqa: F401

    assert Bridge is FromItsWing
