"""Who writes the answers: transformers or vLLM, behind one call on token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from oprd.model_files import check_finite, check_model, check_tensors, load_tokenizer, warn_of_code
from oprd.models import end_of_turn, end_token_ids, text_config

DEFAULT_MAX_NEW_TOKENS = 32768
# Spelled out, for what is left open generate() takes from the model's generation config (Qwen's repetition penalty).
PLAIN = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
PLAIN_DRAWS = {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. ``batch_size`` answers are drawn at once, and written to disk together."""

    samples: int = 16
    temperature: float = 0.7
    top_p: float = 0.95
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature must be a number that is not negative, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError("temperature: 0 is greedy and gives the same answer every time. Set samples: 1.")


@dataclass(frozen=True)
class Answer:
    """One response: its text without special tokens, its length in tokens (the end token counts), whether it ended."""

    text: str
    tokens: int
    cut_off: bool


class Engine(Protocol):
    """Anything that continues prompts."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    ends: set[int]

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
        """One answer to each prompt (token ids); the same for the same prompts and seed."""
        ...


def answer_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: set[int]) -> Answer:
    """A response up to its first end token."""
    kept = _ended(ids, ends)
    return Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept), not kept or kept[-1] not in ends)


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: stop + 1]


def _ends(tokenizer: PreTrainedTokenizerBase, generation_config: Any) -> set[int]:
    """Every token that ends an answer; a chat model's end of turn too, where its configuration forgets it."""
    ends = end_token_ids(tokenizer, generation_config)
    turn = end_of_turn(tokenizer, chat=True)
    ends |= set() if turn is None else {turn}
    if not ends:
        raise ValueError(
            "The tokenizer has no end token, so no answer would ever end. Set tokenizer.eos_token and save it."
        )
    return ends


class TransformersEngine:
    """``model.generate`` in batches. Neither the model's mode nor the random state outside is changed."""

    name = "transformers"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.context = getattr(text_config(model), "max_position_embeddings", None)
        self.ends = _ends(tokenizer, model.generation_config)
        known = {*tokenizer.get_vocab().values(), *self.ends}  # other rows stand for no token: never sample them
        self._padded = [row for row in range(text_config(model).vocab_size) if row not in known] or None

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
        """See `Engine`."""
        return [answer_of(self.tokenizer, ids, self.ends) for ids in self.write(prompts, sampling, seed)]

    @torch.no_grad()
    def write(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[list[int]]:
        """Token ids of one answer to each prompt, up to its end token and with it. Prompts are padded on the left."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends)
        drawn = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, **PLAIN_DRAWS}
        config = GenerationConfig(
            **PLAIN,
            **drawn,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(self.ends),
            suppress_tokens=self._padded,
            cache_implementation="static" if self.model.device.type == "cpu" else None,
            disable_compile=True,
        )
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        was_training, device = self.model.training, self.model.device
        self.model.eval()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                written = self.model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
                )[:, width:]
        finally:
            self.model.train(was_training)
        return [_ended(row, self.ends) for row in written.tolist()]


class VLLMEngine:
    """vLLM, with a seed of its own for every answer."""

    name = "vllm"

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ValueError('vLLM is not installed: pip install "oprd[vllm]", or use engine: transformers.') from error
        from transformers import GenerationConfig as Declared

        self._llm, self._params, self.tokenizer = LLM(model=model, **options), SamplingParams, tokenizer
        self.context = self._llm.llm_engine.model_config.max_model_len
        try:
            declared = Declared.from_pretrained(model, revision=options.get("revision"))
        except OSError:  # a model without one
            declared = None
        self.ends = _ends(tokenizer, declared)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
        """See `Engine`."""
        params = [
            self._params(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=-1,
                max_tokens=sampling.max_new_tokens,
                seed=(seed + place) % 2**31,
                stop_token_ids=sorted(self.ends),
                detokenize=False,
            )
            for place in range(len(prompts))
        ]
        outputs = self._llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], params, use_tqdm=False)
        return [answer_of(self.tokenizer, list(output.outputs[0].token_ids), self.ends) for output in outputs]


def load_engine(
    model: str,
    *,
    engine: str = "transformers",
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    **vllm: Any,
) -> Engine:
    """A model from the Hub or a folder, ready to answer.

    Args:
        engine: ``transformers`` or ``vllm``.
        dtype: ``auto`` is the checkpoint's.
        device: of ``transformers``; by default the first accelerator, else the CPU.
        vllm: further options of ``vllm.LLM`` (``tensor_parallel_size``, ``max_model_len``, ``gpu_memory_utilization``).

    Raises:
        ValueError: an unknown engine, vLLM options without vLLM, or vLLM not installed.
    """
    from transformers import AutoModelForCausalLM

    shared = {"revision": revision, "trust_remote_code": trust_remote_code}
    warn_of_code(model, trust_remote_code)
    vllm = {name: value for name, value in vllm.items() if value is not None}
    if engine == "vllm":
        if device is not None:
            raise ValueError("device would be ignored: vLLM takes the GPUs that CUDA_VISIBLE_DEVICES names.")
        safe = {"load_format": "safetensors"}
        return VLLMEngine(model, load_tokenizer(model, "model", **shared), dtype=dtype, **shared, **safe, **vllm)
    if engine != "transformers":
        raise ValueError(f"engine must be transformers or vllm, got {engine!r}.")
    if vllm:
        raise ValueError(f"{', '.join(vllm)} would be ignored: these are options of engine: vllm.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be auto or a number format such as float32 or bfloat16, got {dtype!r}.")
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    place = _device(device or accelerator)
    check_model(model, "model", trust_remote_code=trust_remote_code)
    check_tensors(model, "model", **shared)
    tokenizer = load_tokenizer(model, "model", **shared)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True, **shared)
    check_finite(loaded, "model")
    return TransformersEngine(loaded.to(place).eval(), tokenizer)


def _device(name: Any) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: no such device, or none of that kind or number here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {name} is not there ({reason}). Name one of this machine, such as cpu or cuda:0."
        ) from error
    return device
