"""Trains the canned tiny models in however many processes it is launched, and writes what came out."""

import json
import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from oprd.states import fill
from oprd.training import microbatches
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
    "loss/a/representation",
    "b/cosine",
    "transition_cosine",
    "privileged/shortened",
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


def count_passes(trainer):
    """Micro-batches that run from now on, and how many there would be if no other process had more."""
    counts = {"passes": 0, "own": 0}
    of_part, prepare = trainer._micro_batch_loss, trainer._prepare_inputs

    def watched(model, part):
        counts["passes"] += 1
        return of_part(model, part)

    def prepared(batch):
        ready = prepare(batch)
        if not isinstance(ready, microbatches.MicroBatch):
            lengths = microbatches.lengths_of(ready).tolist()
            counts["own"] += len(fill(lengths, trainer.args.max_tokens_per_microbatch or sum(lengths)))
        return ready

    trainer._micro_batch_loss, trainer._prepare_inputs = watched, prepared
    return counts


def main(out, size, cases):
    torch.set_num_threads(1)
    results = {}
    for name, settings in cases.items():
        # Looking for unused parameters would hide a missing gradient.
        settings = {"ddp_find_unused_parameters": False, "per_device_eval_batch_size": size, **settings}
        if settings.pop("several", False):
            settings["teacher"] = {"a": tiny_model(seed=1), "b": tiny_model(seed=2)}
        if "other" in settings:
            settings |= other_teacher(settings.pop("other"))
        trainer = canned_trainer(out, per_device_train_batch_size=size, max_steps=3, **settings)
        counts = count_passes(trainer)
        trainer.train()
        everyone = gather_object([counts])
        columns = {name: values[:8] for name, values in settings.get("columns", {}).items()}
        trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:8], **columns}))
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {key: p.detach().flatten().tolist() for key, p in model.named_parameters()}
        processes = trainer.accelerator.num_processes
        results[name] = {
            "processes": processes,
            "counts": everyone,
            "weights": weights,
            **{key: logged(trainer, key) for key in KEYS},
        }
    if trainer.accelerator.is_main_process:
        Path(out, "result.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
