"""The update step of others: what one micro-batch's loss is, given models and stored rollouts.

A `Method` has two halves. ``prepare`` looks at ids and masks and nothing else; ``loss`` runs the models, and never looks at
a tensor's values, so that it also runs on fake tensors. Every loss is a sum over the response tokens, divided by their number
in the whole batch.

Shapes: B sequences, S columns (prompt and completion), C completion columns, N response tokens, V vocabulary, K support.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from benchmarks.update_step.swapping import Swap
from benchmarks.update_step.workload import Batch, Models, Shape
from torch import Tensor, nn


@dataclass(frozen=True)
class Method:
    """``padded_to``: see `microbatches`; ``packed``: micro-batches hold as many rows as fit the longest one's tokens
    (`packed_microbatches`). ``set_up``: what to do to models first. ``unavailable``: why it cannot run here, or None."""

    loss: Callable[[Models, Any], Tensor]
    prepare: Callable[[Batch], Any] = lambda batch: batch
    padded_to: str = "microbatch"
    unavailable: Callable[[], str | None] = lambda: None
    head_trains: bool = True
    packed: bool = False
    set_up: Callable[[Models], None] = lambda models: None


# --- naive: full logits of both models ------------------------------------------------------------------------------------


def _log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Next-token log-probabilities at every column, float32 ``[B, S, V]``, as common trainers form them."""
    logits_BSV = model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False).logits
    return logits_BSV.float().log_softmax(-1)


def _at_responses(values_BSx: Tensor, batch: Batch) -> Tensor:
    """The columns that predict the completion, ``[B, S, ...] -> [B, C, ...]``."""
    return values_BSx[:, -batch.completion_ids_BC.shape[1] - 1 : -1]


def naive_top_1(models: Models, batch: Batch) -> Tensor:
    """The sampled token's policy gradient; its value is the log-ratio. The teacher goes first and leaves ``[B, C]``."""
    index_BC1 = batch.completion_ids_BC.unsqueeze(-1)
    with torch.no_grad():
        log_q_BC = _at_responses(_log_probs(models.teacher, batch), batch).gather(-1, index_BC1).squeeze(-1)
    log_p_BC = _at_responses(_log_probs(models.student, batch), batch).gather(-1, index_BC1).squeeze(-1)
    ratio_BC = (log_p_BC - log_q_BC).detach()
    cost_BC = ratio_BC + ratio_BC * (log_p_BC - log_p_BC.detach())
    return (batch.completion_mask_BC * cost_BC).sum() / batch.total


def naive_top_k(models: Models, batch: Batch, k: int = 16) -> Tensor:
    """Reverse KL on the student's top k, probabilities of the full vocabulary. The support comes from the student's forward,
    so the teacher runs while its graph is alive."""
    log_p_BCV = _at_responses(_log_probs(models.student, batch), batch)
    index_BCK = log_p_BCV.detach().topk(k, dim=-1).indices
    with torch.no_grad():
        log_q_BCK = _at_responses(_log_probs(models.teacher, batch), batch).gather(-1, index_BCK)
    log_p_BCK = log_p_BCV.gather(-1, index_BCK)
    cost_BC = (log_p_BCK.exp() * (log_p_BCK - log_q_BCK)).sum(-1)
    return (batch.completion_mask_BC * cost_BC).sum() / batch.total


# --- TRL: its own trainer's loss ----------------------------------------------------------------------------------------


@cache
def _trl_trainer(temperature: float = 1.0) -> Any:
    """A `DistillationTrainer` with what `_compute_loss` reads and nothing else: no accelerator, no data."""
    from trl import DistillationTrainer
    from trl.models.utils import _ForwardRedirection

    class LossOnly(DistillationTrainer):
        def __init__(self) -> None:
            self.beta, self.temperature = 1.0, temperature
            self.accelerator = SimpleNamespace(unwrap_model=lambda model: model, is_main_process=False)
            self.args, self.state = SimpleNamespace(report_to=[]), SimpleNamespace(global_step=0)
            self._forward_redirection = _ForwardRedirection()
            self._is_vlm = False

    return LossOnly()


