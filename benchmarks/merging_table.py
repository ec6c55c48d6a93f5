"""Two specialists into one student: the comparison of docs/results.md, three seeds.

    python benchmarks/merging_table.py                 # run what is missing, then print the table
    python benchmarks/merging_table.py --only "OPRD, each row its teacher"
    python benchmarks/merging_table.py --print         # the table of what has been run

The specialists are the miniature's student after 400 more supervised steps on additions alone, or on subtractions alone. A run
has 100 updates of 16 prompts x 2 responses, half of the prompts of either kind. See benchmarks/sweeping.py for how rows are
swept and scored; ``both`` is 128 problems of either kind, and so is what decides the learning rate, 32 of either.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from supervised import supervise
from sweeping import Key, Row, Table, flags, main

OUT = Path("runs/merging")
SIGNS = {"plus": "+", "minus": "-"}
STUDENT = "miniature:student"


def problem(rng: random.Random, skill: str, num_terms: int) -> dict[str, str]:
    """A chain of one sign only."""
    value = rng.randrange(100)
    prompt = solution = f"{value:02d}"
    for _ in range(num_terms):
        sign, term = SIGNS[skill], rng.randint(1, 9)
        value = (value + term if sign == "+" else value - term) % 100
        prompt += f"{sign}{term}"
        solution += f"{sign}{term}={value:02d}"
    answer = f"{value:02d}"
    return {"prompt": prompt + "=?", "solution": solution + f"\\boxed{{{answer}}}", "answer": answer, "skill": skill}


def problems(seed: int, count: int, *skills: str) -> list[dict[str, str]]:
    """``count`` of each skill, by turns."""
    rng = random.Random(seed)
    return [problem(rng, skill, rng.randint(4, 8)) for _ in range(count) for skill in skills]


def kept_apart() -> set[str]:
    return {p["prompt"] for seed, count in ((999, 128), (998, 32)) for p in problems(seed, count, *SIGNS)}


def both() -> list[dict[str, str]]:
    return problems(999, 128, *SIGNS)


def plus() -> list[dict[str, str]]:
    return [p for p in both() if p["skill"] == "plus"]


def minus() -> list[dict[str, str]]:
    return [p for p in both() if p["skill"] == "minus"]


def validation() -> list[dict[str, str]]:
    return problems(998, 32, *SIGNS)


def prepare() -> None:
    """The specialists, the mean of their weights, and the prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.models import resolve_path

    tokenizer = AutoTokenizer.from_pretrained(resolve_path(STUDENT))
    apart = kept_apart()
    for skill in SIGNS:

        def draw(rng: random.Random, skill: str = skill) -> list[dict]:
            length, batch = rng.randint(4, 8), []
            while len(batch) < 64:
                drawn = problem(rng, skill, length)
                batch += [drawn] if drawn["prompt"] not in apart else []
            return batch

        model = AutoModelForCausalLM.from_pretrained(resolve_path(STUDENT), dtype=torch.float32)
        supervise(model, tokenizer, draw, OUT / skill, steps=400, seed=7, lr=1e-3, of=600)
    if not (OUT / "mean").exists():
        one, other = (AutoModelForCausalLM.from_pretrained(OUT / skill, dtype=torch.float32) for skill in SIGNS)
        with torch.no_grad():
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                a.copy_((a + b) / 2)
        one.save_pretrained(OUT / "mean")
        tokenizer.save_pretrained(OUT / "mean")
    rows = [p for p in problems(1, 2048, *SIGNS) if p["prompt"] not in apart]
    for name, chosen in {"both": rows, **{s: [p for p in rows if p["skill"] == s] for s in SIGNS}}.items():
        lines = [json.dumps({key: row[key] for key in ("prompt", "answer", "skill")}) for row in chosen]
        (OUT / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def one_after_the_other(key: Key, directory: Path, arguments: dict) -> Path:
    """Half of the updates from either specialist."""
    from oprd.training.run import run

    half = {**arguments, "max_steps": TABLE.steps // 2, "model_name_or_path": STUDENT}
    for skill in SIGNS:
        alone = {"teacher_model_name_or_path": OUT / skill, "dataset_name": OUT / f"{skill}.jsonl"}
        done = run(flags({**half, **alone, "output_dir": directory / skill}))[0]
        half["model_name_or_path"] = str(done / "final")
    return done / "final"


OPD = {"representation_weight": 0, "logit_weight": 0, "output_loss": "full"}
ALL = {
    "dataset_name": str(OUT / "both.jsonl"),
    "teachers": json.dumps({skill: {"model_name_or_path": str(OUT / skill)} for skill in SIGNS}),
}
BOTH = {**ALL, "teacher_column": "skill"}
OPRD_RATES, OPD_RATES = (1e-3, 2e-3, 4e-3), (5e-4, 1e-3, 2e-3)
RECIPE = "benchmarks/table.yaml"
ROWS = {
    "OPRD, each row its teacher": Row({**BOTH, "lm_head": "teacher"}, OPRD_RATES, RECIPE),
    "OPRD + head metric, own head": Row({**BOTH, "lm_head": "keep", "logit_weight": 1}, (2e-3, 4e-3), RECIPE),
    "OPD full KL, each row its teacher": Row({**BOTH, **OPD, "lm_head": "keep"}, OPD_RATES, RECIPE),
    "OPD full KL, mean of the heads": Row({**BOTH, **OPD, "lm_head": "teacher"}, (1e-3,), RECIPE),
    "OPRD + full KL, mean of the heads": Row({**BOTH, "output_loss": "full", "lm_head": "teacher"}, (2e-3,), RECIPE),
    "OPRD, plus then minus": Row({"lm_head": "teacher"}, (2e-3,), RECIPE, run=one_after_the_other),
    "OPD full KL, plus then minus": Row({**OPD, "lm_head": "keep"}, (1e-3,), RECIPE, run=one_after_the_other),
    "OPRD from the mean of the weights": Row(
        {**BOTH, "lm_head": "teacher", "model_name_or_path": str(OUT / "mean")}, (2e-3,), RECIPE
    ),
    "control: OPRD, all teachers on every row": Row({**ALL, "lm_head": "teacher"}, (2e-3,), RECIPE),
    "control: OPRD, teachers swapped": Row(
        {
            **BOTH,
            "lm_head": "teacher",
            "teachers": json.dumps(
                {a: {"model_name_or_path": str(OUT / b)} for a, b in zip(SIGNS, [*SIGNS][::-1], strict=True)}
            ),
        },
        (2e-3,),
        RECIPE,
    ),
}
TABLE = Table(
    OUT,
    ROWS,
    {
        "plus specialist": (str(OUT / "plus"), 44),
        "minus specialist": (str(OUT / "minus"), 44),
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
