"""Trains the canned tiny models under whatever engine and in however many processes it is launched; writes what is logged."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor
from worker import other_teacher

import tiny
from oprd.models import is_partitioned
from tiny import PROMPTS, canned_trainer, logged, tiny_model

KEYS = ("loss", "grad_norm", "cosine", "loss/representation", "loss/logit", "loss/output", "eval_loss")
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
ENGINES = {
    "ddp": {"ddp_find_unused_parameters": False},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "Qwen3DecoderLayer"}},
    "zero2": {"deepspeed": ZERO | {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": ZERO | {"zero_optimization": {"stage": 3}}},
}


def fsdp_on_cpu():
    """accelerate shards on accelerators only, torch on CPUs too: step over accelerate's gate."""
    start = AcceleratorState.__init__

    def started(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = started


def uneven(ids, canned=tiny.canned_completion):
    """Responses whose lengths differ by far."""
    return canned(ids) * 4 if len(ids) % 3 == 0 else canned(ids)[:1]


def silence(trainer):
    """Nothing that is written for half of a step's prompts counts (as if tools had said it): those of whole processes."""
    generate, silenced = trainer._generate, PROMPTS[4:8] + PROMPTS[8:12]

    def generated(prompts):
        prompt_ids, completion_ids, _, *images = generate(prompts)
        counts = [[int(p not in silenced)] * len(ids) for p, ids in zip(prompts, completion_ids, strict=True)]
        return prompt_ids, completion_ids, counts, *images

    trainer._generate = generated


def is_at_work(engine, trainer):
    """Whether weights lie as the engine lays them."""
    student = list(trainer.accelerator.unwrap_model(trainer.model_wrapped).parameters())
    apart = [teacher.model for teacher in trainer.teachers if teacher.model is not None]
    teacher = [p for model in apart for p in trainer.accelerator.unwrap_model(model).parameters()]
    sharded = {"fsdp2": lambda p: isinstance(p, DTensor), "zero3": is_partitioned}.get(engine)
    if sharded is None:
        wrapper = {"ddp": "DistributedDataParallel", "zero2": "DeepSpeedEngine"}[engine]
        return type(trainer.model_wrapped).__name__ == wrapper
    return all(map(sharded, student)) and (not teacher or sum(map(sharded, teacher)) > len(teacher) / 2)


def teacher_of(settings):
    """One, two, or none where the student teaches itself."""
    if settings.pop("several", False):
        return {"a": tiny_model(seed=1), "b": tiny_model(seed=2)}
    return None if "teacher_model_kind" in settings else tiny_model(seed=1 - settings.pop("same", 0))


def main(out, engine, cases):
    torch.set_num_threads(1)
    fsdp_on_cpu()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    # All models first: while ZeRO-3 is on, transformers makes new ones in parts, with other weights.
    cases = {
        name: {"model": tiny_model(seed=0), "teacher": teacher_of(settings), **settings}
        | ENGINES[engine]
        | (other_teacher(settings["other"]) if "other" in settings else {})
        for name, settings in cases.items()
    }
    results = {}
    for name, settings in cases.items():
        settings.pop("other", None)
        writes = settings.pop("writes", None)
        if writes == "uneven":
            tiny.canned_completion = uneven
        size = settings.pop("responses", 8) // processes
        trainer = canned_trainer(
            Path(out) / name.replace(" ", "-"),
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            **settings,
        )
        if writes == "silent":
            silence(trainer)
        assert trainer.accelerator.num_processes == processes
        trainer.train()
        assert processes == 1 or is_at_work(engine, trainer), engine
        columns = {name: values[:11] for name, values in settings.get("columns", {}).items()}
        trainer.evaluate(Dataset.from_dict({"prompt": PROMPTS[:11], **columns}))  # the last batch is not full
        tiny.canned_completion = uneven.__defaults__[0]
        results[name] = {key: logged(trainer, key) for key in KEYS}
    if trainer.accelerator.is_main_process:
        Path(out, f"{engine}-{processes}.json").write_text(json.dumps(results))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
