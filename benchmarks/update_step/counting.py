"""One row without running it: peak bytes of one micro-batch, counted on fake tensors."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import torch
from benchmarks.update_step.given_states import given_states
from benchmarks.update_step.measure import Setting, have_gradients, methods, top_of
from benchmarks.update_step.ours import our_chunks
from benchmarks.update_step.peers import liger_unavailable, peer_tiles
from benchmarks.update_step.swapping import Swap, swapped
from benchmarks.update_step.workload import FIRST_ID, SHAPES, Batch, make_models
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from oprd.insight.live_bytes import LiveBytes
from oprd.insight.simulate import as_fake


def count(setting: Setting, *, columns: int = 16_384, supervised: int = 2_000, top: int = 8) -> dict[str, Any]:
    """Peak bytes of one micro-batch on fake tensors: one sequence of ``columns``, its last ``supervised`` the response.

    No weights, no GPU, seconds at any size. Kernels that write in place on a GPU do so here (`as_on_gpu`); their
    workspaces are not seen. Gradients exist beforehand.
    """
    shape = SHAPES[setting.shape]
    method = methods(shape)[setting.method]
    if reason := method.unavailable():
        return asdict(setting) | {"unavailable": reason}
    dtype = getattr(torch, setting.dtype or shape.dtype)
    prepared = method.prepare(one_sequence(columns, supervised))
    started = time.perf_counter()
    fake = FakeTensorMode()
    with fake, swapped(*peer_tiles(shape), *our_chunks(shape), *as_on_gpu()):
        if setting.phase == "loss":
            models = given_states(shape, 1, columns, dtype, "cpu")
        else:
            models = make_models(shape, dtype)
        method.set_up(models)
        have_gradients(models.student)
        prepared = as_fake(prepared, fake)
        with LiveBytes() as memory:
            method.loss(models, prepared).backward()
    return asdict(setting) | {
        "columns": columns,
        "supervised": supervised,
        "peak_bytes": memory.peak,
        "peak_is": "counted",
        "at_peak": top_of(memory, top),
        "seconds_to_count": time.perf_counter() - started,
    }


def one_sequence(columns: int, supervised: int) -> Batch:
    """A prompt and a response without padding."""
    ids = torch.full((1, columns), FIRST_ID)
    prompt, response = ids.split([columns - supervised, supervised], dim=1)
    return Batch(prompt, torch.ones_like(prompt), response, torch.ones_like(response), supervised)


def as_on_gpu() -> list[Swap]:
    """What fake tensors on a CPU would get wrong about a GPU, to be put right while counting.

    - transformers forms a mask ``[B, 1, S, S]`` unless it sees that nothing is padded, and fake masks cannot be looked at.
      Here nothing is padded, so there is none.
    - TRL folds its tiles in Triton kernels that write in place and multiplies into float32 from half precision; its fallback
      for CPUs, in torch, would hold five more tiles.
    - Liger asks for the value of the incoming gradient, which is 1.
    """
    from transformers.models.qwen2 import modeling_qwen2
    from trl.kernels import chunked_divergence as kernel

    def nothing(*_: Any, **__: Any) -> None:
        return None

    swaps: list[Swap] = [(modeling_qwen2, "create_causal_mask", nothing)]
    swaps += [(kernel, name, nothing) for name in ("_stats_tile", "_backward_tile", "_project", "_addmm_fp32")]
    if liger_unavailable() is None:
        from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase

        def backward(ctx: Any, _: Tensor, *__: Any) -> tuple:
            grad_input, grad_weight, grad_bias = ctx.saved_tensors
            return grad_input, grad_weight, None, None, None, grad_bias

        swaps.append((LigerFusedLinearDistillationBase, "backward", staticmethod(backward)))
    return swaps
