"""``oprd bridge fit``: the student answers prompts, both models read the answers once, and the bridge is solved."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, set_seed

from oprd import models
from oprd.bridge import Bridge
from oprd.bridge.collect import CONTROLS, RANDOM_STUDENT, RANDOM_TEACHER, SHUFFLED, Collection, before_of
from oprd.bridge.predict import predict
from oprd.durability.folders import writing
from oprd.durability.stopping import CONTINUES, SIGNALS, Stopped, any_process
from oprd.objectives import map_layers
from oprd.states import TeacherElsewhere
from oprd.training.config import OPRDConfig
from oprd.training.options import BRIDGE_HELP
from oprd.training.pairing import agreement
from oprd.training.trainer import OPRDTrainer

logger = get_logger(__name__)

SAVE_SECONDS = 300.0
WORK = "collected-{}.safetensors"


def _option(name: str, default: Any) -> Any:
    return field(default=default, metadata={"help": BRIDGE_HELP[name].replace("%", "%%")})


@dataclass
class BridgeConfig:
    """How a bridge is fitted; the rest (models, prompts, sampling) is the training recipe's.

    Raises:
        ValueError: values out of range.
    """

    bridge_rank: str = _option("bridge_rank", "auto")
    bridge_prompts: int = _option("bridge_prompts", 2000)
    bridge_held_out: float = _option("bridge_held_out", 0.1)
    bridge_ridge: float = _option("bridge_ridge", 1e-8)
    bridge_controls: bool = _option("bridge_controls", True)

    def __post_init__(self) -> None:
        rank = str(self.bridge_rank)
        if not (rank in ("auto", "full") or (rank.isdigit() and int(rank) > 0)):
            raise ValueError(f"bridge_rank must be auto, full or a positive number, got {self.bridge_rank!r}.")
        self.bridge_rank = rank
        if self.bridge_prompts < 2:
            raise ValueError(f"bridge_prompts must be at least 2, got {self.bridge_prompts}.")
        if not 0 < self.bridge_held_out < 1:
            raise ValueError(f"bridge_held_out must lie between 0 and 1, got {self.bridge_held_out}.")
        if not self.bridge_ridge >= 0:
            raise ValueError(f"bridge_ridge must not be negative, got {self.bridge_ridge}.")

    @property
    def rank(self) -> str | int:
        """As `BridgeFitter.fit` takes it."""
        return int(self.bridge_rank) if self.bridge_rank.isdigit() else self.bridge_rank


class RolloutTrainer(OPRDTrainer):
    """The trainer's own rollouts, templates and alignment for a pair that has no bridge yet."""

    @staticmethod
    def _compares_states(args: OPRDConfig) -> bool:
        return False


def rollout_settings(args: OPRDConfig) -> OPRDConfig:
    """The recipe's sampling settings, with every response position and nothing that needs a bridge."""
    args = copy.copy(args)
    args.bridge, args.positions, args.lm_head, args.logit_weight = None, "all", "keep", 0.0
    args.representation_weight = args.representation_weight or 1.0  # so that too few pairs are refused
    args.eval_strategy, args.trainable, args.attention_weight = "no", "all", 0.0
    args.layer_weighting, args.representation_loss = "uniform", None
    args.report_to = []  # nothing is trained, and trackers are opened by training
    # Rows stay with the process whose prompts they answer, and both models are read outside of a training step.
    args.max_tokens_per_microbatch, args.gradient_scope, args.offload_teacher = None, "full", False
    return args


def _key(settings: BridgeConfig, trainer: RolloutTrainer, fingerprints: dict[str, str]) -> dict[str, Any]:
    """What a half-done collection must share with this one to be continued."""
    args = trainer.args
    return {
        **dataclasses.asdict(settings),
        **fingerprints,
        "state_at": args.state_at,
        "seed": args.seed,
        "temperature": args.temperature,
        "max_completion_length": args.max_completion_length,
        "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "processes": trainer.accelerator.num_processes,
    }


