"""`OPRDTrainer`: TRL's distillation trainer with hidden states as what is distilled.

Generation, data order, accumulation, PEFT, sharding, checkpoints and logging are TRL's and transformers'. This file is
the only one that touches their private methods, with `oprd._compat`.
"""

from __future__ import annotations

import textwrap
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationTrainer

from oprd import models
from oprd._compat import RepeatSampler, is_vllm_available, prepare_deepspeed
from oprd.bridge import Bridge
from oprd.evaluation import grade
from oprd.objectives import position_weights, select_positions
from oprd.states import Rollout, check_packed_attention, make_rollout, only, pack, tile_mlps, use_packed_attention
from oprd.training import heads, microbatches, preflight
from oprd.training.config import OPRDConfig
from oprd.training.meters import MemoryWatch, Meters, Stopwatch
from oprd.training.microbatches import MicroBatch
from oprd.training.objective import Sums, TeacherStates, Terms, student_loss, teacher_states
from oprd.training.pair import fit_prompts, open_bridge, open_pair
from oprd.training.source import Source
from oprd.training.teacher import Offloaded, check_settings, load_teacher

logger = get_logger(__name__)


class OPRDTrainer(DistillationTrainer):
    """On-policy distillation in hidden-state space (OPRD, arXiv 2606.06021), alone or beside next-token objectives.

    Each step samples responses from the student, runs both backbones once over them, and minimises
    ``output_weight * L_OPD + representation_weight * L_OPRD + logit_weight * L_logit`` (`OPRDConfig`). Without an output
    loss no LM head runs on either side.

    Args:
        model: the student; a Hub id, a path, a model or a PEFT model.
        teacher_model: the teacher, likewise; ``args.teacher_model_name_or_path`` if not given.
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
        if args.lm_head == "solved" and args.fsdp:
            raise ValueError("lm_head: solved writes the whole head at the end, which FSDP shards. Use DDP or ZeRO-2.")
        if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "DeepSpeed ZeRO-3 partitions the LM head before it can be compared or adopted, which this version does not "
                "handle. Use ZeRO-2, or FSDP2 (accelerate config, fsdp_version: 2)."
            )
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if teacher_model is None:
            raise ValueError("No teacher: pass teacher_model, or set teacher_model_name_or_path.")
        if teacher_model is model and not isinstance(model, str):
            raise ValueError("Student and teacher are one object, and the teacher is frozen. Pass a copy of it.")
        check_settings(args, is_path=isinstance(teacher_model, str))
        model, teacher_model = (models.resolve_path(m) if isinstance(m, str) else m for m in (model, teacher_model))
        student_source = Source(model, (args.model_init_kwargs or {}).get("revision"), args.trust_remote_code)
        teacher_source = Source(teacher_model, args.teacher_model_revision, args.trust_remote_code)
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
        self.vocab_size = shapes.vocab_size
        teacher, processes = teacher_model, self.accelerator.num_processes
        teacher = load_teacher(teacher, args, self.model.dtype, processes) if isinstance(teacher, str) else teacher
        teacher.requires_grad_(False).eval()
        heads.check_loaded(self.model, teacher, is_fsdp=self.is_fsdp_enabled)
        pair.check_bridge(self.model, teacher)
        self._end_where_told(args.eos_token)
        self.lm_head, why = heads.adopt_or_keep(
            self.model,
            teacher,
            args.lm_head,
            shapes.vocab_size,
            pair.foreign,
            through_bridge=bridge is not None and not self.is_fsdp_enabled,
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
        )
        heads.freeze_and_report(
            self.model, teacher, self.objective, self.lm_head, why, head_alone=args.trainable == "head"
        )
        tile_mlps(teacher)
        if not tile_mlps(self.model, with_gradient=args.tile_mlp) and args.tile_mlp:
            raise ValueError("tile_mlp would be ignored: the student's blocks have no plain MLP. Unset it.")
        for read in (self.model, teacher) if args.is_packed else ():
            use_packed_attention(read)
            if not self.is_fsdp_enabled:
                with self.accelerator.autocast():
                    check_packed_attention(read, suffix=read is self.model and args.gradient_scope == "suffix")
        if self.is_deepspeed_enabled:
            self.teacher_model = prepare_deepspeed(teacher, self.accelerator)
        else:  # told where to, as under FSDP accelerate leaves a model that it does not shard in main memory
            here = not args.offload_teacher
            self.teacher_model = self.accelerator.prepare_model(teacher, device_placement=here, evaluation_mode=True)
        self.teacher_at_hand = Offloaded(teacher, self.accelerator.device).here if args.offload_teacher else nullcontext
        self._suppress_padded_vocabulary()
        self._meters = {"train": Meters(), "eval": Meters()}
        self._stopwatches = {mode: Stopwatch(self.accelerator.device) for mode in ("train", "eval")}
        self._memory = MemoryWatch(self.accelerator.device)
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
        batch = super()._generate_and_score_completions(inputs)
        if self.args.is_packed:
            batch, inputs = microbatches.balance(batch, inputs, self.accelerator)
        self._stopwatch.seconds["rollout"] += self._stopwatch.now() - started
        generated = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            generated = generated & batch["tool_mask"].bool()
        share = None
        if self._pair.reader is not None:
            batch |= self._pair.reader.read(
                [row["prompt"] for row in inputs], batch["completion_ids"], batch["completion_mask"]
            )
            share = self._paired_share(batch, generated, mode)
        masks = {
            "state": select_positions(generated, self.args.positions, self.args.position_k),
            "output": generated & (batch["completion_ids"] < self.vocab_size),  # vLLM may sample padded rows
        }
        if share is not None:
            masks["state"] = masks["state"] & (batch["teacher_columns"][..., self._partner_column] >= 0)
        used = [masks["state"]] * self.objective.uses_states + [masks["output"]] * self.objective.uses_output
        supervised = torch.stack(used).any(0)
        counts = [count for mask in masks.values() for count in (mask.any(1).sum(), mask.sum())]
        counts = torch.stack([*counts, generated.sum(), supervised.sum()])
        counts = self.accelerator.reduce(counts.float(), reduction="sum")
        for (name, mask), (rows, positions) in zip(masks.items(), counts[:4].view(2, 2), strict=True):
            batch[f"{name}_weights"] = position_weights(
                mask, self.args.reduction, num_sequences=rows, num_positions=positions
            )
        _, _, _, response_tokens, generated_tokens, supervised_tokens = counts.tolist()
        self._metrics[mode]["response_tokens"].append(response_tokens)
        if mode == "train":
            self.usage["tokens_generated"] += int(generated_tokens)
            self.usage["tokens_trained"] += int(supervised_tokens)
        if "answer" in inputs[0]:  # a column is there on every process or on none; a single answer may be missing
            texts = self.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
            answers = [row["answer"] for row in inputs]
            right = [
                float("nan") if a is None else float(grade(t, str(a))) for t, a in zip(texts, answers, strict=True)
            ]
            right = self.accelerator.gather(torch.tensor(right, device=self.accelerator.device))
            self._metrics[mode]["accuracy"].append(right.nanmean().item())
        return batch

    @property
    def _partner_column(self) -> int:
        return 0 if self.args.state_at == "predictive" else 1

    def _paired_share(self, batch: dict[str, Any], generated: Tensor, mode: str) -> float:
        """Share of response tokens, over all processes, whose state has a partner on the teacher's side."""
        paired = generated & (batch["teacher_columns"][..., self._partner_column] >= 0)
        counts = self.accelerator.reduce(torch.stack([paired.sum(), generated.sum()]).float(), reduction="sum")
        share = (counts[0] / counts[1].clamp(min=1)).item()
        self._metrics[mode]["paired_share"].append(share)
        if self.objective.representation_weight and self._pair.reader.crossing is not None:
            self._pair.reader.check_pairs(batch, generated, self.args.min_paired_share, share)
        return share

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
        else:
            parts = microbatches.cut(inputs, self.args.max_tokens_per_microbatch, self.accelerator)
            loss = torch.stack([self._micro_batch_loss(model, part) for part in parts]).sum()
            self._meter.end_batch()
        return (loss, None) if return_outputs else loss

    def _micro_batch_loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Teacher, then student, each through its own wrapper, so that DDP, FSDP and ZeRO gather and reduce."""
        rollout = only(self.make_rollout(batch), states=self.objective.uses_states, outputs=self.objective.uses_output)
        if self.args.is_packed:
            rollout = pack(rollout, suffix=self.args.gradient_scope == "suffix")
        started = self._stopwatch.now()
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        with self.teacher_at_hand():
            targets = self._forward_redirection(self.teacher_model, teacher, self._teacher_states, teacher, rollout)
        self._stopwatch.seconds["teacher"] += self._stopwatch.now() - started
        student = self.accelerator.unwrap_model(model)
        loss, terms, sums = self._forward_redirection(
            model, student, self._student_loss, student, teacher, rollout, targets
        )
        self._meter.add(terms, sums)
        # The weights' denominators are global; DDP and the logged loss average over processes.
        return loss * self.accelerator.num_processes

    def _teacher_states(self, teacher: nn.Module, rollout: Rollout) -> TeacherStates:
        with self.accelerator.autocast():
            return teacher_states(self.objective, teacher, rollout)

    def _student_loss(
        self, student: nn.Module, teacher: nn.Module, rollout: Rollout, targets: TeacherStates
    ) -> tuple[Tensor, Terms, Sums]:
        with self.accelerator.autocast():
            return student_loss(self.objective, student, teacher, rollout, targets)

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
        state, loss = self.accelerator.gradient_state, 0.0
        meets = state.sync_gradients
        for is_last, part in ((part is parts[-1], part) for part in parts):
            state._set_sync_gradients(meets and is_last)
            self._memory.begin()
            meet = is_last or self.accelerator.is_fsdp2  # where no_sync holds whole gradients, and ends an outer one
            with nullcontext() if meet else self.accelerator.no_sync(model):
                loss = loss + super(DistillationTrainer, self).training_step(model, part, num_items_in_batch)
            self._memory.end()
        self._meter.end_batch()
        self._step += 1  # TRL's own counter
        self._stopwatch.seconds["step"] += self._stopwatch.now() - started
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._record_times()
        return loss

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
