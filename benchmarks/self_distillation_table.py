"""A student that teaches itself what it does when it is asked for care (OPRSD): the comparison of docs/results.md, three seeds.

    python benchmarks/self_distillation_table.py                 # run what is missing, then print the table
    python benchmarks/self_distillation_table.py --print         # the table of what has been run

The student ships with the miniature: trained on to forget carries of 8 and 9, unless ``??`` stands before the problem. Its teacher is
itself behind ``??``. A run has 100 updates of 16 prompts x 2 responses. See benchmarks/sweeping.py for how rows are swept and
scored.
"""

from __future__ import annotations

from pathlib import Path

from sweeping import Row, Table, main

from oprd.miniature.skills import CARE
from oprd.miniature.task import held_out

OUT = Path("runs/self")
STUDENT = "miniature:careless"


def asked_for_care() -> list[dict]:
    return [{**problem, "prompt": CARE + problem["prompt"]} for problem in held_out()]


OWN = {
    "model_name_or_path": STUDENT,
    "dataset_name": "miniature:train.jsonl",
    "teacher_prompt_template": CARE + "{prompt}",
}
OPD = {"representation_weight": 0, "output_loss": "full"}
BASE, EMA, LIVE = ({"teacher_model_kind": kind} for kind in ("base", "ema", "live"))
RATES = (5e-4, 1e-3, 2e-3)
RECIPE = "benchmarks/table.yaml"
ROWS = {
    "OPRSD, frozen start": Row({**OWN, **BASE}, RATES, RECIPE),
    "full KL, frozen start": Row({**OWN, **OPD, **BASE}, (5e-4,), RECIPE),
    "OPRSD, moving average": Row({**OWN, **EMA, "teacher_update_rate": 0.05}, (5e-4,), RECIPE),
    "OPRSD, live": Row({**OWN, **LIVE}, (5e-4,), RECIPE),
    "OPRSD, slower moving average": Row({**OWN, **EMA, "teacher_update_rate": 0.005}, (5e-4,), RECIPE, seeds=(0,)),
    "full KL, live": Row({**OWN, **OPD, **LIVE}, (5e-4,), RECIPE, seeds=(0,)),
    "OPRSD + full KL, live": Row({**OWN, **LIVE, "output_loss": "full"}, (5e-4,), RECIPE, seeds=(0,)),
    "control: OPRSD, another mark": Row(
        {**OWN, **BASE, "teacher_prompt_template": "=={prompt}"}, (5e-4,), RECIPE, seeds=(0,)
    ),
    "control: OPRSD, no mark": Row({**OWN, **BASE, "teacher_prompt_template": "{prompt}"}, (5e-4,), RECIPE, seeds=(0,)),
}
TABLE = Table(
    OUT,
    ROWS,
    {"student": (STUDENT, 44)},
    steps=100,
    recorded=Path("benchmarks/recorded/self-distillation.jsonl"),
    tests={"test": held_out, "asked for care": asked_for_care},
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


if __name__ == "__main__":
    main(TABLE, one_row, __doc__)
