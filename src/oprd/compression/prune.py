"""From a model to a folder with a copy of fewer layers: check, measure, cut, save, and read it back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from oprd.bridge import model_fingerprint
from oprd.compression.influence import Influence, choose_blocks, measure_influence
from oprd.compression.surgery import check_kept, drop_blocks
from oprd.durability.folders import staged
from oprd.evaluation.benchmarks import Problem
from oprd.evaluation.evaluate import batch_seed, batches_of, encode_prompts
from oprd.evaluation.sampling import Sampling, TransformersEngine, load_engine
from oprd.lineage.machine import versions
from oprd.model_files import check_model, quietly
from oprd.models import LAYER_MAP, PRUNED_FROM, resolve_path, text_config
from oprd.prompts import load_prompts
from oprd.records import check_folder, write_json
from oprd.states import Reading

RECORD = "pruning.json"
PROBE_TOKENS = 32  # that the student is read back with
READ_BACK_ERROR = 1e-2  # relative; what rounding may do in 16 bits


@dataclass(frozen=True)
class Choice:
    """Which blocks stay; exactly one is given: how many stay, how many go, or which (1-based, ascending)."""

    keep: int | None = None
    drop: int | None = None
    layers: tuple[int, ...] | None = None

    def check(self, depth: int) -> None:
        """It can be of a model of this depth.

        Raises:
            ValueError: not exactly one is given, or it is outside of what there is.
        """
        if sum(value is not None for value in (self.keep, self.drop, self.layers)) != 1:
            raise ValueError("Give one of --keep, --drop and --layers.")
        if self.layers is not None:
            check_kept(self.layers, depth)
        else:
            choose_blocks([0.0] * depth, self.count(depth))

    def count(self, depth: int) -> int:
        """Blocks to keep, where they are chosen by influence."""
        return self.keep if self.keep is not None else depth - self.drop


@dataclass(frozen=True)
class Probing:
    """What influence is measured on: prompts, and the model's own answers to them (``answers`` tokens at most, T = 1)."""

    data: str
    prompts: int = 256
    answers: int = 64
    batch_size: int = 16
    seed: int = 0
    split: str = "train"
    prompt_column: str | None = None
    as_chat: bool = False

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("answers", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}.")


def prune(
    model: str,
    out: str | Path,
    choice: Choice,
    probing: Probing | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """A copy of a causal LM with fewer layers, in a folder that ``from_pretrained`` loads, in the model's own dtype.

    Its config has the layer map and the original's fingerprint; ``pruning.json`` beside it is what is returned: influence,
    kept and dropped layers, and what they were measured on.

    Args:
        model: a Hub id, a folder, ``miniature:NAME``.
        probing: needed unless ``choice.layers`` says which layers stay; with them, influence is measured for the record.

    Raises:
        ValueError: anything that can be known before the weights are read; an architecture whose config cannot say what is
            left.
        OSError: the folder could not be written; nothing of it stays.
    """
    path, out = resolve_path(model), Path(out)
    if choice.layers is None and probing is None:
        raise ValueError(
            "Layers are chosen by influence, which is measured on prompts. Name some with --data, or --layers."
        )
    if out.exists() or out.is_symlink():
        raise ValueError(f"--out {out} is already there. Choose another folder, or remove it.")
    check_model(path, "model")
    config = AutoConfig.from_pretrained(path, revision=revision)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{model} is quantised. Prune the model that it was made from, and quantise the result.")
    depth = config.get_text_config().num_hidden_layers
    choice.check(depth)
    check_folder(out, "--out", sum(file.stat().st_size for file in Path(path).glob("*.safetensors")))
    rows = None if probing is None else _draw_prompts(probing)

    with quietly():
        engine = load_engine(path, revision=revision, device=device)
    whole = engine.model
    found = None if rows is None else _influence(engine, rows, probing, progress)
    kept = list(choice.layers or choose_blocks(found.values, choice.count(depth)))
    record = {
        "model": model,
        "revision": revision,
        "fingerprint": model_fingerprint(whole),
        "layers": depth,
        "kept": kept,
        "dropped": [layer for layer in range(1, depth + 1) if layer not in kept],
        "chosen": "by influence" if choice.layers is None else "by hand",
        "influence": None if found is None else list(found.values),
        "positions": None if found is None else found.positions,
        "measured_on": None if probing is None else asdict(probing) | {"prompts": len(rows)},
        "parameters": {"before": _size(whole)},
        "versions": versions(),
    }
    own = text_config(whole)
    origin = getattr(own, PRUNED_FROM, None) or record["fingerprint"]  # where it was pruned before, the first one's
    drop_blocks(whole, kept)
    setattr(own, PRUNED_FROM, origin)
    record["layer_map"] = list(getattr(own, LAYER_MAP))
    record["parameters"]["after"] = _size(whole)
    with staged(out) as folder, quietly():
        whole.save_pretrained(folder)
        engine.tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, record)
        check_saved(folder, whole)
    return record


