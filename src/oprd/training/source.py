"""What is known about a model before its weights are loaded, whether it is a path, a Hub id or an instance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from oprd.model_files import check_model, check_tensors, load_tokenizer, warn_of_code
from oprd.models import causal_lm


@dataclass(frozen=True)
class Source:
    """A model, or where it lies. Nothing here loads weights; without ``has_weights`` there are none in its folder."""

    model: Any
    revision: str | None = None
    trust_remote_code: bool = False
    has_weights: bool = True

    @property
    def is_path(self) -> bool:
        return isinstance(self.model, str)

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def check(self, role: str, attn_implementation: str | None = None) -> None:
        """Its files are a whole causal LM; of an instance there is nothing to ask.

        Raises:
            ValueError: with the file at fault.
        """
        if self.is_path:
            warn_of_code(self.model, self.trust_remote_code)
            check_model(self.model, role, trust_remote_code=self.trust_remote_code, weights=self.has_weights)
        if self.is_path and self.has_weights:
            check_tensors(self.model, role, attn_implementation=attn_implementation, **self._where)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's config."""
        return AutoConfig.from_pretrained(self.model, **self._where) if self.is_path else causal_lm(self.model).config

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The generation config that lies beside the weights, or what the model's config implies."""
        if not self.is_path:
            return causal_lm(self.model).generation_config
        try:
            return GenerationConfig.from_pretrained(self.model, revision=self.revision)
        except OSError:  # none was saved
            return GenerationConfig.from_model_config(self.config)

    def tokenizer(self, role: str, argument: str) -> PreTrainedTokenizerBase:
        """The tokenizer that lies beside the weights.

        Raises:
            ValueError: an instance that was not loaded from anywhere; it names the argument to pass.
        """
        path = self.model if self.is_path else self.config._name_or_path
        if not path:
            raise ValueError(f"The {role} is a model without a path: pass its tokenizer as {argument}.")
        return load_tokenizer(path, role, padding_side="left", truncation_side="left", **self._where)

    def tokenizer_if_known(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the weights; None for an instance whose origin, if any, holds none."""
        if self.is_path:
            return self.tokenizer("teacher", "tokenizer")
        try:
            return self.tokenizer("teacher", "tokenizer")
        except (OSError, ValueError):
            return None
