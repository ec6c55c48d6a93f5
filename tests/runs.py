"""Finished runs without a training: a manifest, a log, a small final student, and evaluations of made-up answers."""

import json

import numpy as np

from oprd.evaluation.benchmarks import Benchmark, Problem, problem_id
from oprd.evaluation.evaluate import write_evaluation
from oprd.evaluation.grading import Verdict
from oprd.evaluation.sampling import Sampling
from oprd.evaluation.summary import Evaluation, Graded
from oprd.lineage.card import write_card
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.manifest import Manifest

VARIED = "one two three four five six seven eight"  # five different 4-grams
STUCK = "so so so so so so so so"  # one 4-gram five times


def quiz(name="quiz", count=8, *, source=None, reverse=False):
    """A benchmark of sums."""
    problems = [
        Problem(problem_id(f"{name}: {n} + {n}?", str(2 * n)), f"{name}: {n} + {n}?", str(2 * n)) for n in range(count)
    ]
    return Benchmark(name, source or f"{name}.jsonl", tuple(problems[::-1] if reverse else problems), "text")


def answers(right, *, on=None, tokens=10, cut_off=False, no_box=False, text=VARIED):
    """An evaluation: ``right`` is problems x samples (or a value a problem), everything else a value or such a matrix."""
    right = np.asarray(right)
    right = right[:, None] if right.ndim == 1 else right
    on = on or quiz(count=len(right))

    def spread(value):
        value = np.asarray(value)
        return np.broadcast_to(value[:, None] if value.ndim == 1 else value, right.shape)

    tokens, cut_off, no_box, text = map(spread, (tokens, cut_off, no_box, text))
    graded = []
    for i, problem in enumerate(on.problems):
        for j in range(right.shape[1]):
            verdict = Verdict.NO_BOX if no_box[i, j] else Verdict.RIGHT if right[i, j] else Verdict.WRONG
            boxed = None if no_box[i, j] else problem.answer if right[i, j] else "none"
            graded.append(
                Graded(
                    problem.id,
                    i,
                    j,
                    0,
                    problem.answer,
                    boxed,
                    str(verdict),
                    int(tokens[i, j]),
                    bool(cut_off[i, j]),
                    str(text[i, j]),
                )
            )
    return Evaluation.of(graded)


def write_answers(folder, right, *, on=None, identity=None, sampling=None, **more):
    """`answers` as the files of an evaluation in ``folder/<benchmark>``; that folder."""
    evaluation = answers(right, on=on, **more)
    on = on or quiz(count=len(evaluation.answers))
    drawn = Sampling(**{"samples": len(evaluation.answers[0]), "max_new_tokens": 64, **(sampling or {})})
    write_evaluation(folder / on.name, on, drawn, evaluation, {"model": str(folder), **(identity or {})})
    return folder / on.name


def record(name, digest="0" * 64, **more):
    """What a manifest says of a model."""
    return {"name": name, "revision": None, "hash": digest, "files": {"model.safetensors": digest}} | more


def identity(**more):
    """What a manifest says of a run before it starts."""
    return {
        "command": ["oprd", "train"],
        "directory": "/nowhere",
        "config": {"dataset_name": "miniature:train.jsonl", "learning_rate": 1e-4, "output_dir": "runs/one"},
        "student": record("miniature:student", "a" * 64),
        "teacher": record("miniature:teacher", "b" * 64),
        "bridge": None,
        "data": {"train": {"name": "miniature:train.jsonl", "rows": 4, "hash": "c" * 64}},
        "seeds": {"seed": 0, "data_seed": None},
        "parent": None,
        "repeats": None,
    } | more


def evaluate_run(run, right, *, who="final", on=None, **more):
    """An evaluation of a run's model by itself, as ``oprd eval`` leaves it."""
    judged = combined_hash(folder_hashes(run / "final")) if who == "final" else "d" * 64
    return write_answers(run / "evaluations" / who, right, on=on, identity={"model_hash": judged}, **more)


def make_run(
    folder,
    right=None,
    *,
    on=None,
    finished=True,
    weights="weights",
    seconds=60,
    processes=1,
    memory=10**9,
    tokens=1000,
    steps=4,
    answered=None,
    **more,
):
    """A run that says it took ``seconds``; ``right`` are the graded answers of its final student, None for no evaluation.

    ``answered`` are further arguments of `answers`, ``more`` parts of the manifest's `identity`.
    """
    manifest = Manifest.start(folder, identity=identity(**more), processes=processes, resumed=False)
    manifest._clock -= seconds
    manifest.update(
        force=True,
        updates=steps,
        tokens_generated=tokens,
        tokens_trained=tokens,
        peak_memory_bytes=memory,
        peak_memory_of="host",
    )
    rows = [{"step": step, "loss": 1 / step, "cosine": 1 - 1 / step} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "final").mkdir()
        (folder / "final" / "config.json").write_text("{}")
        (folder / "final" / "model.safetensors").write_text(weights)
        manifest.content["last_update"] = steps
        manifest.finish(folder / "final")
        write_card(folder)
    if right is not None:
        evaluate_run(folder, right, on=on, **(answered or {}))
    return folder
