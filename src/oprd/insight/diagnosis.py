"""``oprd diagnose``: can this student learn from this teacher's states, and what did a run change?

The student answers prompts, both models read the answers once, and sums are kept: of states layer by layer, of choices
under either head, and what a linear map could carry. With answers to grade, both models, and either under the other's LM head,
are asked to solve the same problems.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from oprd import models
from oprd.evaluation import grade
from oprd.evaluation.benchmarks import Problem
from oprd.evaluation.evaluate import batch_seed, batches_of, encode_prompts, room_for
from oprd.evaluation.metrics import bootstrap_interval
from oprd.evaluation.sampling import Sampling, TransformersEngine, load_engine
from oprd.insight.advice import advise, recipe_of, verdict
from oprd.insight.cases import Case, Fit, Member, fit_of
from oprd.insight.comparison import Comparison, Seen
from oprd.lineage.machine import versions
from oprd.model_files import quietly
from oprd.records import check_folder, write_json
from oprd.states import make_rollout
from oprd.training.solved_head import why_head_cannot_be_solved

RECORD = "diagnosis.json"
READ_TOKENS, READ_ROWS = 8192, 16  # of one reading
MOST_NEW_TOKENS = 512
HELD_OUT = 5  # one prompt in this many is kept from what is fitted


@dataclass(frozen=True)
class Settings:
    """How long answers are (None: what the context leaves, at most `MOST_NEW_TOKENS`), how many are drawn at once, and where
    models are loaded. ``accuracy``: grade, where there are answers to grade by."""

    max_new_tokens: int | None = None
    batch_size: int = 32
    dtype: str = "auto"
    device: str | None = None
    accuracy: bool = True

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Text:
    """One prompt and its answer in the student's tokens, its row of the data, and whether it is held out."""

    row: dict[str, Any]
    prompt: list[int]
    answer: list[int]
    held_out: bool


def diagnose(
    case: Case, out: str | Path, settings: Settings | None = None, *, progress: bool = False
) -> dict[str, Any]:
    """Compare, advise, and write ``diagnosis.json`` into ``out``.

    Returns:
        JSON values: ``models``, ``files``, ``answers``, ``students`` (each with ``layers``, ``cka``, ``positions``, ``activations``,
        ``choices``, ``bridge``, ``heads`` and, with answers to grade, ``accuracy``), ``advice``, ``recipe``.

    Raises:
        ValueError: anything that can be known before weights are read; answers without a token.
    """
    settings = settings or Settings()
    check_folder(out, "--out")
    for role, member in (*case.students.items(), ("teacher", case.teacher)):
        member.check(role)
    rows = case.prompts.draw()
    fit = fit_of(case, rows)
    prompts, longest = _encode(case, fit, rows, settings)
    sampling = Sampling(1, 1.0, 1.0, longest, settings.batch_size, case.prompts.seed)
    started, found = time.perf_counter(), {}
    teacher: TransformersEngine | None = None
    texts: list[Text] = []
    graded = settings.accuracy and "answer" in rows.column_names
    for place, (name, member) in enumerate(reversed(case.students.items())):  # the last one writes
        dtype = (
            settings.dtype if teacher is None else _dtype_of(teacher)
        )  # a run may have saved another one than it loaded
        student = _load(member, settings, dtype)
        if place == 0:
            answers = _write(student, prompts, sampling, f"{name} writes" if progress else None)
            texts = [
                Text(row, prompt, answer, number % HELD_OUT == HELD_OUT - 1)
                for number, (row, prompt, answer) in enumerate(zip(rows, prompts, answers, strict=True))
            ]
            cut_off = sum(not answer or answer[-1] not in student.ends for answer in answers) / len(answers)
            teacher = _load(case.teacher, settings, _dtype_of(student))
        comparison = Comparison(student.model, teacher.model, fit, seed=case.prompts.seed)
        bar = tqdm(total=len(texts), desc=f"{name} and teacher read", unit="answer", disable=not progress)
        for seen in _readings(texts, fit, student.model.device):
            comparison.update(seen)
            bar.update(len(seen.rollout.student.ids_BS))
        bar.close()
        found[name] = comparison.result() | {"heads": _heads(student.model, teacher.model, fit)}
        if graded:
            own = answers if place == 0 else None
            found[name]["accuracy"] = _accuracies(student, teacher, fit, texts, sampling, own, name, progress)
        del student, comparison
    for result in found.values():  # the teacher solves its problems once
        if graded and "teacher" not in result["accuracy"]:
            result["accuracy"]["teacher"] = found[list(case.students)[-1]]["accuracy"]["teacher"]
    lengths = [len(text.answer) for text in texts]
    record = {
        "models": {name: member.path for name, member in (*case.students.items(), ("teacher", case.teacher))},
        "files": fit.facts,
        "answers": {
            "prompts": len(texts),
            "data": case.prompts.data,
            "written_by": list(case.students)[-1],
            "tokens": sum(lengths),
            "mean_length": sum(lengths) / len(lengths),
            "cut_off": cut_off,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": 1.0,
            "seed": case.prompts.seed,
        },
        "students": {name: found[name] for name in case.students},
        "seconds": time.perf_counter() - started,
        "versions": versions(),
    }
    record["advice"] = advise(fit.facts, record["students"], cut_off)
    if "student" in case.students:
        record["verdict"] = verdict(fit.facts, record["students"]["student"])
        record["recipe"] = _recipe(case, record, f"runs/{Path(out).resolve().name}")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(Path(out) / RECORD, record)
    return record


