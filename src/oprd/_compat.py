"""Names that TRL and transformers do not promise to keep, imported in one place.

Tested with ``trl>=1.16,<1.17``. Each entry says what would let it go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Builds the architecture named in the checkpoint's config; until TRL exports a public loader.
from trl.trainer.utils import RepeatSampler, create_model_from_path

# DeepSpeed inference engine for a frozen model; until accelerate's prepare_model(evaluation_mode=True) covers ZeRO-3.
from trl.models import prepare_deepspeed  # isort: skip

# Whether a vLLM that TRL supports is installed; until TRL exports the question.
from trl.import_utils import is_vllm_available  # isort: skip

# A model that can generate, out of whatever wraps it for training; until accelerate offers the same.
from trl.models import unwrap_model_for_generation  # isort: skip

# Tiled output losses (Triton, or slower torch ops); until TRL exports them from trl.kernels.
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction  # isort: skip
from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton  # isort: skip

LOGPROB_TILE = 32_768  # tokens of a vocabulary tile


def has_tiled_kernels(device: torch.device) -> bool:
    """Whether TRL's tiled kernels run in Triton there."""
    return _use_triton(device)


def tiled_reverse_kl(own: Any, other: Any, own_Nd: torch.Tensor, other_Nd: torch.Tensor) -> torch.Tensor:
    """Reverse KL ``[N]``, float32, between the distributions of two heads at states ``[N, d]``; gradients to ``own``'s.

    ``own``, ``other``: `oprd.objectives.projection.Projection`, of one temperature. Tiles are multiplied in autocast's dtype
    (else the states') and logits kept in float32.
    """
    divergence_N, _ = ChunkedDivergenceFunction.apply(
        own_Nd,
        own.weight_Vd,
        own.bias_V,
        other_Nd,
        other.weight_Vd,
        other.bias_V,
        1.0,  # reverse
        own.temperature,
        own.scale,
        own.softcap,
        other.scale,
        other.softcap,
    )
    return divergence_N


def tiled_log_probability(head: Any, states_Nd: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """Log-probability ``[N]``, float32, of one token of each position. Logits have autocast's dtype, else the states'."""
    return ChunkedLogProbFunction.apply(
        states_Nd,
        head.weight_Vd,
        head.bias_V,
        tokens_N,
        head.temperature,
        LOGPROB_TILE,
        head.softcap,
        head.scale,
        (),
    )[0]


@contextmanager
def vllm_sampling(trainer: Any, *, temperature: float, top_p: float, max_tokens: int) -> Iterator[Any]:
    """The trainer's vLLM with its present weights and other sampling; until TRL's generation takes sampling by call."""
    generation = trainer.vllm_generation
    if trainer._last_loaded_step != trainer.state.global_step:
        generation.sync_weights()
        trainer._last_loaded_step = trainer.state.global_step
    wanted = {"temperature": temperature, "top_p": top_p, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    wanted["max_completion_length"] = max_tokens
    before = {name: getattr(generation, name) for name in wanted}
    vars(generation).update(wanted)
    try:
        yield generation
    finally:
        vars(generation).update(before)


__all__ = [
    "RepeatSampler",
    "create_model_from_path",
    "has_tiled_kernels",
    "is_vllm_available",
    "prepare_deepspeed",
    "tiled_log_probability",
    "tiled_reverse_kl",
    "unwrap_model_for_generation",
    "vllm_sampling",
]
