"""Two specialists into one student: the comparison of docs/results.md, three seeds.

    python benchmarks/merging_table.py                 # run what is missing, then print the table
    python benchmarks/merging_table.py --only "OPRD, each row its teacher"
    python benchmarks/merging_table.py --print         # the table of what has been run

The specialists ship with the miniature: its student after 400 more supervised steps on additions alone, or on subtractions
alone. A run
has 100 updates of 16 prompts x 2 responses, half of the prompts of either kind. See benchmarks/sweeping.py for how rows are
swept and scored; ``both`` is 128 problems of either kind, and so is what decides the learning rate, 32 of either.
"""

from __future__ import annotations

import json
from pathlib import Path

from sweeping import Key, Row, Table, flags, main

from oprd.miniature.rebuild import write_problems
from oprd.miniature.skills import SIGNS, TEST, VALIDATION, skilled, skilled_training

OUT = Path("runs/merging")
STUDENT = "miniature:student"
SPECIALISTS = {skill: f"miniature:{skill}" for skill in SIGNS}


def both() -> list[dict[str, str]]:
    return skilled(*TEST)


def plus() -> list[dict[str, str]]:
    return [p for p in both() if p["skill"] == "plus"]


def minus() -> list[dict[str, str]]:
    return [p for p in both() if p["skill"] == "minus"]


def validation() -> list[dict[str, str]]:
    return skilled(*VALIDATION)


def prepare() -> None:
    """The mean of the specialists' weights, and the prompts of either skill."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.models import resolve_path

    if not (OUT / "mean").exists():
        paths = [resolve_path(SPECIALISTS[skill]) for skill in SIGNS]
        one, other = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True) for path in paths
        )
        with torch.no_grad():
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                a.copy_((a + b) / 2)
        one.save_pretrained(OUT / "mean")
        AutoTokenizer.from_pretrained(paths[0]).save_pretrained(OUT / "mean")
    for skill in SIGNS:
        write_problems(OUT / f"{skill}.jsonl", [p for p in skilled_training() if p["skill"] == skill])


def one_after_the_other(key: Key, directory: Path, arguments: dict) -> Path:
    """Half of the updates from either specialist."""
    from oprd.training.run import run

    half = {**arguments, "max_steps": TABLE.steps // 2, "model_name_or_path": STUDENT}
    for skill in SIGNS:
        alone = {"teacher_model_name_or_path": SPECIALISTS[skill], "dataset_name": OUT / f"{skill}.jsonl"}
        done = run(flags({**half, **alone, "output_dir": directory / skill}))[0]
        half["model_name_or_path"] = str(done / "final")
    return done / "final"


OPD = {"representation_weight": 0, "logit_weight": 0, "output_loss": "full"}
ALL = {
    "dataset_name": "miniature:skills-train.jsonl",
    "teachers": json.dumps({skill: {"model_name_or_path": path} for skill, path in SPECIALISTS.items()}),
}
BOTH = {**ALL, "teacher_column": "skill"}
OPRD_RATES, OPD_RATES = (1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)
RECIPE = "benchmarks/table.yaml"
SWAPPED = {"plus": "minus", "minus": "plus"}
ROWS = {
    "OPRD, each row its teacher": Row({**BOTH, "lm_head": "teacher"}, OPRD_RATES, RECIPE),
    "OPRD + head metric, own head": Row({**BOTH, "lm_head": "keep", "logit_weight": 1}, (2e-3, 4e-3), RECIPE),
    "OPD full KL, each row its teacher": Row({**BOTH, **OPD, "lm_head": "keep"}, OPD_RATES, RECIPE),
    "OPD full KL, mean of the heads": Row({**BOTH, **OPD, "lm_head": "teacher"}, (5e-4,), RECIPE, seeds=(0,)),
    "OPRD, plus then minus": Row({"lm_head": "teacher"}, (4e-3,), RECIPE, run=one_after_the_other),
    "OPD full KL, plus then minus": Row(
        {**OPD, "lm_head": "keep"}, (5e-4,), RECIPE, seeds=(0,), run=one_after_the_other
    ),
    "OPRD from the mean of the weights": Row(
        {**BOTH, "lm_head": "teacher", "model_name_or_path": str(OUT / "mean")}, (4e-3,), RECIPE, seeds=(0,)
    ),
    "control: OPRD, all teachers on every row": Row({**ALL, "lm_head": "teacher"}, (4e-3,), RECIPE, seeds=(0,)),
    "control: OPRD, teachers swapped": Row(
        {
            **BOTH,
            "lm_head": "teacher",
            "teachers": json.dumps({skill: {"model_name_or_path": SPECIALISTS[o]} for skill, o in SWAPPED.items()}),
        },
        (4e-3,),
        RECIPE,
        seeds=(0,),
    ),
}
TABLE = Table(
    OUT,
    ROWS,
    {
        "plus specialist": (SPECIALISTS["plus"], 44),
        "minus specialist": (SPECIALISTS["minus"], 44),
        "student": (STUDENT, 44),
        "mean of the specialists' weights": (str(OUT / "mean"), 44),
    },
    steps=100,
    recorded=Path("benchmarks/recorded/merging.jsonl"),
    validation=validation,
    tests={"both": both, "plus": plus, "minus": minus},
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


if __name__ == "__main__":
    main(TABLE, one_row, __doc__, prepare)