def _recipe(case: Case, record: dict[str, Any], output_dir: str) -> dict[str, Any]:
    """A recipe to begin with: what was diagnosed, what was advised, and the paper's batch and rate."""
    student, teacher, prompts = case.students["student"], case.teacher, case.prompts
    recipe: dict[str, Any] = {"model_name_or_path": student.label}
    if case.template is not None and (teacher.path, teacher.revision) == (student.path, student.revision):
        recipe["teacher_model_kind"] = "base"
    else:
        recipe["teacher_model_name_or_path"] = teacher.label
    given = {"model_revision": student.revision, "teacher_prompt_template": case.template}
    given["teacher_model_revision"] = None if "teacher_model_kind" in recipe else teacher.revision
    given |= {"dataset_name": prompts.data, "dataset_config": prompts.config, "chat_template_kwargs": case.chat or None}
    given |= {"dataset_train_split": None if prompts.split == "train" else prompts.split}
    given |= {"prompt_column": prompts.prompt_column, "answer_column": prompts.answer_column}
    given |= {"as_chat": prompts.as_chat or None, "trust_remote_code": student.trust_remote_code or None}
    recipe |= {name: value for name, value in given.items() if value is not None}
    recipe["output_dir"] = output_dir
    recipe |= recipe_of(record["files"], record["students"]["student"])
    budget = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "responses_per_prompt": 2}
    return (
        recipe
        | budget
        | {"max_completion_length": record["answers"]["max_new_tokens"], "max_steps": 500, "learning_rate": 1e-5}
    )


def _load(member: Member, settings: Settings, dtype: str) -> TransformersEngine:
    with quietly():
        return load_engine(
            member.path,
            revision=member.revision,
            dtype=dtype,
            device=settings.device,
            trust_remote_code=member.trust_remote_code,
        )


def _dtype_of(engine: TransformersEngine) -> str:
    return str(engine.model.dtype).removeprefix("torch.")


def _encode(case: Case, fit: Fit, rows: Any, settings: Settings) -> tuple[list[list[int]], int]:
    """The student's prompts as tokens, and how long an answer may be.

    Raises:
        ValueError: a prompt that leaves no room for an answer, in the student's context or in the teacher's.
    """
    student, teacher = list(case.students.values())[-1], case.teacher
    problems = [Problem(f"prompt {number}", row["prompt"], "") for number, row in enumerate(rows, 1)]
    prompts = encode_prompts(student.tokenizer, problems, case.chat)
    contexts = [getattr(member.config, "max_position_embeddings", None) for member in (student, teacher)]
    room = room_for(prompts, contexts[0], settings.max_new_tokens, MOST_NEW_TOKENS)
    if fit.one_vocabulary:  # answers are as long on both sides
        read = prompts if fit.reader is None else [fit.reader.prompt_of(row, room)[0] for row in rows]
        room = min(room, room_for(read, contexts[1], settings.max_new_tokens, MOST_NEW_TOKENS))
    return prompts, room


def _write(
    engine: TransformersEngine, prompts: Sequence[list[int]], sampling: Sampling, told: str | None
) -> list[list[int]]:
    """An answer to each prompt, in their order."""
    answers: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=told, unit="answer", disable=told is None) as bar:
        for number, batch in enumerate(batches_of(prompts, sampling)):
            written = engine.write([prompts[place] for place, _ in batch], sampling, batch_seed(sampling.seed, number))
            for (place, _), answer in zip(batch, written, strict=True):
                answers[place] = answer
            bar.update(len(batch))
    return answers


