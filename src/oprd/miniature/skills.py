"""The miniature's task in two skills, additions alone and subtractions alone, for two specialists; and in two ways, with care and
without, for a student that teaches itself."""

from __future__ import annotations

import random
from functools import cache

from oprd.miniature.task import MAX_TERMS, MIN_TERMS, Problem, make_problem, training_problem

SIGNS = {"plus": "+", "minus": "-"}
CARE = "??"  # before a prompt it asks for care
TEST, VALIDATION, TRAINING = (999, 128), (998, 32), (1, 2048)  # seed, and how many of each skill


def skilled(seed: int, count: int) -> list[Problem]:
    """``count`` problems of either skill by turns, each with its ``skill``."""
    rng = random.Random(seed)
    return [
        {**make_problem(rng, rng.randint(MIN_TERMS, MAX_TERMS), sign), "skill": skill}
        for _ in range(count)
        for skill, sign in SIGNS.items()
    ]


@cache
def _kept_apart() -> frozenset[str]:
    return frozenset(problem["prompt"] for which in (TEST, VALIDATION) for problem in skilled(*which))


def skilled_training() -> list[Problem]:
    """Problems to train on, none of them a test or validation problem."""
    return [problem for problem in skilled(*TRAINING) if problem["prompt"] not in _kept_apart()]


def skilled_batch(rng: random.Random, size: int, sign: str) -> list[Problem]:
    """Training problems of one skill and one length."""
    length, batch = rng.randint(MIN_TERMS, MAX_TERMS), []
    while len(batch) < size:
        drawn = make_problem(rng, length, sign)
        batch += [drawn] if drawn["prompt"] not in _kept_apart() else []
    return batch


def careless(problem: Problem) -> Problem:
    """The same problem with a solution that forgets every carry and borrow of an 8 or a 9."""
    chain = problem["prompt"].removesuffix("=?")
    value, written = int(chain[:2]), chain[:2]
    for sign, term in zip(chain[2::2], map(int, chain[3::2]), strict=True):
        change = term if sign == "+" else -term
        forgets = term >= 8 and value // 10 != (value + change) // 10
        value = value // 10 * 10 + (value + change) % 10 if forgets else (value + change) % 100
        written += f"{sign}{term}={value:02d}"
    return {**problem, "solution": written + f"\\boxed{{{value:02d}}}"}


def with_or_without_care(rng: random.Random, size: int) -> list[Problem]:
    """Training problems of one length: all behind `CARE` and solved, or all without it and solved carelessly."""
    length = rng.randint(MIN_TERMS, MAX_TERMS)
    problems = [training_problem(rng, length) for _ in range(size)]
    if rng.random() < 0.5:
        return [{**problem, "prompt": CARE + problem["prompt"]} for problem in problems]
    return [careless(problem) for problem in problems]
