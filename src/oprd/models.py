"""Any causal LM as a backbone and a head: finding them, loading them, and moving a head from one to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MINIATURE_PREFIX = "miniature:"
# In the config of a depth-pruned student: the original's layer that each of its layers stands for, and whose copy it is.
LAYER_MAP, PRUNED_FROM = "oprd_layer_map", "oprd_pruned_from"


def resolve_path(name: str) -> str:
    """A Hub id or path as given; ``miniature:student`` and the like become files that ship with the package."""
    if not name.startswith(MINIATURE_PREFIX):
        return name
    assets = Path(str(files("oprd"))) / "miniature" / "assets"
    known = sorted(entry.name for entry in assets.iterdir())
    if (wanted := name.removeprefix(MINIATURE_PREFIX)) not in known:  # a path would lead out of the package
        told = ", ".join(MINIATURE_PREFIX + entry for entry in known)
        raise ValueError(f"There is no {name!r} in the package; it has {told}.")
    return str(assets / wanted)


def text_config(model_or_config: nn.Module | PretrainedConfig) -> PretrainedConfig:
    """The config that holds ``hidden_size``, ``num_hidden_layers`` and ``vocab_size``."""
    config = model_or_config if isinstance(model_or_config, PretrainedConfig) else causal_lm(model_or_config).config
    return config.get_text_config()


def recorded_layer_map(config: PretrainedConfig) -> tuple[int, ...] | None:
    """The layer map that ``oprd prune`` wrote into a student's config; None where there is none."""
    found = getattr(config.get_text_config(), LAYER_MAP, None)
    return None if found is None else tuple(found)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model, whether or not PEFT wraps it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> nn.Module:
    """The part below the LM head; calling it never forms a logit."""
    lm = causal_lm(model)
    backbone = lm.base_model
    if backbone is lm:
        raise ValueError(f"{type(lm).__name__} has no separate backbone; a causal LM with an LM head is needed.")
    return backbone


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of blocks of a backbone, in order.

    Raises:
        ValueError: not exactly one module list is as long as the config says the model is deep.
    """
    depth = text_config(backbone.config).num_hidden_layers
    found = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise ValueError(
            f"Cannot tell the blocks of {type(backbone).__name__}: {len(found)} module lists have {depth} entries."
        )
    return found[0]


def gathered(parameter: Tensor) -> Tensor:
    """The whole tensor of a parameter that FSDP2 may have sharded; gradients flow back to the shards."""
    return parameter.full_tensor() if isinstance(parameter, torch.distributed.tensor.DTensor) else parameter


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 holds it in parts: empty outside of its module's forward and of `whole`."""
    return hasattr(parameter, "ds_id")


@contextmanager
def whole(*parameters: nn.Parameter, written: bool = False) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has partitioned are whole; with ``written``, what the first process makes of them is
    what all keep. Every process must enter it. Nothing happens to others."""
    parts = list({id(p): p for p in parameters if is_partitioned(p)}.values())
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if written else None):
        yield


def head_parameters(*models: nn.Module) -> list[nn.Parameter]:
    """Weights (and biases) of the LM heads."""
    return [p for model in models for p in causal_lm(model).get_output_embeddings().parameters()]


class LentHead(nn.Module):
    """A model as losses see it that only read its LM head: the config and a frozen copy of the head."""

    def __init__(self, config: PretrainedConfig, weight_Vd: Tensor, bias_V: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Linear(*weight_Vd.shape[::-1], bias=bias_V is not None, device="meta")
        self.head.weight = nn.Parameter(weight_Vd, requires_grad=False)
        if bias_V is not None:
            self.head.bias = nn.Parameter(bias_V, requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.head


@dataclass(frozen=True)
class Head:
    """What turns a last hidden state into logits, cut to the first V tokens. ``weight_Vd`` keeps its graph."""

    weight_Vd: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, states_Nd: Tensor) -> Tensor:
        """``[N, d] -> [N, V]``, with the model's own bias, scale and soft cap."""
        logits_NV = torch.nn.functional.linear(
            states_Nd,
            self.weight_Vd.to(states_Nd.dtype),
            None if self.bias_V is None else self.bias_V.to(states_Nd.dtype),
        )
        logits_NV = logits_NV * self.scale if self.scale != 1.0 else logits_NV
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)

    def linear_form(self) -> Tensor:
        """The head as one matrix ``[V, d]``, or ``[V, d + 1]`` with the bias for states that end in a 1."""
        if self.softcap is not None:
            raise ValueError("The head metric needs linear logits; this model soft-caps them. Set logit_weight: 0.")
        weight = self.weight_Vd if self.bias_V is None else torch.cat([self.weight_Vd, self.bias_V.unsqueeze(1)], 1)
        return weight * self.scale if self.scale != 1.0 else weight

    def linear_states(self, states_Nd: Tensor) -> Tensor:
        """States to go with `linear_form`: ``[N, d]`` or, where there is a bias, ``[N, d + 1]``."""
        return states_Nd if self.bias_V is None else torch.cat([states_Nd, torch.ones_like(states_Nd[:, :1])], 1)


