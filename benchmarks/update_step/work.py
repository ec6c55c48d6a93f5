"""What an update computes at the full shape, in FLOPs, whatever the machine: TRL's trainer and ours on the realistic lengths.

    python -m benchmarks.update_step.work

Per token and pass a block's matrix products, per pair of tokens its attention (causal, so half of all pairs), per projected
position and pass a head. A pass is one product with every weight; attention's backward takes 2.5 of its forwards.
TRL reads every row at the width of the longest and projects the response tokens alone (as it does on a GPU), each head once
in the forward and once more in backward. Prompts have 180 tokens. Norms, activations and the optimiser are left out.
"""

from __future__ import annotations

from benchmarks.update_step.workload import SHAPES, response_lengths

SHAPE, PROMPT, ROWS, K = SHAPES["qwen2.5-1.5b"], 180, 64, 2000
HEAD_SIZE = SHAPE.width // SHAPE.heads
BLOCK = 2 * (
    2 * SHAPE.width**2 + 2 * SHAPE.width * SHAPE.kv_heads * HEAD_SIZE + 3 * SHAPE.width * SHAPE.intermediate
)  # FLOPs of a token in a block's products
PAIR = 4 * SHAPE.width  # of a pair of tokens in its attention
HEAD = 2 * SHAPE.width * SHAPE.vocab  # of a position in a head
GRAM = 2 * SHAPE.vocab * SHAPE.width**2  # of one product of two heads
TRAINED, RUN = (4, 4.5), (1, 1)  # forward, recomputation and backward; forward: in products and in attention


def body(tokens: float, pairs: float, passes: tuple[float, float]) -> float:
    return SHAPE.layers * (BLOCK * tokens * passes[0] + PAIR * pairs * passes[1])


def whole(length: int) -> float:
    """Student and teacher over one document, full gradient."""
    return sum(body(length, length**2 / 2, passes) for passes in (TRAINED, RUN))


def suffix(length: int, k: int) -> float:
    before = max(length - k, 0)
    rest = length**2 / 2 - before**2 / 2
    return body(length, length**2 / 2, RUN) + body(before, before**2 / 2, RUN) + body(length - before, rest, TRAINED)


def main() -> None:
    responses = response_lengths(ROWS)
    lengths = [PROMPT + response for response in responses]
    head = 6 * HEAD * sum(responses)  # student and teacher, each again in backward, and the student's two gradients
    microbatches = sum(lengths) / max(lengths)
    found = {
        "TRL": ROWS * whole(max(lengths)) + head,
        "TRL, trimmed": sum(map(whole, lengths)) + head,
        "ours: OPRD": sum(map(whole, lengths)),
        "ours: OPRD + head metric": sum(map(whole, lengths)) + 5 * GRAM * microbatches,
        "ours: OPRD last k, suffix": sum(suffix(length, K) for length in lengths),
        "ours: full KL": sum(map(whole, lengths)) + 4 * HEAD * sum(responses),
        "ours: top-16 renormalised": sum(map(whole, lengths)) + HEAD * sum(responses),
    }
    print("| | PFLOP | over TRL | over TRL, trimmed |\n|---|---|---|---|")
    for name, flops in found.items():
        print(f"| {name} | {flops / 1e15:.1f} | {flops / found['TRL']:.2f} | {flops / found['TRL, trimmed']:.2f} |")
    extra = found["ours: OPRD + head metric"] / found["ours: OPRD"] - 1
    print(f"\nHead metric over OPRD: {100 * extra:.1f} % (five products of head by head a micro-batch).")


if __name__ == "__main__":
    main()
