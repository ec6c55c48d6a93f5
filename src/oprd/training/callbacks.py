"""Around the training loop: a progress bar that says how it goes, and a log that other tools can read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from oprd.durability.folders import writing
from oprd.lineage.machine import peak_memory_bytes
from oprd.lineage.manifest import Manifest
from oprd.records import write_text

SHOWN = {"loss": "loss", "cosine": "cos", "accuracy": "acc", "completions/mean_length": "len"}


class ProgressLine(ProgressCallback):
    """One bar with the time left and the latest numbers, instead of a dictionary per log."""

    def __init__(self, description: str = "distilling") -> None:
        super().__init__()
        self._description = description

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self._description)
            self.training_bar.unit = "step"
            # What a resumed run finds done took none of its time: neither speed nor time left count it.
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        shown = {short: f"{logs[name]:.3g}" for name, short in SHOWN.items() if logs.get(name) is not None}
        if shown:
            self.training_bar.set_postfix(shown)


class MetricsFile(TrainerCallback, ExportableState):
    """``metrics.jsonl`` in the output directory: one object per log, on the disk at once.

    A checkpoint holds how many lines there were, and a resumed run keeps so many: those that follow are written again. A run
    that is made longer keeps what it said at its former end too.
    """

    name = "metrics.jsonl"

    def __init__(self) -> None:
        self.lines, self.max_steps = 0, 0

    def state(self) -> dict[str, Any]:
        """For transformers, which keeps it in a checkpoint's ``trainer_state.json``."""
        return {"args": {}, "attributes": {"lines": self.lines, "max_steps": self.max_steps}}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / self.name
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = read_metrics(path) if state.global_step else []
        saved = (state.stateful_callbacks or {}).get(type(self).__name__)
        counted = saved["attributes"] if saved is not None and state.global_step else None
        if counted and not counted["max_steps"] == state.global_step < state.max_steps:
            kept = kept[: counted["lines"]]
        else:  # no checkpoint of ours, or a finished run's
            kept = [line for line in kept if line["step"] <= state.global_step]
        with writing(path):
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines, self.max_steps = len(kept), state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            path = Path(args.output_dir) / self.name
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.lines += 1


class CostMeter(TrainerCallback):
    """Keeps the manifest's cost up to date while the run goes on. Main process only."""

    def __init__(self, manifest: Manifest, trainer: Any, scores: Any = None) -> None:
        self._manifest, self._trainer = manifest, trainer
        self._scores = scores  # the callback that scores benchmarks, if there is one
        self._first_step: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._first_step = state.global_step

    def on_log(self, args, state, control, **kwargs):
        self.write(state)

    def on_save(self, args, state, control, **kwargs):
        (Path(args.output_dir) / "README.md").unlink(missing_ok=True)  # TRL's card; ours is in final/
        self.write(state, force=True)

    def write(self, state: Any, *, force: bool = False) -> None:
        """Tokens, updates and memory so far."""
        on_device = self._trainer.accelerator.device.type == "cuda"
        self._manifest.update(
            force=force,
            **self._trainer.usage,
            updates=state.global_step - (self._first_step or 0),
            peak_memory_bytes=self._trainer.peak_memory if on_device else peak_memory_bytes(),
            peak_memory_of="accelerator" if on_device else "host",
            benchmark_seconds=round(self._scores.seconds, 1) if self._scores else 0.0,
        )


def read_metrics(path: Path) -> list[dict]:
    """The lines of a ``metrics.jsonl``; a last line that a killed run left half written is passed over."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}). Remove the line.") from error
            break
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number}: not an object of numbers. Remove the line.")
    return rows