def logit_scale(config: PretrainedConfig) -> float:
    """What the model multiplies its logits by; families name it differently."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite divides, HyperCLOVA X multiplies
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def head_of(model: nn.Module, vocab_size: int | None = None) -> Head:
    """The model's head over its first ``vocab_size`` tokens (all by default): padded rows take no part."""
    layer, config = causal_lm(model).get_output_embeddings(), text_config(model)
    bias = getattr(layer, "bias", None)
    weight_Vd = gathered(layer.weight)
    if vocab_size is not None and vocab_size < len(weight_Vd):  # a slice's backward makes a gradient of the whole again
        weight_Vd, bias = weight_Vd[:vocab_size], None if bias is None else gathered(bias)[:vocab_size]
    return Head(
        weight_Vd,
        None if bias is None else gathered(bias),
        logit_scale(config),
        getattr(config, "final_logit_softcapping", None),
    )


def end_token_ids(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> set[int]:
    """Every token that ends a response: the tokenizer's end token and those of the generation config."""
    declared = getattr(generation_config, "eos_token_id", None)
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return {*own, *declared}


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list, **how: Any) -> Any:
    """``apply_chat_template``.

    Raises:
        ValueError: a template that is broken, or that refuses these messages.
    """
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except TemplateError as error:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path or 'the tokenizer'} cannot render the prompts "
            f"({type(error).__name__}: {error}). Mend its chat_template, change the messages, or give prompts as text."
        ) from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int | None:
    """The token with which a model of this tokenizer ends its answer: what its chat template puts behind one, which is not
    always the tokenizer's end token; for text prompts the latter."""
    if chat and tokenizer.chat_template:
        marker = "the-answer"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        _, found, rest = apply_template(tokenizer, turns, tokenize=False).rpartition(marker)
        added = tokenizer.added_tokens_decoder if found else {}
        ends = [index for index, token in added.items() if rest.lstrip().startswith(token.content)]
        if ends:
            return max(ends, key=lambda index: len(added[index].content))
    return tokenizer.eos_token_id


def is_tied(model: nn.Module) -> bool:
    """Whether the LM head and the input embeddings are one tensor."""
    lm = causal_lm(model)
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


@torch.no_grad()
def head_drift(student: nn.Module, teacher: nn.Module, vocab_size: int) -> float | None:
    """``|W_T - W_S| / |W_S|`` (Frobenius) over shared tokens; None where widths differ."""
    own, other = (
        gathered(causal_lm(m).get_output_embeddings().weight)[:vocab_size].float() for m in (student, teacher)
    )
    if own.shape != other.shape:
        return None
    return ((other.to(own.device) - own).norm() / own.norm()).item()


