"""Trains the canned tiny models in however many processes it is launched, and writes what came out."""

import json
import sys
from pathlib import Path

import torch
from tiny import canned_trainer, logged


def main(out, size, settings):
    torch.set_num_threads(1)
    trainer = canned_trainer(out, per_device_train_batch_size=size, max_steps=3, **settings)
    trainer.train()
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {name: p.detach().flatten().tolist() for name, p in model.named_parameters()}
        keys = ("loss", "cosine", "loss/representation", "loss/output", "completions/mean_length", "accuracy")
        result = {"processes": trainer.accelerator.num_processes, "weights": weights}
        Path(out, "result.json").write_text(json.dumps(result | {key: logged(trainer, key) for key in keys}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
