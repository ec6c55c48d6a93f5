"""Tools that the student may call while it answers: functions that a recipe names, and what they ask of prompts and template."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema
from trl import add_response_schema, get_training_chat_template, supports_tool_calling

from oprd._compat import is_chat_template_prefix_preserving
from oprd.training.config import OPRDConfig
from oprd.training.engines import is_sharded

HOW = "Name tools as FILE.py:FUNCTION or MODULE:FUNCTION, separated by commas."
DOCUMENTED = (
    "The model is shown name, type hints and docstring: give every argument a type hint and a line under Args:."
)


# ---------------------------------------------------------------------------------------------------- tools by name


def load_tools(names: str | None) -> list[Callable]:
    """The functions that ``names`` lists, such as ``my_tools.py:calculator, my_package.web:search``. Runs their files.

    Raises:
        ValueError: nothing of that name, a file that does not run, or what `check_functions` finds.
    """
    tools = [_function(*split_name(name)) for name in listed(names)]
    check_functions(tools)
    return tools


def tool_records(names: str | None) -> dict[str, dict[str, Any]]:
    """Of every tool: its name as given, and the hash of the file that defines it."""
    records = {}
    for name in listed(names):
        source, function = split_name(name)
        path = Path(source) if source.endswith(".py") else Path(str(_module(source).__file__))
        records[f"tool {function}"] = {"name": name, "hash": sha256(path.read_bytes()).hexdigest()}
    return records


def moved(names: str, folder: Path) -> str:
    """The same names where their files are not here but in ``folder``."""
    found = []
    for name in listed(names):
        source, function = split_name(name)
        elsewhere = source.endswith(".py") and not Path(source).exists() and (folder / source).exists()
        found.append(f"{folder / source if elsewhere else source}:{function}")
    return ", ".join(found)


def listed(names: str | None) -> list[str]:
    """The names between the commas."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def split_name(name: str) -> tuple[str, str]:
    """File or module, and function.

    Raises:
        ValueError: not both.
    """
    source, _, function = name.rpartition(":")
    if not source or not function.isidentifier():
        raise ValueError(f"tools: {name!r} does not say which function of which file. {HOW}")
    return source, function


def _function(source: str, name: str) -> Callable:
    module = _module(source)
    if not hasattr(module, name):
        own = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise ValueError(
            f"tools: {source} has no function {name!r}; it has {', '.join(sorted(own)) or 'none'}. Correct the name."
        )
    return getattr(module, name)


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return _run(source, lambda: importlib.import_module(source))
    path = Path(source).resolve()
    if not path.is_file():
        raise ValueError(f"tools: there is no file {source} (looked in {Path.cwd()}). {HOW}")
    name = _module_name(path)
    if name in sys.modules:  # one file is run once, however many of its functions are tools
        return sys.modules[name]

    def execute() -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module

    return _run(source, execute)


def _module_name(path: Path) -> str:
    return f"oprd_tools_{sha256(str(path).encode()).hexdigest()[:12]}"


def _run(source: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"tools: {source} cannot be imported ({told}). Mend it. {HOW}") from error


# ------------------------------------------------------------------------------------------------------- what is asked


def check_functions(tools: Sequence[Callable]) -> None:
    """Functions that a model can be told about, each under a name of its own.

    Raises:
        ValueError: no plain function, an async one, one without type hints or descriptions, or two of one name.
    """
    names = []
    for tool in tools:
        if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
            raise ValueError(f"tools: {tool!r} is no function. Wrap it in one, with type hints and a docstring.")
        name = tool.__name__
        if inspect.iscoroutinefunction(tool) or inspect.isasyncgenfunction(tool):
            raise ValueError(f"tools: {name} is async, and calls wait for each other. Make it a plain function.")
        try:
            get_json_schema(tool)
        except Exception as error:  # its own two kinds, and whatever a hint that is no type makes of it
            raise ValueError(f"tools: {name} cannot be described ({error}). {DOCUMENTED}") from error
        if name in names:
            raise ValueError(f"tools: two are called {name}, and the student could not tell them apart. Rename one.")
        names.append(name)


