"""Where a NaN or an infinity came from: step, model, layer, rows. And the batch, kept for whoever wants to look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from oprd.models import text_config
from oprd.records import write_json
from oprd.states import Reading, TeacherElsewhere, visit_states
from oprd.training import microbatches
from oprd.training.engines import is_sharded, redirected
from oprd.training.microbatches import MicroBatch

FOLDER = "faults"
SHOWN = 60  # characters of a prompt


class NonFinite(ValueError):
    """A loss, gradient or hidden state that is NaN or infinite."""


@contextmanager
def sampling(trainer: Any) -> Iterator[None]:
    """Around a rollout: a student whose logits are not finite cannot be sampled from.

    Raises:
        NonFinite: with what to do.
    """
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise NonFinite(
            f"Step {trainer.state.global_step + 1}: the student cannot be sampled from, its logits are NaN or infinite: training has "
            "diverged. Lower learning_rate (or raise warmup_steps), and start again or from an earlier checkpoint."
        ) from error


def describe(trainer: Any, model: nn.Module, update: Sequence[MicroBatch], loss: float, norm: float) -> str:
    """One line about what went wrong, and where the update's batch was saved. Every process must call it.

    Gradients are lost: what the update is made of runs again, piece by piece.
    """
    accelerator, step = trainer.accelerator, trainer.state.global_step + 1
    model.zero_grad(set_to_none=True)
    found = [(number, *where) for number, part in enumerate(update) for where in _in_states(trainer, model, part)]
    if not found and not is_sharded(trainer.args) and not trainer.is_deepspeed_enabled:
        found = [(number, *where) for number, part in enumerate(update) for where in _in_rows(trainer, model, part)]
        model.zero_grad(set_to_none=True)
    prompts = [trainer.processing_class.batch_decode(_prompts(part), skip_special_tokens=True) for part in update]
    places = [{"micro_batch": n, "what": what, "rows": rows} for n, what, rows in found]
    path = Path(trainer.args.output_dir) / FOLDER / f"step-{step:06d}-process-{accelerator.process_index}"
    _save(
        path, update, {"step": step, "loss": str(loss), "gradient_norm": str(norm), "found": places, "prompts": prompts}
    )
    said = f"Step {step}: loss {loss:.4g}, gradient norm {norm:.4g}."
    for number, what, rows in found[:1]:
        shown = "; ".join(f"{row} {prompts[number][row][:SHOWN]!r}" for row in rows[:3])
        more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
        said += f" First in {what}, micro-batch {number}, rows {shown}{more}."
    if not found:
        said += " No single row's states, loss or gradient is to blame on this process."
    return f"{said} The batch is in {path}.safetensors."


def _prompts(part: MicroBatch) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(part["prompt_ids"], part["prompt_mask"], strict=True)]


@torch.no_grad()
def _in_states(trainer: Any, model: nn.Module, part: MicroBatch) -> list[tuple[str, list[int]]]:
    """The first layer of either model with such states, and its rows."""
    found: list[tuple[str, list[int]]] = []

    def look(who: str, wrapper: nn.Module, reading: Reading) -> None:
        plain = trainer.accelerator.unwrap_model(wrapper)
        rows = redirected(trainer._forward_redirection, wrapper, plain, partial(_look, trainer, plain, reading))
        found.extend([(f"{who}'s hidden states, layer {layer}", bad) for layer, bad in sorted(rows.items()) if bad][:1])

    for teacher in trainer.teachers_of(part):
        rollout = trainer.make_rollout(part, teacher)
        if not isinstance(teacher.model, TeacherElsewhere):
            with teacher.at_hand():
                who = "the teacher" if teacher.name is None else f"the teacher {teacher.name}"
                look(who, teacher.among(model), rollout.teacher)
    look("the student", model, rollout.student)
    return found


def _look(trainer: Any, model: nn.Module, reading: Reading) -> dict[int, list[int]]:
    """Rows of each layer with states that are not finite."""

    def visit(layer: int, states_BSd: Tensor) -> list[int]:
        wrong_BS = ~states_BSd.isfinite().all(-1) & reading.mask_BS.bool()
        return wrong_BS.any(1).nonzero().flatten().tolist()

    with trainer.accelerator.autocast():
        return visit_states(model, reading, range(1, text_config(model).num_hidden_layers + 1), visit)[1]


def _in_rows(trainer: Any, model: nn.Module, part: MicroBatch) -> list[tuple[str, list[int]]]:
    """Rows whose loss, taken alone, is such; else rows whose gradient is, with the first parameter."""
    losses: list[int] = []
    gradients: dict[str, list[int]] = {}
    meter = trainer._meter.snapshot()
    plain = trainer.accelerator.unwrap_model(model)
    for row in range(len(part["prompt_mask"])):
        plain.zero_grad(set_to_none=True)
        with trainer.accelerator.no_sync(model):
            loss = trainer._micro_batch_loss(model, microbatches.rows_of(part, [row]))
            if not loss.isfinite():
                losses.append(row)
                continue
            loss.backward()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                gradients.setdefault(name, []).append(row)
    trainer._meter.restore(meter)
    if losses:
        return [("the loss", losses)]
    # Backward runs from the last layer to the first: what goes wrong there goes wrong below too.
    last = list(gradients)[-1:]
    return [(f"the gradient of {name}", gradients[name]) for name in last]


def _save(path: Path, update: Sequence[MicroBatch], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{number}.{name}": value.detach().cpu().clone().contiguous()
        for number, part in enumerate(update)
        for name, value in part.items()
        if isinstance(value, Tensor)
    }
    save_file(tensors, path.with_suffix(".safetensors"))
    write_json(path.with_suffix(".json"), about)
