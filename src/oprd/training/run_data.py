"""Everything that a run reads besides models: prompts to train on, prompts to evaluate on, benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import AutoConfig

from oprd.evaluation.benchmarks import Benchmark
from oprd.lineage.inputs import data_record
from oprd.model_files import check_model, load_tokenizer
from oprd.models import resolve_path
from oprd.prompts import load_prompts
from oprd.training.config import OPRDConfig
from oprd.training.privileged import PromptTemplate
from oprd.training.recipe import Configs, DataConfig
from oprd.training.teachers import Routes, named_teachers
from oprd.training.tools import load_tools, tool_records
from oprd.training.validation import load_benchmarks


@dataclass(frozen=True)
class RunData:
    """Everything that a run reads besides models."""

    train: Dataset
    eval: Dataset | None
    benchmarks: dict[str, Benchmark]
    tools: list[Callable] = field(default_factory=list)

    def records(self, data: DataConfig) -> dict[str, Any]:
        """Content hashes for the manifest."""
        named = {"train": data_record(str(data.dataset_name), self.train)}
        if self.eval is not None:
            named["eval"] = data_record(str(data.eval_dataset_name), self.eval)
        for name, benchmark in self.benchmarks.items():
            named[name] = {"name": benchmark.source, "rows": len(benchmark.problems), "hash": benchmark.hash}
        return named | tool_records(data.tools)


def _columns(args: OPRDConfig) -> tuple[str, ...]:
    """Columns besides prompt and answer that the run reads."""
    template = args.teacher_prompt_template
    privileged = () if template is None else PromptTemplate(template).columns
    routes = None if args.teachers is None else Routes.of(named_teachers(args), args.teacher_column)
    return tuple(dict.fromkeys((*privileged, *(() if routes is None else routes.columns))))


def load_data(configs: Configs) -> RunData:
    """Prompts, benchmarks and tools, checked. Runs the files that tools are in.

    Raises:
        ValueError: no student or no prompts named, evaluation half set up, or what the checks of data and tools find.
    """
    data, args, model, _, benchmark = configs
    if model.model_name_or_path is None:
        raise ValueError("No student: set model_name_or_path.")
    if data.dataset_name is None:
        raise ValueError("No prompts: set dataset_name to a Hub id or a parquet, json or jsonl file.")
    teachers = {name: settings.get("model_name_or_path") for name, settings in (args.teachers or {}).items()}
    one = (args.teacher_model_name_or_path, args.teacher_url, args.teacher_model_kind)
    if not teachers and one == (None, None, None):
        raise ValueError(
            "No teacher: set teacher_model_name_or_path, teacher_url or teachers, or teacher_model_kind for a student that "
            "teaches itself."
        )
    named = {"student": model.model_name_or_path, "teacher": args.teacher_model_name_or_path}
    named |= {f"teacher {name}": path for name, path in teachers.items()}
    for role, name in ((role, name) for role, name in named.items() if name is not None):
        check_model(resolve_path(name), role, trust_remote_code=args.trust_remote_code)
    tools = load_tools(data.tools)
    columns = {"prompt_column": data.prompt_column, "answer_column": data.answer_column, "as_chat": data.as_chat}
    columns["columns"] = _columns(args)
    train_dataset = load_prompts(
        data.dataset_name,
        config=data.dataset_config,
        split=data.dataset_train_split,
        drop_duplicates=data.drop_duplicates,
        **columns,
    )
    evaluates = args.eval_strategy != "no"
    if evaluates != (data.eval_dataset_name is not None):
        raise ValueError("Evaluation needs both eval_strategy (steps or epoch) and eval_dataset_name; one is missing.")
    eval_dataset = (
        load_prompts(data.eval_dataset_name, config=data.eval_config, split=data.eval_split, **columns)
        if evaluates
        else None
    )
    benchmarks: dict[str, Benchmark] = {}
    if benchmark.validation_benchmark or benchmark.tests:
        student = resolve_path(model.model_name_or_path)
        where = {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code}
        config = AutoConfig.from_pretrained(student, **where).get_text_config()
        benchmarks = load_benchmarks(
            benchmark,
            load_tokenizer(student, "student", **where),
            context=getattr(config, "max_position_embeddings", None),
            max_new_tokens=args.max_completion_length,
            tools=tools,
        )
    return RunData(train_dataset, eval_dataset, benchmarks, tools)
