"""Names that TRL and transformers do not promise to keep, imported in one place.

Tested with ``trl>=1.16,<1.17``. Each entry says what would let it go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Builds the architecture named in the checkpoint's config; until TRL exports a public loader.
from trl.trainer.utils import RepeatSampler, create_model_from_path

# DeepSpeed inference engine for a frozen model; until accelerate's prepare_model(evaluation_mode=True) covers ZeRO-3.
from trl.models import prepare_deepspeed  # isort: skip

# Whether a vLLM that TRL supports is installed; until TRL exports the question.
from trl.import_utils import is_vllm_available  # isort: skip

# A model that can generate, out of whatever wraps it for training; until accelerate offers the same.
from trl.models import unwrap_model_for_generation  # isort: skip


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
    "is_vllm_available",
    "prepare_deepspeed",
    "unwrap_model_for_generation",
    "vllm_sampling",
]