def check_tools(
    tools: Sequence[Callable], args: OPRDConfig, tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]
) -> None:
    """Functions, prompts, a chat template and processes with which tools can be called.

    Args:
        tokenizer: the student's. Where it does not say how answers are parsed, that is added for templates that TRL knows.
        prompt: the first of the dataset.

    Raises:
        ValueError: with what to change.
    """
    if not tools:
        return
    check_functions(tools)
    if isinstance(prompt, str):
        raise ValueError(
            "tools: prompts are text, and calls belong to chats. Set as_chat: true, or give chat messages."
        )
    if taken := {"tools", "chat_template"} & set(args.chat_template_kwargs or {}):
        raise ValueError(f"chat_template_kwargs: {', '.join(sorted(taken))} is set by tools. Remove it.")
    if args.world_size > 1:
        _check_processes(args)
    if not supports_tool_calling(tokenizer):
        raise ValueError(
            "tools: the student's chat template does not show calls, their arguments and results. Use a tokenizer whose "
            "chat_template does (Qwen3's, for one), or remove tools."
        )
    try:
        if (
            getattr(tokenizer, "response_template", None) is None
            and getattr(tokenizer, "response_schema", None) is None
        ):
            add_response_schema(tokenizer)
        rendering(tools, tokenizer)
    except ValueError as error:
        raise ValueError(
            f"tools: the student's chat template is not one that TRL knows ({error}) Set tokenizer.response_template and save it; "
            "with a chat template in which later messages leave earlier ones as they are."
        ) from error


def _check_processes(args: OPRDConfig) -> None:
    """Processes generate as often as their own rows have turns, so none may wait for another in it."""
    waits = None
    if args.use_vllm and args.vllm_mode == "server":
        waits = "vllm_mode: server answers all processes at once"
    elif args.use_vllm and args.vllm_tensor_parallel_size > 1:
        waits = "vllm_tensor_parallel_size over 1 has processes generate together"
    elif not args.use_vllm and is_sharded(args):
        waits = "a sharded student generates on all processes at once"
    if waits:
        raise ValueError(
            f"tools: {waits}, and with tools each has turns of its own. Use vllm_mode: colocate with one process each, DDP, or "
            "one process."
        )


def rendering(tools: Sequence[Callable], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a chat template is given besides messages, so that a prompt reads as it will in a rollout; nothing without tools.

    TRL takes another template where the tokenizer's own renders earlier messages differently once later ones are there.
    """
    if not tools:
        return {}
    keeps = is_chat_template_prefix_preserving(tokenizer)
    return {"tools": list(tools), "chat_template": None if keeps else get_training_chat_template(tokenizer)}


def check_one_rendering(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    tools: Sequence[Callable],
    prompt: list[dict[str, Any]],
) -> None:
    """Both templates show prompt, calls and results alike: the teacher reads what the student's made of them.

    Raises:
        ValueError: they differ, or the teacher's cannot render them.
    """
    call = {"type": "function", "function": {"name": tools[0].__name__, "arguments": {}}}
    chat = [
        *prompt,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": tools[0].__name__, "content": "a"},
    ]
    how = {"tools": list(tools), "add_generation_prompt": True, "tokenize": False}
    shown = list(_rendered((student, teacher), chat, how))
    if shown[0] != shown[1]:
        raise ValueError(
            "tools: the teacher's chat template shows tools, calls or results otherwise than the student's, and it reads what the "
            "student's made of them. Give both tokenizers one chat_template and save it (the student's, say)."
        )


def _rendered(tokenizers: Sequence[PreTrainedTokenizerBase], chat: list, how: dict) -> Iterator[str | None]:
    for tokenizer in tokenizers:
        try:
            yield tokenizer.apply_chat_template(chat, **how)
        except (TemplateError, TypeError, ValueError):  # a template without tools, or no template
            yield None
