"""What is diagnosed: two models, or a run's student before and after beside its teacher; and the prompts."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from oprd.lineage.inputs import model_record
from oprd.lineage.manifest import read_manifest
from oprd.lineage.scoring import subjects_of
from oprd.model_files import check_model, load_tokenizer
from oprd.models import end_of_turn, end_token_ids, recorded_layer_map, resolve_path
from oprd.objectives import map_layers
from oprd.prompts import load_prompts
from oprd.states import Crossing
from oprd.training import preflight
from oprd.training.config import parse_layer_map
from oprd.training.pairing import TeacherReader, agreement
from oprd.training.privileged import PromptTemplate


@dataclass(frozen=True)
class Prompts:
    """Which prompts, and how many of them are drawn."""

    data: str
    prompts: int = 128
    seed: int = 0
    split: str = "train"
    config: str | None = None
    prompt_column: str | None = None
    answer_column: str | None = None
    as_chat: bool = False
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.prompts < 5:
            raise ValueError(f"--prompts must be at least 5 (one in five is held out), got {self.prompts}.")

    def draw(self) -> Dataset:
        """That many rows, in their order.

        Raises:
            ValueError: fewer than five rows, and whatever `load_prompts` finds.
        """
        names = ("split", "config", "prompt_column", "answer_column", "as_chat", "columns")
        rows = load_prompts(self.data, **{name: getattr(self, name) for name in names})
        if len(rows) < 5:
            raise ValueError(f"{self.data} has {len(rows)} prompts; a diagnosis needs at least 5. Give more.")
        count = min(self.prompts, len(rows))
        return rows.select(sorted(random.Random(self.seed).sample(range(len(rows)), count)))


@dataclass(frozen=True)
class Member:
    """A model by its files: label, where it is, and the content it must have (None: any)."""

    label: str
    path: str
    revision: str | None = None
    expected: str | None = None
    trust_remote_code: bool = False

    def check(self, role: str) -> None:
        """It can be loaded, and is what it was.

        Raises:
            ValueError: whatever `check_model` finds; other content than the run's record has.
        """
        check_model(self.path, role, trust_remote_code=self.trust_remote_code)
        if self.expected is not None and model_record(self.path, self.revision)["hash"] != self.expected:
            raise ValueError(f"{self.path} is not what it was when the run began: its content has changed.")

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @cached_property
    def config(self) -> PretrainedConfig:
        """Of the language model."""
        return AutoConfig.from_pretrained(self.path, **self._where).get_text_config()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its own."""
        return load_tokenizer(self.path, "model", **self._where)

    @property
    def ends(self) -> set[int]:
        """Every token that ends its answers."""
        try:
            declared = GenerationConfig.from_pretrained(self.path, revision=self.revision)
        except OSError:  # a model without one
            declared = None
        return end_token_ids(self.tokenizer, declared)


@dataclass(frozen=True)
class Case:
    """Students (the last one writes the answers), a teacher, prompts, and how the teacher's prompt is made."""

    students: dict[str, Member]
    teacher: Member
    prompts: Prompts
    template: str | None = None
    chat: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None  # of the run
    layer_map: list[int] | None = None  # of the run's recipe