def _readings(texts: Sequence[Text], fit: Fit, device: torch.device) -> Iterator[Seen]:
    """Texts of like length together, as many as `READ_TOKENS` hold and at least one."""
    batch: list[Text] = []
    for text in sorted(texts, key=lambda text: len(text.prompt) + len(text.answer)):
        longest = len(text.prompt) + len(text.answer)
        if batch and (len(batch) == READ_ROWS or longest * (len(batch) + 1) > READ_TOKENS):
            yield _reading(batch, fit, device)
            batch = []
        batch.append(text)
    yield _reading(batch, fit, device)


def _reading(batch: Sequence[Text], fit: Fit, device: torch.device) -> Seen:
    (prompt_ids, prompt_mask), (answer_ids, answer_mask) = (
        _padded([getattr(text, part) for text in batch], device) for part in ("prompt", "answer")
    )
    teacher_text = None
    if fit.reader is not None:
        teacher_text = fit.reader.text_of(fit.reader.read([text.row for text in batch], answer_ids, answer_mask))
    weights = answer_mask.float()
    rollout = make_rollout(
        prompt_ids,
        prompt_mask,
        answer_ids,
        answer_mask,
        state_weights_BC=weights,
        output_weights_BC=torch.zeros_like(weights),
        teacher_text=teacher_text,
    )
    row_N = rollout.state_pairs.row_N
    before_N = rollout.state_pairs.student_N - (prompt_mask.sum(1)[row_N] - 1)
    after_N = answer_mask.sum(1)[row_N] - 1 - before_N
    held_out_B = torch.tensor([text.held_out for text in batch], device=device)
    return Seen(rollout, before_N, after_N, held_out_B[row_N], int(answer_mask.sum()))


def _padded(tokens: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, tokens))
    ids = torch.tensor([[*one, *[0] * (width - len(one))] for one in tokens])
    mask = torch.tensor([[True] * len(one) + [False] * (width - len(one)) for one in tokens])
    return ids.to(device), mask.to(device)


def _heads(student: nn.Module, teacher: nn.Module, fit: Fit) -> dict[str, Any]:
    tied: dict[str, Any] = {"student_tied": models.is_tied(student), "teacher_tied": models.is_tied(teacher)}
    tied["why_not_solved"] = why_head_cannot_be_solved(student, teacher)
    if not fit.one_vocabulary:
        return {**tied, "drift": None, "why_not_adopted": "the teacher has another vocabulary"}
    size = fit.vocab_sizes[0]
    return {
        **tied,
        "drift": models.head_drift(student, teacher, size),
        "why_not_adopted": models.why_head_cannot_move(student, teacher, size),
    }


def _accuracies(
    student: TransformersEngine,
    teacher: TransformersEngine,
    fit: Fit,
    texts: Sequence[Text],
    sampling: Sampling,
    written: list[list[int]] | None,
    name: str,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Share of problems solved by the student, and by either model's states under the other's head; with the student's
    ``written`` answers, by the teacher too."""

    def solved(engine: TransformersEngine, prompts: list[list[int]], who: str) -> dict[str, float]:
        return _graded(engine, texts, _write(engine, prompts, sampling, f"{who} solves" if progress else None))

    own = [text.prompt for text in texts]
    room = sampling.max_new_tokens
    asked = own if fit.reader is None else [fit.reader.prompt_of(text.row, room)[0] for text in texts]
    scores = {"student": solved(student, own, name) if written is None else _graded(student, texts, written)}
    if written is not None:
        scores["teacher"] = solved(teacher, asked, "teacher")
    if fit.one_vocabulary and fit.one_width:
        with models.wearing_head(teacher.model, student.model, fit.vocab_sizes[0]):
            scores["teacher_under_student_head"] = solved(teacher, asked, f"teacher under {name}'s head")
        with models.wearing_head(student.model, teacher.model, fit.vocab_sizes[0]):
            scores["student_under_teacher_head"] = solved(student, own, f"{name} under the teacher's head")
    return scores


def _graded(engine: TransformersEngine, texts: Sequence[Text], answers: list[list[int]]) -> dict[str, float]:
    said = engine.tokenizer.batch_decode(answers, skip_special_tokens=True)
    correct = [[grade(answer, text.row["answer"])] for answer, text in zip(said, texts, strict=True)]
    low, high = bootstrap_interval(correct)
    return {"value": 100 * sum(one for (one,) in correct) / len(correct), "low": low, "high": high}
