"""What lies in a model's folder, looked into before a weight is read: the right kind of model, whole, and no code.

Every check names the file and the way out. A Hub id is looked into once its files are in the cache.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TO_SAFETENSORS = (
    "Only safetensors are read, for a pickle runs code when it is loaded. Convert it where you trust it: "
    "AutoModelForCausalLM.from_pretrained(folder, use_safetensors=False).save_pretrained(new_folder)."
)
SHOWN = 3  # names in a message


def check_model(name: str, role: str, *, trust_remote_code: bool = False, weights: bool = True) -> None:
    """A local folder holds a causal LM: config, and (with ``weights``) every tensor in whole safetensors files.

    Args:
        name: a folder; of a Hub id nothing is asked here.
        role: ``student`` or the like, for messages.

    Raises:
        ValueError: with the file at fault and what to do.
    """
    folder = Path(name)
    if folder.is_file():
        why = " GGUF files cannot be trained: give the model that it was made from." if folder.suffix == ".gguf" else ""
        raise ValueError(f"The {role} {name} is a file. Name the folder that holds config.json and the weights.{why}")
    if not folder.is_dir():
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ValueError(f"The {role}: there is no folder {name}. Give one that exists, or a Hub id (owner/name).")
        return
    config = _config_of(folder, role)
    _check_kind(folder, role, config, trust_remote_code)
    if weights:
        _check_weight_files(folder, role)


def _config_of(folder: Path, role: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        what = f"The {role} {folder} is no model: it has no config.json."
        if (folder / "adapter_config.json").exists():
            raise ValueError(
                f"{what} It is an adapter alone. Merge it first: AutoPeftModelForCausalLM.from_pretrained(folder)"
                ".merge_and_unload().save_pretrained(new_folder)."
            )
        if any(folder.glob("*.gguf")):
            raise ValueError(f"{what} GGUF files cannot be trained: give the model that they were made from.")
        raise ValueError(f"{what} Name a folder that save_pretrained wrote, such as RUN/final.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The {role}'s {path} is not valid JSON ({error}). Restore the file.") from error
    if not isinstance(config, dict):
        raise ValueError(f"The {role}'s {path} must be a JSON object. Restore the file.")
    return config


def _check_kind(folder: Path, role: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    """A causal LM that transformers knows; of code in the folder, that it was asked for."""
    path = folder / "config.json"
    if config.get("auto_map"):
        if trust_remote_code:
            return  # what it is, its own code says
        if config.get("model_type") not in CONFIG_MAPPING:
            raise ValueError(
                f"The {role}'s {path} wants to run Python code from its own folder (auto_map). Read that code, then set "
                "trust_remote_code: true; or choose a model that transformers knows."
            )
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise ValueError(f"The {role}'s {path} has no model_type. Restore the file from where the model came from.")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"The {role}'s {path}: transformers {transformers.__version__} knows no model_type {kind!r}. Correct it, or install "
            "a version that does."
        )
    declared = config.get("architectures")
    if not isinstance(declared, list) or not declared:
        raise ValueError(
            f"The {role}'s {path} names no architectures. Restore the file from where the model came from."
        )
    reads_both_ways = kind in BOTH_WAYS and not config.get("is_decoder", False)
    if str(declared[0]) not in _causal_classes() or reads_both_ways:
        raise ValueError(
            f"The {role}'s {path} is of a {declared[0]}, which is no causal language model. Choose a decoder that writes text, "
            "such as Qwen3ForCausalLM."
        )
    try:
        AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        raise ValueError(f"The {role}'s {path} holds a bad value: {_one_line(error)}. Restore the file.") from error


def _causal_classes() -> set[str]:
    """Names of the classes that ``AutoModelForCausalLM`` makes; for a few families there are several."""
    several = ((names,) if isinstance(names, str) else names for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return {name for names in several for name in names}


# Encoders that transformers also offers as a decoder (is_decoder: true).
BOTH_WAYS = {"bert", "roberta", "electra", "camembert", "xlm-roberta", "xlm-roberta-xl", "data2vec-text", "ernie"}
BOTH_WAYS |= {"big_bird", "megatron-bert", "mobilebert", "rembert", "roformer", "roberta-prelayernorm", "xmod"}


def _check_weight_files(folder: Path, role: str) -> None:
    """Every safetensors file that the weights are in can be opened, and is as long as its header says."""
    for path in _weight_files(folder, role):
        if not path.is_file():
            raise ValueError(
                f"The {role} lacks {path}, which {INDEX} names. Copy or download the missing file, or the whole model again."
            )
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The {role}'s {path} is truncated or damaged ({error}). Copy or download it again."
            ) from error


def _weight_files(folder: Path, role: str) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            places = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted(set(map(str, places)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The {role}'s {folder / INDEX} is no index of weights ({error!r}). Restore it."
            ) from error
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(
                f"The {role}'s {folder / INDEX} names a file outside its folder ({outside[0]}). Restore it."
            )
        return [folder / name for name in names]
    pickles = sorted(
        path.name for pattern in PICKLES for path in folder.glob(pattern) if path.name != "training_args.bin"
    )
    if pickles:
        raise ValueError(f"The {role} {folder} has its weights as a pickle ({pickles[0]}). {TO_SAFETENSORS}")
    raise ValueError(f"The {role} {folder} has no weights: neither {WEIGHTS} nor {INDEX}. Copy or download them.")


def check_tensors(
    name: str,
    role: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> None:
    """Every tensor of the architecture is in the files, in the shape that the config asks for.

    transformers would make up what is missing at random and go on with a warning. The model is built without memory
    ("meta"), so that no weight is read. Quantised weights have other names and are left to their quantiser.

    Raises:
        ValueError: missing or misshapen tensors, or layers that the config does not have; weights that are not
            safetensors; an attention or a quantiser that is not installed.
    """
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(name, **where)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        if getattr(method, "value", method) == "bitsandbytes" and find_spec("bitsandbytes") is None:
            raise ValueError(
                f"The {role} {name} holds weights quantised by bitsandbytes, which is not installed: pip install "
                '"oprd[quantized]".'
            )
        return
    if attn_implementation is not None:
        where["attn_implementation"] = attn_implementation
    with quietly(), _whole():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                name,
                device_map="meta",
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **where,
            )
        except ImportError as error:
            raise ValueError(f"The {role} {name} needs a package that is not installed: {_one_line(error)}") from error
    if found["mismatched_keys"]:
        key, there, wanted = min(found["mismatched_keys"])
        raise ValueError(
            f"The {role} {name}: {key} has shape {list(there)} in its file, and config.json makes it {list(wanted)} "
            f"({len(found['mismatched_keys'])} such tensors). Restore the config.json that belongs to these weights."
        )
    if found["missing_keys"]:
        raise ValueError(
            f"The {role} {name} lacks {_few(found['missing_keys'])}, which would start at random. Copy or download all of its "
            "weight files again."
        )
    known = {_any_layer(key) for key in model.state_dict()}
    if beyond := {key for key in found["unexpected_keys"] if _any_layer(key) in known}:
        raise ValueError(
            f"The {role} {name} holds {_few(beyond)}, layers that its config.json does not have. Restore the config.json that "
            "belongs to these weights."
        )
    if found["unexpected_keys"]:
        logger.warning(f"The {role} {name} holds {_few(found['unexpected_keys'])}, which no part of the model reads.")


@contextmanager
def _whole() -> Iterator[None]:
    """Models made inside are not partitioned, though DeepSpeed ZeRO-3 be on."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = reference() if reference is not None else None
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def check_finite(model: nn.Module, role: str) -> None:
    """No weight is NaN or infinite.

    Raises:
        ValueError: the first tensor that holds one.
    """
    for name, parameter in model.named_parameters():
        is_real = parameter.is_floating_point() and not parameter.is_meta
        if is_real and not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(
                f"The {role}'s weight {name} holds NaN or infinity. Take another checkpoint; this one comes from a run that "
                "had diverged, or was written wrongly."
            )


def load_tokenizer(name: str, role: str, **where: Any) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        ValueError: none there, or files that cannot be read.
    """
    folder = Path(name)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"The {role}'s {path} cannot be read ({_one_line(error)}). Copy or download it again."
            ) from error
    elif folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise ValueError(
            f"The {role} {name} has no tokenizer (no tokenizer.json). Copy the files of its tokenizer there: "
            "AutoTokenizer.from_pretrained(origin).save_pretrained(folder)."
        )
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        try:
            json.loads(settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"The {role}'s {settings} is not valid JSON ({error}). Restore the file.") from error
    return AutoTokenizer.from_pretrained(name, **where)


TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json", "tokenizer_config.json")


def warn_of_code(name: str, trust_remote_code: bool) -> None:
    """Say aloud that a model's own code will run."""
    if not trust_remote_code:
        return
    folder = Path(name)
    brings = not folder.is_dir() or any(folder.glob("*.py"))
    if brings:
        logger.warning(f"trust_remote_code is on: Python code from {name} will run here, with all that you may do.")


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bars and load reports of transformers."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _any_layer(key: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", key)


def _few(names: Sequence[str] | set[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more tensors" if len(names) > SHOWN else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
