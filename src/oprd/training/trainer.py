"""`OPRDTrainer`: TRL's distillation trainer with hidden states as what is distilled.

Generation, data order, accumulation, PEFT, sharding, checkpoints and logging are TRL's and transformers'. This file is
the only one that touches their private methods, with `oprd._compat`.
"""

from __future__ import annotations

import textwrap
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationTrainer

from oprd import models
from oprd._compat import RepeatSampler, is_vllm_available
from oprd.bridge import Bridge
from oprd.states import (
    Rollout,
    TeacherElsewhere,
    check_packed_attention,
    make_rollout,
    only,
    pack,
    read_one_token,
    tile_mlps,
    use_packed_attention,
)
from oprd.training import heads, microbatches, preflight
from oprd.training.checkpoints import CheckpointedTrainer
from oprd.training.config import OPRDConfig
from oprd.training.engines import check_engine, expose_head, is_sharded, lender_of, place_teacher, redirected
from oprd.training.guard import Guard
from oprd.training.meters import MemoryWatch, Meters, Stopwatch
from oprd.training.microbatches import MicroBatch
from oprd.training.nonfinite import sampling
from oprd.training.objective import Sums, TeacherStates, Terms, student_loss, teacher_states
from oprd.training.pair import fit_prompts, open_bridge, open_pair
from oprd.training.quantised import widen_adapters
from oprd.training.source import Source
from oprd.training.supervision import accuracy, counted_rows, supervise
from oprd.training.teacher import load_teacher, open_teacher

logger = get_logger(__name__)


