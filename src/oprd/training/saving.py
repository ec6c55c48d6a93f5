"""A student on disk, plain: what ``from_pretrained`` loads and nothing of this machine."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer

from oprd.durability.folders import publish, staging_of, writing
from oprd.records import read_json, write_json
from oprd.training.quantised import is_quantised, save_with_adapters


def save_final(
    trainer: Trainer, directory: Path, announce: Callable[[Path], None] | None = None, *, goes_on: bool = False
) -> None:
    """``from_pretrained`` folder with weights (adapters merged, or beside quantised weights) and tokenizer, whole or not at all. Every process must call it.

    Args:
        announce: called by the main process with the folder that is about to become ``directory``.
        goes_on: training continues, so adapters are merged in a copy of the model, which takes its memory once more.

    Raises:
        OSError: it could not be written; the path and the cause are named, and ``directory`` is as it was.
    """
    trainer.accelerator.wait_for_everyone()
    staging, is_main = staging_of(directory), trainer.accelerator.is_main_process
    with writing(directory, staging if is_main else None):
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        _write(trainer, staging, goes_on=goes_on)
        if is_main:
            if announce is not None:
                announce(staging)
            publish(staging, directory)
    trainer.accelerator.wait_for_everyone()


def _write(trainer: Trainer, directory: Path, *, goes_on: bool) -> None:
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if hasattr(model, "merge_and_unload"):
        if trainer.accelerator.is_main_process:
            if is_quantised(model):
                save_with_adapters(model, directory, goes_on=goes_on)
            else:
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


def _forget_this_machine(tokenizer_config: Path) -> None:
    """transformers saves how a tokenizer was loaded here; the same student would have another content elsewhere."""
    if not tokenizer_config.exists():
        return
    settings = read_json(tokenizer_config)
    write_json(tokenizer_config, {k: v for k, v in settings.items() if k not in ("is_local", "local_files_only")})
