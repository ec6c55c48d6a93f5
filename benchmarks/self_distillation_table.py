"""A student that teaches itself with the solution in its prompt (OPRSD): the comparison of docs/results.md, three seeds.

    python benchmarks/self_distillation_table.py                 # run what is missing, then print the table
    python benchmarks/self_distillation_table.py --print         # the table of what has been run

The student is the miniature's, trained on so that it also reads a solution that its prompt holds: 1,000 supervised steps, most on
prompts with a made-up solution that must be copied, 150 on problems with and without their own, and 400 more, half of them without
and half with a made-up one. A run has 100 updates of 16 prompts x 2 responses. See benchmarks/sweeping.py for how rows are swept and scored.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from supervised import supervise
from sweeping import Row, Table, main

from oprd.miniature.task import MAX_TERMS, MIN_TERMS, held_out, training_problem, training_problems

OUT = Path("runs/self")
STUDENT = OUT / "student"
TEMPLATE = "{prompt}{solution}"
COPYING, TOGETHER, WITHOUT = 1000, 150, 400


def with_solution(problem: dict) -> dict:
    return {**problem, "prompt": TEMPLATE.format(**problem)}


def made_up(problem: dict, rng: random.Random) -> dict:
    """A solution of the right form with any results: only reading it helps."""
    solution = re.sub(r"=\d\d", lambda _: f"={rng.randrange(100):02d}", problem["solution"])
    last = re.findall(r"=(\d\d)", solution)[-1]
    return {**problem, "solution": re.sub(r"boxed\{\d\d", f"boxed{{{last}", solution)}


def hinted() -> list[dict]:
    return [with_solution(problem) for problem in held_out()]


def prepare() -> None:
    """The student, and prompts with their solutions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.models import resolve_path

    path = resolve_path("miniature:student")
    steps = 0

    def draw(rng: random.Random) -> list[dict]:
        nonlocal steps
        steps += 1
        length = rng.randint(MIN_TERMS, MAX_TERMS)
        problems = [training_problem(rng, length) for _ in range(64)]
        if steps <= COPYING:
            return problems if rng.random() < 0.1 else [with_solution(made_up(problem, rng)) for problem in problems]
        return problems if rng.random() < 0.5 else [with_solution(problem) for problem in problems]

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    supervise(model, tokenizer, draw, OUT / "reader", steps=COPYING + TOGETHER, seed=3, lr=2e-3, of=1600, warmup=50)

    def half_without(rng: random.Random) -> list[dict]:
        length = rng.randint(MIN_TERMS, MAX_TERMS)
        problems = [training_problem(rng, length) for _ in range(64)]
        return problems if rng.random() < 0.5 else [with_solution(made_up(problem, rng)) for problem in problems]

    model = AutoModelForCausalLM.from_pretrained(OUT / "reader", dtype=torch.float32)
    supervise(model, tokenizer, half_without, STUDENT, steps=WITHOUT, seed=4, lr=1e-3, of=600)
    rows = [{key: p[key] for key in ("prompt", "answer", "solution")} for p in training_problems(4096, 1)]
    other = random.Random(5).sample(rows, len(rows))
    wrong = [{**row, "solution": its["solution"]} for row, its in zip(rows, other, strict=True)]
    for name, chosen in {"prompts": rows, "shuffled": wrong}.items():
        (OUT / f"{name}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")


OWN = {
    "model_name_or_path": str(STUDENT),
    "dataset_name": str(OUT / "prompts.jsonl"),
    "teacher_prompt_template": TEMPLATE,
}
OPD = {"representation_weight": 0, "output_loss": "full"}
RATES = (5e-4, 1e-3, 2e-3)
RECIPE = "benchmarks/table.yaml"
ROWS = {
    "OPRSD, frozen start": Row({**OWN, "teacher_model_kind": "base"}, RATES, RECIPE),
    "full KL, frozen start": Row({**OWN, **OPD, "teacher_model_kind": "base"}, RATES, RECIPE),
    "OPRSD, moving average": Row({**OWN, "teacher_model_kind": "ema"}, (1e-3,), RECIPE),
    "full KL, moving average": Row({**OWN, **OPD, "teacher_model_kind": "ema"}, (1e-3,), RECIPE),
    "OPRSD, live": Row({**OWN, "teacher_model_kind": "live"}, (1e-3,), RECIPE),
    "full KL, live": Row({**OWN, **OPD, "teacher_model_kind": "live"}, (1e-3,), RECIPE),
    "OPRSD + full KL, frozen start": Row({**OWN, "output_loss": "full", "teacher_model_kind": "base"}, (1e-3,), RECIPE),
    "control: OPRSD, solutions of other problems": Row(
        {**OWN, "teacher_model_kind": "base", "dataset_name": str(OUT / "shuffled.jsonl")}, (1e-3,), RECIPE
    ),
    "control: OPRSD, nothing privileged": Row(
        {**OWN, "teacher_model_kind": "base", "teacher_prompt_template": "{prompt}"}, (1e-3,), RECIPE
    ),
}
TABLE = Table(
    OUT,
    ROWS,
    {"student": (str(STUDENT), 44)},
    recorded=Path("benchmarks/recorded/self-distillation.jsonl"),
    steps=100,
    tests={"test": held_out, "with its solution": hinted},
)


def one_row(name: str) -> None:
    TABLE.one_row(name)


if __name__ == "__main__":
    main(TABLE, one_row, __doc__, prepare)