def case_of_models(
    student: str,
    teacher: str,
    prompts: Prompts,
    *,
    revisions: tuple[str | None, str | None] = (None, None),
    template: str | None = None,
    chat: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Case:
    """Two models, before a run."""
    members = [
        Member(name, resolve_path(name), revision, trust_remote_code=trust_remote_code)
        for name, revision in zip((student, teacher), revisions, strict=True)
    ]
    return Case({"student": members[0]}, members[1], _with_columns(prompts, template), template, chat or {})


def case_of_run(
    run: str, prompts: dict[str, Any], *, teacher: str | None = None, trust_remote_code: bool = False
) -> Case:
    """A finished run: its student before and after, its teacher, its training prompts.

    Args:
        prompts: fields of `Prompts` that replace the run's own.
        teacher: in place of the run's, where that was at an address; or the name of one of several.

    Raises:
        ValueError: no run, or not finished; a teacher that is not here; several.
    """
    manifest = read_manifest(Path(run))
    recipe = manifest["config"]
    before, after = (subjects_of(run, [role], None)[0] for role in ("student", "final"))
    several = list(manifest["teacher"].get("teachers", {}))
    if teacher is None and several:
        raise ValueError(f"{run} had several teachers ({', '.join(several)}). Name one with --teacher.")
    if teacher is None and "://" in manifest["teacher"]["name"]:
        raise ValueError(
            f"The teacher of {run} was at {manifest['teacher']['name']}. Run oprd diagnose where its files are, and name them "
            "with --teacher."
        )
    if teacher is None or teacher in several:
        taught = subjects_of(run, ["teacher"], None)[several.index(teacher) if several else 0]
        teacher_member = Member("teacher", taught.path, taught.revision, taught.expected, trust_remote_code)
    else:
        teacher_member = Member(teacher, resolve_path(teacher), trust_remote_code=trust_remote_code)
    own = {
        "data": _near(recipe.get("dataset_name"), manifest),
        "split": recipe.get("dataset_train_split", "train"),
        "config": recipe.get("dataset_config"),
        "prompt_column": recipe.get("prompt_column"),
        "answer_column": recipe.get("answer_column"),
        "as_chat": recipe.get("as_chat", False),
    }
    if "data" in prompts:  # other prompts have layouts of their own
        own = {}
    template = recipe.get("teacher_prompt_template")
    chosen = _with_columns(Prompts(**(own | prompts)), template)
    students = {
        "before": Member("before", before.path, before.revision, before.expected, trust_remote_code),
        "after": Member("after", after.path, after.revision, after.expected, trust_remote_code),
    }
    chat = recipe.get("chat_template_kwargs") or {}
    given = recipe.get("layer_map") if teacher is None else None
    layer_map = None if given is None else parse_layer_map(given)
    return Case(students, teacher_member, chosen, template, chat, recipe.get("max_completion_length"), layer_map)


def _near(name: str, manifest: dict[str, Any]) -> str:
    """A data file as the run named it, from where it was started."""
    moved = Path(manifest["directory"]) / name
    return str(moved) if not Path(name).exists() and moved.exists() else name


def _with_columns(prompts: Prompts, template: str | None) -> Prompts:
    return prompts if template is None else replace(prompts, columns=PromptTemplate(template).columns)


@dataclass(frozen=True)
class Fit:
    """What the files of two models settle before any weights are read.

    ``reading`` is of `preflight` (``same``, ``other prompt``, ``other tokens``); ``layer_map`` has the teacher's layer of each
    student layer; ``agree`` says whether a student's and a teacher's token are one.
    """

    facts: dict[str, Any]
    reading: str
    layer_map: list[int]
    vocab_sizes: tuple[int, int]
    reader: TeacherReader | None
    agree: Callable[[Tensor, Tensor], Tensor]

    @property
    def one_vocabulary(self) -> bool:
        return self.reading != preflight.OTHER_TOKENS

    @property
    def one_width(self) -> bool:
        return len(set(self.facts["width"])) == 1


def fit_of(case: Case, rows: Dataset) -> Fit:
    """Shapes, tokenizers, end tokens, and how the teacher reads what a student writes.

    Raises:
        ValueError: chat prompts without a chat template, or a teacher's tokenizer without an end token.
    """
    student, teacher = list(case.students.values())[-1], case.teacher
    prompt, is_chat = rows[0]["prompt"], not isinstance(rows[0]["prompt"], str)
    for role, member in (("student", student), ("teacher", teacher)):
        if is_chat and not member.tokenizer.chat_template:
            raise ValueError(
                f"Prompts are chat messages but the {role}'s tokenizer has no chat template. Set its chat_template and save it, "
                "or give prompts as text."
            )
    sizes = [preflight.vocabulary_size(member.tokenizer) for member in (student, teacher)]
    for role, member, size in (("student", student, sizes[0]), ("teacher", teacher, sizes[1])):
        preflight.check_embeddings(role, member.config, size)
    reading = preflight.compare_tokenizers(student.tokenizer, teacher.tokenizer, prompt)
    depths = [member.config.num_hidden_layers for member in (student, teacher)]
    recorded = recorded_layer_map(student.config)
    mapped = recorded is not None and len(recorded) == depths[0] and max(recorded) == depths[1]
    layer_map = list(case.layer_map or (recorded if mapped else map_layers(*depths)))
    preflight.check_layer_map(layer_map, None, *depths)
    own_end, other_end = (end_of_turn(m.tokenizer, chat=is_chat) for m in (student, teacher))
    own, other = student.tokenizer.get_vocab().keys(), teacher.tokenizer.get_vocab().keys()
    facts = {
        "layers": depths,
        "width": [member.config.hidden_size for member in (student, teacher)],
        "vocabulary": [len(own), len(other)],
        "shared_tokens": len(own & other) / len(own),
        "reading": reading,
        "layer_map": layer_map if recorded is not None or depths[0] != depths[1] else None,
        "pruned_from_teacher": mapped,
        "end_tokens": [
            None if end is None else member.tokenizer.convert_ids_to_tokens(end)
            for end, member in ((own_end, student), (other_end, teacher))
        ],
    }
    same_text = reading == preflight.OTHER_TOKENS or other_end is None or other_end in student.ends
    facts["ends_alike"] = bool(student.ends) and same_text
    reader, crossing = None, None
    if reading == preflight.OTHER_TOKENS:
        if other_end is None:
            raise ValueError("The teacher's tokenizer has no end token. Set its eos_token and save it.")
        crossing = Crossing(
            student.tokenizer,
            teacher.tokenizer,
            student_ends=student.ends,
            teacher_end=other_end,
            teacher_ends=teacher.ends,
        )
    if reading != preflight.SAME or case.template is not None:
        context = getattr(teacher.config, "max_position_embeddings", None)
        template = None if case.template is None else PromptTemplate(case.template)
        if template is not None:
            template.check(rows, case.prompts.data)
        reader = TeacherReader(teacher.tokenizer, crossing, context, case.chat, template)
    return Fit(facts, reading, layer_map, (sizes[0], sizes[1]), reader, agreement(crossing))
