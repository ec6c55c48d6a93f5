"""One training run from a recipe: check, train, and leave a folder that says what happened."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import yaml
from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub import upload_folder
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import TrackioCallback
from trl import ModelConfig, get_peft_config

from oprd.bridge import Bridge
from oprd.durability.stopping import CONTINUES, SIGNALS, Stopped, said_once
from oprd.lineage.card import write_card
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.inputs import model_record
from oprd.lineage.manifest import NAME, Manifest, read_manifest
from oprd.models import causal_lm, resolve_path
from oprd.records import check_folder, write_text
from oprd.training.bridging import RolloutTrainer, fit_bridge, rollout_settings
from oprd.training.callbacks import CostMeter, MetricsFile, ProgressLine
from oprd.training.config import OPRDConfig
from oprd.training.dashboard import Dashboard, choose_dashboard
from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP
from oprd.training.preflight import check_attention
from oprd.training.quantised import check_quantised, quantization_of
from oprd.training.recipe import Configs, parse, repeated, resolved, second_stage, without_secrets
from oprd.training.run_data import RunData, load_data
from oprd.training.run_record import Call, say_whether_identical, start_manifest
from oprd.training.saving import save_final
from oprd.training.solved_head import solve_head
from oprd.training.starting import leaving, locked, plan_start, together
from oprd.training.surroundings import check_surroundings
from oprd.training.trainer import OPRDTrainer
from oprd.training.validation import BenchmarkConfig, BenchmarkScores

logger = get_logger(__name__)


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
        "use_safetensors": True,  # a pickle runs code when it is loaded
    }
    if args.teacher_url is None:
        args.teacher_model_init_kwargs = {**shared, **(args.teacher_model_init_kwargs or {})}
    return kind(
        model=resolve_path(model.model_name_or_path),
        args=args,
        train_dataset=data.train,
        eval_dataset=data.eval,
        quantization_config=quantization_of(args, model),
        peft_config=get_peft_config(model),
        tools=data.tools,
    )


def attach_callbacks(trainer: OPRDTrainer, description: str = "distilling") -> None:
    """`MetricsFile` always; `ProgressLine` in place of the bar or the printer that transformers adds."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine(description))
    if trainer.pop_callback(TrackioCallback) is not None:
        trainer.add_callback(Dashboard())
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
    if args.teachers is not None or args.teacher_model_kind is not None:
        raise ValueError(
            "A bridge is between a student and one other model: name the teacher in teacher_model_name_or_path, without teachers and "
            "teacher_model_kind."
        )
    check_surroundings(args, model)
    args.eval_strategy = "no"
    directory = Path(args.bridge if args.bridge not in (None, "auto") else Path(args.output_dir) / "bridge")
    if (directory / "bridge.json").exists():
        raise ValueError(f"{directory} already holds a bridge. Choose another folder with --bridge DIR, or remove it.")
    check_folder(directory, "bridge")
    with leaving(), SIGNALS.obeyed(), said_once(), locked(directory):
        bridge = fit_bridge(lambda: _bridge_trainer(load_data(configs), args, model), settings, directory)
    return directory, bridge, PartialState().is_main_process


def run(arguments: list[str], *, description: str = "distilling", afterwards: str = CONTINUES) -> tuple[Path, bool]:
    """Train from command-line arguments; the run's directory, and whether this is the main process.

    The directory holds ``config.yaml`` (the resolved recipe), ``manifest.json`` (repeat with ``oprd train --from``),
    ``metrics.jsonl``, ``checkpoint-*/`` and ``final/``, which loads with ``AutoModelForCausalLM.from_pretrained``. With
    ``bridge: auto`` it also holds ``bridge/``, with benchmarks ``evaluations/`` and ``best``; a second stage (``then``) has
    its run in ``then/``, and that directory is returned.

    Killed at any moment, the same arguments continue; ``afterwards`` says so to who stopped it.

    Raises:
        Stopped: on SIGTERM, when what is under way has been saved.
    """
    call = Call(["oprd", "train", *without_secrets(arguments)], description=description)
    with leaving(), SIGNALS.obeyed(), said_once(afterwards):
        if "--from" not in arguments:
            return _run(arguments, call)
        with repeated(arguments) as (arguments, before):
            return _run(arguments, dataclasses.replace(call, before=before))


def _run(arguments: list[str], call: Call) -> tuple[Path, bool]:
    configs = parse(arguments)
    data, args = configs.data, configs.args
    check_surroundings(args, configs.model)
    check_quantised(args, configs.model, second_stage=data.then is not None)
    directory = Path(args.output_dir)
    second = None if data.then is None else second_stage(arguments, data.then, directory)
    if second is None or not together(lambda: _is_finished(directory)):
        is_main = _one_stage(configs, call)
    if second is None:
        return directory, is_main
    if SIGNALS.received is not None:
        raise Stopped(f"stopped by {SIGNALS.received} before the second stage; {CONTINUES}")
    written = directory / "then.yaml"
    if PartialState().is_main_process:
        write_text(written, yaml.safe_dump(second, sort_keys=True))
    PartialState().wait_for_everyone()
    resume = ["--resume"] if data.resume else []
    other = None if call.before is None else Path(call.before["folder"]) / "then"
    before = read_manifest(other) if other is not None and (other / NAME).exists() else None
    call = dataclasses.replace(call, before=before, description=f"{call.description}, then")
    return _run(["--config", str(written), *resume], call)


