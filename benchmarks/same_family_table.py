"""The same-family comparison of docs/results.md: every objective at its own best learning rate, three seeds.

    python benchmarks/same_family_table.py                 # run what is missing, then print the table
    python benchmarks/same_family_table.py --only "OPD top-16"
    python benchmarks/same_family_table.py --print         # the table of what has been run

Every run has the same budget: 200 steps of 16 prompts x 2 responses, sampled by the student being trained.
See benchmarks/sweeping.py for how rows are swept and scored.
"""

from __future__ import annotations

from pathlib import Path

from sweeping import Row, Table, main

OUT = Path("runs/table")
OPD = {"representation_weight": 0, "logit_weight": 0, "lm_head": "keep"}
OPRD = {"representation_weight": 1, "logit_weight": 0, "output_loss": "none"}
RANDOM = {"teacher_model_name_or_path": str(OUT / "random-teacher")}
SELF = {"teacher_model_name_or_path": "miniature:student"}
ROWS = {
    "OPRD, teacher's head": {**OPRD, "lm_head": "teacher"},
    "OPRD, own head": {**OPRD, "lm_head": "keep"},
    "OPD full KL": {**OPD, "output_loss": "full"},
    "OPD sampled token": {**OPD, "output_loss": "sampled"},
    "OPRD + head metric, own head": {"logit_weight": 1, "lm_head": "keep"},
    "OPD top-16": {**OPD, "output_loss": "top_k"},
    "OPRD + head metric, teacher's head": {"logit_weight": 1, "lm_head": "teacher"},
    "OPRD, teacher's head, last 16": {**OPRD, "lm_head": "teacher", "positions": "last_k", "position_k": 16},
    "OPRD + 0.1 x head metric, teacher's head": {"logit_weight": 0.1, "lm_head": "teacher"},
    "head metric alone, own head": {"representation_weight": 0, "logit_weight": 1, "lm_head": "keep"},
    "sampled token + 1 x OPRD, own head": {**OPRD, "output_loss": "sampled", "lm_head": "keep"},
    "sampled token + 10 x OPRD, own head": {
        **OPRD,
        "output_loss": "sampled",
        "lm_head": "keep",
        "representation_weight": 10,
    },
    "OPD top-16, teacher's head": {**OPD, "output_loss": "top_k", "lm_head": "teacher"},
    "full KL + OPRD, teacher's head": {**OPRD, "output_loss": "full", "lm_head": "teacher"},
}
# Controls have no best rate to look for; they run at their counterpart's usual one.
CONTROLS = {
    "control: no teacher (zero reward)": Row({**OPD, "output_loss": "sampled", **SELF}, (1e-3,)),
    "control: random teacher, OPRD, own head": Row({**OPRD, "lm_head": "keep", **RANDOM}, (2e-3,)),
    "control: random teacher, OPD top-16": Row({**OPD, "output_loss": "top_k", **RANDOM}, (1e-3,)),
}
TABLE = Table(
    OUT,
    {name: Row(settings) for name, settings in ROWS.items()} | CONTROLS,
    {"teacher": ("miniature:teacher", 44), "student": ("miniature:student", 44)},
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


def random_teacher() -> None:
    if not (OUT / "random-teacher").exists():
        from oprd.miniature.rebuild import build_model
        from oprd.miniature.task import build_tokenizer

        tokenizer = build_tokenizer()
        build_model(tokenizer, seed=123).save_pretrained(OUT / "random-teacher")
        tokenizer.save_pretrained(OUT / "random-teacher")


if __name__ == "__main__":
    main(TABLE, one_row, __doc__, random_teacher)
