"""`Bridge`: the frozen linear maps between a student's and a teacher's states, and the folder they live in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from oprd.bridge.teacher_side import TeacherSide, project

FORMAT = 1
WEIGHTS, DESCRIPTION = "bridge.safetensors", "bridge.json"
NAMES = ("student_map", "student_mean", "teacher_map", "teacher_mean")


class Bridge:
    """One pair of linear maps per student layer, both into the same r dimensions (Eq. 12, 13). Nothing in it trains.

    Args:
        layer_map: teacher layer of each student layer, from 1 (Eq. 11).
        student_maps: ``[L, r, d_S]``; the student's maps P_S.
        student_means: ``[L, d_S]`` subtracted before P_S, or None for maps without an intercept.
        teacher_maps: ``[L, r, d_T]``; the teacher's principal directions P_T.
        teacher_means: ``[L, d_T]``.
        report: what the fit measured (JSON values).
        fitted_for: ``{role: fingerprint}`` of models and tokenizers.

    Raises:
        ValueError: shapes that do not belong together, or values that are not finite.
    """

    def __init__(
        self,
        layer_map: Sequence[int],
        student_maps: Tensor,
        student_means: Tensor | None,
        teacher_maps: Tensor,
        teacher_means: Tensor,
        *,
        report: Mapping[str, Any] | None = None,
        fitted_for: Mapping[str, str] | None = None,
    ) -> None:
        self.layer_map = [int(layer) for layer in layer_map]
        self._tensors = {
            "student_map": student_maps.detach(),
            "student_mean": None if student_means is None else student_means.detach(),
            "teacher_map": teacher_maps.detach(),
            "teacher_mean": teacher_means.detach(),
        }
        for name in ("student_map", "teacher_map"):
            if self._tensors[name].ndim != 3 or 0 in self._tensors[name].shape:
                shape = tuple(self._tensors[name].shape)
                raise ValueError(
                    f"bridge {name} has shape {shape}, expected layers x rank x width of at least 1. Fit it again."
                )
        if any(layer < 1 for layer in self.layer_map):
            raise ValueError(f"bridge layer_map {self.layer_map} must count teacher layers from 1. Fit it again.")
        depth, rank = len(self.layer_map), student_maps.shape[1]
        expected = {
            "student_map": (depth, rank, student_maps.shape[-1]),
            "student_mean": (depth, student_maps.shape[-1]),
            "teacher_map": (depth, rank, teacher_maps.shape[-1]),
            "teacher_mean": (depth, teacher_maps.shape[-1]),
        }
        for name, tensor in self._tensors.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != expected[name]:
                raise ValueError(
                    f"bridge {name} has shape {tuple(tensor.shape)}, expected {expected[name]}. Fit it again."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"bridge {name} holds values that are not finite (NaN or infinity). Fit it again.")
        self.report = dict(report or {})
        self.fitted_for = dict(fitted_for or {})

    @property
    def rank(self) -> int:
        """Dimensions that the two sides share."""
        return self._tensors["student_map"].shape[1]

    @property
    def student_dim(self) -> int:
        """Width of the student."""
        return self._tensors["student_map"].shape[2]

    @property
    def teacher_dim(self) -> int:
        """Width of the teacher."""
        return self._tensors["teacher_map"].shape[2]

    def __repr__(self) -> str:
        return (
            f"Bridge(rank={self.rank}, student {len(self.layer_map)} layers x {self.student_dim}, "
            f"teacher x {self.teacher_dim}, layer_map={self.layer_map})"
        )

    def _project(self, side: str, layer: int, states: Tensor) -> Tensor:
        if not 1 <= layer <= len(self.layer_map):
            raise ValueError(f"The bridge has layers 1..{len(self.layer_map)} of the student, not {layer}.")
        linear, mean = (self._tensors[f"{side}_{part}"] for part in ("map", "mean"))
        if states.shape[-1] != linear.shape[-1]:
            raise ValueError(f"The bridge takes {side} states of width {linear.shape[-1]}, not {states.shape[-1]}.")
        return project(states, linear[layer - 1], None if mean is None else mean[layer - 1])

    def project_student(self, layer: int, states: Tensor) -> Tensor:
        """``P_S h`` of student layer ``layer`` (from 1): ``[..., d_S] -> [..., r]``. Gradients reach the states only."""
        return self._project("student", layer, states)

    def project_teacher(self, layer: int, states: Tensor) -> Tensor:
        """``P_T (h - mu_T)`` of the teacher layer that *student* layer ``layer`` is paired with: ``[..., r]``."""
        return self._project("teacher", layer, states)

    @cached_property
    def teacher_side(self) -> TeacherSide:
        """What a teacher elsewhere needs of the bridge."""
        return TeacherSide(self._tensors["teacher_map"], self._tensors["teacher_mean"])

    def to(self, device: torch.device | str) -> Bridge:
        """The same bridge on another device."""
        return self._with({name: None if t is None else t.to(device) for name, t in self._tensors.items()})

    def truncate(self, rank: int) -> Bridge:
        """The first ``rank`` dimensions: what a fit at that rank would have given."""
        if not 1 <= rank <= self.rank:
            raise ValueError(f"Cannot cut a bridge of rank {self.rank} to rank {rank}; choose 1..{self.rank}.")
        cut = self._with({n: t[:, :rank].contiguous() if n.endswith("map") else t for n, t in self._tensors.items()})
        if "rank" in cut.report and rank != self.rank:
            cut.report["rank"] = {**cut.report["rank"], "taken": rank, "by": "request"}
        return cut

    def _with(self, tensors: Mapping[str, Tensor | None]) -> Bridge:
        return Bridge(
            self.layer_map, *(tensors[name] for name in NAMES), report=self.report, fitted_for=self.fitted_for
        )

    # ------------------------------------------------------------------------------------------------ on disk

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write ``bridge.safetensors`` and ``bridge.json``; each appears whole or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = save({n: t.detach().cpu().contiguous() for n, t in self._tensors.items() if t is not None})
        description = {
            "format": FORMAT,
            "rank": self.rank,
            "student_dim": self.student_dim,
            "teacher_dim": self.teacher_dim,
            "layer_map": self.layer_map,
            "intercept": self._tensors["student_mean"] is not None,
            "fitted_for": self.fitted_for,
            "report": self.report,
            "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }
        description["sha256"] = _seal(description)
        # The description last: it names the weights that it belongs to.
        _write(directory / WEIGHTS, weights)
        _write(directory / DESCRIPTION, (json.dumps(description, indent=1) + "\n").encode())

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike) -> Bridge:
        """Read a bridge that `save_pretrained` wrote.

        Raises:
            ValueError: no bridge there, or files that are not as they were written.
        """
        directory = Path(directory)
        missing = [name for name in (WEIGHTS, DESCRIPTION) if not (directory / name).is_file()]
        if missing:
            raise ValueError(
                f"There is no bridge in {directory} ({' and '.join(missing)} missing). Fit one with "
                "oprd bridge fit --config RECIPE."
            )
        again = "Fit it again with oprd bridge fit, or restore the files."
        try:
            description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
            seal = description.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{directory / DESCRIPTION} is not a bridge's description ({error}). {again}") from error
        if description.get("format") != FORMAT:
            raise ValueError(
                f"{directory / DESCRIPTION} has format {description.get('format')!r}; this version reads {FORMAT}. Fit it again "
                "with oprd bridge fit, or use the version of oprd that wrote it."
            )
        if seal != _seal(description):
            raise ValueError(f"{directory / DESCRIPTION} was changed since it was written. {again}")
        weights = (directory / WEIGHTS).read_bytes()
        if hashlib.sha256(weights).hexdigest() != description.get("weights_sha256"):
            raise ValueError(f"{directory / WEIGHTS} is truncated or was changed since it was written. {again}")
        try:
            tensors = load(weights)
        except SafetensorError as error:
            raise ValueError(f"{directory / WEIGHTS} cannot be read ({error}). {again}") from error
        try:
            return cls(
                description["layer_map"],
                tensors["student_map"],
                tensors.get("student_mean"),
                tensors["teacher_map"],
                tensors["teacher_mean"],
                report=description["report"],
                fitted_for=description["fitted_for"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{directory} holds no whole bridge ({error}). {again}") from error

    def check_fitted_for(self, found: Mapping[str, str]) -> None:
        """Refuse models or tokenizers other than those that the bridge was fitted for.

        Args:
            found: ``{role: fingerprint}``; roles that either side does not know are not compared.

        Raises:
            ValueError: with both fingerprints.
        """
        for role, fingerprint in found.items():
            own = self.fitted_for.get(role)
            if own is not None and own != fingerprint:
                raise ValueError(
                    f"The bridge was fitted for another {role.replace('_', ' ')}: {own}, not {fingerprint}. Fit one for "
                    "this pair with oprd bridge fit, or name the models that this one belongs to."
                )


def _seal(description: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(description))  # numbers for names become text, as they do in the file
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
