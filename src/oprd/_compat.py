"""Names that TRL and transformers do not promise to keep, imported in one place.

Tested with ``trl>=1.16,<1.17``. Each entry says what would let it go.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import GenerationConfig

# Builds the architecture named in the checkpoint's config; until TRL exports a public loader.
from trl.trainer.utils import RepeatSampler, create_model_from_path

# DeepSpeed inference engine for a frozen model; until accelerate's prepare_model(evaluation_mode=True) covers ZeRO-3.
from trl.models import prepare_deepspeed  # isort: skip

# Whether a vLLM that TRL supports is installed; until TRL exports the question.
from trl.import_utils import is_vllm_available  # isort: skip

# A model that can generate, out of whatever wraps it for training; until accelerate offers the same.
from trl.models import unwrap_model_for_generation  # isort: skip

# Whether earlier messages stay as they are when later ones come, and answers read as messages; until TRL exports them.
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response  # isort: skip

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


def rollout_in_turns(trainer: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """The trainer's rollout with tools from prompts as token ids: responses, and 1 where the model itself wrote, 0 in tool
    results; until TRL's rollout takes ids."""
    written = trainer._generate_single_turn(prompts, None, {})
    read = [
        [parse_response(trainer._tokenizer, ids, prefix=prompt, tools=trainer.tools)]
        for ids, prompt in zip(written, prompts, strict=True)
    ]
    chats: list[list] = [[] for _ in prompts]  # only added to
    own, _, responses, *_ = trainer._tool_call_loop(chats, prompts, written, read, None, {})
    return responses, own


@contextmanager
def rollout_sampling(trainer: Any, *, temperature: float, top_p: float, max_tokens: int) -> Iterator[None]:
    """The trainer's own rollouts with other sampling; until TRL's generation takes sampling by call. 0 is greedy."""
    drawn = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    plain = {"min_p": None, "repetition_penalty": 1.0, "max_new_tokens": max_tokens}
    chosen = {**trainer.generation_kwargs, **drawn, **plain}
    wanted = {"generation_kwargs": chosen, "max_completion_length": max_tokens}
    if not trainer.use_vllm:
        wanted["generation_config"] = GenerationConfig(**chosen, disable_compile=True)
    before = {name: getattr(trainer, name) for name in wanted}
    vars(trainer).update(wanted)
    try:
        with (
            vllm_sampling(trainer, temperature=temperature, top_p=top_p, max_tokens=max_tokens)
            if trainer.use_vllm
            else nullcontext()
        ):
            yield
    finally:
        vars(trainer).update(before)


__all__ = [
    "RepeatSampler",
    "create_model_from_path",
    "has_tiled_kernels",
    "is_chat_template_prefix_preserving",
    "is_vllm_available",
    "prepare_deepspeed",
    "rollout_in_turns",
    "rollout_sampling",
    "tiled_log_probability",
    "tiled_reverse_kl",
    "unwrap_model_for_generation",
    "vllm_sampling",
]
