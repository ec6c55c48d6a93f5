"""What goes over the wire: questions and answers as safetensors, checked on arrival on both sides. Never pickle.

Shapes: B sequences, S columns, D documents, L layers, N places, E chain steps, d width, r rank.
A question's body holds ``ids [B, S]``, ``mask [B, S]`` or (packed) ``lengths [D]`` and ``positions [1, S]``, ``layers [L, 2]``
(student's, teacher's), ``states [N]`` and, where asked for, ``outputs [N]`` and ``chains [E]``. Its parameters say which
projection, which autocast, and whether the last states are wanted at ``states`` too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from oprd.bridge import TeacherSide
from oprd.states import Question, Reading, TeacherStates

PROTOCOL = 1
TEACHER, CHECKSUM = "x-oprd-teacher", "x-oprd-sha256"  # headers: who answers, and what the body must hash to
UNKNOWN_PROJECTION = 409  # the client sends it and asks again
MOST_QUESTION_BYTES = 64 * 2**20
MOST_LAYERS = 1024
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {"ids", "mask", "lengths", "positions", "layers", "states", "outputs", "chains"}
LAST = ("at_states", "at_outputs", "at_chains")


class Refused(Exception):
    """A request that gets an HTTP status and one line instead of an answer."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a teacher can be asked: its shape, and the most that one forward and one answer may hold."""

    depth: int
    width: int
    vocab_size: int
    context: int | None
    max_tokens: int
    max_answer_bytes: int


def write_question(question: Question) -> tuple[bytes, dict[str, str]]:
    """Body and parameters; numbers travel as int32."""
    reading = question.reading
    tensors: dict[str, Tensor | None] = {
        "ids": reading.ids_BS,
        "layers": torch.tensor(sorted(question.layers.items()), dtype=torch.int32).reshape(-1, 2),
        "states": question.state_places_N,
        "outputs": question.output_places_N,
        "chains": question.chain_places_E,
    }
    if reading.is_packed:
        tensors |= {"lengths": torch.tensor(reading.lengths), "positions": reading.positions_BS}
    else:
        tensors["mask"] = reading.mask_BS
    body = save({name: t.to("cpu", torch.int32).contiguous() for name, t in tensors.items() if t is not None})
    parameters = {"last": "1"} if question.last_at_states else {}
    if question.dtype is not None:
        parameters["autocast"] = str(question.dtype).removeprefix("torch.")
    return body, parameters


def read_tensors(body: bytes) -> dict[str, Tensor]:
    """Named tensors.

    Raises:
        Refused: 400 for anything that is not safetensors.
    """
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise Refused(400, "the body is not safetensors") from error


def read_question(
    body: bytes, parameters: Mapping[str, str], through: TeacherSide | None, limits: Limits, device: torch.device
) -> Question:
    """The question, on ``device``, if the teacher can answer it without fail.

    Raises:
        Refused: 400 or 422 with what is wrong, 413 for more than one forward or one answer may hold.
    """
    unknown = set(parameters) - {"projection", "autocast", "last"}
    if unknown or parameters.get("last", "1") != "1" or parameters.get("autocast", "float16") not in AUTOCAST:
        raise Refused(422, f"parameters are projection, autocast ({' or '.join(AUTOCAST)}) and last=1")
    tensors = read_tensors(body)
    if set(tensors) - NAMES:
        raise Refused(422, f"tensors are {', '.join(sorted(NAMES))}")
    if any(tensor.dtype != torch.int32 for tensor in tensors.values()):
        raise Refused(422, "all tensors must be int32")
    reading = _reading(tensors, limits)
    count = reading.ids_BS.numel()
    layers = _layers(tensors, through, limits)
    places = {name: _numbers(tensors, name, 1, 0, count) for name in ("states", "outputs", "chains") if name in tensors}
    if "states" not in places:
        raise Refused(422, "states is missing")
    question = Question(
        Reading(
            reading.ids_BS.to(device),
            reading.mask_BS.to(device),
            None if reading.positions_BS is None else reading.positions_BS.to(device),
            reading.lengths,
        ),
        places["states"].to(device),
        layers,
        through,
        last_at_states="last" in parameters,
        output_places_N=places["outputs"].to(device) if "outputs" in places else None,
        chain_places_E=places["chains"].to(device) if "chains" in places else None,
        dtype=AUTOCAST.get(parameters.get("autocast", "")),
    )
    if not layers and not question.needs_last:
        raise Refused(422, "nothing is asked for: give layers, outputs, chains or last=1")
    size = sum(
        math.prod(shape) * max(dtype.itemsize for dtype in dtypes)
        for shape, dtypes in expected(question, limits.width, torch.float32).values()
    )
    if size > limits.max_answer_bytes:
        raise Refused(413, f"the answer would have {size:,} bytes, this service gives {limits.max_answer_bytes:,}")
    return question


def _numbers(tensors: Mapping[str, Tensor], name: str, ndim: int, low: int, high: int) -> Tensor:
    """One tensor as int64, with ``low <= number < high``."""
    tensor = tensors.get(name)
    if tensor is None:
        raise Refused(422, f"{name} is missing")
    if tensor.ndim != ndim:
        raise Refused(422, f"{name} must have {ndim} dimensions")
    if tensor.numel() and not (low <= int(tensor.min()) and int(tensor.max()) < high):
        raise Refused(422, f"{name} must lie in {low}..{high - 1}")
    return tensor.long()


