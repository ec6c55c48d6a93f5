"""Trains the canned tiny models in however many processes it is launched, and writes what came out."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset

from tiny import PROMPTS, WIDE, canned_trainer, logged, merged_tokenizer, random_bridge, tiny_model

KEYS = (
    "eval_loss",
    "eval_cosine",
    "eval_completions/mean_length",
    "loss",
    "cosine",
    "loss/representation",
    "loss/output",
    "completions/mean_length",
    "accuracy",
    "paired_share",
    "prefix/supervised",
)


def other_teacher(kind):
    """A teacher of another shape behind a bridge, or one with another tokenizer besides."""
    extra = {"bridge": random_bridge()}
    if kind == "shape":
        return {"teacher": tiny_model(seed=1, **WIDE), "trainer_kwargs": extra}
    tokenizer = merged_tokenizer()
    teacher = tiny_model(seed=1, vocab_size=len(tokenizer), **WIDE)
    teacher.generation_config.eos_token_id = tokenizer.eos_token_id
    return {"teacher": teacher, "trainer_kwargs": extra | {"teacher_processing_class": tokenizer}}


def main(out, size, cases):
    torch.set_num_threads(1)
    results = {}
    for name, settings in cases.items():
        # Looking for unused parameters would hide a missing gradient.
        settings = {"ddp_find_unused_parameters": False, "per_device_eval_batch_size": size, **settings}
        if "other" in settings:
            settings |= other_teacher(settings.pop("other"))
        trainer = canned_trainer(out, per_device_train_batch_size=size, max_steps=3, **settings)
        trainer.train()
        trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:8]}))
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {key: p.detach().flatten().tolist() for key, p in model.named_parameters()}
        processes = trainer.accelerator.num_processes
        results[name] = {"processes": processes, "weights": weights, **{key: logged(trainer, key) for key in KEYS}}
    if trainer.accelerator.is_main_process:
        Path(out, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
