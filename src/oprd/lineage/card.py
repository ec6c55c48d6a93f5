"""``final/README.md``: a model card that says where the student came from, how good it is, and how to make it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from oprd.evaluation.benchmarks import FILE_KINDS
from oprd.lineage.evaluations import Found, find_evaluations, last_update, of_final
from oprd.lineage.manifest import read_manifest
from oprd.records import read_json, write_text

TAGS = ["oprd", "trl", "distillation", "on-policy-distillation"]
CITATION = """\
@article{oprd2026,
    title  = {{OPRD: On-Policy Representation Distillation}},
    year   = 2026,
    eprint = {arXiv:2606.06021},
}"""


SECRETS = ("token", "use_auth_token", "hub_token", "push_to_hub_token")  # as settings for loading a model may hold


def hub_id(name: str | None, where: str | Path = ".") -> str | None:
    """The name if it is one of the Hub's, else None: not a data file, nor a folder or file here or in ``where``."""
    if not name or ":" in name or Path(name).suffix.lower() in FILE_KINDS:
        return None
    if Path(name).exists() or (Path(where) / name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def root_student(manifest: dict[str, Any]) -> dict[str, Any]:
    """Record of the model that the line of runs began with: the student of the first run whose student is no run's."""
    seen: set[str] = set()
    while manifest.get("parent") and manifest["parent"]["run"] not in seen:
        seen.add(manifest["parent"]["run"])
        try:
            manifest = read_manifest(Path(manifest["parent"]["run"]))
        except ValueError:  # the parent's folder is gone
            break
    return manifest["student"]


def _estimate(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"


def _results(evaluations: dict[str, Found]) -> list[str]:
    if not evaluations:
        return ["Not evaluated yet: `oprd eval RUN --on BENCHMARK` fills this section."]
    lines = [
        "| benchmark | problems | samples | Avg@k | Best@k | mean length | cut off |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in evaluations.items():
        s = found.summary
        lines.append(
            f"| {name} | {s['problems']} | {s['samples']} | {_estimate(s['avg_at_k'])} | {_estimate(s['best_at_k'])} | "
            f"{_estimate(s['mean_length'])} | {s['cut_off']:.1f} % |"
        )
    sampling = next(iter(evaluations.values())).summary["settings"]["sampling"]
    return [
        *lines,
        "",
        f"In percent, with 95 % intervals over problems (temperature {sampling['temperature']}, top_p {sampling['top_p']}, at most "
        f"{sampling['max_new_tokens']} new tokens).",
    ]


def _inputs(manifest: dict[str, Any]) -> list[str]:
    lines = ["| | name | content (SHA-256) |", "|---|---|---|"]
    teacher = manifest["teacher"]
    teachers = {f"teacher {name}": record for name, record in teacher.get("teachers", {}).items()} or {
        "teacher": teacher
    }
    named = {"student": manifest["student"], **teachers, "bridge": manifest.get("bridge")}
    named |= {f"data: {key}": record for key, record in manifest["data"].items()}
    lines += [f"| {label} | `{r['name']}` | `{r['hash'][:16]}` |" for label, r in named.items() if r]
    return lines


def _teacher(record: dict[str, Any]) -> str:
    """The teacher, or teachers, in words."""
    if "kind" in record:
        return f"itself ({record['kind']}, with privileged text in its prompts)"
    return " and ".join(f"`{one['name']}`" for one in record.get("teachers", {"": record}).values())


def _loading(config: dict[str, Any]) -> list[str]:
    """How to load a student that is more than weights."""
    bits = 4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None
    if bits is None:
        return []
    return [
        "## How to load it",
        "",
        f"The weights are quantised to {bits} bits (bitsandbytes), and the adapters that were trained lie beside them, unmerged. "
        "With bitsandbytes and peft installed, `AutoModelForCausalLM.from_pretrained` loads both from a local copy of this "
        "folder (from the Hub: `huggingface_hub.snapshot_download` first).",
        "",
    ]


def _public(settings: Any) -> Any:
    """Settings without what opens doors: a card is made to be uploaded."""
    if isinstance(settings, dict):
        return {key: _public(value) for key, value in settings.items() if key not in SECRETS}
    return [_public(value) for value in settings] if isinstance(settings, list) else settings


def render_card(run: Path, best: dict[str, Any] | None = None) -> ModelCard:
    """The card of a run's final student, from its manifest and its evaluations; or of its best one.

    Args:
        best: ``score.json`` of the best student.
    """
    manifest = read_manifest(run)
    config, cost = manifest["config"], manifest["cost"]
    found, last = find_evaluations(run), last_update(manifest)
    if best is None:
        evaluations = of_final(found, last)
    else:  # its own, else those of training after the same update
        named = [
            dataclasses.replace(one, who="final") if one.who == "best" else one for one in found if one.who != "final"
        ]
        evaluations = of_final(named, best["step"])
    root, where = root_student(manifest), manifest["directory"]
    base = hub_id(root["name"], where) if root["revision"] else None  # only what came from the Hub has a commit
    dataset = hub_id(config.get("dataset_name"), where)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        base_model=base,
        base_model_relation="finetune" if base else None,
        datasets=[dataset] if dataset else None,
        model_name=manifest["run"],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=hub_id(found.summary["settings"]["benchmark"]["source"], where) or name,
                dataset_name=name,
                metric_type="accuracy",
                metric_name=f"Avg@{found.summary['samples']}",
                metric_value=round(found.summary["avg_at_k"]["value"], 2),
            )
            for name, found in evaluations.items()
        ]
        or None,
    )
    session = manifest["sessions"][-1]
    body = [
        f"# {manifest['run']}",
        "",
        f"`{root['name']}` distilled from {_teacher(manifest['teacher'])} on its own answers, with "
        "[oprd](https://arxiv.org/abs/2606.06021) (on-policy representation distillation).",
        "",
        *_chosen(best),
        *_loading(config),
        "## Where it comes from",
        "",
        *_inputs(manifest),
        "",
        "## How good it is",
        "",
        *_results(evaluations),
        "",
        "## What it cost",
        "",
        f"{cost['wall_seconds'] / 3600:.2f} hours on {session['hardware']['processes']} x {cost['device']}, "
        f"{cost['tokens_generated']:,} tokens generated, {cost['tokens_trained']:,} trained on, "
        f"{cost['peak_memory_bytes'] / 1e9:.1f} GB at most ({cost['peak_memory_of']}).",
        "",
        "## How to make it again",
        "",
        "```bash",
        "oprd train --from RUN          # RUN: the folder with this run's manifest.json",
        "oprd train --config recipe.yaml",
        "```",
        "",
        "```yaml",
        yaml.safe_dump(_public(config), sort_keys=True).strip(),
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in session["versions"].items()) + ".",
        "",
        "## Citation",
        "",
        "```bibtex",
        CITATION,
        "```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body) + "\n")


def _chosen(best: dict[str, Any] | None) -> list[str]:
    """Which student of the run this is, where it is not the last."""
    if best is None:
        return []
    return [
        f"This is the run's best student, the one after update {best['step']}: it was chosen by {best['metric']} on "
        f"{best['benchmark']} ({_estimate(best)}), so its score there flatters it. The last one is in the run's `final/`.",
        "",
    ]


def write_card(run: Path) -> Path:
    """Write the card into the run's ``final/``, and one into ``best/`` where there is a best student."""
    run = Path(run)
    path, score = run / "final" / "README.md", run / "best" / "score.json"
    write_text(path, str(render_card(run)))
    if score.exists():
        write_text(score.parent / "README.md", str(render_card(run, read_json(score))))
    return path
