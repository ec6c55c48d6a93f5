"""``oprd completion``: a script that completes this command line in a shell, with no Python at the time of the Tab."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from oprd.commands.bridge import add_actions
from oprd.commands.launching import KEY, LAUNCH_HELP, layouts
from oprd.commands.plan import add_own_keys
from oprd.training.options import BENCHMARK_HELP, BRIDGE_HELP, CHOICES, DATA_HELP, HELP, THEN_HELP
from oprd.training.recipe_file import read_recipe
from oprd.training.shipped import first_sentence, shipped

SHELLS = ("bash", "zsh", "fish")
HOW = """\
bash:  eval "$(oprd completion bash)"            in ~/.bashrc
zsh:   oprd completion zsh > DIR/_oprd           DIR is in $fpath, before compinit
fish:  oprd completion fish > ~/.config/fish/completions/oprd.fish
"""
FILES = {"data", "dataset_name", "eval_dataset_name", "validation_benchmark", "token_file", "teacher_token_file"}
FILES |= {"tools", "on", "plot", "deepspeed"}
FOLDERS = {"runs", "run", "candidate", "source", "registry", "directory", "against", "model", "out", "plots", "from"}
FOLDERS |= {"output_dir", "bridge", "model_name_or_path", "teacher_model_name_or_path", "resume_from_checkpoint"}
SWITCH = ("true", "false")
LIBRARY = {  # keys of TRL and transformers that no shipped recipe has, and people ask for
    "attn_implementation": None, "deepspeed": None, "dtype": ("auto", "float32", "bfloat16", "float16"), "eval_steps": None,
    "eval_strategy": ("no", "steps", "epoch"), "hub_model_id": None, "load_in_4bit": SWITCH, "load_in_8bit": SWITCH,
    "lora_alpha": None, "lora_r": None, "lora_target_modules": None, "num_train_epochs": None, "optim": None, "project": None,
    "push_to_hub": SWITCH, "report_to": ("none", "trackio", "wandb", "tensorboard", "mlflow"), "resume_from_checkpoint": None,
    "run_name": None, "save_steps": None, "save_strategy": ("no", "steps", "epoch", "best"), "save_total_limit": None, "seed": None,
    "use_peft": SWITCH, "use_vllm": SWITCH, "vllm_mode": ("colocate", "server"),
}  # fmt: skip


def add_completion(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "completion",
        help="print the script that completes oprd's words in a shell",
        description="Print the script that completes commands, settings, names of recipes and files in a shell. Keys of\n"
        "TRL and transformers are completed as far as they are usual.",
        epilog=HOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell")
    parser.set_defaults(run_command=run_completion)


def run_completion(options: argparse.Namespace) -> int:
    """Print it."""
    try:
        import shtab
    except ImportError as error:
        raise ValueError("oprd completion needs shtab, which is not installed: pip install shtab.") from error
    print(shtab.complete(_whole(options.parser, file=shtab.FILE, folder=shtab.DIRECTORY), options.shell))
    return 0


def _whole(root: argparse.ArgumentParser, *, file: object, folder: object) -> argparse.ArgumentParser:
    """The command line with the keys that other parsers read, and with what completes each value."""
    commands = _commands(root)
    fit = add_actions(commands["bridge"])
    add_own_keys(commands["plan"])
    for parser in (commands["train"], fit):
        for name, told in LAUNCH_HELP.items():
            _add(parser, name, layouts() if name == KEY else None, told)
        _add(parser, "json", None, "print JSON instead of a table", action="store_true")
    _add(commands["train"], "from", None, "repeat this run")
    for parser in (commands["plan"], commands["train"], fit, commands["show"]):
        _add_keys(parser)
    for parser in all_parsers(root):
        for action in parser._actions:
            for shown in getattr(action, "_choices_actions", ()):
                action.choices[shown.dest].description = shown.help  # a line, not the whole story
            name = action.dest
            if name == "recipe" or (name == "config" and parser is not commands["gate"]):
                action.complete = _recipes(*shipped())
            elif name == "config":
                action.complete = _recipes()
            elif name in FILES or name in FOLDERS:
                action.complete = file if name in FILES else folder
    return root


def _add_keys(parser: argparse.ArgumentParser) -> None:
    """The keys of a recipe: ours, those that shipped recipes have, and other usual ones."""
    _add(parser, "config", None, "the recipe")
    ours = {**HELP, **DATA_HELP, **BRIDGE_HELP, **BENCHMARK_HELP, "then": THEN_HELP}
    for name, told in ours.items():
        _add(parser, name, CHOICES.get(name), told)
    used = {key: value for path in shipped().values() for key, value in read_recipe(path).items()}
    for name in sorted(({*used} | {*LIBRARY}) - {*ours}):
        _add(
            parser,
            name,
            LIBRARY.get(name, SWITCH if isinstance(used.get(name), bool) else None),
            "of TRL or transformers",
        )


def _add(parser: argparse.ArgumentParser, name: str, choices: tuple[str, ...] | None, told: str, **how: str) -> None:
    more = how or {"choices": choices, "metavar": "VALUE"}
    parser.add_argument(f"--{name}", help=first_sentence(told).rstrip(".").replace("%", "%%"), **more)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Its sub-commands."""
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def all_parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It, and those of the commands below it."""
    yield parser
    for below in _commands(parser).values():
        yield from all_parsers(below)


def _recipes(*names: str) -> dict[str, object]:
    """YAML files, and these names, as shtab wants it told for each shell."""
    function, words = ("_oprd_glob_recipes", " ".join(names)) if names else ("_oprd_glob_yaml", "")
    bash = f"""
{function}() {{
  compgen -W "{words}" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -f -X '!*.yml' -- "$1"
  compgen -d -- "$1"
}}"""
    zsh = f"{function}() {{ compadd -- {words}; _files -g '*.(yaml|yml)' }}"
    fish = f"""
function {function}
  printf '%s\\n' {words}
  __fish_complete_path (commandline -ct) | string match -r '.*(/|\\.ya?ml)(\\t.*)?$'
end"""
    shells = {"bash": bash, "zsh": zsh, "fish": fish}
    return {"bash": function, "zsh": function, "fish": f"({function})", "preamble": shells}
