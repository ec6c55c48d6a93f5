"""How an update grows: time with tokens, memory with tokens and with the vocabulary.

    python benchmarks/growth.py            # CPU; about ten minutes on one core
    python benchmarks/growth.py --device cuda

Memory is counted on fake tensors at the Qwen2.5-1.5B shape in bf16, packed, one response: peak above weights and gradients,
the larger of the teacher's forward and the student's update. Time is that of real updates of packed responses of 512 tokens
each (attention is quadratic in a response's own length, whatever is packed beside it) on a reduced model; processor
seconds on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from oprd.insight.simulate import Counts, Shapes, layout, simulate
from oprd.states import tile_mlps, use_packed_attention
from oprd.training.lessons import student_loss
from oprd.training.objective import Objective, teacher_states

VOCABULARIES = (32_000, 64_000, 128_000, 256_000)
TOKENS = (4_096, 8_192, 16_384, 32_768)
TIMED = (1_024, 2_048, 4_096, 8_192)
OBJECTIVES = {
    "OPRD": {},
    "OPRD + head metric": {"logit_weight": 1.0},
    "top-16": {"representation_weight": 0.0, "output_loss": "top_k"},
    "full KL": {"representation_weight": 0.0, "output_loss": "full"},
}


def config(vocabulary: int, scale: int = 1) -> Qwen2Config:
    """Qwen2.5-1.5B, or one of a width so many times smaller and a quarter of its depth."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=1536 // scale,
        intermediate_size=8960 // scale,
        num_hidden_layers=28 if scale == 1 else 7,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
    )


def counted(vocabulary: int, tokens: int, last_k: int | None = None, scope: str = "full", **settings: object) -> Counts:
    shape = config(vocabulary)
    chosen = Objective(tuple(range(1, 29)), 28, vocabulary, **settings)
    where = {"positions": "last_k", "position_k": last_k} if last_k else {}
    rows = ((256, tokens - 256),)
    return simulate(
        Shapes(shape, shape, rows, dtype=torch.bfloat16, is_packed=True, gradient_scope=scope, **where), chosen
    )


def gigabytes(counts: Counts) -> float:
    return round(max(counts.teacher_rise, counts.targets + counts.student_rise) / 1e9, 3)


def seconds(tokens: int, device: str, settings: dict) -> float:
    """Of one update of ``tokens`` in responses of 512, the faster of two."""
    shape = config(18_992, scale=8)
    chosen = Objective(tuple(range(1, 8)), 7, 18_992, **settings)
    shapes = Shapes(shape, shape, ((64, 448),) * (tokens // 512), is_packed=True)
    torch.manual_seed(0)
    student, teacher = (AutoModelForCausalLM.from_config(shape).to(device) for _ in range(2))
    teacher.requires_grad_(False).eval()
    student.activation_checkpointing_enable({"use_reentrant": False})
    for model in (student.train(), teacher):
        use_packed_attention(model)
        tile_mlps(model)
    rollout = layout(shapes, chosen, device)
    clock = time.process_time if device == "cpu" else synchronised
    taken = []
    for _ in range(3):
        started = clock()
        targets = teacher_states(chosen, teacher, rollout)
        student_loss(chosen, student, teacher, rollout, targets)[0].backward()
        taken.append(clock() - started)
    return min(taken[1:])


def synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip-memory", action="store_true")
    options = parser.parse_args()
    if not options.skip_memory:
        for name, settings in OBJECTIVES.items():
            found = {size: gigabytes(counted(size, 16_384, **settings)) for size in VOCABULARIES}
            print(json.dumps({"peak GB by vocabulary, 16,384 tokens": name, **found}), flush=True)
        for name, last_k, scope in (("all", None, "full"), ("last 2000", 2000, "full"), ("suffix", 2000, "suffix")):
            found = {size: gigabytes(counted(151_936, size, last_k, scope)) for size in TOKENS}
            print(json.dumps({"peak GB by tokens, OPRD": name, **found}), flush=True)
    for name, settings in OBJECTIVES.items():
        found = {size: round(seconds(size, options.device, settings), 3) for size in TIMED}
        per = {f"ms/token {size}": round(1e3 * value / size, 4) for size, value in found.items()}
        print(json.dumps({"seconds by tokens": name, **found, **per}), flush=True)


if __name__ == "__main__":
    main()
