"""The process that holds the teacher: its weights, the projections that clients have sent, one forward at a time."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from threading import Lock
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from oprd import model_files, models
from oprd.bridge import TeacherSide, model_fingerprint
from oprd.serving import wire
from oprd.serving.files import digests, read_files
from oprd.serving.wire import Limits, Refused
from oprd.states import answer, check_packed_attention, tile_mlps, use_packed_attention

logger = logging.getLogger(__name__)

MOST_PROJECTIONS = 4
MAX_TOKENS = 65_536
MAX_ANSWER_BYTES = 8 * 2**30


def check_model(model: str, revision: str | None, trust_remote_code: bool) -> str:
    """The model's path or Hub id, if there is such a model.

    Raises:
        ValueError: neither a folder with a config nor a model that the Hub gives.
    """
    path = models.resolve_path(model)
    model_files.check_model(path, "teacher", trust_remote_code=trust_remote_code)
    try:
        AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"--model {model} cannot be served: {reason}") from error
    model_files.warn_of_code(path, trust_remote_code)
    return path


class Host:
    """A frozen teacher and what it answers.

    Args:
        teacher: a causal LM on one device.
        files: the small files beside its weights, by name.
        max_tokens: most tokens, padding included, of one forward.
        max_answer_bytes: most bytes of one answer.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        files: Mapping[str, bytes],
        *,
        max_tokens: int = MAX_TOKENS,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        self.teacher = teacher.requires_grad_(False).eval()
        self.files = dict(files)
        models.decoder_layers(models.backbone_of(teacher))
        tile_mlps(teacher)
        parameter = next(models.backbone_of(teacher).parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        config = models.text_config(teacher)
        self.limits = Limits(
            depth=config.num_hidden_layers,
            width=config.hidden_size,
            vocab_size=teacher.get_input_embeddings().weight.shape[0],
            context=getattr(config, "max_position_embeddings", None),
            max_tokens=max_tokens,
            max_answer_bytes=max_answer_bytes,
        )
        self.why_not_packed = _why_not_packed(teacher)
        self._projections: OrderedDict[str, TeacherSide] = OrderedDict()
        self._lock = Lock()
        self.about = self._about()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        **limits: int,
    ) -> Host:
        """Weights from a folder or the Hub, in ``dtype`` (``auto`` is the checkpoint's own), on ``device`` (the first
        accelerator by default)."""
        if device is None:
            device = "cpu" if (found := torch.accelerator.current_accelerator()) is None else str(found)
        further = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        with model_files.quietly():
            teacher = AutoModelForCausalLM.from_pretrained(
                path,
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **further,
            )
        model_files.check_finite(teacher, "teacher")
        return cls(teacher.to(device), read_files(path, revision), **limits)

    def _about(self) -> dict[str, Any]:
        head = self.teacher.get_output_embeddings()
        about = {
            "protocol": wire.PROTOCOL,
            "fingerprint": model_fingerprint(self.teacher),
            "dtype": str(self.dtype).removeprefix("torch."),
            "head": {
                "shape": list(head.weight.shape),
                "dtype": str(head.weight.dtype).removeprefix("torch."),
                "bias": getattr(head, "bias", None) is not None,
            },
            "files": digests(self.files),
        }
        # Whoever answers with the same digest has the same weights, in the same precision, under the same tokenizer.
        about["teacher"] = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return about | {
            "why_not_packed": self.why_not_packed,
            "max_tokens": self.limits.max_tokens,
            "versions": {name: version(name) for name in ("oprd", "torch", "transformers")},
        }

    # ---------------------------------------------------------------------------------- called from a worker thread

    def head(self) -> bytes:
        """The LM head as safetensors: ``weight [V, d]`` and, where there is one, ``bias [V]``."""
        parts = self.teacher.get_output_embeddings().named_parameters()
        return save({name: part.detach().cpu().contiguous() for name, part in parts})

    def keep_projection(self, digest: str, body: bytes) -> None:
        """Take a bridge's teacher side in; of several, those that were used last are kept.

        Raises:
            Refused: content that is no projection for this teacher, or not what its digest says.
        """
        if hashlib.sha256(body).hexdigest() != digest:
            raise Refused(422, "the body is not what its sha256 says")
        side = wire.read_projection(body, self.limits.width)
        with survives_out_of_memory(), self._lock:
            self._projections[digest] = side.to(self.device)
            while len(self._projections) > MOST_PROJECTIONS:
                self._projections.popitem(last=False)

    def projection(self, digest: str) -> TeacherSide:
        """A projection that was sent before.

        Raises:
            Refused: it is not known, or no longer.
        """
        with self._lock:
            if digest not in self._projections:
                raise Refused(wire.UNKNOWN_PROJECTION, "unknown projection: send it first")
            self._projections.move_to_end(digest)
            return self._projections[digest]

    def answer(self, body: bytes, parameters: Mapping[str, str]) -> bytes:
        """One question's answer; one call at a time.

        Raises:
            Refused: a question that cannot be answered, or that the device has no memory for.
        """
        through = self.projection(parameters["projection"]) if "projection" in parameters else None
        question = wire.read_question(body, parameters, through, self.limits, self.device)
        if question.reading.is_packed and self.why_not_packed is not None:
            raise Refused(422, self.why_not_packed)
        with (
            survives_out_of_memory(),
            torch.autocast(self.device.type, question.dtype, enabled=question.dtype is not None),
        ):
            return wire.write_answer(answer(self.teacher, question))


@contextmanager
def survives_out_of_memory() -> Iterator[None]:
    """Turn a lack of memory, of the device or the machine, into a refusal; the service goes on."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "allocate memory" not in str(error):  # what torch says of main memory
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise Refused(
            507,
            "the teacher ran out of memory: ask for fewer tokens at once (per_device_train_batch_size, "
            "max_tokens_per_microbatch), or lower --max_tokens of oprd serve-teacher",
        ) from error


def _why_not_packed(teacher: nn.Module) -> str | None:
    """None if the teacher reads packed rows from now on; otherwise the reason."""
    config = models.text_config(teacher)
    before = config._attn_implementation
    try:
        use_packed_attention(teacher)
        check_packed_attention(teacher)
    except ValueError as error:
        config._attn_implementation = before
        return f"this teacher reads no packed rows: {error}"
    return None
