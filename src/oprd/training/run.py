"""One training run from a recipe: parse, check, train, and leave a folder that says what happened."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from oprd.bridge import Bridge
from oprd.models import resolve_path
from oprd.training.bridging import BridgeConfig, RolloutTrainer, fit_bridge, rollout_settings
from oprd.training.callbacks import MetricsFile, ProgressLine
from oprd.training.config import OPRDConfig
from oprd.training.options import BRIDGE_HELP, DATA_HELP, HELP, THEN_HELP
from oprd.training.prompts import load_prompts
from oprd.training.solved_head import solve_head
from oprd.training.trainer import OPRDTrainer

Configs = tuple["DataConfig", OPRDConfig, ModelConfig, BridgeConfig]


def _data(name: str, default: Any) -> Any:
    return field(default=default, metadata={"help": DATA_HELP[name]})


@dataclass
class DataConfig:
    """Where prompts come from (`oprd.training.prompts.load_prompts`), and whether to continue a run."""

    dataset_name: str | None = _data("dataset_name", None)
    dataset_config: str | None = _data("dataset_config", None)
    dataset_train_split: str = _data("dataset_train_split", "train")
    eval_dataset_name: str | None = _data("eval_dataset_name", None)
    eval_config: str | None = _data("eval_config", None)
    eval_split: str = _data("eval_split", "test")
    prompt_column: str | None = _data("prompt_column", None)
    answer_column: str | None = _data("answer_column", None)
    drop_duplicates: bool = _data("drop_duplicates", False)
    as_chat: bool = _data("as_chat", False)
    resume: bool = field(default=False, metadata={"help": HELP["resume"]})
    then: dict | str | None = field(default=None, metadata={"help": THEN_HELP})


def _parser(command: str) -> TrlParser:
    usage = f"oprd {command} --config RECIPE [--key value ...]"
    kinds = (DataConfig, OPRDConfig, ModelConfig, BridgeConfig)
    return TrlParser(kinds, prog=f"oprd {command}", usage=usage, allow_abbrev=False)


def parse(arguments: list[str], command: str = "train") -> Configs:
    """``--config recipe.yaml`` and ``--key value`` pairs; later ones win. Unknown keys are errors."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser = _parser(command)
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ValueError("--config needs a recipe: a YAML file, or the name of one that ships with oprd.")
        recipe = find_recipe(arguments[position])
        _check_recipe(recipe, {action.dest for action in parser._actions} | {"env"})
        arguments = [*arguments[:position], str(recipe), *arguments[position + 1 :]]
    data, args, model, bridge = parser.parse_args_and_config(arguments)
    if isinstance(data.then, str):
        data.then = yaml.safe_load(data.then)
    if data.then is not None and not isinstance(data.then, dict):
        raise ValueError("then must be a mapping of settings for the second stage.")
    changed = [f.name for f in dataclasses.fields(bridge) if getattr(bridge, f.name) != f.default]
    if changed and args.bridge is None and command == "train":
        raise ValueError(f"{', '.join(changed)} would be ignored: set bridge to auto or to a folder.")
    return data, args, model, bridge


def _check_recipe(path: Path, known: set[str]) -> None:
    """A mapping whose every key is a setting.

    Raises:
        ValueError: not YAML, not a mapping, or an unknown key, with the nearest known one.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"The recipe is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The recipe {path} must be a mapping of settings, such as learning_rate: 1.0e-5.")
    _check_keys(str(path), settings, known)


def _check_keys(where: str, settings: dict[str, Any], known: set[str]) -> None:
    for key in sorted(map(str, settings.keys() - known)):
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "."))


def find_recipe(name: str) -> Path:
    """A path as given, or a recipe of the package by its name (``miniature`` or ``miniature.yaml``)."""
    path = Path(name)
    if path.exists():
        return path
    shipped = Path(__file__).parent.parent / "recipes"
    candidate = shipped / (name.removesuffix(".yaml") + ".yaml")
    if candidate.exists() and path.parent == Path("."):
        return candidate
    known = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ValueError(f"There is no recipe {name}. Give a YAML file, or one that ships with oprd: {known}.")


def _resolved(configs: tuple[Any, ...]) -> dict[str, Any]:
    """Every setting that is not its default, and all of this project's own: enough to repeat the run."""
    settings: dict[str, Any] = {}
    for config in configs:
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default  # type: ignore[misc]
            plain = value.value if hasattr(value, "value") else value
            plain = plain.to_dict() if hasattr(plain, "to_dict") else plain
            if (item.name in (*HELP, *BRIDGE_HELP) or plain != default) and _is_plain(plain):
                settings[item.name] = plain
    # Derived from the machine, secret, or about this one call: not what repeats a run.
    for name in ("local_rank", "run_name", "hub_token", "push_to_hub_token", "resume", "resume_from_checkpoint"):
        settings.pop(name, None)
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (isinstance(value, list) and all(_is_plain(v) for v in value))
    )