def collect(trainer: RolloutTrainer, settings: BridgeConfig, directory: Path) -> tuple[Collection, dict[str, Any]]:
    """Roll out, read, sum up; every few minutes the sums are saved, and a later call continues from them.

    Returns:
        What this process has collected, and facts about it.
    """
    accelerator, args = trainer.accelerator, trainer.args
    student, teacher = trainer.model.eval(), accelerator.unwrap_model(trainer.teacher_model)
    configs = [models.text_config(model) for model in (student, teacher)]
    controls = CONTROLS if settings.bridge_controls else ()
    if isinstance(teacher, TeacherElsewhere) and controls:  # a random one would be as large as the one that is not here
        controls = (SHUFFLED, RANDOM_STUDENT)
    layer_map = map_layers(*(config.num_hidden_layers for config in configs))
    collection = Collection(
        layer_map,
        *(config.hidden_size for config in configs),
        controls=controls,
        device=accelerator.device,
        seed=accelerator.process_index,
    )
    random = {RANDOM_STUDENT: _random_like(models.causal_lm(student), args.seed + 1)} if controls else {}
    if RANDOM_TEACHER in controls:
        random[RANDOM_TEACHER] = _random_like(teacher, args.seed)
    fingerprints = trainer.pair.fingerprints(student, teacher)
    path = directory / WORK.format(accelerator.process_index)
    key = _key(settings, trainer, fingerprints)
    _go_on(collection, path, key, accelerator)
    rows = trainer.train_dataset.select(range(min(settings.bridge_prompts, len(trainer.train_dataset))))
    every = max(2, round(1 / settings.bridge_held_out))  # one prompt in this many is held out
    if len(rows) < every:
        raise ValueError(
            f"{len(rows)} prompts leave none to hold out (one in {every}). Give more prompts, or raise bridge_held_out."
        )
    numbers = range(accelerator.process_index, len(rows), accelerator.num_processes)
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps
    batches = [numbers[start : start + size] for start in range(0, len(numbers), size)]
    # Every process takes part in every generation; a process that has run out repeats its last batch unrecorded.
    total = -(-len(range(0, len(rows), accelerator.num_processes)) // size)
    saved = time.monotonic()
    bar = tqdm(
        total=total,
        initial=collection.batches,
        desc="bridge: rollouts",
        unit="batch",
        disable=not accelerator.is_local_main_process or args.disable_tqdm,
    )
    for place in range(collection.batches, total):
        # Processes save and stop after the same batch, or they could not go on together.
        due, asked = time.monotonic() - saved > SAVE_SECONDS, SIGNALS.asked(accelerator)
        if any_process(due, accelerator) or asked:
            _save(collection, path, key)
            saved = time.monotonic()
        if asked:
            raise Stopped(f"stopped by {SIGNALS.received} after {place} of {total} batches for the bridge; {CONTINUES}")
        set_seed(args.seed * 1_000_003 + place * accelerator.num_processes + accelerator.process_index)
        chosen = batches[min(place, len(batches) - 1)]
        batch = trainer._generate_and_score_completions([rows[number] for number in chosen])
        if place < len(batches):
            held_out = torch.tensor([number % every == every - 1 for number in chosen], device=accelerator.device)
            _add_in_pieces(collection, trainer, student, teacher, batch, held_out, random)
        bar.update()
    bar.close()
    _save(collection, path, key)
    facts = {
        "fitted_for": fingerprints,
        "data": {
            "prompts": len(rows),
            "held_out_every": every,
            "temperature": args.temperature,
            "max_completion_length": args.max_completion_length,
            "seed": args.seed,
            "state_at": args.state_at,
            "student": str(models.text_config(student)._name_or_path or type(student).__name__),
            "teacher": str(models.text_config(teacher)._name_or_path or type(teacher).__name__),
        },
        "versions": {name: version(name) for name in ("oprd", "torch", "transformers", "trl")},
    }
    shares = trainer._metrics["eval"].get("paired_share")
    if shares:
        facts["data"]["paired_share"] = sum(shares) / len(shares)
    return collection, facts


def _go_on(collection: Collection, path: Path, key: dict[str, Any], accelerator: Any) -> None:
    """Take up the latest collection that every process has."""
    found = {Collection.batches_in(place, key): place for place in (before_of(path), path)}
    everyone = gather_object([list(found)]) if accelerator.num_processes > 1 else [list(found)]
    shared = set.intersection(*map(set, everyone)) - {None}
    if shared:
        collection.load(found[max(shared)], key)
        logger.info(f"Continuing a collection of {collection.batches} batches.")


def _save(collection: Collection, path: Path, key: dict[str, Any]) -> None:
    with writing(path):
        collection.save(path, key)


def _add_in_pieces(collection, trainer, student, teacher, batch, held_out_B, random) -> None:
    """A generation batch in pieces of the training micro-batch, which is what the models' forwards are sized for."""
    size, before = trainer.args.per_device_train_batch_size, collection.batches
    for start in range(0, len(held_out_B), size):
        part = slice(start, start + size)
        piece = {
            name: value[part] if isinstance(value, Tensor) and value.ndim else value for name, value in batch.items()
        }
        rollout = trainer.make_rollout(piece)
        with trainer.accelerator.autocast():
            collection.add(student, teacher, rollout, held_out_B[part], random)
    collection.batches = before + 1


def _random_like(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A model of the same config, freshly initialised."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    return fresh.to(model.device, model.dtype).eval().requires_grad_(False)


def merge_processes(trainer: RolloutTrainer, collection: Collection, directory: Path) -> Collection:
    """The main process adds what the others have saved; the others return their own."""
    accelerator = trainer.accelerator
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for rank in range(1, accelerator.num_processes):
            first = collection.fitter
            other = Collection(
                first.layer_map, *first.dims, controls=list(collection.controls), device=accelerator.device
            )
            other.load(directory / WORK.format(rank), _key_of(directory / WORK.format(rank)))
            collection.merge(other)
    return collection


def _key_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["about"])["key"]


def solve_collection(
    trainer: RolloutTrainer, collection: Collection, facts: dict[str, Any], settings: BridgeConfig
) -> Bridge:
    """The bridge with its report: curves, controls and the prediction."""
    bridge = collection.fitter.fit(settings.rank, settings.bridge_ridge)
    bridge.fitted_for = facts["fitted_for"]
    bridge.report |= {name: facts[name] for name in ("data", "versions")}
    if collection.controls:
        few = collection.layers
        report = {"layers": few, "rank": bridge.rank, "bridge": _at_rank(collection.fitter, bridge.rank, settings, few)}
        for name, fitter in collection.controls.items():
            report[name] = _at_rank(fitter, bridge.rank, settings, None)
        bridge.report["controls"] = report
    if len(collection.fitter.sample):
        student, teacher = trainer.model, trainer.accelerator.unwrap_model(trainer.teacher_model)
        shapes, reader = trainer.pair.shapes, trainer.pair.reader
        if isinstance(teacher, TeacherElsewhere):
            teacher.fetch_head()
        own = models.head_of(student, shapes.vocab_size)
        other = models.head_of(teacher, shapes.teacher_vocab_size or shapes.vocab_size)
        bridge.report["prediction"] = predict(
            collection.fitter,
            lambda h: own.logits(h.to(own.weight_Vd)).float().cpu(),
            lambda h: other.logits(h.to(other.weight_Vd)).float().cpu(),
            agreement(None if reader is None else reader.crossing),
        )
    return bridge


def _at_rank(fitter, rank: int, settings: BridgeConfig, layers: list[int] | None) -> dict[str, float]:
    """Held-out cosine and R^2 at one rank, mean over ``layers`` (all by default)."""
    from oprd.bridge.report import layer_scores

    solutions = fitter.solutions(ridge=settings.bridge_ridge, intercept=True)
    chosen = [layer - 1 for layer in layers] if layers else range(len(solutions))
    scores = [layer_scores(solutions[i], fitter.held_out[i], fitter.sample, i, rank) for i in chosen]
    return {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}


def fit_bridge(build: Callable[[], RolloutTrainer], settings: BridgeConfig, directory: Path) -> Bridge:
    """Collect, solve and save; the bridge is the folder ``directory``.

    Args:
        build: makes the trainer whose rollouts are collected.
    """
    directory.mkdir(parents=True, exist_ok=True)
    about_heads = logging.getLogger("oprd.training.heads")  # nothing is trained here, so it has nothing to say
    level = about_heads.level
    about_heads.setLevel(logging.ERROR)
    try:
        trainer = build()
    finally:
        about_heads.setLevel(level)
    started = time.perf_counter()
    with SIGNALS.held():  # a batch is the least that can be taken up again
        collection, facts = collect(trainer, settings, directory)
    collected = time.perf_counter() - started
    collection = merge_processes(trainer, collection, directory)
    accelerator = trainer.accelerator
    failure: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            started = time.perf_counter()
            bridge = solve_collection(trainer, collection, facts, settings)
            bridge.report["seconds"] = {"collect": collected, "solve": time.perf_counter() - started}
            bridge.save_pretrained(directory)
        except ValueError as error:  # every process must hear of it
            failure = [str(error)]
        for path in directory.glob(WORK.format("*")):
            path.unlink()
    broadcast_object_list(failure)
    if failure[0]:
        raise ValueError(failure[0])
    logger.info(f"Bridge fitted in {collected:.0f} s and saved to {directory}.")
    return Bridge.from_pretrained(directory)
