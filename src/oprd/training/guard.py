"""What is done when the numbers of an update go wrong: it is found, said and kept; and when memory runs out: smaller micro-batches.

An update is made of several micro-batches whose losses add up to one with global denominators. So one that does not fit
can be cut in two without changing the gradient; since it may have left half of its gradient behind, the update's earlier
ones are run again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from oprd.models import gathered
from oprd.training import microbatches, nonfinite
from oprd.training.engines import is_sharded
from oprd.training.microbatches import MicroBatch

logger = get_logger(__name__)

REMEMBERED, ALARM = 100, 20.0  # gradient norms, and how many times their median is alarming
SKIPS_IN_A_ROW = 10


class Guard:
    """Watches the updates of one trainer.

    Args:
        trainer: an `oprd.OPRDTrainer`; its ``_micro_batch_loss`` and ``_meter`` are what is run and measured again.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._update: list[MicroBatch] = []  # what the update under way is made of, as far as it has run
        self._before: dict | None = None  # the meters before it
        self._loss: Tensor | float = 0.0
        self._most_tokens: int | None = None  # of a micro-batch, since one did not fit
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self.has_loss = False  # of the micro-batch under way: what fails now is its backward
        self.skipped = 0
        self._skips_in_a_row = 0

    # -------------------------------------------------------------------------------------------- out of memory

    def run(self, model: nn.Module, parts: list[MicroBatch], one: Callable[[MicroBatch, bool], Tensor]) -> Tensor:
        """Forward and backward of ``parts``, which end an update or are an earlier accumulation step of it; their loss.

        Args:
            one: runs a micro-batch, told whether it is the last; returns its loss, detached.

        Raises:
            RuntimeError: out of memory where a cut cannot help.
        """
        if not self._update:
            self._before = self._trainer._meter.snapshot()
        earlier, loss = list(self._update), 0.0
        queue = deque(piece for part in parts for piece in microbatches.halved(part, self._most_tokens))
        while queue:
            part = queue.popleft()
            self.has_loss = False
            try:
                added = one(part, not queue)
            except (RuntimeError, MemoryError) as error:
                if not should_reduce_batch_size(error):
                    raise
                queue.extendleft(reversed([*self._update, *self._halves(part, error, is_last=not queue)]))
                self._update, loss = [], 0.0
                model.zero_grad(set_to_none=True)  # a backward may have stopped half way
                self._trainer._meter.restore(self._before)
                clear_device_cache(garbage_collection=True)
                continue
            self._update.append(part)
            if not any(part is done for done in earlier):
                loss = loss + added
        self._loss = self._loss + loss
        return loss

    def _halves(self, part: MicroBatch, error: Exception, *, is_last: bool) -> list[MicroBatch]:
        trainer, rows = self._trainer, len(part["prompt_mask"])
        accelerator, step = trainer.accelerator, trainer.state.global_step + 1
        tokens = int(microbatches.lengths_of(part).sum())
        where = f"Step {step}: out of memory in a micro-batch of {rows} rows and {tokens} tokens"
        remedy = f"Set max_tokens_per_microbatch below {tokens} or lower per_device_train_batch_size (oprd plan says what fits)."
        # Where all must gather and reduce together, one process cannot run a part twice.
        together = is_sharded(trainer.args) or accelerator.distributed_type == DistributedType.DEEPSPEED
        meets = accelerator.num_processes > 1 and is_last and accelerator.sync_gradients and self.has_loss
        if together or meets:
            raise RuntimeError(f"{where}, in the midst of adding up over processes. {remedy}") from error
        if rows == 1:
            raise RuntimeError(
                f"{where}. Lower max_completion_length, or set activation_checkpointing or tile_mlp (oprd plan says what fits)."
            ) from error
        self._most_tokens = min(self._most_tokens or tokens, max(1, tokens // 2))
        logger.warning(
            f"{where}. It is cut in two, as all over {self._most_tokens} tokens are from now on; the gradient stays the same. "
            f"{remedy}",
            main_process_only=False,
        )
        return microbatches.halved(part, tokens - 1)

    # ---------------------------------------------------------------------------------------------- bad numbers

    def check(self, model: nn.Module, norm: Tensor | float) -> None:
        """After the last backward of an update, before its weights change. Every process must call it.

        Raises:
            nonfinite.NonFinite: a loss or gradient is NaN or infinite, and ``on_nonfinite`` is ``stop``.
        """
        trainer = self._trainer
        loss = torch.as_tensor(self._loss, dtype=torch.float32, device=trainer.accelerator.device)
        loss = trainer.accelerator.reduce(loss.clone(), reduction="sum").item()
        norm = float(gathered(norm)) if isinstance(norm, Tensor) else float(norm)
        step, update = trainer.state.global_step + 1, self._update
        self._update, self._loss = [], 0.0
        if torch.tensor([loss, norm]).isfinite().all():
            self._skips_in_a_row = 0
            self._watch(step, norm)
            return
        found = nonfinite.describe(trainer, model, update, loss, norm)
        if trainer.args.on_nonfinite == "stop" or trainer.is_deepspeed_enabled:
            remedy = "Lower learning_rate or max_grad_norm if training had begun to diverge"
            raise nonfinite.NonFinite(f"{found} {remedy}; on_nonfinite: skip leaves single bad batches out.")
        self.skipped += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row >= SKIPS_IN_A_ROW:
            raise nonfinite.NonFinite(f"{found} That is the {SKIPS_IN_A_ROW}th update in a row.")
        logger.warning(f"{found} The update is left out.")
        model.zero_grad(set_to_none=True)  # an optimiser passes over parameters without gradient

    def _watch(self, step: int, norm: float) -> None:
        usual = median(self._norms) if len(self._norms) >= REMEMBERED // 5 else None
        if usual and norm > ALARM * usual:
            logger.warning(
                f"Step {step}: the gradient's norm is {norm:.3g}, {norm / usual:.0f} times what it was lately ({usual:.3g}). If that "
                "stays so, lower learning_rate or max_grad_norm."
            )
        self._norms.append(norm)