def build_trainer(
    data: DataConfig, args: OPRDConfig, model: ModelConfig, kind: type[OPRDTrainer] = OPRDTrainer
) -> OPRDTrainer:
    """Load the data, check everything, load the models.

    Raises:
        ValueError: no student, no data, or whatever the data and pre-flight checks find.
    """
    if model.model_name_or_path is None:
        raise ValueError("No student: set model_name_or_path.")
    if data.dataset_name is None:
        raise ValueError("No prompts: set dataset_name to a Hub id or a parquet, json or jsonl file.")
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
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def attach_callbacks(trainer: OPRDTrainer, description: str = "distilling") -> None:
    """`MetricsFile` always; `ProgressLine` in place of the bar or the printer that transformers adds."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine(description))
    trainer.add_callback(MetricsFile())


def save_final(trainer: OPRDTrainer, directory: Path) -> None:
    """``from_pretrained`` folder with weights (adapters merged), tokenizer and model card."""
    trainer.accelerator.wait_for_everyone()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    if hasattr(model, "merge_and_unload"):
        if trainer.accelerator.is_main_process:
            model.merge_and_unload().save_pretrained(directory)
            trainer.processing_class.save_pretrained(directory)
    else:
        if trainer.is_fsdp_enabled:  # the sharded default writes no model that from_pretrained could load
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(directory))
    if trainer.accelerator.is_main_process:
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same
        trainer.create_model_card(model_name=Path(trainer.args.output_dir).resolve().name)
        card = Path(trainer.args.output_dir) / "README.md"
        if card.exists():
            card.replace(directory / "README.md")
    trainer.accelerator.wait_for_everyone()


def _bridge_trainer(data: DataConfig, args: OPRDConfig, model: ModelConfig) -> RolloutTrainer:
    data = dataclasses.replace(data, eval_dataset_name=None)
    return build_trainer(data, rollout_settings(args), copy.copy(model), RolloutTrainer)


def fit(arguments: list[str]) -> tuple[Path, Bridge, bool]:
    """``oprd bridge fit``: from a training recipe to a bridge in the folder that ``bridge`` names, or
    ``output_dir/bridge``; the folder, the bridge, and whether this is the main process."""
    data, args, model, settings = parse(arguments, "bridge fit")
    directory = Path(args.bridge if args.bridge not in (None, "auto") else Path(args.output_dir) / "bridge")
    if (directory / "bridge.json").exists():
        raise ValueError(f"{directory} already holds a bridge. Choose another folder with --bridge DIR, or remove it.")
    bridge = fit_bridge(lambda: _bridge_trainer(data, args, model), settings, directory)
    return directory, bridge, PartialState().is_main_process


def run(arguments: list[str], *, description: str = "distilling") -> tuple[Path, bool]:
    """Train from command-line arguments; the run's directory, and whether this is the main process.

    The directory holds ``config.yaml`` (repeat with ``oprd train --config``), ``metrics.jsonl``, ``checkpoint-*/`` and
    ``final/``, which loads with ``AutoModelForCausalLM.from_pretrained``. With ``bridge: auto`` it also holds ``bridge/``;
    a second stage (``then``) has its run in ``then/``, and that directory is returned.
    """
    data, args, model, settings = parse(arguments)
    directory = Path(args.output_dir)
    second = None if data.then is None else _second_stage(arguments, data.then, directory)
    if second is None or not (directory / "final").exists():
        is_main = _one_stage(data, args, model, settings, description)
    if second is None:
        return directory, is_main
    written = directory / "then.yaml"
    if PartialState().is_main_process:
        written.write_text(yaml.safe_dump(second, sort_keys=True), encoding="utf-8")
    PartialState().wait_for_everyone()
    return run(["--config", str(written), *(["--resume"] if data.resume else [])], description=f"{description}, then")


def _second_stage(arguments: list[str], then: dict[str, Any], first: Path) -> dict[str, Any]:
    """The recipe of the second stage: the first one's, then ``then``, then what the command line said.

    Raises:
        ValueError: an unknown key, before the first stage starts.
    """
    recipe = {}
    rest = list(arguments)
    if "--config" in rest:
        position = rest.index("--config")
        recipe = yaml.safe_load(find_recipe(rest[position + 1]).read_text(encoding="utf-8"))
        del rest[position : position + 2]
    _check_keys("then", then, {action.dest for action in _parser("train")._actions})
    own = {"output_dir": str(first / "then"), "model_name_or_path": str(first / "final")}
    spoken = dict(zip((key.removeprefix("--") for key in rest[::2]), map(yaml.safe_load, rest[1::2]), strict=False))
    second = {**recipe, **then, **{k: v for k, v in spoken.items() if k not in own}, **own}
    second = {key: value for key, value in second.items() if value is not None and key not in ("then", "resume")}
    if "bridge" not in then:  # a bridge belongs to the student that it was fitted for, and that one has moved
        for key in ("bridge", *BRIDGE_HELP):
            second.pop(key, None)
    return second


def _one_stage(data: DataConfig, args: OPRDConfig, model: ModelConfig, bridge: BridgeConfig, description: str) -> bool:
    settings = _resolved((data, args, model, bridge))  # before the trainer fills in anything
    if args.bridge is None:
        settings = {key: value for key, value in settings.items() if key not in BRIDGE_HELP}
    directory = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if directory.is_dir() else None
    if (directory / "final").exists() and not data.resume:
        raise ValueError(f"{directory} holds a finished run. Choose another output_dir, or remove it.")
    if last is not None and not (data.resume or args.resume_from_checkpoint):
        raise ValueError(
            f"{directory} already holds {Path(last).name}. Continue it with --resume, or choose another output_dir."
        )
    if args.bridge == "auto":
        fitted = directory / "bridge"
        if not (fitted / "bridge.json").exists():
            fit_bridge(lambda: _bridge_trainer(data, args, model), bridge, fitted)
        args.bridge = str(fitted)
    trainer = build_trainer(data, args, model)
    attach_callbacks(trainer, description)
    if trainer.accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=True), encoding="utf-8")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or (last if data.resume else None))
    if trainer.lm_head == "solved":
        solve_head(trainer)
    save_final(trainer, directory / "final")
    if args.push_to_hub:
        trainer.push_to_hub()
    is_main = trainer.accelerator.is_main_process
    trainer.end()
    return is_main
