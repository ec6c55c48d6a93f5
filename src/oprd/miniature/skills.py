"""The miniature's task in two skills, additions alone and subtractions alone: what two specialists are good at."""

from __future__ import annotations

import random
from functools import cache

from oprd.miniature.task import MAX_TERMS, MIN_TERMS, Problem, make_problem

SIGNS = {"plus": "+", "minus": "-"}
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
