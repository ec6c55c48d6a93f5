"""``--accelerate_config``: the same command in several processes, by ``accelerate launch``."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

KEY = "accelerate_config"
ERRORS = "OPRD_ERROR_FOLDER"  # set for the processes of a launch
INTERRUPTED = 130
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
FOLDER = Path(__file__).parent.parent / "launch"
LAUNCH_HELP: dict[str, str] = {
    KEY: "How processes are laid out: the name of a configuration that ships with oprd (single_gpu, multi_gpu, fsdp2, zero2, "
    "zero3, multi_gpu_nodes, fsdp2_nodes, zero3_nodes) or a file of accelerate config. docs/scale.md says which.",
    "num_processes": "Processes over all machines, one per GPU (default: the configuration's).",
    "num_machines": "Machines.",
    "machine_rank": "Which of the machines this is, from 0.",
    "main_process_ip": "Address of machine 0.",
    "main_process_port": "A free port on machine 0.",
}


def launch(command: list[str], arguments: list[str]) -> int | None:
    """Run ``oprd COMMAND ARGUMENTS`` again, in the processes that ``--accelerate_config`` asks for.

    Args:
        command: such as ``["train"]``.

    Returns:
        The exit status; None if nothing of the kind was asked for, or this is one of those processes.

    Raises:
        ValueError: an unknown configuration, or launch settings without one.
    """
    asked, rest = _taken(arguments)
    if not asked:
        return None
    if KEY not in asked:
        raise ValueError(f"--{next(iter(asked))} is for several processes: say how with --{KEY} NAME (docs/scale.md).")
    if "LOCAL_RANK" in os.environ:
        raise ValueError(f"--{KEY} inside accelerate launch or torchrun: choose one of the two.")
    config = _config_file(asked.pop(KEY))
    for name, value in asked.items():
        if name in NUMBERS and not value.isdecimal():
            raise ValueError(f"--{name} must be a whole number, got {value!r}.")
    settings = [part for name, value in asked.items() for part in (f"--{name}", value)]
    from accelerate.commands.launch import launch_command, launch_command_parser

    parsed = launch_command_parser().parse_args(
        ["--config_file", str(config), *settings, "--module", "oprd", *command, *rest]
    )
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # we say it
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the processes, which finish and save
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ERRORS] = folder
        try:
            launch_command(parsed)
        except SystemExit as status:
            return int(status.code or 0)
        except Exception as error:  # torch's launcher wraps whatever a process failed of
            kind = type(error).__name__
            if kind not in ("ChildFailedError", "SignalException", "CalledProcessError"):
                raise
            _tell_errors(Path(folder), getattr(error, "failures", {}))
            return INTERRUPTED if getattr(error, "sigval", None) == signal.SIGINT else 1
        finally:
            signal.signal(signal.SIGINT, before)
            del os.environ[ERRORS]
    return 0


def tell_error(message: str) -> None:
    """One line on stderr; from a process of `launch`, through it, so that what all of them say is told once."""
    folder = os.environ.get(ERRORS)
    if folder and Path(folder).is_dir():
        (Path(folder) / os.environ.get("RANK", "0")).write_text(message, encoding="utf-8")
    else:
        print(message, file=sys.stderr)


def _tell_errors(folder: Path, failures: dict[int, Any]) -> None:
    """What the processes have said, each thing once; and which of them a signal ended."""
    told = [path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())]
    for rank, failure in failures.items():
        if failure.exitcode < 0:
            why = " (often: no main memory left)" if failure.exitcode == -signal.SIGKILL else ""
            told.append(f"oprd: error: process {rank} was ended by {failure.signal_name()}{why}.")
    for message in dict.fromkeys(told):
        print(message, file=sys.stderr)


def _taken(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Launch settings, and the arguments without them."""
    asked: dict[str, str] = {}
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in LAUNCH_HELP:
            value = value if equals else next(remaining, "")
            if not value:
                raise ValueError(f"--{name} needs a value.")
            asked[name] = value
        else:
            rest.append(argument)
    return asked, rest


def _config_file(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    if name not in layouts():
        raise ValueError(f"--{KEY} {name}: neither a file nor one of {', '.join(layouts())}.")
    return FOLDER / f"{name}.yaml"


def layouts() -> tuple[str, ...]:
    """Names of the configurations that ship with oprd."""
    return tuple(sorted(entry.stem for entry in FOLDER.glob("*.yaml")))
