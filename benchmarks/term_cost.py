"""What single terms of an update cost, where a whole update is too noisy to tell: the head metric, states and their changes,
attention maps, and what is only logged.

    OMP_NUM_THREADS=1 python benchmarks/term_cost.py

Sizes are those of a packed micro-batch of ``benchmarks.update_step --shape medium --num-rollouts 8``: 28 layers, d = 192,
V = 18,992, 1,484 positions; attention maps of 6 heads of 32 (2 for keys) on 64 keys and the first. Processor seconds, forward and backward, the best of eight.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch

from oprd.objectives import (
    Since,
    attention_map_loss,
    head_grams,
    logit_mse,
    state_term,
    streaming,
    teacher_maps,
    transition_term,
)

LAYERS, WIDTH, VOCABULARY, POSITIONS = 28, 192, 18_992, 1_484
HEADS, KEY_HEADS, KEYS = 6, 2, 64


def best(run: Callable[[], None], times: int = 8) -> float:
    taken = []
    for _ in range(times):
        started = time.process_time()
        run()
        taken.append(time.process_time() - started)
    return min(taken)


def main() -> None:
    torch.manual_seed(0)
    own, other = (torch.randn(VOCABULARY, WIDTH) for _ in range(2))
    states, targets = (torch.randn(POSITIONS, WIDTH) for _ in range(2))
    weights, places = torch.rand(POSITIONS), torch.arange(POSITIONS)
    own.requires_grad_(), states.requires_grad_()

    def head_metric() -> None:
        (weights * logit_mse(states, targets, head_grams(own, other))).sum().backward()

    def state_terms() -> None:
        for _ in range(LAYERS):
            state_term(states, places, targets, weights)[0].backward()

    def transition_terms() -> None:
        since = Since(states, places[:-1], targets[:-1])
        for _ in range(LAYERS):
            transition_term(states, places[1:], targets[1:], weights[1:], since).loss.backward()

    query, other_query = torch.randn(2, POSITIONS, HEADS, WIDTH // HEADS)
    key, other_key = torch.randn(2, POSITIONS, KEY_HEADS, WIDTH // HEADS)
    query.requires_grad_(), key.requires_grad_()

    def attention_maps() -> None:
        for _ in range(LAYERS):
            maps = teacher_maps(other_query, other_key, places, places, KEYS)
            attention_map_loss(query, key, maps, places, places, weights).backward()

    print(f"head metric           {best(head_metric):.3f} s")
    whole = best(state_terms)
    with mock.patch.object(streaming, "cosine_similarity", lambda a, _: a.new_zeros(len(a))):
        without = best(state_terms)
    print(f"state terms           {whole:.3f} s, of which logged cosines {whole - without:.3f} s")
    print(f"transition terms      {best(transition_terms):.3f} s")
    print(f"attention maps        {best(attention_maps, 3):.3f} s, the teacher's among it")


if __name__ == "__main__":
    main()
