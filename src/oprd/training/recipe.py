"""From a recipe and the command line to settings, and back to a file that repeats the run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from trl import ModelConfig, TrlParser

from oprd.lineage.manifest import NAME, read_manifest
from oprd.training.bridging import BridgeConfig
from oprd.training.config import OPRDConfig
from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, DATA_HELP, HELP, THEN_HELP
from oprd.training.ranges import check_ranges
from oprd.training.recipe_file import KEYS_ARE_LISTED, check_keys, check_values, kinds_of, read_recipe
from oprd.training.shipped import find_recipe
from oprd.training.tools import moved
from oprd.training.validation import BenchmarkConfig

logger = logging.getLogger(__name__)


def _data(name: str, default: Any) -> Any:
    return field(default=default, metadata={"help": DATA_HELP[name]})


@dataclass
class DataConfig:
    """Where prompts come from (`oprd.prompts.load_prompts`), and whether to continue a run."""

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
    tools: str | None = _data("tools", None)
    resume: bool = field(default=False, metadata={"help": HELP["resume"]})
    then: dict | str | None = field(default=None, metadata={"help": THEN_HELP})

    def __post_init__(self) -> None:
        if isinstance(self.tools, list):
            self.tools = ", ".join(map(str, self.tools))


class Configs(NamedTuple):
    """Everything that a recipe sets."""

    data: DataConfig
    args: OPRDConfig
    model: ModelConfig
    bridge: BridgeConfig
    benchmarks: BenchmarkConfig


KINDS = (DataConfig, OPRDConfig, ModelConfig, BridgeConfig, BenchmarkConfig)


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        told = re.sub(r"^argument (--\w+)[^:]*", r"\1", message).rstrip(".")  # it has each key in two spellings
        raise ValueError(f"{told}. Correct it; oprd train --help explains the settings.")


def _parser(command: str) -> TrlParser:
    usage = f"oprd {command} --config RECIPE [--key value ...]"
    return _Parser(KINDS, prog=f"oprd {command}", usage=usage, allow_abbrev=False)


def parse(arguments: list[str], command: str = "train") -> Configs:
    """``--config recipe.yaml`` and ``--key value`` pairs; later ones win. Unknown keys are errors."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser, rest, settings = _parser(command), arguments, {}
    if "--config" in arguments:
        position = arguments.index("--config") + 1
        if position == len(arguments):
            raise ValueError("--config needs a recipe: a YAML file, or the name of one that ships with oprd.")
        recipe = find_recipe(arguments[position])
        settings = read_recipe(recipe)
        check_recipe(str(recipe), settings, parser)
        rest = [*arguments[: position - 1], *arguments[position + 1 :]]
        arguments = [*arguments[:position], str(recipe), *arguments[position + 1 :]]
    said = {*settings, *(part.split("=", 1)[0].removeprefix("--") for part in arguments if part.startswith("--"))}
    for argument in arguments:
        key = argument.split("=", 1)[0]
        if key.startswith("--") and key not in {*parser._option_string_actions, "--config"}:
            near = difflib.get_close_matches(key, parser._option_string_actions, n=1)
            raise ValueError(f"Unknown key {key}; " + (f"did you mean {near[0]}?" if near else KEYS_ARE_LISTED))
    if loose := parser.parse_known_args(rest)[1]:
        raise ValueError(f"Unexpected {loose[0]}: put its key before it, such as --config {loose[0]}.")
    if "output_dir" not in said and "config" in said:
        arguments = [*arguments, "--output_dir", f"runs/{recipe.stem}"]
    elif "output_dir" not in said and command == "train":
        raise ValueError("Nowhere to write to: set output_dir, such as --output_dir runs/first.")
    data, args, model, bridge, benchmark = parser.parse_args_and_config(arguments)
    args.report_to_is_open = "report_to" not in said
    check_ranges(model)
    if isinstance(data.then, str):
        data.then = yaml.safe_load(data.then)
    if data.then is not None and not isinstance(data.then, dict):
        raise ValueError("then must be a mapping of settings for the second stage.")
    changed = [f.name for f in dataclasses.fields(bridge) if getattr(bridge, f.name) != f.default]
    if changed and args.bridge is None and command == "train":
        raise ValueError(f"{', '.join(changed)} would be ignored: set bridge to auto or to a folder.")
    return Configs(data, args, model, bridge, benchmark)


def check_recipe(where: str, settings: dict[str, Any], parser: argparse.ArgumentParser | None = None) -> None:
    """Every key is a setting, and every value of its kind.

    Raises:
        ValueError: with the nearest known key, or what the setting takes.
    """
    check_keys(where, settings, {action.dest for action in (parser or _parser("train"))._actions} | {"env"})
    check_values(where, settings, kinds_of(KINDS))


def resolved(configs: Configs) -> dict[str, Any]:
    """Every setting that is not its default, and all of this project's own: enough to repeat the run."""
    settings: dict[str, Any] = {}
    for config in configs:
        for item in dataclasses.fields(config):
            value = getattr(config, item.name)
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default  # type: ignore[misc]
            plain = value.value if hasattr(value, "value") else value
            plain = plain.to_dict() if hasattr(plain, "to_dict") else plain
            if (item.name in (*HELP, *BRIDGE_HELP, *BENCHMARK_HELP, *ALWAYS_TOLD) or plain != default) and _is_plain(
                plain
            ):
                settings[item.name] = plain
    # Derived from the machine, or about this one call: not what repeats a run.
    for name in ("local_rank", "run_name", "resume", "resume_from_checkpoint"):
        settings.pop(name, None)
    if configs.args.report_to_is_open:  # so that a repetition does not hang on a package either
        settings.pop("report_to", None)
    return _without_secrets(settings)


