"""Checkpoints that a kill at any moment cannot tear, and from which a run goes on bit for bit.

A checkpoint is written beside its place, hashed, brought to the disk and renamed (`oprd.durability.folders`); older ones go
afterwards. Besides the model it holds what transformers keeps and what it forgets: sums that are not logged yet, lines of
``metrics.jsonl``, and the work that a signal left undone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from transformers import set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from trl import DistillationTrainer

from oprd.durability.checkpoint_files import Whole, newest_whole, rotate, whole
from oprd.durability.folders import publish, staging_of, writing
from oprd.durability.random_numbers import random_state, set_random_state
from oprd.durability.stopping import CONTINUES, SIGNALS, Stopped
from oprd.durability.trees import has_tree, load_tree, save_tree

logger = get_logger(__name__)

OPTIMIZER, SCHEDULER, SCALER, PROCESS, STATE = "optimizer", "scheduler", "scaler", "process-{}", "trainer_state.json"
BENCHMARKS, EVALUATION, SAVE, EPOCH_END = "benchmarks", "evaluation", "save", "epoch_end"  # what ends a step, in order


class CheckpointedTrainer(DistillationTrainer):
    """TRL's trainer with checkpoints as this module says, and an end on request (`oprd.durability.stopping`).

    Optimiser, scheduler and random numbers are safetensors and JSON. FSDP and DeepSpeed write their parts themselves, as
    pickles, into the same folder: those are left to them, and the checksums cover them.
    """

    averages: Mapping[
        str, Any
    ] = {}  # by name: what moves along and is in no model (``state_dict``, ``load_state_dict``)
    # Called where evaluations are, with nothing; decides by itself whether there is something to do.
    scorer: Callable[[], None] | None = None
    _resumes: str | None = None  # a checkpoint whose random numbers and sums are still to be taken up
    _ended_step = -1
    _is_summarised = False
    _latest: tuple[float | None, float | None] = (None, None)  # gradient norm and learning rate of the step

    # -------------------------------------------------------------------------------------------------------- saving

    @property
    def _saved_by_libraries(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_checkpoint(self, model, trial=None, *, undone: tuple[str, ...] = (), numbers: dict | None = None) -> None:
        """Every process must call it.

        Args:
            undone: what a resumed run does before it goes on.
            numbers: of before, if a resumed run is not to go on from the present ones.
        """
        self.store_flos()
        run, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        target, best = run / f"checkpoint-{step}", self.state.best_global_step
        if best and (best == step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")
        staging, is_writer = staging_of(target), self.args.should_save
        with self._together(target):
            if is_writer:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        with self._together(target):
            self.save_model(str(staging), _internal_call=True)
            for name, average in self.averages.items() if is_writer and not self.args.save_only_model else ():
                save_tree(staging, name, average.state_dict())
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(staging))
                self._save_scaler(str(staging))
                save_tree(staging, PROCESS.format(self.args.process_index), self._progress(undone, numbers))
            if is_writer:
                self._export_callbacks()
                self.state.save_to_json(str(staging / STATE))
        with self._together(target):
            if is_writer:
                publish(staging, target, with_checksums=True)
        if is_writer:
            rotate(run, step, best, self.args.save_total_limit)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    @contextmanager
    def _together(self, target: Path) -> Iterator[None]:
        """Processes meet at the end; where one fails all do, instead of waiting for it."""
        failure = None
        try:
            with writing(target, staging_of(target) if self.args.should_save else None):
                yield
        except Exception as error:
            failure = error
        told = gather_object([str(failure or "")]) if self.accelerator.num_processes > 1 else []
        if failure is not None:
            raise failure
        if any(told):
            raise OSError(next(filter(None, told)))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._saved_by_libraries:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_tree(Path(output_dir), OPTIMIZER, self.optimizer.state_dict())
            save_tree(Path(output_dir), SCHEDULER, self.lr_scheduler.state_dict())

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_tree(Path(output_dir), SCALER, scaler.state_dict())

    def numbers(self) -> dict[str, Any]:
        """What an evaluation changes: random numbers, and whether the model trains, by which transformers and TRL log."""
        return {"random": random_state(self.accelerator.device), "training": self.model.training}

    def _progress(self, undone: tuple[str, ...], numbers: dict | None) -> dict[str, Any]:
        """What this process alone knows: random numbers, and what it has added up since the last log."""
        return {
            "processes": self.accelerator.num_processes,
            **(numbers or self.numbers()),
            "loss": self._tr_loss,
            "loss_before": self._total_loss_scalar,
            "logged_at": self._globalstep_last_logged,
            "metrics": self._metrics["train"],
            "meter": vars(self._meters["train"]),
            "latest": self._latest,
            "undone": list(undone),
            "is_summarised": self._is_summarised,
        }

    def _export_callbacks(self) -> None:
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = {name: each if len(each) > 1 else each[0] for name, each in states.items()}

    # ------------------------------------------------------------------------------------------------------ resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *more, **others):
        """As transformers', from a checkpoint that is whole: with True the newest such.

        Raises:
            ValueError: it is not, or there is none.
        """
        if resume_from_checkpoint and not isinstance(resume_from_checkpoint, Whole):
            resume_from_checkpoint = self._whole(None if resume_from_checkpoint is True else resume_from_checkpoint)
        return super().train(resume_from_checkpoint or None, *more, **others)

    def _whole(self, named: str | None) -> Whole:
        """The main process looks, all hear of it."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = newest_whole(Path(self.args.output_dir)) if named is None else whole(Path(named))
                if answer[0] is None:
                    answer[1] = f"There is no checkpoint in {self.args.output_dir} to resume from."
            except ValueError as error:
                answer[1] = str(error)
        broadcast_object_list(answer)
        if answer[1] is not None:
            raise ValueError(answer[1])
        return answer[0]

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ):
        make = sampler_fn
        if is_training and make is not None:

            def sampler_fn(dataset):
                self._sampler = make(dataset)
                return self._sampler

        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, dataloader_key)

    def _init_training_state(self, max_steps, steps_an_epoch, num_train_epochs, resume_from_checkpoint, trial):
        epochs, steps = super()._init_training_state(
            max_steps, steps_an_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._resumes, self._ended_step, self._is_summarised = resume_from_checkpoint, -1, False
        if resume_from_checkpoint is not None:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step and best.is_dir():  # wherever the run lay when it was saved
                self.state.best_model_checkpoint = str(best)
            for _ in range(epochs if getattr(self, "_sampler", None) is not None else 0):
                next(iter(self._sampler), None)  # a permutation an epoch, one after the other from one generator
        return epochs, steps

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        for name, average in self.averages.items() if checkpoint is not None else ():
            if not has_tree(Path(checkpoint), name):
                raise ValueError(f"{checkpoint} holds no averaged {name}: it is of a run without one. Start a new run.")
            average.load_state_dict(load_tree(Path(checkpoint), name))
        if checkpoint is None or self._saved_by_libraries:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if not has_tree(Path(checkpoint), OPTIMIZER):
            raise ValueError(
                f"{checkpoint} holds a model alone (save_only_model), so the run cannot go on from it. Start a new run from its "
                f"weights: model_name_or_path: {checkpoint}."
            )
        self.optimizer.load_state_dict(load_tree(Path(checkpoint), OPTIMIZER))
        self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint), SCHEDULER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and has_tree(Path(checkpoint), SCALER):
            self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called by transformers where the first step is about to draw; sums, and what was left undone, come along."""
        if checkpoint is None:
            return
        self._resumes, processes = None, self.accelerator.num_processes
        name, device = PROCESS.format(self.args.process_index), self.accelerator.device
        if not has_tree(Path(checkpoint), name):
            logger.warning(
                f"{checkpoint} was written by fewer processes: from here on the run draws other random numbers."
            )
            set_seed(self.args.seed + 1_000_003 * self.state.global_step + self.args.process_index)
            return
        progress = load_tree(Path(checkpoint), name)
        if progress["processes"] != processes:
            logger.warning(f"{checkpoint} was written by {progress['processes']} processes, not {processes}.")
        set_random_state(progress["random"], device)
        self.model_wrapped.train(progress["training"])
        self._tr_loss, self._total_loss_scalar = progress["loss"].to(device), progress["loss_before"]
        self._globalstep_last_logged, self._latest = progress["logged_at"], progress["latest"]
        self._is_summarised, self._ended_step = progress["is_summarised"], self.state.global_step
        self._metrics["train"].update(_on(progress["metrics"], device))
        vars(self._meters["train"]).update(_on(progress["meter"], device))
        undone = progress["undone"]
        if undone:
            self._end_step(
                self.model_wrapped, None, None, [work for work in undone if work != EPOCH_END], EPOCH_END in undone
            )
        if EPOCH_END in undone:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            norm, rate = self._latest
            self._maybe_log_save_evaluate(self._tr_loss, norm, self.model_wrapped, None, 0, None, time.time(), rate)

    def _run_epoch(self, **given) -> None:
        if self._resumes is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # killed after its last step; transformers would take one more
            return
        super()._run_epoch(**given)

    def _finalize_training(self, *given, **named):
        if self._resumes is not None:
            self._load_rng_state(self._resumes)
        return super()._finalize_training(*given, **named)

    def _load_best_model(self) -> None:
        self._whole(self.state.best_model_checkpoint)
        super()._load_best_model()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:
            if self._is_summarised:
                return
            self._is_summarised = True  # over the whole run, not since it was last resumed
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    # --------------------------------------------------------------------------------------------- the end of a step

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler: bool = False):
        if skip_scheduler and self.state.global_step:  # eval_on_start, of a run that has started before
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def prediction_step(self, *given, **named):
        self.check_stop()
        return super().prediction_step(*given, **named)

    def check_stop(self) -> None:
        """A point at which long work can be left. Every process must call it.

        Raises:
            Stopped: any of them has been asked to.
        """
        if SIGNALS.asked(self.accelerator):
            raise Stopped(f"stopped by {SIGNALS.received} at step {self.state.global_step}; {CONTINUES}")

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ) -> None:
        is_epoch_end, self._ended_step = self._ended_step == self.state.global_step, self.state.global_step
        due = [BENCHMARKS] if self.scorer is not None and not is_epoch_end else []
        due += [EVALUATION] if self.control.should_evaluate else []
        due += [SAVE] if self.control.should_save else []
        self.control.should_evaluate = self.control.should_save = False
        norm = grad_norm.item() if hasattr(grad_norm, "item") else grad_norm
        self._latest = (norm, learning_rate)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )
        # transformers ends an epoch after its last step, and after the last step of all.
        is_last = float(self.state.epoch).is_integer() or self.control.should_training_stop
        self._end_step(model, trial, ignore_keys_for_eval, due, is_last and not is_epoch_end)

    def _end_step(self, model, trial, ignore_keys, due: list[str], epoch_ends: bool) -> None:
        """Benchmarks, evaluation, checkpoint. On request only the checkpoint, with the rest to be done on resume.

        Raises:
            Stopped: after that checkpoint.
        """
        asked = SIGNALS.asked(self.accelerator)
        numbers, is_saved, later = None, False, [EPOCH_END] * epoch_ends
        for work in (BENCHMARKS, EVALUATION):
            if asked or work not in due:
                continue
            numbers = self.numbers()  # evaluation draws from training's generators
            try:
                if work == BENCHMARKS:
                    self.scorer()
                else:
                    is_best = self._determine_best_metric(self._evaluate(trial, ignore_keys), trial)
                    if self.args.save_strategy == SaveStrategy.BEST:
                        due = [*[w for w in due if w != SAVE], *[SAVE] * is_best]
            except Stopped:
                asked = True
            else:
                due, numbers = [w for w in due if w != work], None
        if SAVE in due and not asked:
            self._save_checkpoint(model, trial, undone=tuple(later))
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            is_saved, asked = True, SIGNALS.asked(self.accelerator)
        if asked:
            self.stop(model, undone=() if is_saved else (*due, *later), numbers=numbers, is_saved=is_saved)

    def stop(
        self, model=None, *, undone: tuple[str, ...] = (), numbers: dict | None = None, is_saved: bool = False
    ) -> None:
        """Write a checkpoint, unless this step's is there, and end.

        Raises:
            Stopped: always.
        """
        step = self.state.global_step
        if not is_saved:
            self._save_checkpoint(model if model is not None else self.model_wrapped, undone=undone, numbers=numbers)
            self.callback_handler.on_save(self.args, self.state, self.control)
        raise Stopped(f"stopped by {SIGNALS.received} at step {step}, checkpoint-{step} written; {CONTINUES}")


def _on(tree: Any, device) -> Any:
    if isinstance(tree, dict):
        return {key: _on(value, device) for key, value in tree.items()}
    return tree.to(device) if hasattr(tree, "to") else tree
