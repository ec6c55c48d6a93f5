"""Settings of who teaches, as far as they can be checked without looking at anything else."""

from __future__ import annotations

import re
from typing import Any

import yaml

from oprd.training.privileged import PromptTemplate

KEYS: dict[str, tuple[type, ...]] = {
    "model_name_or_path": (str,),
    "model_revision": (str,),
    "url": (str,),
    "token_file": (str,),
    "bridge": (str,),
    "weight": (int, float),
    "when": (dict,),
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Rules = dict[str, re.Pattern[str]]  # column -> what is looked for in it


def check_teachers(args: Any) -> None:
    """One teacher, several, or the student itself, and what the teacher reads.

    Args:
        args: `oprd.OPRDConfig`; its ``teachers`` are parsed where they are text.

    Raises:
        ValueError: settings that contradict each other, or that would be ignored.
    """
    if args.teacher_prompt_template is not None:
        PromptTemplate(args.teacher_prompt_template)
    args.refuse_ignored(
        args.teacher_prompt_template is None, "there is no teacher_prompt_template", max_teacher_prompt_length=None
    )
    args.teachers = parse_teachers(args.teachers)
    if args.teachers is not None:
        elsewhere = (
            "teacher_model_name_or_path",
            "teacher_model_revision",
            "teacher_url",
            "teacher_token_file",
            "bridge",
        )
        if given := [name for name in elsewhere if getattr(args, name) is not None]:
            raise ValueError(f"{', '.join(given)} beside teachers: give it to one of the teachers, or remove it.")
        if args.lm_head == "solved":
            raise ValueError("lm_head: solved is for one teacher through a bridge. Use lm_head: auto.")
    _check_own(args)


def _check_own(args: Any) -> None:
    kind = args.teacher_model_kind
    args.refuse_ignored(kind is None, "teacher_model_kind is not set", teacher_update_rate=0.005, teacher_sync_steps=1)
    if kind is None:
        return
    others = ("teacher_model_name_or_path", "teacher_model_revision", "teacher_url", "teachers", "bridge")
    if given := [name for name in others if getattr(args, name) is not None]:
        raise ValueError(
            f"{', '.join(given)} beside teacher_model_kind: {kind}, by which the student teaches itself. Remove one."
        )
    if args.teacher_prompt_template is None:
        raise ValueError(
            f"teacher_model_kind: {kind} needs teacher_prompt_template, such as '{{prompt}} A solution: {{solution}}': a teacher "
            "that is the student and reads the same has nothing to teach."
        )
    args.refuse_ignored(kind != "ema", "teacher_model_kind is not ema", teacher_update_rate=0.005, teacher_sync_steps=1)
    if not 0 < args.teacher_update_rate <= 1:
        raise ValueError(f"teacher_update_rate must be more than 0 and at most 1, got {args.teacher_update_rate}.")
    if args.lm_head in ("teacher", "solved"):
        raise ValueError(f"lm_head: {args.lm_head} cannot be: the teacher is the student itself. Use lm_head: auto.")
    if kind != "base":
        why = f"the teacher of teacher_model_kind: {kind} moves with the student"
        args.refuse_ignored(True, why, teacher_load_in_8bit=False, offload_teacher=False)
    args.refuse_ignored(True, "the teacher is the student itself", teacher_model_init_kwargs=None)


def parse_teachers(value: Any) -> dict[str, dict[str, Any]] | None:
    """``teachers`` of a recipe, or the same as text on the command line, checked key by key.

    Raises:
        ValueError: not a mapping of names to mappings, an unknown key, a value of another kind, or a pattern that is none.
    """
    if isinstance(value, str):
        value = yaml.safe_load(value)
    if value is None:
        return None
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"teachers must map names to settings, such as {{maths: {{model_name_or_path: DIR}}}}, got {value!r}."
        )
    for name, settings in value.items():
        _check_teacher(f"teachers: {name}", name, settings)
    return value


def _check_teacher(where: str, name: Any, settings: Any) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"{where}: a name is made of letters, digits, dots, dashes and underscores. Rename it.")
    if not isinstance(settings, dict):
        raise ValueError(f"{where} must be a mapping such as {{model_name_or_path: DIR}}, got {settings!r}.")
    for key, given in settings.items():
        if key not in KEYS:
            raise ValueError(f"{where}: unknown key {key!r}; it takes {', '.join(KEYS)}.")
        if not isinstance(given, KEYS[key]) or isinstance(given, bool):
            raise ValueError(f"{where}: {key} must be {' or '.join(k.__name__ for k in KEYS[key])}, got {given!r}.")
    if not 0 < settings.get("weight", 1) < float("inf"):
        raise ValueError(f"{where}: weight must be a number of more than 0, got {settings['weight']}.")
    if "url" in settings and settings.keys() & {"model_name_or_path", "model_revision"}:
        raise ValueError(f"{where} has both a model and a url. Remove one of them.")
    if "token_file" in settings and "url" not in settings:
        raise ValueError(f"{where}: token_file would be ignored: there is no url. Remove it.")
    if settings.get("bridge") == "auto":
        raise ValueError(
            f"{where}: bridge: auto fits one bridge for one teacher. Fit it with oprd bridge fit and name DIR."
        )
    rules_of(where, settings.get("when"))


def rules_of(where: str, when: dict[str, Any] | None) -> Rules | None:
    """Columns and the patterns that are looked for in them.

    Raises:
        ValueError: no column, or no regular expression.
    """
    if when is None:
        return None
    if not when:
        raise ValueError(f"{where}: when names no column. Write when: {{column: pattern}}, or remove it.")
    try:
        return {str(column): re.compile(str(pattern)) for column, pattern in when.items()}
    except re.error as error:
        raise ValueError(f"{where}: when: {error.pattern!r} is no regular expression ({error}). Correct it.") from error
