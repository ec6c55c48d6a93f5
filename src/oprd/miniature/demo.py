"""``oprd demo``: the miniature distilled with several methods, on one budget, side by side."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from oprd.miniature.task import MAX_RESPONSE_DIGITS, MAX_RESPONSE_TOKENS, held_out

OPD = {"representation_weight": 0, "logit_weight": 0, "lm_head": "keep"}


@dataclass(frozen=True)
class Demo:
    """A pair, and the methods that are compared on it, each at the best learning rate of docs/results.md."""

    about: str
    teacher: str
    student: str
    methods: dict[str, tuple[str, dict[str, object]]]  # name -> recipe, settings
    max_new_tokens: int = MAX_RESPONSE_TOKENS


DEMOS = {
    "same": Demo(
        "A student and a teacher of one origin solve chained sums (37+4-9+2=?).",
        "teacher",
        "student",
        {
            "OPRD": ("miniature", {"learning_rate": 2e-3}),
            "OPD top-16": ("miniature", {"learning_rate": 5e-4, "output_loss": "top_k", **OPD}),
        },
    ),
    "bridge": Demo(
        "The student's teacher is deeper and wider and of another origin: hidden states meet in a bridge.",
        "wide-teacher",
        "student",
        {
            "bridge, then full KL": ("miniature-bridge", {}),
            "full KL": (
                "miniature",
                {
                    "teacher_model_name_or_path": "miniature:wide-teacher",
                    "learning_rate": 1e-3,
                    "output_loss": "full",
                    **OPD,
                },
            ),
        },
    ),
    "tokenizer": Demo(
        "The student writes digit by digit; to its teacher a two-digit number is one token.",
        "teacher",
        "digit-student",
        {
            "bridge": (
                "miniature-tokenizer",
                {"representation_weight": 1, "output_loss": "none", "bridge": "auto", "bridge_prompts": 1024},
            ),
            "prefix marginals": ("miniature-tokenizer", {}),
        },
        MAX_RESPONSE_DIGITS,
    ),
}
SAMPLES = 16
ANEW = "oprd demo begins anew"  # every demo has a folder of its own


def rebuild_assets() -> None:
    """Train student and teacher again from the fixed seed, over the files in the package."""
    from oprd.miniature.rebuild import rebuild

    rebuild(Path(str(files("oprd"))) / "miniature" / "assets", announce=_say)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _evaluate(name: str, path: str, max_new_tokens: int) -> dict[str, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from oprd.evaluation.evaluate import evaluate

    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    result = evaluate(
        model,
        tokenizer,
        held_out(),
        samples=SAMPLES,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        batch_size=512,
        progress=f"evaluating {name}",
    ).summary()
    return {
        "model": name,
        f"Avg@{SAMPLES}": round(result["avg_at_k"]["value"], 1),
        "95 % interval": f"{result['avg_at_k']['low']:.1f} to {result['avg_at_k']['high']:.1f}",
        f"Best@{SAMPLES}": round(result["best_at_k"]["value"], 1),
        "mean length": round(result["mean_length"]["value"], 1),
    }


def run_demo(out: str, *, which: str = "same", steps: int | None = None, seed: int = 0) -> list[dict[str, object]]:
    """Evaluate teacher and student, distil with each method, evaluate again, draw the plots; one row per model."""
    from transformers.utils import logging as transformers_logging

    from oprd.insight.plots import plot_runs
    from oprd.models import resolve_path
    from oprd.training.callbacks import read_metrics
    from oprd.training.run import run

    transformers_logging.disable_progress_bar()
    demo, root = DEMOS[which], Path(out)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    _say(
        f"{demo.about} Each method gets the same budget; the student writes the\nanswers it learns from. "
        f"{len(held_out())} held-out problems, {SAMPLES} samples each, T=0.7."
    )
    rows = [
        _evaluate(role, resolve_path(f"miniature:{name}"), demo.max_new_tokens) | {"seconds": None}
        for role, name in (("teacher", demo.teacher), ("student", demo.student))
    ]
    curves = {}
    for name, (recipe, settings) in demo.methods.items():
        directory = root / stamp / name.lower().replace(" ", "-")
        settings = {
            **settings,
            "output_dir": directory,
            "seed": seed,
            **({"max_steps": steps} if steps is not None else {}),
        }
        arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        started = time.perf_counter()
        last, _ = run(["--config", recipe, *arguments], description=name, afterwards=ANEW)
        seconds = time.perf_counter() - started
        rows.append(_evaluate(name, str(last / "final"), demo.max_new_tokens) | {"seconds": round(seconds)})
        curves[name] = read_metrics(directory / "metrics.jsonl")
        if last != directory:  # a second stage goes on counting
            steps_before = curves[name][-1]["step"]
            curves[name] += [row | {"step": row["step"] + steps_before} for row in read_metrics(last / "metrics.jsonl")]
    references = {f"{row['model']} (T=0.7)": row[f"Avg@{SAMPLES}"] / 100 for row in rows[:2]}
    plot_runs(curves, root / "plots", references=references)
    return rows