def why_head_cannot_move(student: nn.Module, teacher: nn.Module, vocab_size: int) -> str | None:
    """None if the student can adopt the teacher's head; otherwise the reason, in words for a user."""
    if is_tied(student):
        return "the student ties its head to its input embeddings, so a new head would change what it reads"
    own, other = (causal_lm(m).get_output_embeddings() for m in (student, teacher))
    if own.weight.shape[1] != other.weight.shape[1]:
        return f"the student is {own.weight.shape[1]} wide and the teacher {other.weight.shape[1]}"
    if min(own.weight.shape[0], other.weight.shape[0]) < vocab_size:
        return f"a head has fewer rows than the tokenizer's {vocab_size} tokens"
    if (getattr(own, "bias", None) is None) != (getattr(other, "bias", None) is None):
        return "only one of the two heads has a bias"
    return None


def adopt_head(student: nn.Module, teacher: nn.Module, vocab_size: int) -> None:
    """Copy the teacher's head over the student's for the tokenizer's ``vocab_size`` tokens; padded rows stay."""
    adopt_mean_head(student, [(1.0, teacher)], vocab_size)


@torch.no_grad()
def adopt_mean_head(student: nn.Module, teachers: Sequence[tuple[float, nn.Module]], vocab_size: int) -> None:
    """The mean of several teachers' heads, each with its weight, for the student's.

    Raises:
        ValueError: a head that does not fit.
    """
    for _, teacher in teachers:
        reason = why_head_cannot_move(student, teacher, vocab_size)
        if reason:
            raise ValueError(
                f"The student cannot adopt the teacher's LM head: {reason}. Set lm_head: keep and logit_weight: 1."
            )
    own = causal_lm(student).get_output_embeddings()
    total = sum(weight for weight, _ in teachers)
    shares = [(weight / total, causal_lm(teacher).get_output_embeddings()) for weight, teacher in teachers]
    for name in ("weight", "bias") if getattr(own, "bias", None) is not None else ("weight",):
        kept = getattr(own, name)[:vocab_size]
        if len(shares) == 1:  # as it is, without rounding
            kept.copy_(getattr(shares[0][1], name)[:vocab_size])
        else:
            kept.copy_(sum(share * getattr(head, name)[:vocab_size].to(kept.device).float() for share, head in shares))


@contextmanager
def wearing_head(model: nn.Module, other: nn.Module, vocab_size: int) -> Iterator[None]:
    """Inside, the model's last states go through another model's head, of the same width. Tied input embeddings stay."""
    lm, lent = causal_lm(model), head_of(other, vocab_size)
    own, scale = lm.get_output_embeddings(), lent.scale / logit_scale(text_config(model))
    worn = nn.Linear(own.weight.shape[1], own.weight.shape[0], bias=lent.bias_V is not None, device="meta")
    with torch.no_grad():
        for name, rows in (("weight", lent.weight_Vd), ("bias", lent.bias_V)):
            if rows is not None:
                mine = getattr(own, name, None)
                whole_rows = own.weight.new_zeros(len(own.weight)) if mine is None else mine.detach().clone()
                whole_rows[: len(rows)] = rows.to(whole_rows) * scale
                setattr(worn, name, nn.Parameter(whole_rows, requires_grad=False))
    lm.set_output_embeddings(worn)
    try:
        yield
    finally:
        lm.set_output_embeddings(own)


def freeze_unreachable(model: nn.Module, *, top_layer: int, head: bool) -> int:
    """Turn off gradients where no loss term reaches, and return how many parameters that is.

    With states of layers up to ``top_layer`` only, later blocks and the final norm get no gradient; with ``head=False``
    an untied LM head gets none. Left trainable they would stop DDP, which waits for every gradient.
    """
    lm, depth = causal_lm(model), text_config(model).num_hidden_layers
    backbone = backbone_of(model)
    stopped: list[nn.Parameter] = []
    if not head and not is_tied(model):
        stopped += lm.get_output_embeddings().parameters()
    if top_layer < depth and not head:
        reached = {id(p) for block in decoder_layers(backbone)[:top_layer] for p in block.parameters()}
        reached |= {id(p) for p in lm.get_input_embeddings().parameters()}
        stopped += [p for p in backbone.parameters() if id(p) not in reached]
    trainable = [p for p in stopped if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    return sum(getattr(p, "ds_numel", p.numel()) for p in trainable)
