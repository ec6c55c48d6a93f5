"""One training run from a recipe: check, train, and leave a folder that says what happened."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from huggingface_hub import upload_folder
from transformers import AutoConfig, AutoTokenizer, PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, get_peft_config, get_quantization_config

from oprd.bridge import Bridge
from oprd.evaluation.benchmarks import Benchmark
from oprd.lineage.card import write_card
from oprd.lineage.inputs import data_record, model_record, run_of_model
from oprd.lineage.manifest import NAME, Manifest, differing_inputs, read_manifest
from oprd.models import resolve_path
from oprd.prompts import load_prompts
from oprd.records import write_text
from oprd.training.bridging import RolloutTrainer, fit_bridge, rollout_settings
from oprd.training.callbacks import CostMeter, MetricsFile, ProgressLine
from oprd.training.config import OPRDConfig
from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP
from oprd.training.preflight import check_attention
from oprd.training.recipe import Configs, DataConfig, parse, repeated, resolved, second_stage
from oprd.training.saving import save_final
from oprd.training.solved_head import solve_head
from oprd.training.trainer import OPRDTrainer
from oprd.training.validation import BenchmarkConfig, BenchmarkScores, load_benchmarks

logger = get_logger(__name__)


IN_CHECKPOINT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")  # and won by it


@dataclass(frozen=True)
class Call:
    """How a run was asked for: the command, the manifest of the run that it repeats, words for the progress bar."""

    command: list[str]
    before: dict[str, Any] | None = None
    description: str = "distilling"


@dataclass(frozen=True)
class RunData:
    """Everything that a run reads besides models."""

    train: Dataset
    eval: Dataset | None
    benchmarks: dict[str, Benchmark]

    def records(self, data: DataConfig) -> dict[str, Any]:
        """Content hashes for the manifest."""
        named = {"train": data_record(str(data.dataset_name), self.train)}
        if self.eval is not None:
            named["eval"] = data_record(str(data.eval_dataset_name), self.eval)
        for name, benchmark in self.benchmarks.items():
            named[name] = {"name": benchmark.source, "rows": len(benchmark.problems), "hash": benchmark.hash}
        return named


def load_data(configs: Configs) -> RunData:
    """Prompts and benchmarks, checked.

    Raises:
        ValueError: no student or no prompts named, evaluation half set up, or what the data checks find.
    """
    data, args, model, _, benchmark = configs
    if model.model_name_or_path is None:
        raise ValueError("No student: set model_name_or_path.")
    if data.dataset_name is None:
        raise ValueError("No prompts: set dataset_name to a Hub id or a parquet, json or jsonl file.")
    if args.teacher_model_name_or_path is None:
        raise ValueError("No teacher: set teacher_model_name_or_path.")
    columns = {"prompt_column": data.prompt_column, "answer_column": data.answer_column, "as_chat": data.as_chat}
    train_dataset = load_prompts(
        data.dataset_name,
        config=data.dataset_config,
        split=data.dataset_train_split,
        drop_duplicates=data.drop_duplicates,
        **columns,
    )
    evaluates = args.eval_strategy != "no"
    if evaluates != (data.eval_dataset_name is not None):
        raise ValueError("Evaluation needs both eval_strategy (steps or epoch) and eval_dataset_name; one is missing.")
    eval_dataset = (
        load_prompts(data.eval_dataset_name, config=data.eval_config, split=data.eval_split, **columns)
        if evaluates
        else None
    )
    benchmarks: dict[str, Benchmark] = {}
    if benchmark.validation_benchmark or benchmark.tests:
        student = resolve_path(model.model_name_or_path)
        where = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(student, **where).get_text_config()
        benchmarks = load_benchmarks(
            benchmark,
            AutoTokenizer.from_pretrained(student, **where),
            context=getattr(config, "max_position_embeddings", None),
            max_new_tokens=args.max_completion_length,
        )
    return RunData(train_dataset, eval_dataset, benchmarks)


def build_trainer(
    data: RunData, args: OPRDConfig, model: ModelConfig, kind: type[OPRDTrainer] = OPRDTrainer
) -> OPRDTrainer:
    """Check everything, load the models.

    Raises:
        ValueError: whatever pre-flight finds.
    """
    check_attention(args, model.attn_implementation)
    shared = {"attn_implementation": model.attn_implementation}
    args.model_init_kwargs = {
        **shared,
        "revision": model.model_revision,
        "dtype": model.dtype or "float32",
        **(args.model_init_kwargs or {}),
    }
    args.teacher_model_init_kwargs = {**shared, **(args.teacher_model_init_kwargs or {})}
    return kind(
        model=resolve_path(model.model_name_or_path),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def attach_callbacks(trainer: OPRDTrainer, description: str = "distilling") -> None:
    """`MetricsFile` always; `ProgressLine` in place of the bar or the printer that transformers adds."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine(description))
    trainer.add_callback(MetricsFile())


