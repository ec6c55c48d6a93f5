"""One training run from a recipe: parse, check, train, and leave a folder that says what happened."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from oprd.models import resolve_path
from oprd.training.callbacks import MetricsFile, ProgressLine
from oprd.training.config import OPRDConfig
from oprd.training.options import DATA_HELP, HELP
from oprd.training.prompts import load_prompts
from oprd.training.trainer import OPRDTrainer


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


def parse(arguments: list[str]) -> tuple[DataConfig, OPRDConfig, ModelConfig]:
    """``--config recipe.yaml`` and ``--key value`` pairs; later ones win. Unknown keys are errors."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    usage = "oprd train --config RECIPE [--key value ...]"
    parser = TrlParser((DataConfig, OPRDConfig, ModelConfig), prog="oprd train", usage=usage, allow_abbrev=False)
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ValueError("--config needs a recipe: a YAML file, or the name of one that ships with oprd.")
        recipe = find_recipe(arguments[position])
        _check_recipe(recipe, {action.dest for action in parser._actions} | {"env"})
        arguments = [*arguments[:position], str(recipe), *arguments[position + 1 :]]
    return parser.parse_args_and_config(arguments)


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
    for key in settings.keys() - known:
        near = difflib.get_close_matches(str(key), known, n=1)
        raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "."))


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
            if (item.name in HELP or plain != default) and _is_plain(plain):
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


def build_trainer(data: DataConfig, args: OPRDConfig, model: ModelConfig) -> OPRDTrainer:
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
    return OPRDTrainer(
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


def run(arguments: list[str], *, description: str = "distilling") -> tuple[Path, bool]:
    """Train from command-line arguments; the run's directory, and whether this is the main process.

    The directory holds ``config.yaml`` (repeat with ``oprd train --config``), ``metrics.jsonl``, ``checkpoint-*/`` and
    ``final/``, which loads with ``AutoModelForCausalLM.from_pretrained``.
    """
    data, args, model = parse(arguments)
    settings = _resolved((data, args, model))  # before the trainer fills in anything
    directory = Path(args.output_dir)
    last = get_last_checkpoint(args.output_dir) if directory.is_dir() else None
    if (directory / "final").exists() and not data.resume:
        raise ValueError(f"{directory} holds a finished run. Choose another output_dir, or remove it.")
    if last is not None and not (data.resume or args.resume_from_checkpoint):
        raise ValueError(
            f"{directory} already holds {Path(last).name}. Continue it with --resume, or choose another output_dir."
        )
    trainer = build_trainer(data, args, model)
    attach_callbacks(trainer, description)
    if trainer.accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=True), encoding="utf-8")
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or (last if data.resume else None))
    save_final(trainer, directory / "final")
    if args.push_to_hub:
        trainer.push_to_hub()
    is_main = trainer.accelerator.is_main_process
    trainer.end()
    return directory, is_main
