"""What each GPU holds for students of 1.5B, 8B and 32B on 1, 8 and 64 GPUs: the tables of docs/scale.md.

    python benchmarks/scale_plans.py [--gpu_memory 80] [--models 1.5B 8B 32B]

From shapes alone (``oprd.insight.plan``); no weights, no GPU. Weights and optimiser in float32, forward in bf16, packed
micro-batches, activation checkpointing, rollouts by a vLLM that sleeps during the update.
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig
from transformers import PretrainedConfig, Qwen2Config, Qwen3Config

from oprd.insight import plan

GB = 10**9
VOCABULARY, PROMPT = 151_936, 512


def _qwen3(layers: int, width: int, heads: int, inner: int) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=inner,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        max_position_embeddings=40_960,
    )


MODELS: dict[str, tuple[PretrainedConfig, int]] = {  # shape, tokens of a micro-batch
    "1.5B": (
        Qwen2Config(
            num_hidden_layers=28,
            hidden_size=1536,
            num_attention_heads=12,
            num_key_value_heads=2,
            intermediate_size=8960,
            vocab_size=VOCABULARY,
            tie_word_embeddings=False,
            max_position_embeddings=131_072,
        ),
        16_384,
    ),
    "8B": (_qwen3(36, 4096, 32, 12_288), 8192),
    "32B": (_qwen3(64, 5120, 64, 25_600), 8192),
}
LORA = {"peft": LoraConfig(r=32, target_modules="all-linear"), "dtype": torch.bfloat16, "autocast": None}
LAYOUTS = (
    (1, "none", {}),
    (1, "none", {"LoRA, bf16 weights": LORA}),
    (1, "none", {"offload_teacher": True}),
    (1, "none", {"teacher_elsewhere": True}),
    (8, "none", {}),
    (8, "zero2", {}),
    (8, "fsdp", {}),
    (8, "zero3", {}),
    (8, "fsdp", {"teacher_elsewhere": True}),
    (16, "fsdp", {}),
    (64, "zero2", {}),
    (64, "fsdp", {}),
)
COLUMNS = ("student", "teacher", "gradients", "optimizer", "targets", "activations", "peak GB", "fits")
NAMES = {"none": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP2"}


def main() -> None:
    """Print one table per model."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gpu_memory", type=float, default=80.0, help="GB of one GPU (default 80)")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    asked = options.parse_args()
    gpu = asked.gpu_memory * GB
    for name, (config, tokens) in ((name, MODELS[name]) for name in asked.models):
        print(f"\n{name}, micro-batches of {tokens} tokens\n\n| GPUs | layout | {' | '.join(COLUMNS)} |")
        print("|---" * (len(COLUMNS) + 2) + "|")
        for processes, sharding, extra in LAYOUTS:
            row = plan(
                config,
                rows=((PROMPT, tokens - PROMPT),),
                gpu=gpu,
                processes=processes,
                sharding=sharding,
                is_packed=True,
                in_vllm=0.3,
                vllm_sleeps=True,
                on_gpu=True,
                **{"autocast": torch.bfloat16} | extra.get("LoRA, bf16 weights", extra),
            ).row
            layout = ", ".join(
                ["one GPU" if processes == 1 else NAMES[sharding], *(e.replace("_", " ") for e in extra)]
            )
            print(f"| {processes} | {layout} | {' | '.join(str(row[column]) for column in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
