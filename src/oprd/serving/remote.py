"""`RemoteTeacher`: what stands for a teacher elsewhere in a trainer. It has everything but a backbone."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig

from oprd.bridge import Bridge, TeacherSide
from oprd.serving.client import PATIENCE, Client, Rejected
from oprd.serving.files import MOST_BYTES, check_names
from oprd.serving.secret import VARIABLE, read_token
from oprd.serving.server import check_installed
from oprd.serving.wire import UNKNOWN_PROJECTION, expected, read_answer, read_tensors, write_question
from oprd.states import Question, TeacherElsewhere, TeacherStates

MOST_SENT = 5  # times that a projection is sent for one question
SLACK = 2**16  # bytes of a safetensors header, for a start
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def connect(url: str, token_file: str | None = None, *, patience: float = PATIENCE) -> RemoteTeacher:
    """The teacher that a service holds.

    Args:
        url: of ``oprd serve-teacher``.
        token_file: file with the token; by default it is in the environment.

    Raises:
        ValueError: no token, a wrong one, or something else than such a service.
        ConnectionError: nobody answers.
    """
    check_installed()
    token = read_token(token_file)
    if token is None:
        raise ValueError(f"teacher_url needs the service's token: set {VARIABLE}, or teacher_token_file.")
    return RemoteTeacher(Client(url, token, patience=patience))


class RemoteTeacher(TeacherElsewhere):
    """A frozen teacher in another process, with its config, generation config and fingerprint, and its LM head once that
    is fetched.

    Args:
        client: where it is.

    Attributes:
        folder: its config and tokenizer, for pre-flight; gone when this object is.
        record: what a manifest says of it.

    Raises:
        ValueError: a service that says something which cannot be.
    """

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.client, self.about = client, client.about()
        if self.about["teacher"] != client.teacher:
            raise ValueError(f"{client.url} says two different things about its teacher.")
        self.fingerprint = str(self.about["fingerprint"])
        self.why_not_packed: str | None = self.about["why_not_packed"]
        self._folder = tempfile.TemporaryDirectory(prefix="oprd-teacher-")
        self.folder = self._folder.name
        self._fetch_files()
        self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        self.config._name_or_path = client.url
        has_own = (Path(self.folder) / "generation_config.json").exists()
        self.generation_config = (
            GenerationConfig.from_pretrained(self.folder)
            if has_own
            else GenerationConfig.from_model_config(self.config)
        )
        head = self.about["head"]
        vocab_size, width = map(int, head["shape"])
        self._width = self.config.get_text_config().hidden_size
        self.lm_head = nn.Linear(width, vocab_size, bool(head["bias"]), device="meta", dtype=DTYPES[head["dtype"]])
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return DTYPES[self.about["dtype"]]

    @property
    def record(self) -> dict[str, Any]:
        """Name, and content in one hash; `oprd.lineage` keeps it as it keeps a model here."""
        about = {"fingerprint": self.fingerprint, "dtype": self.about["dtype"]}
        return {"name": self.client.url, "revision": None, "hash": self.client.teacher, **about}

    def get_output_embeddings(self) -> nn.Linear:
        """The LM head; without content before `fetch_head`."""
        return self.lm_head

    def place(self, device: torch.device) -> RemoteTeacher:
        """Where the head is to lie, now or once it is fetched."""
        self._device = device
        if self.has_head:
            self.lm_head.to(device)
        return self

    _device: torch.device | None = None

    @property
    def has_head(self) -> bool:
        """Whether the head has content."""
        return not self.lm_head.weight.is_meta

    def fetch_head(self) -> None:
        """Bring the head here, once.

        Raises:
            ValueError: a head of another shape or dtype than the service has said.
        """
        if self.has_head:
            return
        wanted = dict(self.lm_head.named_parameters())
        size = sum(p.numel() * p.dtype.itemsize for p in wanted.values())
        found = read_tensors(self.client.request("GET", "/v1/head", most_bytes=size + SLACK))
        shapes = {name: (part.shape, part.dtype) for name, part in found.items()}
        if shapes != {name: (part.shape, part.dtype) for name, part in wanted.items()}:
            raise ValueError(f"The LM head that {self.client.url} sends is not the one that it has described.")
        for name, part in found.items():
            setattr(self.lm_head, name, nn.Parameter(part.to(self._device), requires_grad=False))

    def answer(self, question: Question) -> TeacherStates:
        """The states asked for, in main memory, once all of them have come and are what was asked for.

        Raises:
            ValueError: a refusal, another teacher, or an answer to another question.
            ConnectionError: no answer.
        """
        side = _teacher_side(question)
        body, parameters = write_question(question)
        if side is not None:
            parameters["projection"] = side.digest
        wanted = expected(question, self._width, self.dtype)
        most = SLACK + sum(
            shape[0] * shape[1] * max(dtype.itemsize for dtype in dtypes) + 256 for shape, dtypes in wanted.values()
        )
        ask = {"most_bytes": most, "body": body, "parameters": parameters}
        for _ in range(MOST_SENT):
            try:
                content = self.client.request("POST", "/v1/states", **ask)
                break
            except Rejected as error:
                if error.status != UNKNOWN_PROJECTION or side is None:
                    raise
            # The first question of all processes, or the first one to a service that was started again.
            self.client.request("PUT", f"/v1/projections/{side.digest}", most_bytes=0, body=side.content())
        else:
            raise ConnectionError(
                f"The teacher at {self.client.url} has forgotten the bridge {MOST_SENT} times in a row: more than four runs "
                "with different bridges share it. Serve another one."
            )
        return read_answer(content, wanted)

    def _fetch_files(self) -> None:
        for name in check_names(list(self.about["files"])):
            content = self.client.request("GET", f"/v1/files/{name}", most_bytes=MOST_BYTES)
            if hashlib.sha256(content).hexdigest() != self.about["files"][name]:
                raise ValueError(f"{name} is not what {self.client.url} has said that it is.")
            (Path(self.folder) / name).write_bytes(content)


def _teacher_side(question: Question) -> TeacherSide | None:
    through = question.through
    return through.teacher_side if isinstance(through, Bridge) else through
