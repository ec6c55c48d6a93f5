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
from oprd.states import Rollout, TeacherStates, make_rollout, only, pack_all, read_one_token, shared
from oprd.training import microbatches, preflight
from oprd.training.at_layers import Lesson, Sums
from oprd.training.checkpoints import CheckpointedTrainer
from oprd.training.config import OPRDConfig
from oprd.training.engines import check_engine, expose_head, is_sharded, redirected
from oprd.training.guard import Guard
from oprd.training.lessons import Terms, joint_loss
from oprd.training.meters import MemoryWatch, Meters, Stopwatch
from oprd.training.microbatches import MicroBatch
from oprd.training.nonfinite import sampling
from oprd.training.objective import Objective, teacher_states
from oprd.training.opening import check_room, open_teachers, ready_teachers
from oprd.training.pair import Pair, fit_prompts
from oprd.training.quantised import widen_adapters
from oprd.training.source import Source
from oprd.training.supervision import accuracy, counted_rows, of_teacher, supervise
from oprd.training.teachers import Routes, Teacher, named_teachers
from oprd.training.weighting import layer_means

logger = get_logger(__name__)


class OPRDTrainer(CheckpointedTrainer):
    """On-policy distillation in hidden-state space (OPRD, arXiv 2606.06021), alone or beside next-token objectives.

    Each step samples responses from the student, runs both backbones once over them, and minimises
    ``output_weight * L_OPD + representation_weight * L_OPRD + logit_weight * L_logit`` (`OPRDConfig`). Without an output
    loss no LM head runs on either side.

    Args:
        model: the student; a Hub id, a path, a model or a PEFT model.
        teacher_model: the teacher, likewise, or one elsewhere (`oprd.serving.connect`); ``args.teacher_model_name_or_path`` or
            ``args.teacher_url`` if not given. A dict for several teachers by name, beside or instead of ``args.teachers``; none
            where the student teaches itself (``args.teacher_model_kind``).
        args: `OPRDConfig`.
        train_dataset: needs a ``prompt`` column (text or chat messages). With an ``answer`` column, responses are graded
            and ``accuracy`` is logged.
        eval_dataset: the same, for evaluation; or a dict of them.
        processing_class: the student's tokenizer; loaded from ``model`` if not given.
        teacher_processing_class: the teacher's tokenizer; loaded from the teacher's path where there is one. If it is
            another than the student's, the teacher reads the student's text in its own tokens.
        bridge: a fitted `oprd.bridge.Bridge` or its folder, for a teacher of another shape, origin or tokenizer;
            ``args.bridge`` if not given. A dict by name for several teachers.
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
        teacher_model: str | PreTrainedModel | dict[str, str | PreTrainedModel] | None = None,
        args: OPRDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        bridge: Bridge | str | dict[str, Bridge | str] | None = None,
        peft_config: Any = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        tools: list | None = None,
    ) -> None:
        args = args or OPRDConfig("oprd")
        if args.use_vllm and not is_vllm_available():
            raise ValueError('vLLM is not installed: pip install "oprd[vllm]", or set use_vllm: false.')
        has_adapter = peft_config is not None or hasattr(model, "get_base_model")
        check_engine(args, has_adapter=has_adapter)
        given = list(teacher_model.values()) if isinstance(teacher_model, dict) else [teacher_model]
        if any(one is model for one in given) and not isinstance(model, str):
            raise ValueError(
                "Student and teacher are one object, and the teacher is frozen. Pass a copy of it, or have the student teach "
                "itself with teacher_model_kind."
            )
        model = models.resolve_path(model) if isinstance(model, str) else model
        preflight.check_datasets(train_dataset, eval_dataset, responses_per_prompt=args.responses_per_prompt)
        if bridge is not None and args.bridge is not None:
            raise ValueError("Two bridges: pass bridge or set args.bridge, not both.")
        named = named_teachers(args, teacher_model, bridge)
        self.routes = Routes.of(named, args.teacher_column)
        opened = open_teachers(
            named,
            Source(model, (args.model_init_kwargs or {}).get("revision"), args.trust_remote_code),
            processing_class,
            teacher_processing_class,
            preflight.named_datasets(train_dataset, eval_dataset),
            self.routes,
            has_adapter=has_adapter,
            tools=tools or (),
            compares_states=self._compares_states(args),
        )
        tokenizer = opened[0].pair.tokenizer
        contexts = [one.pair.shapes.context for one in opened if one.pair.shapes.context is not None]
        train_dataset = fit_prompts(train_dataset, tokenizer, args, min(contexts, default=None), tools or ())
        check_room(opened, train_dataset, args)

        # The base class insists on equal vocabulary sizes and keeps the teacher's head; the teacher is set up below.
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        widen_adapters(self.model)
        self.vocab_size = opened[0].pair.shapes.vocab_size
        self._end_where_told(args.eos_token)
        self.teachers, self.lm_head, self.averages = ready_teachers(self, opened, args)
        self.teacher_model = self.teachers[0].model
        expose_head(self.model, args)
        self._suppress_padded_vocabulary()
        self._meters = {"train": Meters(), "eval": Meters()}
        self._means = layer_means(self.teachers, self._meters["train"], self.accelerator)
        self.averages |= {f"means{'' if name is None else f'-{name}'}": mean for name, mean in self._means.items()}
        for average in self.averages.values():
            self.add_callback(average)
        self._stopwatches = {mode: Stopwatch(self.accelerator.device) for mode in ("train", "eval")}
        self._memory = MemoryWatch(self.accelerator.device)
        self._guard = Guard(self)
        self.usage = {"tokens_generated": 0, "tokens_trained": 0}  # over all processes, since this object was made

    @property
    def peak_memory(self) -> int:
        """Bytes on this process's accelerator."""
        return self._memory.peak

    # ---------------------------------------------------------------------------------------- before the first step

    @property
    def objective(self) -> Objective:
        """The first teacher's."""
        return self.teachers[0].objective

    @property
    def pair(self) -> Pair:
        """The student and the first teacher."""
        return self.teachers[0].pair

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
        if self.routes is not None:
            batch["route"] = torch.tensor([self.routes.index(row) for row in inputs], device=self.accelerator.device)
        self._stopwatch.seconds["rollout"] += self._stopwatch.now() - started
        found = supervise(
            batch,
            inputs,
            args=self.args,
            teachers=self.teachers,
            vocab_size=self.vocab_size,
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

    def make_rollout(self, batch: dict[str, Any], teacher: Teacher | None = None) -> Rollout:
        """One micro-batch, ready for the student and a teacher (the first)."""
        teacher = teacher or self.teachers[0]
        batch = of_teacher(batch, teacher)
        reader = teacher.pair.reader
        crosses = reader is not None and reader.crossing is not None
        return make_rollout(
            batch["prompt_ids"],
            batch["prompt_mask"],
            batch["completion_ids"],
            batch["completion_mask"],
            state_weights_BC=batch["state_weights"],
            output_weights_BC=batch["output_weights"],
            transition_weights_BC=batch.get("transition_weights"),
            state_at=self.args.state_at,
            teacher_text=None if reader is None else reader.text_of(batch),
            prefix_table=reader.table_of if crosses and teacher.objective.uses_output else None,
        )

    def teachers_of(self, batch: MicroBatch) -> list[Teacher]:
        """Those that read a micro-batch."""
        return [self.teachers[batch["teacher"]]] if "teacher" in batch else self.teachers

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
            parts = self._cut(inputs)
            loss = torch.stack([self._micro_batch_loss(model, part) for part in parts]).sum()
            self._meter.end_batch()
            loss = self.accelerator.reduce(loss, reduction="mean")  # the loop weighs processes by rows that count
        return (loss, None) if return_outputs else loss

    def _cut(self, batch: dict[str, Any]) -> list[MicroBatch]:
        return microbatches.cut(batch, self.args.max_tokens_per_microbatch, self.accelerator, len(self.teachers))

    def _micro_batch_loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Teachers, then student, each through its own wrapper, so that DDP, FSDP and ZeRO gather and reduce."""
        teachers = self.teachers_of(batch)
        rollouts = [
            only(self.make_rollout(batch, t), states=t.objective.uses_states, outputs=t.objective.uses_output)
            for t in teachers
        ]
        is_suffix = self.args.gradient_scope == "suffix"
        rollouts = pack_all(rollouts, suffix=is_suffix) if self.args.is_packed else shared(rollouts)
        started = self._stopwatch.now()
        lessons = [self._ask(teacher, model, rollout) for teacher, rollout in zip(teachers, rollouts, strict=True)]
        self._stopwatch.seconds["teacher"] += self._stopwatch.now() - started
        student = self.accelerator.unwrap_model(model)
        ask = partial(self._student_loss, student, lessons)
        loss, terms, sums = redirected(self._forward_redirection, model, student, ask)
        self._meter.add(terms, sums)
        # The weights' denominators are global; DDP and the logged loss average over processes.
        return loss * self.accelerator.num_processes

    def _ask(self, teacher: Teacher, student: nn.Module, rollout: Rollout) -> Lesson:
        wrapper = teacher.among(student)
        plain = self.accelerator.unwrap_model(wrapper)

        def states() -> TeacherStates:
            with self.accelerator.autocast():
                return teacher_states(teacher.objective, plain, rollout)

        with teacher.at_hand():
            targets = redirected(self._forward_redirection, wrapper, plain, states)
            head = teacher.lend() if teacher.objective.uses_head else plain
        means = self._means.get(teacher.name)
        return Lesson(
            teacher.objective, head, rollout, targets, teacher.name, None if means is None else means.weighting
        )

    def _student_loss(self, student: nn.Module, lessons: list[Lesson]) -> tuple[Tensor, Terms, Sums]:
        rollout = lessons[0].rollout
        with self.accelerator.autocast():
            if self.args.gradient_scope == "suffix" and rollout.student_prefix is None and is_sharded(self.args):
                read_one_token(student, rollout.student, max(lesson.objective.top_layer for lesson in lessons))
            return joint_loss(student, lessons)

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
        parts = self._cut(batch)
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
