"""Teachers that cannot be: several, the student itself, and what they are given to read."""

import json

import pytest

from badinput.harness import ABSENT, Case, cases, check_refused
from oprd.training.trainer import OPRDTrainer

ONE_LESS = {"teacher_model_name_or_path": ABSENT}


def named(**teachers):
    """The recipe's teachers instead of its one."""

    def settings(root="{root}"):
        return {**ONE_LESS, "teachers": teachers}

    return settings()


def kinds(*values):
    """Prompts with a column of these values."""
    rows = [{"prompt": "abc"[: 1 + n % 3] + str(n), "kind": value, "hint": "a1"} for n, value in enumerate(values)]
    return lambda place: place.rows(*rows)


TWO = {"a": {"model_name_or_path": "teacher"}, "b": {"model_name_or_path": "student"}}
OWN = {**ONE_LESS, "teacher_model_kind": "live", "teacher_prompt_template": "{prompt}{hint}"}
EIGHT = ["a", "b"] * 4


@cases(
    Case("teachers that are a list", "teachers must be text or a mapping", "Correct it", None, {**ONE_LESS, "teachers": ["a"]}),
    Case("teachers that are nothing", "teachers must map names to settings", "such as", None, {**ONE_LESS, "teachers": {}}),
    Case("a teacher with an unknown key", "teachers: a: unknown key 'path'", "it takes model_name_or_path", None, named(a={"path": "x"})),
    Case("a teacher that is a word", "teachers: a must be a mapping", "model_name_or_path", None, named(a="teacher")),
    Case("a teacher whose weight is 0", "teachers: a: weight must be a number of more than 0, got 0", "more than 0", None,
        named(a={"model_name_or_path": "teacher", "weight": 0})),
    Case("a teacher whose weight is text", "teachers: a: weight must be int or float, got 'much'", "int or float", None,
        named(a={"model_name_or_path": "teacher", "weight": "much"})),
    Case("a teacher with a strange name", "teachers: a/b: a name is made of letters", "Rename it", None, named(**{"a/b": {}})),
    Case("a teacher without a model", "teachers: a has no model", "set its model_name_or_path", None, named(a={"weight": 1})),
    Case("a teacher that is not there", "gone is no folder here", "the Hub has not given it", None, named(a={"model_name_or_path": "gone"})),
    Case("a teacher with a model and a url", "teachers: a has both a model and a url", "Remove one", None,
        named(a={"model_name_or_path": "teacher", "url": "http://localhost:1"})),
    Case("a teacher's token without a url", "teachers: a: token_file would be ignored", "Remove it", None,
        named(a={"model_name_or_path": "teacher", "token_file": "x"})),
    Case("a teacher's bridge that fits itself", "teachers: a: bridge: auto fits one bridge", "oprd bridge fit", None,
        named(a={"model_name_or_path": "teacher", "bridge": "auto"})),
    Case("a pattern that is none", r"teachers: a: when: '\(' is no regular expression", "Correct it", None,
        named(a={"model_name_or_path": "teacher", "when": {"prompt": "("}})),
    Case("a rule without a column", "teachers: a: when names no column", "column: pattern", None,
        named(a={"model_name_or_path": "teacher", "when": {}})),
    Case("teachers beside a teacher", "teacher_model_name_or_path beside teachers", "give it to one of the teachers", None, {"teachers": TWO}),
    Case("a bridge beside teachers", "bridge beside teachers", "give it to one", None, {**ONE_LESS, "teachers": TWO, "bridge": "bridge"}),
    Case("a solved head for several", "lm_head: solved is for one teacher", "lm_head: auto", None, {**ONE_LESS, "teachers": TWO, "lm_head": "solved"}),
    Case("a column without teachers", "teacher_column would be ignored", "Remove it", None, {"teacher_column": "kind"}),
    Case("no such column", r"prompts\.jsonl, line 1: has no column 'kind'", "it has prompt", None, {**ONE_LESS, "teachers": TWO, "teacher_column": "kind"}),
    Case("a name that is none of theirs", "train_dataset, row 8: kind is 'c', which is none of a, b", "none of a, b",
        kinds(*EIGHT[:7], "c"), {**ONE_LESS, "teachers": TWO, "teacher_column": "kind"}),
    Case("a teacher whom no row asks", "No row of train_dataset asks b", "Remove it from teachers", kinds(*"aaaaaaaa"),
        {**ONE_LESS, "teachers": TWO, "teacher_column": "kind"}),
    Case("a column and rules", "both choose a teacher", "Remove one", kinds(*EIGHT),
        {**named(a={"model_name_or_path": "teacher", "when": {"prompt": "a"}}, b={"model_name_or_path": "student"}), "teacher_column": "kind"}),
    Case("a teacher before the others that takes all", "a has no when and would take every row", "put it last", None,
        named(a={"model_name_or_path": "teacher"}, b={"model_name_or_path": "student", "when": {"prompt": "a"}})),
    Case("rows that no rule takes", r"row 1: no teacher's when matches", "Let the last teacher have none", None,
        named(a={"model_name_or_path": "teacher", "when": {"prompt": "^z"}}, b={"model_name_or_path": "student", "when": {"prompt": "^y"}})),
)  # fmt: skip
def test_several_teachers(case, place, capfd):
    check_refused(case, place, capfd)


