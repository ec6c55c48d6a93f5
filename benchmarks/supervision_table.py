"""Which positions, which layers, which loss: the study of docs/results.md, at equal cost, three seeds.

    python benchmarks/supervision_table.py                 # run what is missing, then print the table
    python benchmarks/supervision_table.py --print         # the table of what has been run

Every run has 100 updates of 16 prompts x 2 responses of the miniature's pair, under the teacher's LM head. See
benchmarks/sweeping.py for how rows are swept and scored.
"""

from __future__ import annotations

from pathlib import Path

from sweeping import Row, Table, main

OUT = Path("runs/supervision")
K = {"position_k": 16}
ONE = (2e-3,)
CHANGE = {"representation_loss": "transition"}
ROWS = {
    "all positions, all layers, mse": Row({}, (1e-3, 2e-3, 4e-3)),
    "first 16 positions": Row({"positions": "first_k", **K}, ONE),
    "last 16 positions": Row({"positions": "last_k", **K}, ONE),
    "random 16 positions": Row({"positions": "random_k", **K}, ONE),
    "adaptive positions": Row({"positions": "adaptive"}, ONE),
    "last layer": Row({"layers": "last"}, ONE),
    "layers by teacher_rms": Row({"layer_weighting": "teacher_rms"}, ONE),
    "adaptive layers": Row({"layer_weighting": "adaptive"}, ONE),
    "normalized_mse": Row({"representation_loss": "normalized_mse"}, ONE),
    "transition over positions": Row(CHANGE, ONE),
    "transition over both": Row({**CHANGE, "transition_over": "both"}, ONE),
    "mse + attention maps of the last layer": Row({"attention_weight": 1}, ONE),
}
TABLE = Table(
    OUT,
    ROWS,
    {"teacher": ("miniature:teacher", 44), "student": ("miniature:student", 44)},
    steps=100,
    recorded=Path("benchmarks/recorded/supervision.jsonl"),
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


if __name__ == "__main__":
    main(TABLE, one_row, __doc__)
