"""The student as its own teacher: as it was, as it has been on average, or as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from oprd import models

KINDS = ("base", "ema", "live")


class Average(TrainerCallback):
    """``theta_T <- (1 - rate) theta_T + rate theta_S`` after every ``every`` updates, for what the student trains.

    Args:
        student: the parameters that are trained, by name.
        kept: the average of each, changed in place.
    """

    def __init__(self, student: dict[str, nn.Parameter], kept: dict[str, Tensor], rate: float, every: int) -> None:
        self._student, self._kept, self._rate, self._every = student, kept, rate, every
        # In half precision a small share of a small step is often less than a tensor can take up.
        self._exact = {name: tensor.float() for name, tensor in kept.items() if tensor.dtype.itemsize < 4}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an update."""
        if state.global_step % self._every == 0:
            self._follow()
            exact = self._kept | self._exact
            own = [p.data.to(exact[name].dtype) for name, p in self._student.items()]
            torch._foreach_lerp_([exact[name] for name in self._student], own, self._rate)
            for name, tensor in self._exact.items():
                self._kept[name].copy_(tensor)

    def _follow(self) -> None:
        """The student may have been moved since; a copy of it is where it was placed."""
        for name, parameter in self._student.items():
            for tensors in (self._kept, self._exact):
                if name in tensors and tensors[name].device != parameter.device:
                    tensors[name] = tensors[name].to(parameter.device)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, as a checkpoint holds them."""
        return {name: tensor.detach() for name, tensor in (self._kept | self._exact).items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError for the averages of other parameters."""
        if state.keys() != self._kept.keys():
            raise ValueError("The checkpoint's averaged teacher has other parameters than this one. Start a new run.")
        for tensors in (self._kept, self._exact):
            for name, tensor in tensors.items():
                tensor.copy_(state[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the student has the averages for its weights."""
        self._follow()
        before = {name: parameter.data for name, parameter in self._student.items()}
        for name, parameter in self._student.items():
            parameter.data = self._kept[name]
        try:
            yield
        finally:
            for name, parameter in self._student.items():
                parameter.data = before[name]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def average_of_copy(student: nn.Module, teacher: nn.Module, rate: float, every: int) -> Average:
    """Of a teacher that is a copy of the student."""
    own, other = trained(student), dict(teacher.named_parameters())
    return Average(own, {name: other[name].data for name in own}, rate, every)


class OwnTeacher:
    """The student's module, read as its teacher: one set of weights in memory (and one of adapters for their average).

    Args:
        student: unwrapped.
        kind: ``live``; or, of a student with an adapter, ``base`` (adapter off) or ``ema``.
    """

    def __init__(self, student: nn.Module, kind: str, rate: float, every: int) -> None:
        self._student, self._kind = student, kind
        self.average = None
        if kind == "ema":
            own = trained(student)
            self.average = Average(own, {name: p.detach().clone() for name, p in own.items()}, rate, every)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside, the student's module is the teacher: without dropout, with the teacher's weights."""
        was_training = self._student.training
        # PEFT switches the gradients of all its weights off and on again, also of those that were frozen.
        needs = [(parameter, parameter.requires_grad) for parameter in self._student.parameters()]
        self._student.eval()
        weights = {"live": nullcontext, "base": self._without_adapter, "ema": self._averaged}[self._kind]
        try:
            with weights():
                yield
        finally:
            for parameter, needed in needs:
                parameter.requires_grad_(needed)
            self._student.train(was_training)

    def _without_adapter(self):
        return self._student.disable_adapter()

    def _averaged(self):
        return self.average.in_place()

    @torch.no_grad()
    def lend(self) -> nn.Module:
        """The LM head as it is now, without gradient; inside `at_hand`."""
        head = models.causal_lm(self._student).get_output_embeddings()
        bias = getattr(head, "bias", None)
        with models.whole(head.weight):
            weight_Vd = models.gathered(head.weight).detach()
            weight_Vd = weight_Vd.clone() if models.is_partitioned(head.weight) else weight_Vd
        bias_V = None if bias is None else models.gathered(bias).detach()
        return models.LentHead(models.causal_lm(self._student).config, weight_Vd, bias_V)