class OPRDTrainer(CheckpointedTrainer):
    """On-policy distillation in hidden-state space (OPRD, arXiv 2606.06021), alone or beside next-token objectives.

    Each step samples responses from the student, runs both backbones once over them, and minimises
    ``output_weight * L_OPD + representation_weight * L_OPRD + logit_weight * L_logit`` (`OPRDConfig`). Without an output
    loss no LM head runs on either side.

    Args:
        model: the student; a Hub id, a path, a model or a PEFT model.
        teacher_model: the teacher, likewise, or one elsewhere (`oprd.serving.connect`); ``args.teacher_model_name_or_path`` or
            ``args.teacher_url`` if not given.
        args: `OPRDConfig`.
        train_dataset: needs a ``prompt`` column (text or chat messages). With an ``answer`` column, responses are graded
            and ``accuracy`` is logged.
        eval_dataset: the same, for evaluation; or a dict of them.
        processing_class: the student's tokenizer; loaded from ``model`` if not given.
        teacher_processing_class: the teacher's tokenizer; loaded from the teacher's path where there is one. If it is
            another than the student's, the teacher reads the student's text in its own tokens.
        bridge: a fitted `oprd.bridge.Bridge` or its folder, for a teacher of another shape, origin or tokenizer;
            ``args.bridge`` if not given.
        peft_config, callbacks, optimizers, quantization_config, tools: as in TRL.

    Raises:
        ValueError: anything that pre-flight finds (`oprd.training.preflight`), before weights are loaded.
    """

    _tag_names = ["trl", "oprd", "on-policy-distillation"]
    _name = "OPRD"
    _paper = {
        "title": "OPRD: On-Policy Representation Distillation",
        "id": "2606.06021",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{oprd2026,
                title  = {{OPRD: On-Policy Representation Distillation}},
                year   = 2026,
                eprint = {arXiv:2606.06021},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | None = None,
        args: OPRDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        bridge: Bridge | str | None = None,
        peft_config: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        tools: list | None = None,
    ) -> None:
        args = args or OPRDConfig("oprd")
        if args.use_vllm and not is_vllm_available():
            raise ValueError('vLLM is not installed: pip install "oprd[vllm]", or set use_vllm: false.')
        check_engine(args, has_adapter=peft_config is not None or hasattr(model, "get_base_model"))
        if teacher_model is model and not isinstance(model, str):
            raise ValueError("Student and teacher are one object, and the teacher is frozen. Pass a copy of it.")
        teacher_model, teacher_source = open_teacher(teacher_model, args)
        model = models.resolve_path(model) if isinstance(model, str) else model
        student_source = Source(model, (args.model_init_kwargs or {}).get("revision"), args.trust_remote_code)
        preflight.check_datasets(train_dataset, eval_dataset, responses_per_prompt=args.responses_per_prompt)
        if bridge is not None and args.bridge is not None:
            raise ValueError("Two bridges: pass bridge or set args.bridge, not both.")
        bridge = open_bridge(args.bridge if bridge is None else bridge)
        if bridge is not None and not args.representation_weight:
            raise ValueError("The bridge would be ignored: representation_weight is 0.")
        pair = self._pair = open_pair(
            args,
            student_source,
            teacher_source,
            processing_class,
            teacher_processing_class,
            bridge,
            train_dataset,
            has_tools=bool(tools),
            compares_states=self._compares_states(args),
        )
        shapes = pair.shapes
        train_dataset = fit_prompts(train_dataset, pair.tokenizer, args, shapes.context)

        # The base class insists on equal vocabulary sizes and keeps the teacher's head; the teacher is set up below.
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=pair.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        widen_adapters(self.model)
        self.vocab_size = shapes.vocab_size
        teacher, processes = teacher_model, self.accelerator.num_processes
        teacher = load_teacher(teacher, args, self.model.dtype, processes) if isinstance(teacher, str) else teacher
        teacher.requires_grad_(False).eval()
        heads.check_loaded(self.model, teacher)
        pair.check_bridge(self.model, teacher)
        self._end_where_told(args.eos_token)
        with models.whole(*models.head_parameters(self.model, teacher), written=True):
            self.lm_head, why = heads.adopt_or_keep(
                self.model,
                teacher,
                args.lm_head,
                shapes.vocab_size,
                pair.foreign,
                through_bridge=bridge is not None and not is_sharded(args),
                other_vocabulary=shapes.teacher_vocab_size is not None,
                trains_output=args.output_loss != "none",
            )
        self.objective = args.objective(
            layers=shapes.layers,
            num_layers=shapes.num_layers,
            vocab_size=shapes.vocab_size,
            head_adopted=self.lm_head == "teacher",
            bridge=None if bridge is None else bridge.to(self.accelerator.device),
            teacher_vocab_size=shapes.teacher_vocab_size,
            layer_map=shapes.layer_map,
        )
        heads.freeze_and_report(
            self.model, teacher, self.objective, self.lm_head, why, head_alone=args.trainable == "head"
        )
        read_here = [m for m in (self.model, teacher) if not isinstance(m, TeacherElsewhere)]
        for model_here in read_here[1:]:
            tile_mlps(model_here)
        if not tile_mlps(self.model, with_gradient=args.tile_mlp) and args.tile_mlp:
            raise ValueError("tile_mlp would be ignored: the student's blocks have no plain MLP. Unset it.")
        for read in read_here if args.is_packed else ():
            use_packed_attention(read)
            if not is_sharded(args):
                with self.accelerator.autocast():
                    check_packed_attention(read, suffix=read is self.model and args.gradient_scope == "suffix")
        self.teacher_model, self.teacher_at_hand = place_teacher(teacher, args, self.accelerator)
        self._lender = lender_of(teacher)
        expose_head(self.model, args)
        self._suppress_padded_vocabulary()
        self._meters = {"train": Meters(), "eval": Meters()}
        self._stopwatches = {mode: Stopwatch(self.accelerator.device) for mode in ("train", "eval")}
        self._memory = MemoryWatch(self.accelerator.device)
        self._guard = Guard(self)
        self.usage = {"tokens_generated": 0, "tokens_trained": 0}  # over all processes, since this object was made

    @property
    def peak_memory(self) -> int:
        """Bytes on this process's accelerator."""
        return self._memory.peak

    # ---------------------------------------------------------------------------------------- before the first step

    @staticmethod
    def _compares_states(args: OPRDConfig) -> bool:
        return args.representation_weight > 0

    def _end_where_told(self, eos_token: str | None) -> None:
        """Generation, and the model as it will be saved, end at ``eos_token`` too."""
        if eos_token is not None:
            self.model.generation_config.eos_token_id = list(self.eos_token_ids)

    def _suppress_padded_vocabulary(self) -> None:
        """Embedding rows beyond the tokenizer stand for no token: never sample them."""
        rows = models.text_config(self.model).vocab_size
        if rows > self.vocab_size and not self.use_vllm:
            padded = [*(self.generation_config.suppress_tokens or []), *range(self.vocab_size, rows)]
            self.generation_config.suppress_tokens = padded
            self.generation_kwargs["suppress_tokens"] = padded

    # ------------------------------------------------------------------------------------------------------ rollouts

    def _get_train_sampler(self, dataset: Dataset | None = None):
        args = self.args
        generated = args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        return RepeatSampler(
            data_source=dataset if dataset is not None else self.train_dataset,
            mini_repeat_count=args.responses_per_prompt,
            batch_size=generated // args.responses_per_prompt,
            repeat_count=args.gradient_accumulation_steps,
            shuffle=self.shuffle_dataset,
            seed=args.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, and the weight of every position: the denominators are counted here, over the whole step."""
        mode = "train" if self.model.training else "eval"
        started = self._stopwatch.now()
        with sampling(self):
            batch = super()._generate_and_score_completions(inputs)
        batch["is_counted"] = counted_rows(self.accelerator, len(inputs))
        if self.args.is_packed:
            batch, inputs = microbatches.balance(batch, inputs, self.accelerator)
        self._stopwatch.seconds["rollout"] += self._stopwatch.now() - started
        found = supervise(
            batch,
            [row["prompt"] for row in inputs],
            args=self.args,
            objective=self.objective,
            vocab_size=self.vocab_size,
            reader=self._pair.reader,
            accelerator=self.accelerator,
        )
        for name, value in found.metrics.items():
            self._metrics[mode][name].append(value)
        if mode == "train":
            self.usage["tokens_generated"] += found.generated
            self.usage["tokens_trained"] += found.trained
        if "answer" in inputs[0]:  # a column is there on every process or on none; a single answer may be missing
            answers = [row["answer"] for row in inputs]
            share = accuracy(batch, answers, self.processing_class, self.accelerator)
            self._metrics[mode]["accuracy"].append(share)
        return batch | found.tensors

    def make_rollout(self, batch: dict[str, Any]) -> Rollout:
        """One micro-batch, ready for both models."""
        reader = self._pair.reader
        crosses = reader is not None and reader.crossing is not None
        return make_rollout(
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["completion_ids"],
            batch["completion_mask"],
            state_weights_BC=batch["state_weights"],
            output_weights_BC=batch["output_weights"],
            state_at=self.args.state_at,
            teacher_text=None if reader is None else reader.text_of(batch),
            prefix_table=reader.table_of if crosses and self.objective.uses_output else None,
        )

    def _prepare_inputs(self, generation_batch):
        is_ready = isinstance(generation_batch, MicroBatch)
        return generation_batch if is_ready else super()._prepare_inputs(generation_batch)

    # ---------------------------------------------------------------------------------------------------------- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Of one micro-batch; of all of them, if ``inputs`` are not cut yet (in evaluation)."""
        if isinstance(inputs, MicroBatch):
            loss = self._micro_batch_loss(model, inputs)
            self._guard.has_loss = True
        else:
            parts = microbatches.cut(inputs, self.args.max_tokens_per_microbatch, self.accelerator)
            loss = torch.stack([self._micro_batch_loss(model, part) for part in parts]).sum()
            self._meter.end_batch()
            loss = self.accelerator.reduce(loss, reduction="mean")  # the loop weighs processes by rows that count
        return (loss, None) if return_outputs else loss

    def _micro_batch_loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Teacher, then student, each through its own wrapper, so that DDP, FSDP and ZeRO gather and reduce."""
        rollout = only(self.make_rollout(batch), states=self.objective.uses_states, outputs=self.objective.uses_output)
        if self.args.is_packed:
            rollout = pack(rollout, suffix=self.args.gradient_scope == "suffix")
        started = self._stopwatch.now()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with self.teacher_at_hand():
            ask = partial(self._teacher_states, teacher, rollout)
            targets = redirected(self._forward_redirection, self.teacher_model, teacher, ask)
        self._stopwatch.seconds["teacher"] += self._stopwatch.now() - started
        student = self.accelerator.unwrap_model(model)
        ask = partial(self._student_loss, student, rollout, targets)
        loss, terms, sums = redirected(self._forward_redirection, model, student, ask)
        self._meter.add(terms, sums)
        # The weights' denominators are global; DDP and the logged loss average over processes.
        return loss * self.accelerator.num_processes

    def _teacher_states(self, teacher: nn.Module, rollout: Rollout) -> TeacherStates:
        with self.accelerator.autocast():
            return teacher_states(self.objective, teacher, rollout)

    def _student_loss(self, student: nn.Module, rollout: Rollout, targets: TeacherStates) -> tuple[Tensor, Terms, Sums]:
        with self.accelerator.autocast():
            if self.args.gradient_scope == "suffix" and rollout.student_prefix is None and is_sharded(self.args):
                read_one_token(student, rollout.student, self.objective.top_layer)
            return student_loss(self.objective, student, self._lender, rollout, targets)

    @property
    def _stopwatch(self) -> Stopwatch:
        return self._stopwatches["train" if self.model.training else "eval"]

    @property
    def _meter(self) -> Meters:
        return self._meters["train" if self.model.training else "eval"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Transformers' step for each micro-batch of one accumulation step; processes meet after the last one."""
        model.train()
        started = self._stopwatch.now()
        batch = self._prepare_inputs(inputs)
        parts = microbatches.cut(batch, self.args.max_tokens_per_microbatch, self.accelerator)
        state = self.accelerator.gradient_state
        meets = state.sync_gradients

        def one(part: MicroBatch, is_last: bool) -> Tensor:
            state._set_sync_gradients(meets and is_last)
            self._memory.begin()
            meet = is_last or self.accelerator.is_fsdp2  # where no_sync holds whole gradients, and ends an outer one
            with nullcontext() if meet else self.accelerator.no_sync(model):
                loss = super(DistillationTrainer, self).training_step(model, part, num_items_in_batch)
            self._memory.end()
            return loss

        loss = self._guard.run(model, parts, one)
        self._meter.end_batch()
        self._step += 1  # TRL's own counter
        self._stopwatch.seconds["step"] += self._stopwatch.now() - started
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._record_times()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """Transformers' norm, behind which nothing stands between a gradient and the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.check(model, norm)
        if self.args.on_nonfinite == "skip":
            self._metrics["train"]["skipped_updates"].append(self._guard.skipped)
        return norm

    # ------------------------------------------------------------------------------------------------------- logging

    def _record_times(self) -> None:
        seconds, metrics = self._stopwatch.read(), self._metrics["train"]
        metrics["time/rollout"].append(seconds["rollout"])
        metrics["time/teacher"].append(seconds["teacher"])
        metrics["time/student"].append(seconds["step"] - seconds["rollout"] - seconds["teacher"])
        metrics["tokens_per_second"].append(metrics["response_tokens"][-1] / seconds["step"])
        metrics["step_time"].append(seconds["step"])
        if (rise := self._memory.read()) is not None:
            metrics["memory/update_peak_rise_gb"].append(rise / 1e9)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        accumulation = self.args.gradient_accumulation_steps if mode == "train" else 1
        for name, value in self._meters[mode].read(self.accelerator, accumulation).items():
            self._metrics[mode][name] = [value]
        super().log(logs, start_time)
