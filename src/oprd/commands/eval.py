"""``oprd eval``: sample answers on benchmarks and grade them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from oprd.commands.shared import parse_json, show_events, show_rows
from oprd.lineage.evaluations import ROLES

LOADING = ("dtype", "device", "trust_remote_code", "tensor_parallel_size", "gpu_memory_utilization", "max_model_len")
PROMPTS = ("prompt_format", "suffix", "split", "limit", "prompt_column", "answer_column")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults where there are any to tell."""

    def _get_help_string(self, action):
        told = action.default in (None, False) or "(default" in action.help
        return action.help if told else super()._get_help_string(action)


def add_eval(commands) -> None:
    """Its words."""
    parser = commands.add_parser(
        "eval",
        help="sample answers to benchmarks and grade them",
        description="Sample k answers to every problem and grade them with math-verify. Every answer is written to responses.jsonl, "
        "the numbers with 95 % intervals to summary.json. A killed evaluation continues where it was when the same "
        "command runs again.",
        formatter_class=Defaults,
    )
    add = parser.add_argument
    add("model", help="a Hub id, a folder, or a run of oprd train (its final student; see --of)")
    add("--on", nargs="+", required=True, metavar="BENCHMARK", help="aime24, aime25, aimo (or amc), math500, gsm8k, a parquet, "
        "json or jsonl file, or a Hub id")  # fmt: skip
    add("--of", nargs="+", choices=ROLES, default=["final"], help="whose answers, where the model is a run: its final or best "
        "student, the student before, the teacher")  # fmt: skip
    add("--out", "--output_dir", default=None, help="where results go, a folder each benchmark (default: the run's evaluations/, else "
        "evaluations/MODEL)")  # fmt: skip
    add("--samples", type=int, default=16, help="answers to each problem")
    add("--temperature", type=float, default=0.7, help="0 is greedy, with one sample")
    add("--top_p", type=float, default=0.95, help="nucleus")
    add("--max_new_tokens", type=int, default=None, help="most tokens of an answer (default: what the context leaves, at most "
        "32768)")  # fmt: skip
    add("--batch_size", type=int, default=None, help="answers drawn at once (default: 64; 1024 with vLLM)")
    add("--seed", type=int, default=0, help="seed of the answers")
    add("--engine", choices=("transformers", "vllm"), default="transformers", help="what generates")
    add("--limit", type=int, default=None, help="the first so many problems of each benchmark only")
    add("--split", default=None, help="split of a Hub dataset (default: test, or the benchmark's own)")
    add("--suffix", default=None, help="instruction added to problems that lack it; an empty one adds nothing (default: to "
        "reason step by step and box the answer; nothing for text in a prompt column)")  # fmt: skip
    add(
        "--prompt_format",
        choices=("auto", "chat", "text"),
        default="auto",
        help="auto: chat where the tokenizer has a template",
    )
    add(
        "--chat_template_kwargs",
        default=None,
        metavar="JSON",
        help='arguments of the template, such as {"enable_thinking": false}',
    )
    add("--prompt_column", default=None, help="column with the prompt (default: prompt, problem or question)")
    add("--answer_column", default=None, help="column with the answer (default: reward_model.ground_truth or answer)")
    add("--revision", default=None, help="revision of a Hub model")
    add("--dtype", default="auto", help="auto is the checkpoint's own")
    add("--device", default=None, help="of transformers, such as cuda:1 (default: the first accelerator, else cpu)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--tensor_parallel_size", type=int, default=None, help="GPUs that vLLM splits the model over")
    add("--gpu_memory_utilization", type=float, default=None, help="share of each GPU's memory that vLLM takes")
    add("--max_model_len", type=int, default=None, help="context length for vLLM")
    add("--json", action="store_true", help="print the summaries as JSON instead of a table")
    parser.set_defaults(run_command=run_eval)


def run_eval(options: argparse.Namespace) -> int:
    """Evaluate, print a table."""
    template = parse_json("--chat_template_kwargs", options.chat_template_kwargs)
    show_events()
    from oprd.insight.compare import result_row
    from oprd.lineage.scoring import refresh_card, score_models, subjects_of

    results = list(
        score_models(
            subjects_of(options.model, options.of, options.out, options.revision),
            options.on,
            engine=options.engine,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            template=template,
            sampling={name: getattr(options, name) for name in ("samples", "temperature", "top_p", "seed")},
            loading={name: getattr(options, name) for name in LOADING if getattr(options, name) is not None},
            prompts={name: getattr(options, name) for name in PROMPTS},
        )
    )
    refresh_card(Path(options.model))
    if options.json:
        show_rows([{"folder": str(folder), **summary} for _, folder, summary in results], as_json=True)
        return 0
    show_rows([{"model": subject.label, **result_row(summary)} for subject, _, summary in results], as_json=False)
    for _, folder, _ in results:
        print(f"Answers and summary: {folder}", file=sys.stderr)
    return 0
