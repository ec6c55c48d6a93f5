"""What the suffix gradient costs in quality, on the miniature: full against suffix at several k, three seeds.

    python benchmarks/suffix_gradient.py            # run what is missing, then print the table
    python benchmarks/suffix_gradient.py --print

Responses have about 30 tokens (44 at most), and `positions: all` with the suffix gradient leaves out the prompt alone. Both
scopes see the same two learning rates; see benchmarks/sweeping.py for how rows are swept and scored.
"""

from __future__ import annotations

from pathlib import Path

from sweeping import Row, Table, main

OUT = Path("runs/suffix")
OPRD = {"representation_weight": 1, "logit_weight": 0, "output_loss": "none", "lm_head": "teacher"}
POSITIONS = {
    "all": {"positions": "all"},
    "last 16": {"positions": "last_k", "position_k": 16},
    "last 8": {"positions": "last_k", "position_k": 8},
}
ROWS = {
    f"{name}, {scope}": {**OPRD, **positions, "gradient_scope": scope}
    for name, positions in POSITIONS.items()
    for scope in ("full", "suffix")
}
TABLE = Table(
    OUT,
    {name: Row(settings, (2e-3, 4e-3)) for name, settings in ROWS.items()},
    limits=(2e-3, 4e-3),
    recorded=Path(__file__).parent / "recorded" / "suffix-gradient.jsonl",
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


if __name__ == "__main__":
    main(TABLE, one_row, __doc__)
