"""Chained arithmetic modulo 100 with written-out steps: the miniature's task and its tokenizer.

A problem is ``37+4-9+2-1=?``; the answer repeats the chain with every partial result and ends in ``\\boxed{NN}``.
"""

from __future__ import annotations

import random
from functools import cache

MIN_TERMS, MAX_TERMS = 4, 8
MAX_RESPONSE_TOKENS = 44  # of the tokenizer in which a number is one token; 56 where every digit is one
MAX_RESPONSE_DIGITS = 56
HELD_OUT_SEED, NUM_HELD_OUT = 999, 256
VALIDATION_SEED, NUM_VALIDATION = 998, 64

Problem = dict[str, str]  # prompt, solution, answer


def make_problem(rng: random.Random, num_terms: int | None = None, signs: str = "+-") -> Problem:
    """Draw one problem; ``num_terms`` one-digit additions and subtractions (4 to 8 unless given), of ``signs`` alone."""
    num_terms = num_terms or rng.randint(MIN_TERMS, MAX_TERMS)
    value = rng.randrange(100)
    prompt = solution = f"{value:02d}"
    for _ in range(num_terms):
        sign = rng.choice(signs) if len(signs) > 1 else signs
        term = rng.randint(1, 9)
        value = (value + term if sign == "+" else value - term) % 100
        prompt += f"{sign}{term}"
        solution += f"{sign}{term}={value:02d}"
    return {"prompt": prompt + "=?", "solution": solution + f"\\boxed{{{value:02d}}}", "answer": f"{value:02d}"}


@cache
def _fixed_set(seed: int, size: int) -> tuple[Problem, ...]:
    rng = random.Random(seed)
    return tuple(make_problem(rng) for _ in range(size))


def held_out() -> list[Problem]:
    """The 256 test problems; no training or validation problem repeats one."""
    return list(_fixed_set(HELD_OUT_SEED, NUM_HELD_OUT))


@cache
def _test_prompts() -> frozenset[str]:
    return frozenset(problem["prompt"] for problem in held_out())


def validation() -> list[Problem]:
    """64 problems for choosing settings (learning rates, checkpoints), apart from the test problems."""
    return [p for p in _fixed_set(VALIDATION_SEED, NUM_VALIDATION) if p["prompt"] not in _test_prompts()]


@cache
def _reserved_prompts() -> frozenset[str]:
    return _test_prompts() | {problem["prompt"] for problem in validation()}


def training_problem(rng: random.Random, num_terms: int | None = None) -> Problem:
    """A problem that is in neither the test nor the validation set."""
    while (problem := make_problem(rng, num_terms))["prompt"] in _reserved_prompts():
        pass
    return problem


def training_problems(count: int, seed: int) -> list[Problem]:
    """``count`` training problems from ``seed``."""
    rng = random.Random(seed)
    return [training_problem(rng) for _ in range(count)]


def build_tokenizer(*, digits: bool = False):
    """A BPE tokenizer in which every two-digit number (with ``digits`` every digit) and ``\\boxed{`` is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    numbers = "" if digits else r"\d+|"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(numbers + r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    corpus = [f"{value:02d}+{term}-{term}=?\\boxed{{{value:02d}}}" for value in range(100) for term in range(10)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=256
    )