def _bridge_trainer(data: RunData, args: OPRDConfig, model: ModelConfig) -> RolloutTrainer:
    data = dataclasses.replace(data, eval=None)
    return build_trainer(data, rollout_settings(args), copy.copy(model), RolloutTrainer)


def fit(arguments: list[str]) -> tuple[Path, Bridge, bool]:
    """``oprd bridge fit``: from a training recipe to a bridge in the folder that ``bridge`` names, or
    ``output_dir/bridge``; the folder, the bridge, and whether this is the main process."""
    configs = parse(arguments, "bridge fit")
    configs = configs._replace(
        data=dataclasses.replace(configs.data, eval_dataset_name=None), benchmarks=BenchmarkConfig()
    )
    _, args, model, settings, _ = configs
    args.eval_strategy = "no"
    directory = Path(args.bridge if args.bridge not in (None, "auto") else Path(args.output_dir) / "bridge")
    if (directory / "bridge.json").exists():
        raise ValueError(f"{directory} already holds a bridge. Choose another folder with --bridge DIR, or remove it.")
    bridge = fit_bridge(lambda: _bridge_trainer(load_data(configs), args, model), settings, directory)
    return directory, bridge, PartialState().is_main_process


def run(arguments: list[str], *, description: str = "distilling") -> tuple[Path, bool]:
    """Train from command-line arguments; the run's directory, and whether this is the main process.

    The directory holds ``config.yaml`` (the resolved recipe), ``manifest.json`` (repeat with ``oprd train --from``),
    ``metrics.jsonl``, ``checkpoint-*/`` and ``final/``, which loads with ``AutoModelForCausalLM.from_pretrained``. With
    ``bridge: auto`` it also holds ``bridge/``, with benchmarks ``evaluations/`` and ``best``; a second stage (``then``) has
    its run in ``then/``, and that directory is returned.
    """
    said = ["***" if "token" in key else part for key, part in pairwise(["", *arguments])]
    call = Call(["oprd", "train", *said], description=description)
    if "--from" not in arguments:
        return _run(arguments, call)
    with repeated(arguments) as (arguments, before):
        return _run(arguments, dataclasses.replace(call, before=before))


def _run(arguments: list[str], call: Call) -> tuple[Path, bool]:
    configs = parse(arguments)
    data, args = configs.data, configs.args
    directory = Path(args.output_dir)
    second = None if data.then is None else second_stage(arguments, data.then, directory)
    if second is None or not (directory / "final").exists():
        is_main = _one_stage(configs, call)
    if second is None:
        return directory, is_main
    written = directory / "then.yaml"
    if PartialState().is_main_process:
        write_text(written, yaml.safe_dump(second, sort_keys=True))
    PartialState().wait_for_everyone()
    resume = ["--resume"] if data.resume else []
    other = None if call.before is None else Path(call.before["folder"]) / "then"
    before = read_manifest(other) if other is not None and (other / NAME).exists() else None
    call = dataclasses.replace(call, before=before, description=f"{call.description}, then")
    return _run(["--config", str(written), *resume], call)


def _check_directory(directory: Path, last: str | None, data: DataConfig, args: OPRDConfig) -> None:
    if (directory / "final").exists() and not data.resume:
        raise ValueError(f"{directory} holds a finished run. Choose another output_dir, or remove it.")
    if last is not None and not (data.resume or args.resume_from_checkpoint):
        raise ValueError(
            f"{directory} already holds {Path(last).name}. Continue it with --resume, or choose another output_dir."
        )


def _is_done(directory: Path, settings: dict[str, Any], args: OPRDConfig) -> bool:
    """Whether a finished run has no update left to make."""
    if not (directory / NAME).exists():
        return False
    manifest = read_manifest(directory)
    reached = 0 < args.max_steps <= (manifest.get("last_update") or 0)
    return manifest["status"] == "finished" and (reached or manifest["config"] == settings)


def _start_manifest(
    configs: Configs, settings: dict[str, Any], loaded: RunData, call: Call, *, resumed: bool
) -> Manifest:
    """The run's manifest: what it is, by content. Reads every file of both models once.

    Raises:
        ValueError: a model, the bridge or the data is not what it was in the run that this one repeats.
    """
    data, args, model, _, _ = configs
    before, folder = call.before, None if args.bridge in (None, "auto") else args.bridge
    parent = run_of_model(model.model_name_or_path)
    identity: dict[str, Any] = {
        "command": call.command,
        "directory": str(Path.cwd()),
        "config": settings,
        "student": model_record(model.model_name_or_path, model.model_revision),
        "teacher": model_record(args.teacher_model_name_or_path, args.teacher_model_revision),
        "bridge": model_record(folder) if folder and Path(folder).is_dir() else None,
        "data": loaded.records(data),
        "seeds": {"seed": args.seed, "data_seed": args.data_seed},
        "parent": None,
        "repeats": None,
    }
    if parent is not None:
        identity["parent"] = {"run": str(parent), "final": (read_manifest(parent)["final"] or {}).get("hash")}
    if before is not None:
        identity["repeats"] = {name: before[name] for name in ("run", "created", "final")}
        differing = differing_inputs(before, identity)
        if differing:
            raise ValueError(f"{before['run']} cannot be repeated, its inputs have changed: {'; '.join(differing)}.")
    processes = PartialState().num_processes
    manifest = Manifest.start(Path(args.output_dir), identity=identity, processes=processes, resumed=resumed)
    changed = manifest.content["sessions"][-1].get("changed_settings", {})
    kept = [name for name in IN_CHECKPOINT if name in changed]
    if kept:
        raise ValueError(
            f"{', '.join(kept)} would be ignored: the checkpoint's optimiser goes on with what it had "
            f"({changed[kept[0]][0]} for {kept[0]}). Resume with that, or start a new run from its last checkpoint."
        )
    if changed:
        logger.info(f"Resumed with other settings: {', '.join(f'{k} {a} -> {b}' for k, (a, b) in changed.items())}.")
    return manifest


