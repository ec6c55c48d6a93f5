"""The teacher's side of a bridge by itself: what a teacher in another process needs in order to send r numbers for d."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from safetensors.torch import save
from torch import Tensor


def project(states: Tensor, linear_Rd: Tensor, mean_d: Tensor | None) -> Tensor:
    """``P (h - mu)``: ``[..., d] -> [..., R]``, in float32 at least, whatever autocast says."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if mean_d is not None:
        states = states - mean_d.to(states)
    with torch.autocast(states.device.type, enabled=False):
        return states @ linear_Rd.to(states).T


class TeacherSide:
    """Maps ``[L, R, d]`` and means ``[L, d]`` of the teacher layers that L student layers are paired with.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """

    def __init__(self, maps_LRd: Tensor, means_Ld: Tensor) -> None:
        if maps_LRd.ndim != 3 or means_Ld.shape != (maps_LRd.shape[0], maps_LRd.shape[2]):
            raise ValueError(
                f"maps of shape {tuple(maps_LRd.shape)} and means of shape {tuple(means_Ld.shape)} do not belong together."
            )
        if not all(bool(torch.isfinite(part).all()) for part in (maps_LRd, means_Ld)):
            raise ValueError("maps or means hold values that are not finite (NaN or infinity).")
        self.maps_LRd, self.means_Ld = maps_LRd, means_Ld

    @property
    def rank(self) -> int:
        """Dimensions of the projected states."""
        return self.maps_LRd.shape[1]

    def project_teacher(self, layer: int, states: Tensor) -> Tensor:
        """As `oprd.bridge.Bridge.project_teacher`."""
        return project(states, self.maps_LRd[layer - 1], self.means_Ld[layer - 1])

    def to(self, device: torch.device | str) -> TeacherSide:
        """The same on another device."""
        return TeacherSide(self.maps_LRd.to(device), self.means_Ld.to(device))

    def content(self) -> bytes:
        """Both tensors as safetensors."""
        parts = {"maps": self.maps_LRd, "means": self.means_Ld}
        return save({name: part.detach().cpu().contiguous() for name, part in parts.items()})

    @cached_property
    def digest(self) -> str:
        """sha256 of the content, hexadecimal."""
        return hashlib.sha256(self.content()).hexdigest()
