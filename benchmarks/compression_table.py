"""Compressed students (docs/results.md): layers taken out of a teacher, or its weights quantised, and what brings it back.

    python benchmarks/compression_table.py                     # run what is missing, then print both tables
    python benchmarks/compression_table.py --only "5 layers, OPRD"
    python benchmarks/compression_table.py --print             # from benchmarks/recorded

The teacher is miniature:wide-teacher (6 layers x 96). Its students are itself without the one or two layers of lowest
influence (oprd prune), compared with it through the layer map. Every run has one budget: 200 updates of 16 prompts x 2
responses. See benchmarks/sweeping.py for how rows are swept and scored; controls run at one rate.
"""

from __future__ import annotations

import random
from pathlib import Path

from sweeping import Row, Table, main

OUT = Path("runs/compression")
TEACHER = "miniature:wide-teacher"
DEPTH = 6
RATES = (1e-3, 2e-3)
OPRD = {"representation_weight": 1, "logit_weight": 0, "output_loss": "none"}
OBJECTIVES = {
    "OPRD": OPRD,
    "OPD full KL": {"representation_weight": 0, "logit_weight": 0, "output_loss": "full"},
    "OPRD + full KL": {**OPRD, "output_loss": "full"},
}


def pruned(name: str) -> dict:
    """A student among those that `make_students` makes, and its teacher."""
    return {"model_name_or_path": OUT / "students" / name, "teacher_model_name_or_path": TEACHER, "lm_head": "auto"}


ROWS = {
    "4 layers, OPRD": Row({**pruned("4-layers"), **OBJECTIVES["OPRD"]}, (1e-3, 2e-3)),
    "4 layers, OPD full KL": Row({**pruned("4-layers"), **OBJECTIVES["OPD full KL"]}, (5e-4, 1e-3)),
    "4 layers, OPRD + full KL": Row({**pruned("4-layers"), **OBJECTIVES["OPRD + full KL"]}, (1e-3, 2e-3)),
}
CONTROLS = {
    "control: 4 layers at random, OPRD": Row({**pruned("4-layers-random"), **OPRD}, (1e-3,), seeds=(0,)),
}
UNTRAINED = {
    "teacher, 6 layers": (TEACHER, 44),
    "5 layers, no training": (str(OUT / "students" / "5-layers"), 44),
    "4 layers, no training": (str(OUT / "students" / "4-layers"), 44),
    "4 layers at random, no training": (str(OUT / "students" / "4-layers-random"), 44),
}
TABLE = Table(
    OUT,
    ROWS | CONTROLS,
    UNTRAINED,
    (2.5e-4, 8e-3),
    recorded=Path(__file__).parent / "recorded" / "compression.jsonl",
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


def random_layers(keep: int) -> tuple[int, ...]:
    """The first and the last layer, and others that chance chose; never those that influence keeps."""
    chance, influence = random.Random(0), {5: (1, 2, 3, 5, 6), 4: (1, 2, 5, 6)}[keep]
    while True:
        inner = sorted(chance.sample(range(2, DEPTH), keep - 2))
        if (1, *inner, DEPTH) != influence:
            return (1, *inner, DEPTH)


def make_students() -> None:
    """Every pruned student, by influence on the miniature's prompts and the teacher's answers to them, and at random."""
    from oprd.compression.prune import Choice, Probing, prune

    for keep in (5, 4):
        for name, choice in (("", Choice(keep=keep)), ("-random", Choice(layers=random_layers(keep)))):
            folder = OUT / "students" / f"{keep}-layers{name}"
            if not folder.exists():
                prune(TEACHER, folder, choice, Probing("miniature:train.jsonl", answers=44))


if __name__ == "__main__":
    main(TABLE, one_row, __doc__, make_students)