def _one_stage(configs: Configs, call: Call) -> bool:
    data, args, model, bridge, benchmark = configs
    settings = resolved(configs)  # before the trainer fills in anything
    unused = {*(BRIDGE_HELP if args.bridge is None else ()), *(BENCHMARK_HELP if not benchmark.benchmark_steps else ())}
    settings = {key: value for key, value in settings.items() if key not in unused}
    directory = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if directory.is_dir() else None
    _check_directory(directory, last, data, args)
    if (directory / "final").exists() and _is_done(directory, settings, args):
        logger.info(f"{directory} has finished; there is nothing to resume.")
        return PartialState().is_main_process
    loaded = load_data(configs)
    checkpoint = args.resume_from_checkpoint or (last if data.resume else None)
    manifest = None
    if PartialState().is_main_process:
        manifest = _start_manifest(configs, settings, loaded, call, resumed=checkpoint is not None)
    try:
        if args.bridge == "auto":
            fitted = directory / "bridge"
            if not (fitted / "bridge.json").exists():
                fit_bridge(lambda: _bridge_trainer(loaded, args, model), bridge, fitted)
                if manifest is not None:
                    manifest.update(force=True)
            args.bridge = str(fitted)
            if manifest is not None:
                manifest.content["fitted_bridge"] = model_record(str(fitted))
        trainer = _train(configs, loaded, manifest, checkpoint, call.description)
    except BaseException as error:
        if manifest is not None:
            manifest.fail(error)
        raise
    if manifest is not None:
        manifest.content["last_update"] = trainer.state.global_step
        manifest.finish(directory / "final")
        write_card(directory)
        if call.before is not None:
            _say_whether_identical(manifest.content, call.before)
        if args.push_to_hub:  # the student and its card, not the run around it
            upload_folder(repo_id=trainer.hub_model_id, folder_path=directory / "final", token=args.hub_token)
    trainer.end()
    return manifest is not None


def _train(
    configs: Configs, loaded: RunData, manifest: Manifest | None, checkpoint: str | None, description: str
) -> OPRDTrainer:
    """From loaded data to ``final/``."""
    _, args, model, _, benchmark = configs
    trainer = build_trainer(loaded, args, model)
    scores = BenchmarkScores(trainer, benchmark, loaded.benchmarks) if loaded.benchmarks else None
    attach_callbacks(trainer, description)
    if scores is not None:  # behind the file that its scores go to
        trainer.add_callback(scores)
    meter = None
    if manifest is not None:
        meter = CostMeter(manifest, trainer, scores)
        trainer.add_callback(meter)
        manifest.update(force=True)
        write_text(Path(args.output_dir) / "config.yaml", yaml.safe_dump(manifest.content["config"], sort_keys=True))
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.lm_head == "solved":
        solve_head(trainer)
    if scores is not None:
        scores.score(trainer.state, trainer.control)
    save_final(trainer, Path(args.output_dir) / "final")
    if meter is not None:
        meter.write(trainer.state, force=True)
    return trainer


def _say_whether_identical(content: dict[str, Any], before: dict[str, Any]) -> None:
    """Whether the repetition came out the same, bit for bit; if not, what was different about it."""
    if before["final"] is None:
        logger.warning(f"{before['run']} never finished, so there is nothing to compare the result with.")
        return
    if before["final"]["hash"] == content["final"]["hash"]:
        logger.info(f"final/ is bit-identical to that of {before['run']}.")
        return
    one, other = before["sessions"][-1], content["sessions"][-1]
    reasons = [
        f"{key}: {before['config'].get(key)} then"
        for key, value in content["config"].items()
        if key != "output_dir" and before["config"].get(key) != value
    ]
    reasons += [
        f"{k} {one['versions'].get(k)} then" for k, v in other["versions"].items() if one["versions"].get(k) != v
    ]
    reasons += [f"{k}: {one['hardware'][k]} then" for k, v in other["hardware"].items() if one["hardware"][k] != v]
    told = f" ({'; '.join(reasons)})" if reasons else ""
    logger.warning(
        f"final/ differs from that of {before['run']}{told}. Only CPU runs with the same versions repeat exactly."
    )