def _reading(tensors: Mapping[str, Tensor], limits: Limits) -> Reading:
    ids_BS = tensors.get("ids")
    if ids_BS is None or ids_BS.ndim != 2 or not ids_BS.numel():
        raise Refused(422, "ids must be a matrix that is not empty")
    rows, columns = ids_BS.shape
    if rows * columns > limits.max_tokens:
        raise Refused(
            413,
            f"{rows * columns:,} tokens, this service reads {limits.max_tokens:,} at once: lower "
            "per_device_train_batch_size or max_tokens_per_microbatch, or raise --max_tokens of oprd serve-teacher",
        )
    ids_BS = _numbers(tensors, "ids", 2, 0, limits.vocab_size)
    context = limits.context or columns
    if "lengths" not in tensors:
        if "positions" in tensors:
            raise Refused(422, "positions go with lengths")
        if columns > context:
            raise Refused(422, f"rows of {columns} tokens, this teacher's context has {context}")
        mask_BS = _numbers(tensors, "mask", 2, 0, 2).bool()
        if mask_BS.shape != ids_BS.shape or not bool(mask_BS[:, 0].all()):
            raise Refused(422, "mask must be of the shape of ids, and the first token of a row real")
        return Reading(ids_BS, mask_BS)
    if "mask" in tensors or rows != 1:
        raise Refused(422, "packed ids are one row, without a mask")
    lengths = _numbers(tensors, "lengths", 1, 1, context + 1).tolist()
    positions_BS = _numbers(tensors, "positions", 2, 0, context)
    if sum(lengths) != columns or positions_BS.shape != ids_BS.shape:
        raise Refused(422, "lengths and positions must cover ids")
    return Reading(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool), positions_BS, tuple(lengths))


def _layers(tensors: Mapping[str, Tensor], through: TeacherSide | None, limits: Limits) -> dict[int, int]:
    pairs = _numbers(tensors, "layers", 2, 1, MOST_LAYERS + 1)
    if pairs.shape[1] != 2:
        raise Refused(422, "layers must be pairs")
    found = dict(pairs.tolist())
    if len(found) != len(pairs):
        raise Refused(422, "a student layer comes twice")
    if any(layer > limits.depth for layer in found.values()):
        raise Refused(422, f"this teacher has layers 1..{limits.depth}")
    if through is not None and any(layer > len(through.maps_LRd) for layer in found):
        raise Refused(422, f"this projection has layers 1..{len(through.maps_LRd)}")
    return found


def expected(question: Question, width: int, dtype: torch.dtype) -> dict[str, tuple[tuple[int, int], set[torch.dtype]]]:
    """Name, shape and possible dtypes of every tensor of the answer by a teacher of that width and dtype."""
    count, through = len(question.state_places_N), question.through
    if question.dtype is not None:
        layers = {question.dtype}
    elif through is not None:
        layers = {torch.promote_types(dtype, torch.float32)}
    else:
        layers = {dtype, torch.float32}  # a residual stream may be kept finer than the weights
    rank = width if through is None else through.rank
    last = {dtype, torch.float32} | ({question.dtype} if question.dtype else set())
    wanted = {f"layers.{layer}": ((count, rank), layers) for layer in question.layers}
    places = (
        question.state_places_N if question.last_at_states else None,
        question.output_places_N,
        question.chain_places_E,
    )
    return wanted | {name: ((len(p), width), last) for name, p in zip(LAST, places, strict=True) if p is not None}


def write_answer(answer: TeacherStates) -> bytes:
    """All states of an answer."""
    tensors = {f"layers.{layer}": states for layer, states in answer.layers.items()}
    tensors |= {name: getattr(answer, name) for name in LAST if getattr(answer, name) is not None}
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, states in tensors.items():  # two student layers may share a teacher layer, and safetensors share nothing
        rows = states.cpu().contiguous()
        own[name] = rows.clone() if rows.data_ptr() in taken else rows
        taken.add(rows.data_ptr())
    return save(own)


def read_answer(body: bytes, wanted: Mapping[str, tuple[tuple[int, int], set[torch.dtype]]]) -> TeacherStates:
    """The states, if they are exactly what was asked for.

    Raises:
        ValueError: a missing or further tensor, another shape or dtype, or no safetensors.
    """
    try:
        tensors = read_tensors(body)
    except Refused as error:
        raise ValueError(f"The teacher's answer cannot be read: {error}.") from error
    if set(tensors) != set(wanted):
        raise ValueError(f"The teacher's answer holds {sorted(tensors)} and not {sorted(wanted)}.")
    for name, (shape, dtypes) in wanted.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype not in dtypes:
            raise ValueError(
                f"The teacher's answer has {name} of shape {tuple(found.shape)} in {found.dtype}, and {shape} in "
                f"{' or '.join(sorted(map(str, dtypes)))} was asked for."
            )
    layers = {int(name.removeprefix("layers.")): t for name, t in tensors.items() if name.startswith("layers.")}
    return TeacherStates(layers, *(tensors.get(name) for name in LAST))


def read_projection(body: bytes, width: int) -> TeacherSide:
    """A bridge's teacher side.

    Raises:
        Refused: 400 or 422 with what is wrong.
    """
    tensors = read_tensors(body)
    if set(tensors) != {"maps", "means"} or any(
        t.dtype not in (torch.float32, torch.float64) for t in tensors.values()
    ):
        raise Refused(422, "a projection has maps and means, in float32 or float64")
    try:
        side = TeacherSide(tensors["maps"], tensors["means"])
    except ValueError as error:
        raise Refused(422, str(error).rstrip(".")) from error
    layers, rank, columns = side.maps_LRd.shape
    if columns != width or not 1 <= layers <= MOST_LAYERS or not 1 <= rank <= width:
        raise Refused(422, f"this teacher is {width} wide, and a projection has 1..{width} dimensions")
    return side