def _is_finished(directory: Path) -> bool:
    if not (directory / "final").exists():
        return False
    return not (directory / NAME).exists() or read_manifest(directory)["status"] == "finished"


def _one_stage(configs: Configs, call: Call) -> bool:
    data, args, model, bridge, benchmark = configs
    settings = resolved(configs)  # before the trainer fills in anything
    unused = {*(BRIDGE_HELP if args.bridge is None else ()), *(BENCHMARK_HELP if not benchmark.benchmark_steps else ())}
    settings = {key: value for key, value in settings.items() if key not in unused}
    directory = Path(args.output_dir)
    named = args.resume_from_checkpoint if str(args.resume_from_checkpoint).lower() not in ("true", "false") else None
    resume = data.resume or str(args.resume_from_checkpoint).lower() == "true"
    with locked(directory), SIGNALS.held_among(PartialState().num_processes):
        start = together(lambda: plan_start(directory, settings, resume=resume, named=named, max_steps=args.max_steps))
        if start.is_done:
            return PartialState().is_main_process
        if start.is_trained:
            if PartialState().is_main_process:
                _close(Manifest.reopen(directory), directory, call)
            return PartialState().is_main_process
        loaded = load_data(configs)
        manifest = together(lambda: start_manifest(configs, settings, loaded.records(data), call, start))
        choose_dashboard(args, manifest.content["created"])
        manifest, trainer = manifest if PartialState().is_main_process else None, None
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
            trainer = build_trainer(loaded, args, model)
            with SIGNALS.held():
                trainer.check_stop()
                _train(trainer, configs, loaded, manifest, start.checkpoint, call.description)
                if manifest is not None:
                    _close(manifest, directory, call)
        except BaseException as error:
            if manifest is not None:
                manifest.fail(error)
            raise
        finally:
            if trainer is not None and (dashboard := trainer.pop_callback(Dashboard)) is not None:
                dashboard.finish(trainer)
        if manifest is not None and args.push_to_hub:  # the student and its card, not the run around it
            upload_folder(repo_id=trainer.hub_model_id, folder_path=directory / "final", token=args.hub_token)
        for tracker in trainer.accelerator.trackers:
            tracker.finish()
        return manifest is not None


def _train(
    trainer: OPRDTrainer,
    configs: Configs,
    loaded: RunData,
    manifest: Manifest | None,
    checkpoint: str | None,
    description: str,
) -> None:
    """From a trainer to ``final/``."""
    args, directory = configs.args, Path(configs.args.output_dir)
    scores = BenchmarkScores(trainer, configs.benchmarks, loaded.benchmarks) if loaded.benchmarks else None
    attach_callbacks(trainer, description)
    if scores is not None:  # behind the file that its scores go to
        trainer.add_callback(scores)
    meter = None
    if manifest is not None:
        meter = CostMeter(manifest, trainer, scores)
        trainer.add_callback(meter)
        manifest.update(force=True)
        write_text(directory / "config.yaml", yaml.safe_dump(manifest.content["config"], sort_keys=True))
    trainer.train(resume_from_checkpoint=checkpoint)
    numbers = trainer.numbers()
    head = causal_lm(trainer.accelerator.unwrap_model(trainer.model_wrapped)).get_output_embeddings().weight
    trained = head.detach().clone() if trainer.lm_head == "solved" else None
    try:
        if trained is not None:
            solve_head(trainer)
        if scores is not None:
            scores.score(trainer.state, trainer.control)
    except Stopped:
        if trained is not None:  # a checkpoint holds what was trained; the head is solved from that again
            head.data.copy_(trained)
        is_saved = (directory / f"checkpoint-{trainer.state.global_step}").is_dir()
        trainer.stop(numbers=numbers, is_saved=is_saved or args.load_best_model_at_end)

    def announce(folder: Path) -> None:
        """Say what ``final/`` is going to be: a run that is killed after that has only its record to finish."""
        files = folder_hashes(folder)
        manifest.content |= {"final": {"hash": combined_hash(files), "files": files}}
        manifest.content["last_update"] = trainer.state.global_step
        meter.write(trainer.state, force=True)

    save_final(trainer, directory / "final", announce)


def _close(manifest: Manifest, directory: Path, call: Call) -> None:
    """The run is over: what is left to be written about it. Finished is what the manifest says last."""
    write_card(directory)
    manifest.finish(directory / "final")
    if call.before is not None:
        say_whether_identical(manifest.content, call.before)
