"""Draw k answers to every problem and grade them: in memory, or into a folder that a killed evaluation continues."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from oprd.evaluation.benchmarks import Benchmark, Problem, problem_id
from oprd.evaluation.grading import extract_boxed, judge
from oprd.evaluation.sampling import Engine, Sampling, TransformersEngine
from oprd.evaluation.summary import Evaluation, Graded, graded_of
from oprd.models import apply_template
from oprd.records import read_json, whole_lines, write_json, write_text

RESPONSES, PROBLEMS, SETTINGS, SUMMARY = "responses.jsonl", "problems.json", "settings.json", "summary.json"


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], template: dict[str, Any] | None = None
) -> list[list[int]]:
    """Token ids of every prompt, chat messages through the template (with ``template``'s own arguments).

    Raises:
        ValueError: a prompt of no tokens, named by its place.
    """
    encoded = []
    for place, problem in enumerate(problems, 1):
        if isinstance(problem.prompt, str):
            ids = tokenizer(problem.prompt)["input_ids"]
        else:
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | (template or {})
            ids = apply_template(tokenizer, problem.prompt, **how)["input_ids"]
        if not ids:
            raise ValueError(f"Problem {place} ({problem.id}) has no tokens in this model's vocabulary.")
        encoded.append(ids)
    return encoded


def room_for(prompts: Sequence[list[int]], context: int | None, wanted: int | None, most: int) -> int:
    """New tokens that every prompt leaves room for: ``wanted``, or up to ``most`` where that is open.

    Raises:
        ValueError: ``wanted`` does not fit, or nothing does; the longest prompt is named.
    """
    longest = max(range(len(prompts)), key=lambda place: len(prompts[place]))
    if context is None:
        return wanted or most
    room = context - len(prompts[longest])
    if room < max(1, wanted or 1):
        raise ValueError(
            f"Problem {longest + 1}: a prompt of {len(prompts[longest])} tokens leaves {max(room, 0)} of the context of "
            f"{context} for an answer" + (f", not {wanted}. Lower max_new_tokens." if wanted else ".")
        )
    return wanted or min(room, most)


def batches_of(prompts: Sequence[list[int]], sampling: Sampling) -> list[list[tuple[int, int]]]:
    """(problem, sample) of every answer, a batch at a time; prompts of like length together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
    jobs = [(place, sample) for place in order for sample in range(sampling.samples)]
    return [jobs[start : start + sampling.batch_size] for start in range(0, len(jobs), sampling.batch_size)]


def batch_seed(seed: int, batch: int) -> int:
    """The seed of a batch: a later one does not depend on those before it."""
    return int(np.random.SeedSequence([seed, batch]).generate_state(1)[0])


def _answers(
    engine: Engine,
    problems: Sequence[Problem],
    prompts: Sequence[list[int]],
    sampling: Sampling,
    wanted: Sequence[int],
    progress: str | None,
) -> Iterator[list[Graded]]:
    """Graded answers of the batches in ``wanted``, one batch at a time."""
    from tqdm.auto import tqdm

    batches = batches_of(prompts, sampling)
    total = len(prompts) * sampling.samples
    missing = sum(len(batches[number]) for number in wanted)
    with tqdm(total=total, initial=total - missing, desc=progress, unit="answer", disable=progress is None) as bar:
        for number in wanted:
            batch = batches[number]
            answers = engine.generate(
                [prompts[place] for place, _ in batch], sampling, batch_seed(sampling.seed, number)
            )
            graded = []
            for (place, sample), answer in zip(batch, answers, strict=True):
                problem = problems[place]
                graded.append(
                    Graded(
                        problem.id,
                        place,
                        sample,
                        number,
                        problem.answer,
                        extract_boxed(answer.text),
                        str(judge(answer.text, problem.answer)),
                        answer.tokens,
                        answer.cut_off,
                        answer.text,
                    )
                )
            yield graded
            bar.update(len(batch))


def draw(
    engine: Engine,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    part: tuple[int, int] = (0, 1),
    progress: str | None = None,
    template: dict[str, Any] | None = None,
) -> list[Graded]:
    """Graded answers, in memory.

    Args:
        template: further arguments of the chat template.
        part: (i, n): only the i-th of n parts of the batches; several processes share the work. Each of them generates as
            often as the others, for engines that must be called together.
        progress: names a progress bar on stderr.
    """
    prompts = encode_prompts(engine.tokenizer, problems, template)
    batches = batches_of(prompts, sampling)
    numbers = range(len(batches))[part[0] :: part[1]]
    graded = [a for batch in _answers(engine, problems, prompts, sampling, numbers, progress) for a in batch]
    if len(numbers) < -(-len(batches) // part[1]):
        engine.generate([prompts[place] for place, _ in batches[0]], sampling, sampling.seed)
    return graded


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[dict[str, Any] | Problem],
    *,
    progress: str | None = None,
    **sampling: Any,
) -> Evaluation:
    """Draw answers with transformers and grade them, in memory.

    Args:
        problems: `Problem`, or mappings with ``prompt`` (text or chat messages) and ``answer``.
        progress: names a progress bar on stderr.
        sampling: fields of `Sampling`.
    """
    problems = [
        p if isinstance(p, Problem) else Problem(problem_id(p["prompt"], p["answer"]), p["prompt"], p["answer"])
        for p in problems
    ]
    return Evaluation.of(draw(TransformersEngine(model, tokenizer), problems, Sampling(**sampling), progress=progress))


def record(
    engine: Engine,
    benchmark: Benchmark,
    sampling: Sampling,
    directory: Path,
    *,
    identity: dict[str, Any],
    template: dict[str, Any] | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Evaluate into ``directory`` and return the summary; a killed evaluation continues where it was.

    A batch is generated, graded and appended to ``responses.jsonl`` as one; what a kill cut short is drawn again with
    the same seed, so the file comes out the same. ``summary.json`` is written at the end.

    Args:
        identity: what makes this evaluation this one (model, hashes); kept in ``settings.json`` with the sampling and the
            benchmark. Continuing with other settings is refused.
        template: arguments of the chat template.

    Raises:
        ValueError: the folder holds an evaluation with other settings (each is named), or another process writes there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = settings_of(benchmark, sampling, engine.name, identity, template)
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        with lock:
            prompts = encode_prompts(engine.tokenizer, benchmark.problems, template)
            room_for(prompts, engine.context, sampling.max_new_tokens, sampling.max_new_tokens)
            _same_settings(directory, settings)
            write_json(directory / PROBLEMS, [vars(problem) for problem in benchmark.problems])
            batches = batches_of(prompts, sampling)
            graded = _kept(directory / RESPONSES, batches)
            done = 0 if not graded else graded[-1].batch + 1
            if done < len(batches):  # a folder with it is whole
                (directory / SUMMARY).unlink(missing_ok=True)
            with (directory / RESPONSES).open("a", encoding="utf-8") as file:
                remaining = range(done, len(batches))
                for batch in _answers(engine, benchmark.problems, prompts, sampling, remaining, progress):
                    file.write("".join(json.dumps(a.as_row(), ensure_ascii=False) + "\n" for a in batch))
                    file.flush()
                    os.fsync(file.fileno())
                    graded += batch
            summary = Evaluation.of(graded).summary() | {"settings": settings}
            write_json(directory / SUMMARY, summary)
    except Timeout as error:
        raise ValueError(
            f"Another process is evaluating into {directory}. Wait for it, or choose another --out."
        ) from error
    return summary


def write_evaluation(
    directory: Path, benchmark: Benchmark, sampling: Sampling, evaluation: Evaluation, identity: dict[str, Any]
) -> dict[str, Any]:
    """Write an evaluation that was made in memory, in the same files, over what was there; returns its summary."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SUMMARY).unlink(missing_ok=True)  # last to be written: a folder with it is whole
    settings = settings_of(benchmark, sampling, identity.get("engine", "transformers"), identity)
    write_json(directory / SETTINGS, settings)
    write_json(directory / PROBLEMS, [vars(problem) for problem in benchmark.problems])
    lines = [json.dumps(answer.as_row(), ensure_ascii=False) + "\n" for row in evaluation.answers for answer in row]
    write_text(directory / RESPONSES, "".join(lines))
    summary = evaluation.summary() | {"settings": settings}
    write_json(directory / SUMMARY, summary)
    return summary


def settings_of(
    benchmark: Benchmark,
    sampling: Sampling,
    engine: str,
    identity: dict[str, Any],
    template: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What makes an evaluation this one; two with the same settings draw the same answers."""
    return {
        **identity,
        "benchmark": {"name": benchmark.name, "source": benchmark.source, "hash": benchmark.hash},
        "prompt_format": benchmark.format,
        "chat_template_kwargs": template or {},
        "engine": engine,
        "sampling": vars(sampling),
    }


def _flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Settings of settings by names such as ``sampling.seed``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {f"{within}{name}": value}
    return flat


def _short(value: Any) -> str:
    """A hash by its first digits."""
    return f"{value[:12]}..." if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def _same_settings(directory: Path, settings: dict[str, Any]) -> None:
    path = directory / SETTINGS
    if not path.exists():
        write_json(path, settings)
        return
    before = read_json(path)
    skipped = ("model",) if "model_hash" in settings else ()
    there, now = (_flat({n: s.get(n) for n in settings if n not in skipped}) for s in (before, settings))
    differing = [name for name in {**now, **there} if there.get(name) != now.get(name)]
    if differing:
        told = "; ".join(f"{name}: {_short(there.get(name))} there, {_short(now.get(name))} now" for name in differing)
        raise ValueError(
            f"{directory} holds an evaluation with other settings ({told}). Choose another --out, or remove it."
        )


def _kept(path: Path, batches: list[list[tuple[int, int]]]) -> list[Graded]:
    """Answers of whole batches; what follows them in the file is cut off."""
    if not path.exists():
        return []
    kept, size = [], 0
    lines = whole_lines(path)
    for number, batch in enumerate(batches):
        rows = lines[len(kept) : len(kept) + len(batch)]
        if len(rows) < len(batch) or any(row["batch"] != number for row, _ in rows):
            break
        kept += [graded_of(row) for row, _ in rows]
        size = rows[-1][1]
    os.truncate(path, size)
    return kept


def read_evaluation(directory: Path) -> tuple[Evaluation, dict[str, Any]]:
    """A finished evaluation and its summary.

    Raises:
        ValueError: not a folder of a finished evaluation, or a broken line.
    """
    if not (directory / SUMMARY).exists():
        raise ValueError(f"{directory} holds no finished evaluation ({SUMMARY} is missing). Run oprd eval first.")
    try:
        summary = read_summary(directory / SUMMARY)
        return Evaluation.of(graded_of(row) for row, _ in whole_lines(directory / RESPONSES)), summary
    except ValueError as error:
        raise ValueError(f"{directory}: {error} Remove that folder, then run oprd eval again.") from error


def read_summary(path: Path) -> dict[str, Any]:
    """A ``summary.json``.

    Raises:
        ValueError: not JSON, or without what every one has.
    """
    summary = read_json(path)
    whole = isinstance(summary, dict) and {"samples", "problems", "avg_at_k", "best_at_k", "settings"} <= summary.keys()
    settings = summary["settings"] if whole and isinstance(summary["settings"], dict) else {}
    if not {"benchmark", "sampling", "engine"} <= settings.keys() or not isinstance(settings["benchmark"], dict):
        raise ValueError(f"{path} is no summary of an evaluation. Remove its folder, and evaluate again.")
    return summary
