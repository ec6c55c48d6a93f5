"""Make the miniature's models again, from fixed seeds, by supervised training.

One run of a 2,000-step cosine schedule gives student and teacher: the weights after 850 and 1,200 steps. They share an
origin, and the teacher's LM head has moved away from the student's by a fifth. Two more runs, each from a seed of its own,
give a teacher of another shape and a student with another tokenizer; two that go on from the student give specialists, and one
that goes on from the teacher a student that answers with care only where its prompt asks for it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from oprd.miniature.skills import (
    SIGNS,
    TEST,
    VALIDATION,
    skilled,
    skilled_batch,
    skilled_training,
    with_or_without_care,
)
from oprd.miniature.task import (
    MAX_TERMS,
    MIN_TERMS,
    Problem,
    build_tokenizer,
    held_out,
    training_problem,
    training_problems,
    validation,
)

BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS, SCHEDULE_STEPS = 64, 3e-3, 50, 2000
TRAIN_SEED, NUM_TRAIN = 1, 4096


Draw = Callable[[random.Random], list[Problem]]


def mixed(rng: random.Random) -> list[Problem]:
    """A batch of training problems, of one length: no padding."""
    num_terms = rng.randint(MIN_TERMS, MAX_TERMS)
    return [training_problem(rng, num_terms) for _ in range(BATCH_SIZE)]


@dataclass(frozen=True)
class Run:
    """One supervised run; ``saved`` says after which step the weights are which model.

    ``start``: the model that it goes on from, where that is not a fresh one. ``rate``, ``warmup`` and ``schedule``: learning rate,
    and steps of its warm-up and of its cosine.
    """

    saved: dict[int, str]
    seed: int
    shape: dict[str, int] = field(default_factory=dict)
    digits: bool = False
    start: str | None = None
    draw: Draw = mixed
    rate: float = LEARNING_RATE
    warmup: int = WARMUP_STEPS
    schedule: int = SCHEDULE_STEPS


def _specialist(skill: str) -> Run:
    draw = partial(skilled_batch, size=BATCH_SIZE, sign=SIGNS[skill])
    return Run({400: skill}, seed=7, start="student", draw=draw, rate=1e-3, warmup=20, schedule=600)


_care = partial(with_or_without_care, size=BATCH_SIZE)
RUNS = (
    Run({850: "student", 1200: "teacher"}, seed=0),
    Run({1250: "wide-teacher"}, seed=1, shape={"num_layers": 6, "width": 96}),
    Run({500: "digit-student"}, seed=2, digits=True),
    *map(_specialist, SIGNS),
    Run({300: "careless"}, seed=8, start="teacher", draw=_care, rate=1e-3, warmup=20, schedule=400),
)


def build_model(tokenizer, *, seed: int = 0, num_layers: int = 4, width: int = 64, tied: bool = False):
    """A freshly initialised Qwen3 of ``num_layers`` x ``width`` for the miniature's tokenizer (float32)."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=width // 4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).float()


def _batch(tokenizer, problems: list[Problem]):
    import torch

    prompts = tokenizer([problem["prompt"] for problem in problems])["input_ids"]
    answers = tokenizer([problem["solution"] for problem in problems])["input_ids"]
    ids = torch.tensor([p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)])
    labels = ids.clone()
    labels[:, : len(prompts[0])] = -100
    return ids, labels


def write_problems(path: Path, problems: list[Problem]) -> None:
    """Prompts, answers and skills as json lines."""
    rows = [json.dumps({key: p[key] for key in ("prompt", "answer", "skill") if key in p}) for p in problems]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def rebuild(directory: Path, *, announce=print) -> None:
    """Train from scratch and write the models and the problem sets under ``directory`` (a quarter of an hour)."""
    directory.mkdir(parents=True, exist_ok=True)
    write_problems(directory / "train.jsonl", training_problems(NUM_TRAIN, TRAIN_SEED))
    write_problems(directory / "validation.jsonl", validation())
    write_problems(directory / "test.jsonl", held_out())
    write_problems(directory / "skills-train.jsonl", skilled_training())
    write_problems(directory / "skills-validation.jsonl", skilled(*VALIDATION))
    write_problems(directory / "skills-test.jsonl", skilled(*TEST))
    for run in RUNS:
        _supervise(run, directory, announce)


def _supervise(run: Run, directory: Path, announce) -> None:
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    tokenizer = build_tokenizer(digits=run.digits)
    if run.start is None:
        model = build_model(tokenizer, seed=run.seed, **run.shape)
    else:
        model = AutoModelForCausalLM.from_pretrained(directory / run.start, dtype=torch.float32, use_safetensors=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, run.warmup, run.schedule)
    rng = random.Random(run.seed)
    model.train()
    for step in tqdm(range(1, max(run.saved) + 1), desc=f"training {', '.join(run.saved.values())}", unit="step"):
        ids, labels = _batch(tokenizer, run.draw(rng))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in run.saved:
            model.save_pretrained(directory / run.saved[step])
            tokenizer.save_pretrained(directory / run.saved[step])
            announce(f"{run.saved[step]}: step {step}, loss {loss.item():.4f}")
