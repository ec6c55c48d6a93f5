"""Sample k answers to every problem with transformers, and grade them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from oprd.evaluation.grading import grade
from oprd.evaluation.metrics import avg_at_k, best_at_k, bootstrap_interval
from oprd.models import end_token_ids


@dataclass(frozen=True)
class Evaluation:
    """Outcome of ``k`` samples for each problem."""

    correct: list[list[bool]]
    responses: list[list[str]]
    lengths: list[list[int]]

    def summary(self) -> dict[str, float]:
        """Avg@k with its 95 % interval, Best@k, mean length in tokens."""
        low, high = bootstrap_interval(self.correct)
        lengths = [length for row in self.lengths for length in row]
        return {
            "avg_at_k": avg_at_k(self.correct),
            "avg_low": low,
            "avg_high": high,
            "best_at_k": best_at_k(self.correct),
            "mean_length": sum(lengths) / len(lengths),
            "samples": len(self.correct[0]),
            "problems": len(self.correct),
        }


@torch.no_grad()
def evaluate(
    model,
    tokenizer,
    problems: Sequence[dict[str, str]],
    *,
    samples: int = 16,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int,
    batch_size: int = 512,
    seed: int = 0,
    progress: str | None = None,
) -> Evaluation:
    """Draw ``samples`` answers to each problem (a text ``prompt``, reference ``answer``) and grade the last boxed one.

    ``progress`` names a progress bar on stderr. The random state outside is left as it was.
    """
    from tqdm.auto import tqdm
    from transformers import GenerationConfig

    ends = end_token_ids(tokenizer, model.generation_config)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
        cache_implementation="static",
        disable_compile=True,
    )
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt"]))  # alike lengths pad little
    jobs = [index for index in order for _ in range(samples)]
    responses: list[list[str]] = [[] for _ in problems]
    lengths: list[list[int]] = [[] for _ in problems]
    was_training = model.training
    model.eval()
    end_ids = torch.tensor(sorted(ends), device=model.device)
    try:
        with (
            torch.random.fork_rng(),
            tqdm(total=len(jobs), desc=progress, unit="answer", disable=progress is None) as bar,
        ):
            torch.manual_seed(seed)
            for start in range(0, len(jobs), batch_size):
                batch = jobs[start : start + batch_size]
                texts = [problems[i]["prompt"] for i in batch]
                inputs = tokenizer(texts, padding=True, return_tensors="pt", padding_side="left")
                inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
                generated = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
                ended = torch.isin(generated, end_ids).cumsum(1) > 0
                kept = (~ended).sum(1) + ended.any(1)  # the end token counts
                for index, ids, length in zip(batch, generated, kept.tolist(), strict=True):
                    responses[index].append(tokenizer.decode(ids[:length], skip_special_tokens=True))
                    lengths[index].append(length)
                bar.update(len(batch))
    finally:
        model.train(was_training)
    correct = [
        [grade(text, problem["answer"]) for text in row] for row, problem in zip(responses, problems, strict=True)
    ]
    return Evaluation(correct, responses, lengths)
