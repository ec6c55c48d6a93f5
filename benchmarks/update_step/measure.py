"""One row: an update step of one method, timed, and its memory taken."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.update_step.given_states import given_states
from benchmarks.update_step.ours import our_chunks, ours
from benchmarks.update_step.peers import Method, peer_tiles, peers
from benchmarks.update_step.swapping import swapped
from benchmarks.update_step.workload import (
    SHAPES,
    Batch,
    Models,
    Shape,
    make_models,
    microbatches,
    packed_microbatches,
    padded,
    read_rollouts,
)
from torch import nn

from oprd.insight.live_bytes import LiveBytes

PHASES = ("update", "loss", "end to end")


@dataclass(frozen=True)
class Setting:
    """What a row is measured under. ``phase``: ``update`` runs both models, ``loss`` starts from given states, and
    ``end to end`` generates the rollouts first."""

    method: str
    shape: str
    phase: str = "update"
    microbatch: int = 1
    device: str = "cpu"
    dtype: str | None = None
    repeats: int = 3
    rollouts: str | None = None
    time_only: bool = False


def methods(shape: Shape) -> dict[str, Method]:
    """Every row's name and method, in the order of the table."""
    return peers() | ours(shape)


@torch.no_grad()
def generate(models: Models, rollouts: list[dict], device: str) -> float:
    """Seconds to sample ``rollouts`` anew with the student: transformers' generation on the whole batch, as TRL runs it
    without vLLM. Every response goes on to the longest one's length, since a batch ends with its last row."""
    columns = padded(rollouts, device)
    longest = max(len(rollout["response"]) for rollout in rollouts)
    model = models.student.eval()
    started = time.perf_counter()
    model.generate(
        input_ids=columns["prompt_ids"],
        attention_mask=columns["prompt_mask"],
        do_sample=True,
        min_new_tokens=longest,
        max_new_tokens=longest,
        eos_token_id=None,
        pad_token_id=0,
    )
    if device != "cpu":
        torch.cuda.synchronize()
    model.train()
    return time.perf_counter() - started


def run(setting: Setting) -> dict[str, Any]:
    """One warm-up, ``repeats`` timed updates of the whole batch, and the peak above what was there before.

    Gradients exist beforehand, as after the first micro-batch of a step. On a CPU the peak is counted, in an update of its
    own that is not timed and whose tiles shrink with the shape; times are with everybody's own tiles. ``time_only`` leaves
    that out, and warms up on the first micro-batch alone.
    """
    shape = SHAPES[setting.shape]
    method = methods(shape)[setting.method]
    if reason := method.unavailable():
        return asdict(setting) | {"unavailable": reason}
    device = torch.device(setting.device)
    dtype = getattr(torch, setting.dtype or shape.dtype)
    rollouts = read_rollouts(Path(setting.rollouts))
    if method.packed:
        batches = list(packed_microbatches(rollouts, setting.microbatch, device=setting.device))
    else:
        batches = list(microbatches(rollouts, setting.microbatch, padded_to=method.padded_to, device=setting.device))
    if setting.phase == "loss":
        models = given_states(shape, *reading_size(batches, method.packed), dtype, setting.device)
    else:
        models = make_models(shape, dtype, setting.device)
    method.set_up(models)
    have_gradients(models.student)

    def update(number: int | None = None) -> float:
        total = 0.0
        for batch in batches[:number]:
            loss = method.loss(models, method.prepare(batch))
            loss.backward()
            total += loss.detach()
        return float(total)

    loss = update(1 if setting.time_only else None)  # warm-up, and waits for the device
    seconds, processor = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(setting.repeats):
        started = time.perf_counter(), time.process_time()
        loss = update()
        seconds.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    if device.type == "cuda":
        peak, held = torch.cuda.max_memory_allocated() - before, []
    elif setting.time_only:
        peak, held = None, []
    else:
        gc.collect()
        with swapped(*peer_tiles(shape), *our_chunks(shape)), LiveBytes() as memory:
            update()
        peak, held = memory.peak, top_of(memory)
    response = sum(len(rollout["response"]) for rollout in rollouts)
    row = asdict(setting) | {
        "loss": loss,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds_min": min(seconds),
        "processor_seconds_min": min(processor),
        "seconds_median": statistics.median(seconds),
        "response_tokens": response,
        "microbatches": len(batches),
        "read_tokens": sum(batch.mask_BS.sum().item() if method.packed else batch.ids_BS.numel() for batch in batches),
        "tokens_per_second": response / statistics.median(seconds),
        "peak_bytes": peak,
        "peak_is": "allocated" if device.type == "cuda" else "counted",
        "at_peak": held,
    }
    if setting.phase == "end to end":
        row["generation_seconds"] = generate(models, rollouts, setting.device)
    return row


def reading_size(batches: list[Batch], packed: bool) -> tuple[int, int]:
    """Rows and columns that hold any of the readings."""
    if packed:
        return 1, max(int(batch.mask_BS.sum()) for batch in batches)
    return tuple(max(batch.ids_BS.shape[axis] for batch in batches) for axis in (0, 1))


def have_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def top_of(memory: LiveBytes, top: int = 8) -> list[dict]:
    """The largest that was alive at the peak, for JSON."""
    return [held._asdict() | {"dtype": str(held.dtype).removeprefix("torch.")} for held in memory.at_peak(top)]
