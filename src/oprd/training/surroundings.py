"""What a run needs around it: a folder to write to, packages, ports, a server that answers. Looked at before anything is read."""

from __future__ import annotations

import logging
import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from oprd.models import resolve_path
from oprd.records import check_folder

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 3.0
HALF = ("bfloat16", "float16")
TRACKERS = {
    name: name for name in ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow", "neptune")
}
TRACKERS |= {name: name for name in ("swanlab", "tensorboard", "trackio", "wandb")}
TRACKERS |= {"azure_ml": "azureml", "flyte": "flytekit"}
OPTIMIZERS = {  # part of an optimiser's name -> the package that it is from
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    "8bit": "bitsandbytes",
    "32bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "apex": "apex",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "schedule_free": "schedulefree",
    "stable_adamw": "optimi",
}


def check_surroundings(args: Any, model: Any) -> None:
    """Everything below, for a run that is about to start.

    Raises:
        ValueError: with what to change.
    """
    check_packages(args, model)
    say_if_one(args, model)
    say_if_prompt_alone(args)
    check_precision(args, model)
    check_paths(args)
    check_output_dir(args.output_dir, model.model_name_or_path)
    if args.use_vllm and args.vllm_mode == "server" and find_spec("vllm") is not None:
        check_server(args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}")


def check_backends(args: Any) -> None:
    """What the libraries would import, open or listen on while they take the settings in.

    Raises:
        ValueError: a file that is not there, DeepSpeed not installed, a port that is taken.
    """
    for name in ("deepspeed", "fsdp_config", "accelerator_config"):
        value = getattr(args, name)
        if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file():
            raise ValueError(f"{name}: there is no file {value}. Name a JSON file, or write its settings as a mapping.")
    if args.deepspeed and find_spec("deepspeed") is None:
        raise ValueError(
            'deepspeed needs deepspeed, which is not installed: pip install "oprd[deepspeed]", or unset it.'
        )
    check_port()


def say_if_one(args: Any, model: Any) -> None:
    """Say aloud that a student is its own teacher: a control, or a slip. Not of one that is quantised."""
    names = model.model_name_or_path, args.teacher_model_name_or_path
    paths = [os.path.realpath(resolve_path(name)) for name in names if name]
    is_quantised = model.load_in_4bit or model.load_in_8bit
    revisions = model.model_revision or "main", args.teacher_model_revision or "main"
    if len(paths) == 2 and paths[0] == paths[1] and revisions[0] == revisions[1] and not is_quantised:
        logger.warning(
            f"Student and teacher are one model ({names[1]}): they agree already, and there is nothing to learn. Unless this is "
            "a control, name another teacher in teacher_model_name_or_path."
        )


def say_if_prompt_alone(args: Any) -> None:
    """Say aloud that the suffix gradient saves next to nothing: what is supervised begins where the response does."""
    output = args.output_loss != "none" and args.output_weight > 0
    if args.gradient_scope == "suffix" and (output or args.positions in ("all", "first_k", "adaptive")):
        what = "output_loss" if output else f"positions: {args.positions}"
        logger.warning(
            f"gradient_scope: suffix leaves out the prompts alone, since {what} supervises responses from their start. It saves "
            "more with positions: last_k and no output_loss; gradient_scope: full is exact."
        )


def check_packages(args: Any, model: Any) -> None:
    """Packages that settings ask for are installed.

    Raises:
        ValueError: the setting, the package, and how to go on without.
    """
    quantised = 'pip install "oprd[quantized]", or unset it'
    needs = []
    if args.use_vllm:
        needs.append(("use_vllm: true", "vllm", 'pip install "oprd[vllm]", or set use_vllm: false'))
    if args.use_liger_kernel:
        needs.append(("use_liger_kernel: true", "liger_kernel", "pip install liger-kernel, or unset it"))
    if model.load_in_4bit or model.load_in_8bit:
        needs.append(("load_in_4bit or load_in_8bit", "bitsandbytes", quantised))
    optimiser = str(getattr(args.optim, "value", args.optim))
    package = next((package for part, package in OPTIMIZERS.items() if part in optimiser), None)
    if package is not None:
        needs.append((f"optim: {optimiser}", package, f"pip install {package}, or set optim: adamw_torch"))
    for name in set(args.report_to) - {"none"}:
        if name not in TRACKERS:
            raise ValueError(
                f"report_to: {name!r} is none of none, {', '.join(sorted(TRACKERS))}. Set report_to: none."
            )
        is_there = name == "tensorboard" and find_spec("tensorboardX") is not None
        if not is_there:
            needs.append((f"report_to: {name}", TRACKERS[name], f"pip install {name}, or set report_to: none"))
    for setting, package, remedy in needs:
        if find_spec(package) is None:
            raise ValueError(f"{setting} needs {package}, which is not installed: {remedy}.")


def check_precision(args: Any, model: Any) -> None:
    """Settings of number formats that go together.

    Raises:
        ValueError: an unknown dtype; a static cache, whose keys have the weights' format, beside an autocast to another.
    """
    if model.dtype not in (None, "auto", "float32", *HALF):
        raise ValueError(f"dtype must be auto, float32, {' or '.join(HALF)}, got {model.dtype!r}.")
    computes = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    if args.cache_implementation == "static" and computes and model.dtype in (None, "float32"):
        raise ValueError(
            f"cache_implementation: static holds keys in the weights' float32, and {computes}: true computes them in 16 bits. "
            f"Unset cache_implementation, or set {computes}: false."
        )


def check_paths(args: Any) -> None:
    """Files that settings name are there.

    Raises:
        ValueError: the setting and the path.
    """
    checkpoint = args.resume_from_checkpoint
    if isinstance(checkpoint, str) and checkpoint.lower() not in ("true", "false"):
        if not Path(checkpoint).is_dir():
            raise ValueError(
                f"resume_from_checkpoint: there is no folder {checkpoint}. Name a checkpoint-N folder of a run, or use --resume."
            )
        if not (Path(checkpoint) / "trainer_state.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint} is no checkpoint (no trainer_state.json). Name a checkpoint-N folder."
            )


def check_output_dir(directory: str, student: str | None) -> None:
    """It can be written to, and the disk has room for the final student at least.

    Raises:
        ValueError: as of `check_folder`.
    """
    weights = Path(resolve_path(student)).glob("*.safetensors") if student else ()
    check_folder(directory, "output_dir", sum(path.stat().st_size for path in weights))


def check_port() -> None:
    """Where processes were started by hand (RANK, WORLD_SIZE), the first one's MASTER_PORT is free.

    Raises:
        ValueError: another process listens there.
    """
    first = os.environ.get("RANK") == "0" and int(os.environ.get("WORLD_SIZE", "1")) > 1
    port = os.environ.get("MASTER_PORT", "")
    if not first or not port.isdecimal() or torch.distributed.is_initialized():
        return
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):  # under torchrun it is the launcher itself that listens
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(port)))
        except OSError as error:
            raise ValueError(
                f"MASTER_PORT {port} is taken by another process ({error.strerror}). Set MASTER_PORT to a free one."
            ) from error


def check_server(url: str) -> None:
    """Somebody listens at a vLLM server's address.

    Raises:
        ValueError: nobody, or no address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"vllm_server_base_url: {url} is no address such as http://localhost:8000.")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The vLLM server at {url} does not answer ({error}). Start it first (trl vllm-serve --model STUDENT), or correct "
            "vllm_server_base_url, or vllm_server_host and vllm_server_port."
        ) from error