@cases(
    Case("a kind that is none", "teacher_model_kind must be one of base, ema, live, got 'frozen'", "base, ema, live", None,
        {**OWN, "teacher_model_kind": "frozen"}),
    Case("itself and a teacher", "teacher_model_name_or_path beside teacher_model_kind: live", "Remove one", None,
        {**OWN, "teacher_model_name_or_path": "teacher"}),
    Case("itself without anything to read", "teacher_model_kind: live needs teacher_prompt_template", "such as", None,
        {**OWN, "teacher_prompt_template": ABSENT}),
    Case("a rate without an average", "teacher_update_rate would be ignored", "Remove it", None, {**OWN, "teacher_update_rate": 0.1}),
    Case("a rate of 0", "teacher_update_rate must be more than 0 and at most 1, got 0", "at most 1", None,
        {**OWN, "teacher_model_kind": "ema", "teacher_update_rate": 0}),
    Case("the head of itself", "lm_head: teacher cannot be: the teacher is the student itself", "lm_head: auto", None,
        {**OWN, "lm_head": "teacher"}),
    Case("itself in main memory", "offload_teacher would be ignored", "Remove it", None, {**OWN, "offload_teacher": True}),
    Case("a template without the prompt", r"teacher_prompt_template has no \{prompt\}", "the student's prompt", None,
        {**OWN, "teacher_prompt_template": "{hint}"}),
    Case("a template with an open brace", "teacher_prompt_template: ", "write braces of the text twice", None,
        {**OWN, "teacher_prompt_template": "{prompt} \\boxed{"}),
    Case("a template with an expression", r"\{hint.__class__\} is not the name of a column", "names of columns", None,
        {**OWN, "teacher_prompt_template": "{prompt}{hint.__class__}"}),
    Case("a template with LaTeX", r"teacher_prompt_template: \{4 2\} is not the name of a column", "write braces of the text twice", None,
        {**OWN, "teacher_prompt_template": "{prompt} \\boxed{4 2}"}),
    Case("a column that is not there", r"prompts\.jsonl, line 1: has no column 'hint'", "it has prompt, answer", None, OWN),
    Case("a hint that is empty", r"prompts\.jsonl, line 3: hint must be text or a number, got nothing", "Correct or remove the row",
        lambda place: place.rows(*({"prompt": f"a{n}", "hint": "" if n == 2 else "b"} for n in range(8))), OWN),
    Case("a hint that is a list", r"prompts\.jsonl, line 1: hint must be text or a number, got list", "Correct or remove the row",
        lambda place: place.rows(*({"prompt": f"a{n}", "hint": ["b"]} for n in range(8))), OWN),
    Case("a length without a template", "max_teacher_prompt_length would be ignored", "Remove it", None, {"max_teacher_prompt_length": 9}),
    Case("a length of 0", "max_teacher_prompt_length must be at least 1, got 0", "at least 1", None, {**OWN, "max_teacher_prompt_length": 0}),
)  # fmt: skip
def test_the_student_itself(case, place, capfd):
    check_refused(case, place, capfd)


@cases(
    Case("changes over what is none", "transition_over must be one of positions, layers, both, got 'time'", "positions, layers, both", None,
        {"representation_loss": "transition", "transition_over": "time"}),
    Case("changes that are not compared", "transition_over would be ignored", "Remove it", None, {"transition_over": "layers"}),
    Case("changes between layers through a bridge", "transition_over: positions is what a bridge can have", "Set it so", None,
        {"representation_loss": "transition", "transition_over": "both", "bridge": "bridge"}),
    Case("changes between one layer", "transition_over: layers needs two compared layers", "layers", None,
        {"representation_loss": "transition", "transition_over": "layers", "layers": "last"}),
    Case("weights without states", "layer_weighting would be ignored", "Remove it", None,
        {"representation_weight": 0, "output_loss": "full", "layer_weighting": "adaptive"}),
    Case("a scale where there is none", "layer_weighting: teacher_rms would be ignored: cosine has no scale", "uniform or adaptive", None,
        {"representation_loss": "cosine", "layer_weighting": "teacher_rms"}),
    Case("adaptive positions and changes between layers", "positions: adaptive cannot be with transition_over: layers", "positions: all", None,
        {"representation_loss": "transition", "transition_over": "layers", "positions": "adaptive"}),
    Case("a k for adaptive positions", "position_k would be ignored", "Remove it", None, {"positions": "adaptive", "position_k": 4}),
    Case("maps alone", "attention_weight is an extra term", "representation_weight too", None,
        {"attention_weight": 1, "representation_weight": 0, "output_loss": "full"}),
    Case("keys without maps", "attention_keys would be ignored", "Remove it", None, {"attention_keys": 4}),
    Case("maps of suffixes", "attention_weight needs gradient_scope: full", "full", None,
        {"attention_weight": 1, "gradient_scope": "suffix", "positions": "last_k", "position_k": 2}),
    Case("maps of a layer that is not there", r"layers \[9\] are outside 1..3", "the first block is 1", None, {"attention_weight": 1, "attention_layers": 9}),
)  # fmt: skip
def test_what_is_compared(case, place, capfd):
    check_refused(case, place, capfd)


def test_teachers_typed_on_the_command_line(place, capfd, monkeypatch):
    """As JSON; what is wrong with it is said in the same words."""
    monkeypatch.setattr(OPRDTrainer, "train", lambda *_, **__: pytest.fail("it trained"))
    typed = (
        "train",
        "--config",
        "{root}/recipe.yaml",
        "--teachers",
        json.dumps({"a": {"weight": 1}}).replace("{", "{{").replace("}", "}}"),
    )
    check_refused(
        Case("typed", "teachers: a has no model", "set its model_name_or_path", None, ONE_LESS, typed), place, capfd
    )
