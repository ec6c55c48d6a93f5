"""A student on disk, plain: what ``from_pretrained`` loads and nothing of this machine."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import Trainer

from oprd.records import read_json, write_json


def save_final(trainer: Trainer, directory: Path, *, goes_on: bool = False) -> None:
    """``from_pretrained`` folder with weights (adapters merged) and tokenizer. Every process must call it.

    Args:
        goes_on: training continues, so adapters are merged in a copy of the model, which takes its memory once more.
    """
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if hasattr(model, "merge_and_unload"):
        if trainer.accelerator.is_main_process:
            merged = copy.deepcopy(model) if goes_on else model
            merged.merge_and_unload().save_pretrained(directory)
            trainer.processing_class.save_pretrained(directory)
    elif trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")  # sharded ones are no model that from_pretrained could load
        trainer.save_model(str(directory), _internal_call=True)
        plugin.set_state_dict_type(before)
    else:
        trainer.save_model(str(directory), _internal_call=True)  # else it would push the whole run to the Hub
    if trainer.accelerator.is_main_process:
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
        _forget_this_machine(directory / "tokenizer_config.json")
    trainer.accelerator.wait_for_everyone()


def _forget_this_machine(tokenizer_config: Path) -> None:
    """transformers saves how a tokenizer was loaded here; the same student would have another content elsewhere."""
    if not tokenizer_config.exists():
        return
    settings = read_json(tokenizer_config)
    write_json(tokenizer_config, {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")})