def _without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    """Without tokens, at any depth (``model_init_kwargs`` may hold one)."""
    return {
        key: _without_secrets(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key not in SECRETS
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (isinstance(value, list) and all(_is_plain(v) for v in value))
    )


def second_stage(arguments: list[str], then: dict[str, Any], first: Path) -> dict[str, Any]:
    """The recipe of the second stage: the first one's, then ``then``, then what the command line said.

    Raises:
        ValueError: an unknown key, before the first stage starts.
    """
    recipe = {}
    rest = list(arguments)
    if "--config" in rest:
        position = rest.index("--config")
        recipe = read_recipe(find_recipe(rest[position + 1]))
        del rest[position : position + 2]
    check_recipe("then", then)
    own = {"output_dir": str(first / "then"), "model_name_or_path": str(first / "final")}
    spoken = dict(zip((key.removeprefix("--") for key in rest[::2]), map(yaml.safe_load, rest[1::2]), strict=False))
    second = {**recipe, **then, **{k: v for k, v in spoken.items() if k not in own}, **own}
    second = {key: value for key, value in second.items() if value is not None and key not in ("then", "resume")}
    if "bridge" not in then:  # a bridge belongs to the student that it was fitted for, and that one has moved
        for key in ("bridge", *BRIDGE_HELP):
            second.pop(key, None)
    inherited = {} if "teachers" in then or not isinstance(second.get("teachers"), dict) else second["teachers"]
    if bridged := [name for name, settings in inherited.items() if isinstance(settings, dict) and "bridge" in settings]:
        raise ValueError(
            f"then: the bridge of {bridged[0]} was fitted for the student of the first stage. Name the teachers of the second stage "
            "in then: teachers."
        )
    with tempfile.TemporaryDirectory() as folder:  # what is wrong with it is to be known before the first stage starts
        path = Path(folder) / "then.yaml"
        path.write_text(yaml.safe_dump(second), encoding="utf-8")
        try:
            parse(["--config", str(path)])
        except ValueError as error:
            raise ValueError(f"then: {str(error).removeprefix(f'{path}: ')}") from error
    return second


ALWAYS_TOLD = (  # also where they equal the libraries' defaults, which may change
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "max_steps",
    "num_train_epochs",
    "temperature",
    "top_p",
    "top_k",
    "max_completion_length",
)
SECRETS = ("hub_token", "push_to_hub_token", "token", "use_auth_token")
PATH_KEYS = (
    "model_name_or_path",
    "teacher_model_name_or_path",
    "teacher_token_file",
    "token_file",
    "dataset_name",
    "eval_dataset_name",
    "bridge",
    "validation_benchmark",
)


@contextmanager
def repeated(arguments: list[str]) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """``--from RUN`` as ``--config`` with the recipe in RUN's manifest; and that manifest, with RUN as its ``folder``.

    Other arguments win over it; without ``--output_dir`` the repetition goes to ``<output_dir>-repeat``. On a CPU it takes
    as many threads as the run had: sums depend on how they are split.

    Raises:
        ValueError: no run named, a ``--config`` beside it, or no manifest there.
    """
    position = arguments.index("--from")
    if position + 1 == len(arguments):
        raise ValueError("--from needs a run: a folder with a manifest.json.")
    if "--config" in arguments:
        raise ValueError("--from and --config each name a recipe. Give one of them.")
    manifest = read_manifest(Path(arguments[position + 1]))
    recipe, where = dict(manifest["config"]), Path(manifest["directory"])
    for settings in (recipe, *(recipe.get("teachers") or {}).values()):
        for key in PATH_KEYS:  # paths were relative to the folder that the run was started in
            value = settings.get(key)
            if value and not Path(value).exists() and (where / value).exists():
                settings[key] = str(where / value)
    if recipe.get("tools"):
        recipe["tools"] = moved(recipe["tools"], where)
        logger.warning(f"{manifest['run']} has tools, and their files are run: {recipe['tools']}.")
    if "--output_dir" not in arguments:
        if not isinstance(recipe.get("output_dir"), str):
            raise ValueError(f"{arguments[position + 1]}'s recipe has no output_dir. Name one with --output_dir.")
        names = _repetitions(recipe["output_dir"])
        recipe["output_dir"] = next(name for name in names if _is_free(Path(name), manifest["created"]))
    changed = sorted({key for session in manifest["sessions"] for key in session.get("changed_settings", ())})
    if changed:
        logger.warning(
            f"{manifest['run']} was resumed with another {', '.join(changed)}; this run has the last from the start."
        )
    hardware = manifest["sessions"][-1]["hardware"]
    if not hardware["gpus"]:
        torch.set_num_threads(hardware["threads"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        manifest["folder"] = arguments[position + 1]
        yield [*arguments[:position], "--config", str(path), *arguments[position + 2 :]], manifest


def _is_free(folder: Path, created: str) -> bool:
    """Whether a repetition can go there: nothing is there, or one of the same run that was stopped on its way."""
    if not (folder / NAME).exists():
        return not folder.exists()
    there = read_manifest(folder)
    return there["status"] != "finished" and (there.get("repeats") or {}).get("created") == created


def _repetitions(name: str) -> Iterator[str]:
    yield f"{name}-repeat"
    yield from (f"{name}-repeat-{number}" for number in itertools.count(2))


def without_secrets(arguments: list[str]) -> list[str]:
    """Arguments as a manifest keeps them."""
    kept = []
    for before, part in pairwise(["", *arguments]):
        name, equals, value = part.partition("=")
        holds = [key for key in SECRETS if f'"{key}"' in value or f'"{key}"' in part]
        if equals and (name.removeprefix("--") in SECRETS or holds):
            kept.append(f"{name}=***")
        else:
            kept.append("***" if before.removeprefix("--") in SECRETS or holds else part)
    return kept
