"""Benchmarks for a model, or for the models of a run, into folders that say whose answers they hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from oprd.evaluation.benchmarks import Benchmark, load_benchmark
from oprd.evaluation.evaluate import encode_prompts, record, room_for
from oprd.evaluation.sampling import DEFAULT_MAX_NEW_TOKENS, Engine, Sampling, load_engine
from oprd.lineage.card import write_card
from oprd.lineage.evaluations import EVALUATIONS
from oprd.lineage.inputs import model_record
from oprd.lineage.manifest import NAME, read_manifest
from oprd.model_files import check_model, load_tokenizer
from oprd.models import MINIATURE_PREFIX, resolve_path
from oprd.records import check_folder

logger = logging.getLogger(__name__)

BATCH_SIZES = {"transformers": 64, "vllm": 1024}


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: where it is, where its results go, and the content hash it must have (None: any)."""

    label: str
    path: str
    revision: str | None
    out: Path
    expected: str | None = None


def subjects_of(model: str, roles: Sequence[str], out: str | None, revision: str | None = None) -> list[Subject]:
    """The models behind ``oprd eval MODEL --of ROLE ...``.

    Raises:
        ValueError: roles for a model that is no run, a run without the student asked for, a revision of a run.
    """
    run = Path(model)
    if not (run / NAME).exists():
        if list(roles) != ["final"]:
            raise ValueError(
                f"{model} is not a run of oprd train (no {NAME}), so --of {' '.join(roles)} says nothing there."
            )
        if run.is_dir() and not (run / "config.json").exists():
            raise ValueError(f"{model} is neither a model (no config.json) nor a run of oprd train (no {NAME}).")
        name = (
            "--".join(run.resolve().parts[-2:])
            if run.is_dir()
            else model.removeprefix(MINIATURE_PREFIX).replace("/", "--")
        )
        return [Subject(model, resolve_path(model), revision, Path(out or Path(EVALUATIONS) / name))]
    if revision is not None:
        raise ValueError("revision would be ignored: the model is a run.")
    manifest, base, subjects = read_manifest(run), Path(out or run / EVALUATIONS), []
    for role in roles:
        if role in ("final", "best"):
            if not (run / role / "config.json").exists():
                goes_on = "It has not finished: the command that started it continues it. A checkpoint can be evaluated as a model."
                needed = goes_on if role == "final" else "Set validation_benchmark to keep one."
                raise ValueError(f"{run} holds no {role} student. {needed}")
            subjects.append(Subject(f"{run.name} {role}", str(run / role), None, base / role))
        else:
            several = manifest[role].get("teachers", {})
            named = {f"{role} {name}": made for name, made in several.items()} or {role: manifest[role]}
            subjects += [_before(run, manifest, who, made, base) for who, made in named.items()]
    return subjects


def _before(run: Path, manifest: dict[str, Any], who: str, made: dict[str, Any], base: Path) -> Subject:
    """A model that a run was made from."""
    if "://" in made["name"]:
        raise ValueError(
            f"The {who} of {run} was at {made['name']}, and its files are not here. Evaluate it where they are: "
            "oprd eval PATH_OR_HUB_ID."
        )
    path = resolve_path(made["name"])
    if not Path(path).exists() and (Path(manifest["directory"]) / path).exists():
        path = str(Path(manifest["directory"]) / path)
    return Subject(f"{run.name} {who}", path, made["revision"], base / who.replace(" ", "-"), made["hash"])


def score_models(
    subjects: Sequence[Subject],
    benchmarks: Sequence[str],
    *,
    engine: str = "transformers",
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    template: dict[str, Any] | None = None,
    sampling: dict[str, Any],
    loading: dict[str, Any],
    prompts: dict[str, Any],
) -> Iterator[tuple[Subject, Path, dict[str, Any]]]:
    """Evaluate every model on every benchmark, each into ``subject.out/<benchmark>``; yields folder and summary.

    Benchmarks are read and checked, for every model, before any weights are loaded.

    Args:
        sampling: further fields of `Sampling`. loading: of `load_engine`. prompts: of `load_benchmark`.

    Raises:
        ValueError: whatever the checks find; a model of a run that is no longer what it was.
    """
    trust = loading.get("trust_remote_code", False)
    plans: list[tuple[Subject, list[tuple[Benchmark, Sampling]], dict[str, Any]]] = []
    for subject in subjects:
        check_model(subject.path, "model", trust_remote_code=trust, weights=subject.expected is None)
        made = model_record(subject.path, subject.revision)
        if subject.expected is not None and made["hash"] != subject.expected:
            raise ValueError(f"{subject.path} is not what it was when the run began: its content has changed.")
        where = {"revision": subject.revision, "trust_remote_code": trust}
        tokenizer = load_tokenizer(subject.path, "model", **where)
        context = getattr(
            AutoConfig.from_pretrained(subject.path, **where).get_text_config(), "max_position_embeddings", None
        )
        context = loading.get("max_model_len") or context
        plan = []
        for name in benchmarks:
            benchmark = load_benchmark(name, has_template=bool(tokenizer.chat_template), **prompts)
            if any(benchmark.name == other.name for other, _ in plan):
                raise ValueError(
                    f"Two benchmarks are called {benchmark.name}. Rename one of the files, or evaluate it with another --out."
                )
            check_folder(subject.out / benchmark.name, "--out")
            try:
                encoded = encode_prompts(tokenizer, benchmark.problems, template)
                room = room_for(encoded, context, max_new_tokens, DEFAULT_MAX_NEW_TOKENS)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            settings = {"max_new_tokens": room, "batch_size": batch_size or BATCH_SIZES.get(engine, 64), **sampling}
            plan.append((benchmark, Sampling(**settings)))
        identity = {"model": subject.path, "revision": made["revision"], "model_hash": made["hash"]}
        plans.append((subject, plan, identity))
    for subject, plan, identity in plans:
        logger.info(f"{subject.label}: {', '.join(f'{b.name} ({len(b.problems)} problems)' for b, _ in plan)}")
        loaded: Engine = load_engine(subject.path, engine=engine, revision=subject.revision, **loading)
        for benchmark, chosen in plan:
            folder = subject.out / benchmark.name
            label = f"{subject.label}, {benchmark.name}"
            yield (
                subject,
                folder,
                record(loaded, benchmark, chosen, folder, identity=identity, template=template, progress=label),
            )
        del loaded


def refresh_card(run: Path) -> None:
    """Write the evaluations of a finished run into its model card."""
    if (run / NAME).exists() and (run / "final" / "README.md").exists():
        write_card(run)
