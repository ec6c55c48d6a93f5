"""What a bridge was fitted for, in a few hex digits: the weights of a model, the vocabulary of a tokenizer."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from oprd.models import causal_lm, gathered, whole
from oprd.states import TeacherElsewhere

SAMPLES = 64  # values of each weight that take part
DIGITS = 32


@torch.no_grad()
def model_fingerprint(model: nn.Module) -> str:
    """Names, shapes and evenly spaced values of every weight of the base model, rounded to bf16.

    Rounded, so that a checkpoint is itself whether loaded in float32 or bf16; sampled, so that it takes a second for
    billions of parameters. Adapters around a base model do not count. A teacher elsewhere
    says its own.
    """
    if isinstance(model, TeacherElsewhere):
        return model.fingerprint
    digest = hashlib.sha256()
    for name, parameter in sorted(causal_lm(model).named_parameters()):
        if "lora_" in name or ".modules_to_save." in name:
            continue
        with whole(parameter):
            shape, values = tuple(parameter.shape), gathered(parameter).detach().flatten()
            places = torch.linspace(0, values.numel() - 1, min(SAMPLES, values.numel()), dtype=torch.float64).long()
            sample = values[places.to(values.device)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name.replace('.base_layer', '').replace('.original_module', '')}{shape}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Vocabulary, merges, normalisation and special tokens; not the padding and truncation that callers switch."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = tokenizer.get_vocab()
    else:
        content = json.loads(backend.to_str())
        for name in ("padding", "truncation"):
            content.pop(name, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]