def trl(models: Models, batch: Batch) -> Tensor:
    """TRL's `DistillationTrainer._compute_loss` with ``beta=1`` (reverse KL on tiles), called as it is.

    Left out of TRL's step: the logged entropy, which waits for the device once a micro-batch.
    """
    trainer = _trl_trainer()
    trainer.teacher_model = models.teacher
    trainer.model_kwarg_keys = inspect.signature(models.student.forward).parameters.keys()
    inputs = {
        "prompt_ids": batch.prompt_ids_BP,
        "prompt_mask": batch.prompt_mask_BP,
        "completion_ids": batch.completion_ids_BC,
        "completion_mask": batch.completion_mask_BC,
    }
    loss, _, _ = trainer._forward_redirection(
        models.student, models.student, trainer._compute_loss, models.student, inputs, batch.total
    )
    return loss


# --- Liger: chunked loss between given states and heads -----------------------------------------------------------------


@dataclass(frozen=True)
class Compacted:
    """A batch and where its response tokens are predicted, ``[N]`` in the rows laid end to end."""

    batch: Batch
    place_N: Tensor
    target_N: Tensor


def compacted(batch: Batch) -> Compacted:
    """Liger projects every row it is given, so it gets the response tokens alone: better than padded rows with labels
    to ignore."""
    row_N, t_N = batch.completion_mask_BC.nonzero(as_tuple=True)
    column_N = batch.prompt_ids_BP.shape[1] + t_N - 1
    return Compacted(batch, row_N * batch.ids_BS.shape[1] + column_N, batch.completion_ids_BC[row_N, t_N])


def liger_unavailable() -> str | None:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


LIGER_CHUNK = 1024  # its default


def liger(models: Models, inputs: Compacted) -> Tensor:
    """Liger's `LigerFusedLinearJSDLoss` with ``beta=1``, no hard loss, not compiled.

    It keeps logits and log-probabilities in the states' dtype and computes gradients in the forward. It averages over its
    call; its soft weight turns that into a share of the batch, since scaling the result would copy the head's gradient.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    batch = inputs.batch

    def states(model: nn.Module) -> Tensor:
        output = model.base_model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False)
        return output.last_hidden_state.flatten(0, 1).index_select(0, inputs.place_N)

    with torch.no_grad():
        teacher_Nd = states(models.teacher)
    share = len(inputs.place_N) / batch.total
    divergence = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=share, beta=1.0, compiled=False, chunk_size=LIGER_CHUNK
    )
    heads = (model.get_output_embeddings().weight for model in (models.student, models.teacher))
    student_weight, teacher_weight = heads
    return divergence(states(models.student), student_weight, teacher_Nd, teacher_weight, inputs.target_N)


# --- floors ---------------------------------------------------------------------------------------------------------------


def backbone(models: Models, batch: Batch, *, teacher: bool = False) -> Tensor:
    """The student's backbone, its states summed; with ``teacher`` that one's forward before it."""

    def states(model: nn.Module) -> Tensor:
        output = model.base_model(input_ids=batch.ids_BS, attention_mask=batch.mask_BS, use_cache=False)
        return output.last_hidden_state

    if teacher:
        with torch.no_grad():
            states(models.teacher)
    return states(models.student).sum()


def peers() -> dict[str, Method]:
    """Every row that is not ours."""
    return {
        "naive top-1": Method(naive_top_1, padded_to="batch"),
        "naive top-16": Method(naive_top_k, padded_to="batch"),
        "naive top-16, trimmed": Method(naive_top_k),
        "TRL": Method(trl, padded_to="batch"),
        "TRL, trimmed": Method(trl),
        "Liger, trimmed": Method(liger, compacted, unavailable=liger_unavailable),
        "student backbone": Method(backbone, head_trains=False),
        "both backbones": Method(partial(backbone, teacher=True), head_trains=False),
    }


def peer_tiles(shape: Shape) -> list[Swap]:
    """TRL and Liger work on tiles of fixed size; at a reduced shape one would be larger than all logits, so where memory is
    counted they shrink with the shape: TRL's longest response takes four tiles of tokens at any, and the vocabulary five."""
    from trl.kernels import chunked_divergence as kernel

    sizes = (
        (kernel, "TOKEN_CHUNK_SIZE", 4096 * shape.scale),
        (kernel, "VOCAB_CHUNK_SIZE", 32_768 * shape.vocab / 151_936),
        (sys.modules[__name__], "LIGER_CHUNK", 1024 * shape.scale),
    )
    return [(module, name, max(round(size), 1)) for module, name, size in sizes]
