"""What every method updates on: stored rollouts, micro-batches of them, and models of given shapes.

Response lengths are a log-normal that is cut off at 16,384 tokens, as generation is, with a mean of 5,700: what a small
reasoning model writes. They are quantiles instead of draws, so that mean and maximum hold in a small batch too.
Reduced shapes shorten every length by one factor: the quotient of attention to matrix products, of padding to tokens and
of lengths to each other are those of the full shape.

Shapes: B sequences, P prompt columns, C completion columns.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor, nn

MEAN, LONGEST, SPREAD = 5_700, 16_384, 0.8  # response tokens, and the log-normal's sigma
PROMPT = (60, 300)
FIRST_ID = 2  # ids below are kept for padding and ends


@dataclass(frozen=True)
class Shape:
    """A Qwen2. ``scale``: its lengths and kernel tiles over those of the full shape. ``rollouts``: default batch."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    dtype: str
    scale: float
    rollouts: int


# Width sets the scale of lengths and vocabulary, so that body, attention, head and logits keep their shares. Depth is kept.
SHAPES = {
    "qwen2.5-1.5b": Shape(28, 1536, 12, 2, 8960, 151_936, "bfloat16", 1.0, 64),
    "medium": Shape(28, 192, 6, 1, 1120, 18_992, "float32", 1 / 8, 32),
    "small": Shape(28, 64, 4, 1, 373, 6_331, "float32", 1 / 24, 32),
    "tiny": Shape(2, 16, 2, 1, 93, 512, "float32", 1 / 400, 8),
}


@dataclass(frozen=True)
class Models:
    student: nn.Module
    teacher: nn.Module


@dataclass(frozen=True)
class Batch:
    """A padded micro-batch, as TRL makes them: prompts padded on the left, completions on the right. ``total``: response
    tokens of the whole batch, by which every loss divides."""

    prompt_ids_BP: Tensor
    prompt_mask_BP: Tensor
    completion_ids_BC: Tensor
    completion_mask_BC: Tensor
    total: int

    @property
    def ids_BS(self) -> Tensor:
        return torch.cat([self.prompt_ids_BP, self.completion_ids_BC], 1)

    @property
    def mask_BS(self) -> Tensor:
        return torch.cat([self.prompt_mask_BP, self.completion_mask_BC], 1)


def mean_cut_off(mu: float, sigma: float, longest: float) -> float:
    """Mean of ``min(X, longest)`` for ``log X ~ N(mu, sigma^2)``."""
    cdf, z = NormalDist().cdf, (math.log(longest) - mu) / sigma
    return math.exp(mu + sigma**2 / 2) * cdf(z - sigma) + longest * (1 - cdf(z))


def response_lengths(count: int) -> list[int]:
    """``count`` lengths, ascending, of mean 5,700 and at most 16,384 tokens."""
    low, high = 0.0, math.log(LONGEST) + 4 * SPREAD
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_cut_off(middle, SPREAD, LONGEST) < MEAN else (low, middle)
    normal = NormalDist(low, SPREAD)
    return [min(round(math.exp(normal.inv_cdf((i + 0.5) / count))), LONGEST) for i in range(count)]


def make_rollouts(shape: Shape, count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """``count`` rollouts of random ids, in random order."""
    rng = random.Random(seed)
    lengths = response_lengths(count)
    rng.shuffle(lengths)

    def ids(length: float) -> list[int]:
        return [rng.randrange(FIRST_ID, shape.vocab) for _ in range(max(round(length * shape.scale), 1))]

    return [{"prompt": ids(rng.uniform(*PROMPT)), "response": ids(length)} for length in lengths]


def write_rollouts(path: Path, rollouts: list[dict], **about: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rollouts": rollouts}))


def read_rollouts(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rollouts"]


def microbatches(rollouts: list[dict], size: int, *, padded_to: str, device: str = "cpu") -> Iterator[Batch]:
    """Rollouts in their order, ``size`` at a time, with TRL's own padding.

    Args:
        padded_to: ``batch`` pads each to the longest of the whole batch (TRL pads once, before it splits); ``microbatch``
            to the longest beside it.

    Raises:
        ValueError: ``size`` does not divide the batch; TRL's split would leave rows out.
    """
    from trl.trainer.utils import split_tensor_dict

    if len(rollouts) % size:
        raise ValueError(f"{len(rollouts)} rollouts do not split into micro-batches of {size}.")
    parts = len(rollouts) // size
    if padded_to == "batch":
        split = split_tensor_dict(padded(rollouts, device), parts)
    else:
        split = (padded(rollouts[i * size : (i + 1) * size], device) for i in range(parts))
    for part in split:
        yield _batch(part, rollouts)


def packed_microbatches(rollouts: list[dict], size: int, *, device: str = "cpu") -> Iterator[Batch]:
    """As a trainer cuts them for packing: at most ``size`` times the longest rollout's tokens in a micro-batch."""
    from oprd.states import fill

    lengths = [len(row["prompt"]) + len(row["response"]) for row in rollouts]
    for rows in fill(lengths, size * max(lengths)):
        yield _batch(padded([rollouts[row] for row in rows], device), rollouts)


def padded(rows: list[dict], device: str) -> dict[str, Tensor]:
    """Rows as TRL pads them."""
    from trl.trainer.utils import pad

    columns = {}
    for name, key, side in (("prompt", "prompt", "left"), ("completion", "response", "right")):
        ids = [torch.tensor(row[key]) for row in rows]
        columns[f"{name}_ids"] = pad(ids, padding_value=0, padding_side=side).to(device)
        masks = [torch.ones_like(row) for row in ids]
        columns[f"{name}_mask"] = pad(masks, padding_value=0, padding_side=side).to(device)
    return columns


def _batch(columns: dict[str, Tensor], rollouts: list[dict]) -> Batch:
    total = sum(len(rollout["response"]) for rollout in rollouts)
    return Batch(*(columns[f"{n}_{kind}"] for n in ("prompt", "completion") for kind in ("ids", "mask")), total)


def make_model(shape: Shape, seed: int, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """A Qwen2 of random weights with an untied head; on fake tensors within ``FakeTensorMode``."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


def make_models(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Models:
    """A student that trains, with gradient checkpointing, and a frozen teacher of the same shape and other weights."""
    student, teacher = (make_model(shape, seed, dtype, device) for seed in (0, 1))
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    return Models(student, teacher.eval().requires_grad_(False))
