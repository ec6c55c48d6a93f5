"""From a recipe and the command line to settings, and back to a file that repeats the run."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from trl import ModelConfig, TrlParser

from oprd.lineage.manifest import read_manifest
from oprd.training.bridging import BridgeConfig
from oprd.training.config import OPRDConfig
from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, DATA_HELP, HELP, THEN_HELP
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
    resume: bool = field(default=False, metadata={"help": HELP["resume"]})
    then: dict | str | None = field(default=None, metadata={"help": THEN_HELP})


class Configs(NamedTuple):
    """Everything that a recipe sets."""

    data: DataConfig
    args: OPRDConfig
    model: ModelConfig
    bridge: BridgeConfig
    benchmarks: BenchmarkConfig


def _parser(command: str) -> TrlParser:
    usage = f"oprd {command} --config RECIPE [--key value ...]"
    kinds = (DataConfig, OPRDConfig, ModelConfig, BridgeConfig, BenchmarkConfig)
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
    for argument in arguments:
        key = argument.split("=", 1)[0]
        if key.startswith("--") and key not in {*parser._option_string_actions, "--config"}:
            near = difflib.get_close_matches(key, parser._option_string_actions, n=1)
            raise ValueError(f"Unknown key {key}" + (f"; did you mean {near[0]}?" if near else "."))
    data, args, model, bridge, benchmark = parser.parse_args_and_config(arguments)
    if isinstance(data.then, str):
        data.then = yaml.safe_load(data.then)
    if data.then is not None and not isinstance(data.then, dict):
        raise ValueError("then must be a mapping of settings for the second stage.")
    changed = [f.name for f in dataclasses.fields(bridge) if getattr(bridge, f.name) != f.default]
    if changed and args.bridge is None and command == "train":
        raise ValueError(f"{', '.join(changed)} would be ignored: set bridge to auto or to a folder.")
    return Configs(data, args, model, bridge, benchmark)


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
    for key in PATH_KEYS:  # paths were relative to the folder that the run was started in
        value = recipe.get(key)
        if value and not Path(value).exists() and (where / value).exists():
            recipe[key] = str(where / value)
    if "--output_dir" not in arguments:
        recipe["output_dir"] = next(name for name in _repetitions(recipe["output_dir"]) if not Path(name).exists())
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


def _repetitions(name: str) -> Iterator[str]:
    yield f"{name}-repeat"
    yield from (f"{name}-repeat-{number}" for number in itertools.count(2))
