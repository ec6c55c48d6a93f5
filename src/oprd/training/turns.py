"""Benchmark answers over several turns: the trainer's own rollouts, tools and all, as an engine of `oprd.evaluation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oprd._compat import rollout_in_turns, rollout_sampling
from oprd.evaluation.sampling import Answer, Sampling, TransformersEngine
from oprd.models import text_config


class TurnsEngine:
    """Answers with calls in them, as an `Engine`. ``max_new_tokens`` bounds a whole answer, tool results included.

    What is graded, and counted as an answer's tokens, is what the student itself wrote.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self.tokenizer = trainer, trainer.processing_class
        self.context = getattr(text_config(trainer.model), "max_position_embeddings", None)
        self.name = f"{'vllm' if trainer.use_vllm else TransformersEngine.name} (rollouts with tools)"

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
        """See `Engine`. vLLM takes no seed. The model's mode and the random state outside are left as they are."""
        trainer, model = self._trainer, self._trainer.model
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(), rollout_sampling(trainer, **chosen):
                torch.manual_seed(seed)
                responses, own = rollout_in_turns(trainer, [list(ids) for ids in prompts])
        finally:
            model.train(was_training)
        ends = set(trainer.eos_token_ids)
        return [
            own_answer(self.tokenizer, ids, said, cut_off=not said[-1] or ids[-1] not in ends)
            for ids, said in zip(responses, own, strict=True)
        ]


def own_answer(tokenizer: Any, ids: Sequence[int], own: Sequence[int], *, cut_off: bool) -> Answer:
    """What the student itself wrote of a response: where ``own`` is 1."""
    written = [token for token, is_own in zip(ids, own, strict=True) if is_own]
    return Answer(tokenizer.decode(written, skip_special_tokens=True), len(written), cut_off)
