"""One pass of both models over rollouts into a fitter and its controls; can be stopped and continued."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from oprd.bridge.fit import BridgeFitter
from oprd.bridge.moments import Moments
from oprd.bridge.report import Sample
from oprd.records import sync
from oprd.states import (
    PositionPairs,
    Question,
    Reading,
    Rollout,
    TeacherElsewhere,
    answer,
    autocast_dtype,
    visit_states,
)

MOST_CONTROL_LAYERS = 4
SHUFFLED, RANDOM_TEACHER, RANDOM_STUDENT = CONTROLS = ("shuffled_pairs", "random_teacher", "random_student")


def control_layers(depth: int) -> list[int]:
    """Up to four layers, evenly spread, the first and the last among them."""
    count = min(depth, MOST_CONTROL_LAYERS)
    return sorted({1 + round(place * (depth - 1) / max(count - 1, 1)) for place in range(count)})


def before_of(path: Path) -> Path:
    """Where the file is kept that ``path`` has replaced: of several processes one may be killed before it saves, another after."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


class Collection:
    """A fitter, its controls, and how many batches went in.

    Args:
        layer_map, student_dim, teacher_dim: as of `BridgeFitter`.
        controls: which of `CONTROLS` to feed as well: the same rows with the pairs shuffled, and either model replaced by a
            randomly initialised one. Each is fitted like the bridge, at up to four layers. True is all, False none.
        device: where sums are kept.
        seed: of the held-out sample; another one for each process.
    """

    def __init__(
        self,
        layer_map: Sequence[int],
        student_dim: int,
        teacher_dim: int,
        *,
        controls: bool | Sequence[str] = True,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.fitter = BridgeFitter(layer_map, student_dim, teacher_dim, device=device)
        self.layers = control_layers(len(layer_map))
        few = [layer_map[layer - 1] for layer in self.layers]
        names = CONTROLS if controls is True else tuple(controls or ())
        self.controls = {name: BridgeFitter(few, student_dim, teacher_dim, device=device) for name in names}
        for fitter in self._fitters().values():
            fitter.sample = Sample(seed=seed)
        self.batches = 0
        self._before: list[Tensor] = []  # the teacher's rows of the batch before, for shuffling

    def add(
        self,
        student: nn.Module,
        teacher: nn.Module,
        rollout: Rollout,
        held_out_B: Tensor,
        random: dict[str, nn.Module] | None = None,
    ) -> None:
        """One batch of rollouts; rows marked in bool ``held_out_B`` stay out of the fit.

        Args:
            random: the randomly initialised models by control's name.
        """
        layer_map = self.fitter.layer_map
        pairs = rollout.state_pairs
        own = _states(student, rollout.student, range(1, len(layer_map) + 1), pairs, "student")
        other = _states(teacher, rollout.teacher, layer_map, pairs, "teacher")
        self._update(self.fitter, own, other, held_out_B[pairs.row_N])
        few_own, few_other = ([states[layer - 1] for layer in self.layers] for states in (own, other))
        for name, fitter in self.controls.items():
            a, b = few_own, few_other
            held_out_N = held_out_B[pairs.row_N]
            if name == SHUFFLED:
                a, b, held_out_N = self._shuffled(a, b, held_out_N, one_response=len(held_out_B) == 1)
            elif name == RANDOM_TEACHER:
                b = _states(random[name], rollout.teacher, fitter.layer_map, pairs, "teacher")
            else:
                a = _states(random[name], rollout.student, self.layers, pairs, "student")
            self._update(fitter, a, b, held_out_N)
        self._before = few_other if self.controls and len(held_out_B) == 1 else []
        self.batches += 1

    def _shuffled(
        self, own: list[Tensor], other: list[Tensor], held_out_N: Tensor, *, one_response: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Pairs that belong to other positions; of a batch of one response, to the response before, whose topic is its own."""
        source = self._before if one_response and self._before else other
        generator = torch.Generator().manual_seed(self.batches)
        order = torch.randperm(len(source[0]), generator=generator).to(source[0].device)[: len(held_out_N)]
        count = len(order)
        return [rows[:count] for rows in own], [rows[order] for rows in source], held_out_N[:count]

    @staticmethod
    def _update(fitter: BridgeFitter, own: list[Tensor], other: list[Tensor], held_out_N: Tensor) -> None:
        for held_out in (False, True):
            rows = (held_out_N == held_out).nonzero().flatten()
            if len(rows):
                fitter.update([s[rows] for s in own], [t[rows] for t in other], held_out=held_out)

    def merge(self, other: Collection) -> None:
        """Add what another process has collected."""
        self.fitter.merge(other.fitter)
        for name, fitter in self.controls.items():
            fitter.merge(other.controls[name])

    # ---------------------------------------------------------------------------------------------- stop and go on

    def _fitters(self) -> dict[str, BridgeFitter]:
        return {"bridge": self.fitter, **self.controls}

    def save(self, path: Path, key: dict) -> None:
        """Write everything to one file, whole or not at all; ``key`` says what it belongs to."""
        tensors, counts = {}, {}
        for name, fitter in self._fitters().items():
            for part, moments in (("train", fitter.train), ("held_out", fitter.held_out or [])):
                for layer, sums in enumerate(moments):
                    counts[f"{name}/{part}/{layer}"] = sums.count
                    tensors |= {f"{name}/{part}/{layer}/{n}": t.contiguous() for n, t in sums.tensors().items()}
            tensors[f"{name}/sample/generator"] = fitter.sample._generator.get_state()
            if len(fitter.sample):
                tensors[f"{name}/sample/keys"] = fitter.sample.keys
                for side in ("student", "teacher"):
                    for layer, rows in enumerate(getattr(fitter.sample, side)):
                        tensors[f"{name}/sample/{side}/{layer}"] = rows.contiguous()
        tensors |= {f"before/{layer}": rows.contiguous() for layer, rows in enumerate(self._before)}
        about = {"key": key, "batches": self.batches, "counts": counts, "before": len(self._before)}
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata={"about": json.dumps(about, sort_keys=True)})
            sync(partial)
            if path.exists():
                os.replace(path, before_of(path))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)

    def load(self, path: Path, key: dict) -> bool:
        """Take up what `save` wrote, if it is there and belongs to ``key``; says whether it did."""
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            if about["key"] != json.loads(json.dumps(key)):
                return False
            for name, fitter in self._fitters().items():
                fitter.train = self._moments(file, f"{name}/train", about["counts"], fitter)
                fitter.held_out = self._moments(file, f"{name}/held_out", about["counts"], fitter) or None
                sample = Sample()
                sample._generator.set_state(file.get_tensor(f"{name}/sample/generator"))
                if f"{name}/sample/keys" in file.keys():  # noqa: SIM118 - not a dictionary
                    depth = range(len(fitter.layer_map))
                    sample.keys = file.get_tensor(f"{name}/sample/keys")
                    sample.student = [file.get_tensor(f"{name}/sample/student/{layer}") for layer in depth]
                    sample.teacher = [file.get_tensor(f"{name}/sample/teacher/{layer}") for layer in depth]
                fitter.sample = sample
            self._before = [
                file.get_tensor(f"before/{layer}").to(self.fitter.device) for layer in range(about["before"])
            ]
            self.batches = about["batches"]
        return True

    @staticmethod
    def batches_in(path: Path, key: dict) -> int | None:
        """How many batches `load` would take up; None if there is no such file or it belongs to something else."""
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
        return about["batches"] if about["key"] == json.loads(json.dumps(key)) and "before" in about else None

    @staticmethod
    def _moments(file, prefix: str, counts: dict[str, int], fitter: BridgeFitter) -> list[Moments]:
        return [
            Moments(
                counts[f"{prefix}/{layer}"],
                **{
                    name: file.get_tensor(f"{prefix}/{layer}/{name}").to(fitter.device)
                    for name in Moments.empty(1, 1).tensors()
                },
            )
            for layer in range(len(fitter.layer_map))
            if f"{prefix}/{layer}" in counts
        ]


@torch.no_grad()
def _states(model: nn.Module, reading: Reading, layers: Sequence[int], pairs: PositionPairs, side: str) -> list[Tensor]:
    """States at the pairs, ``[N, d]`` for each of ``layers`` in their order (a layer may come twice). A teacher elsewhere gives
    them in autocast's dtype, where that is on."""
    if isinstance(model, TeacherElsewhere):
        places, dtype = pairs.teacher_places(reading.ids_BS.shape[1]), autocast_dtype(reading.ids_BS.device)
        asked = Question(reading, places, {layer: layer for layer in layers}, dtype=dtype)
        found = answer(model, asked).layers
        return [found[layer] for layer in layers]
    gather = pairs.of_student if side == "student" else pairs.of_teacher
    _, found = visit_states(model, reading, sorted(set(layers)), lambda _, states_BSd: gather(states_BSd))
    return [found[layer] for layer in layers]