@torch.no_grad()
def check_saved(folder: Path, model: nn.Module) -> None:
    """The folder loads as the model that was saved there, whose config may not be able to say which layers are left.

    Raises:
        ValueError: it loads as something else.
    """
    ids_BS = torch.arange(PROBE_TOKENS, device=model.device).remainder(text_config(model).vocab_size).unsqueeze(0)

    def logits(of: nn.Module) -> Tensor:
        return of(input_ids=ids_BS, use_cache=False).logits.float()

    saved, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]
    if not wrong:
        meant = logits(model)
        wrong = not (logits(saved.to(model.device).eval()) - meant).norm() <= READ_BACK_ERROR * meant.norm()
    if wrong:
        raise ValueError(
            f"The config of {type(model).__name__} cannot say which layers are left: read back, the student is another model. "
            "It places its kinds of layers by a rule; keep layers that fit the rule with --layers."
        )


def _draw_prompts(probing: Probing) -> list[str | list[dict[str, str]]]:
    """As many of the prompts, in their order."""
    rows = load_prompts(
        probing.data, split=probing.split, prompt_column=probing.prompt_column, as_chat=probing.as_chat
    )["prompt"]
    count = min(probing.prompts, len(rows))
    return [rows[place] for place in sorted(random.Random(probing.seed).sample(range(len(rows)), count))]


def _influence(engine: TransformersEngine, rows: Sequence[Any], probing: Probing, progress: bool) -> Influence:
    prompts = _encode(engine.tokenizer, rows, probing, engine.context)
    sampling = Sampling(1, 1.0, 1.0, max(probing.answers, 1), probing.batch_size, probing.seed)

    def readings() -> Iterator[Reading]:
        with tqdm(total=len(prompts), desc="influence", unit="prompt", disable=not progress) as bar:
            for number, batch in enumerate(batches_of(prompts, sampling)):
                texts = [prompts[place] for place, _ in batch]
                if probing.answers:
                    answers = engine.write(texts, sampling, batch_seed(probing.seed, number))
                    texts = [text + answer for text, answer in zip(texts, answers, strict=True)]
                yield _padded(texts)
                bar.update(len(batch))

    return measure_influence(engine.model, readings())


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Any], probing: Probing, context: int | None
) -> list[list[int]]:
    """Token ids, chat messages through the template.

    Raises:
        ValueError: no template for chat prompts, or a prompt and its answer longer than the context.
    """
    if not isinstance(rows[0], str) and not tokenizer.chat_template:
        raise ValueError("Prompts are chat messages but the tokenizer has no chat template. Give prompts as text.")
    prompts = encode_prompts(tokenizer, [Problem(f"prompt {number}", row, "") for number, row in enumerate(rows, 1)])
    longest = max(map(len, prompts))
    if context is not None and longest + probing.answers > context:
        raise ValueError(
            f"{probing.data}: a prompt of {longest} tokens and an answer of {probing.answers} do not fit the context of "
            f"{context}. Lower --answers, or remove the prompt."
        )
    return prompts


def _padded(texts: Sequence[Sequence[int]]) -> Reading:
    """Token lists as one reading, padded on the right."""
    width = max(map(len, texts))
    ids_BS = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])
    mask_BS = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    return Reading(ids_BS, mask_BS)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layer_rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer of the original, for a table."""
    influence = record["influence"] or [None] * record["layers"]
    place = {layer: number for number, layer in enumerate(record["kept"], 1)}
    return [
        {
            "layer": layer,
            "influence": influence[layer - 1],
            "": "kept" if layer in place else "dropped",
            "student layer": place.get(layer),
            "compared with": record["layer_map"][place[layer] - 1] if layer in place else None,
        }
        for layer in range(1, record["layers"] + 1)
    ]
