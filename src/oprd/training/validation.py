"""Scores on benchmarks while a run goes on, and the best student so far by a validation set."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback

from oprd._compat import unwrap_model_for_generation, vllm_sampling
from oprd.evaluation.benchmarks import Benchmark, load_benchmark, statement_of
from oprd.evaluation.evaluate import draw, encode_prompts, room_for, write_evaluation
from oprd.evaluation.sampling import Answer, Engine, Sampling, TransformersEngine, answer_of
from oprd.evaluation.summary import Evaluation
from oprd.lineage.evaluations import EVALUATIONS
from oprd.records import read_json, write_json
from oprd.training.options import BENCHMARK_HELP
from oprd.training.saving import save_final
from oprd.training.tools import rendering
from oprd.training.turns import TurnsEngine

logger = get_logger(__name__)

BEST, SCORE = "best", "score.json"


def _option(name: str, default: Any) -> Any:
    return field(default=default, metadata={"help": BENCHMARK_HELP[name].replace("%", "%%")})


@dataclass
class BenchmarkConfig:
    """Which benchmarks are scored during training, how, and what counts as best.

    Raises:
        ValueError: a setting that would be ignored, or one that is needed and missing.
    """

    validation_benchmark: str | None = _option("validation_benchmark", None)
    test_benchmarks: str | None = _option("test_benchmarks", None)
    benchmark_steps: int | None = _option("benchmark_steps", None)
    benchmark_samples: int = _option("benchmark_samples", 4)
    benchmark_temperature: float = _option("benchmark_temperature", 0.7)
    benchmark_top_p: float = _option("benchmark_top_p", 0.95)
    benchmark_max_new_tokens: int | None = _option("benchmark_max_new_tokens", None)
    benchmark_batch_size: int = _option("benchmark_batch_size", 128)
    benchmark_limit: int | None = _option("benchmark_limit", None)
    best_metric: str = _option("best_metric", "avg_at_k")

    def __post_init__(self) -> None:
        if isinstance(self.test_benchmarks, list):
            self.test_benchmarks = ",".join(map(str, self.test_benchmarks))
        used = self.validation_benchmark is not None or bool(self.tests)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if changed and not used:
            raise ValueError(f"{', '.join(changed)} would be ignored: set validation_benchmark or test_benchmarks.")
        if used and (self.benchmark_steps is None or self.benchmark_steps < 1):
            raise ValueError(
                "validation_benchmark and test_benchmarks need benchmark_steps: score every so many updates."
            )
        if self.best_metric != "avg_at_k" and self.validation_benchmark is None:
            raise ValueError(
                "best_metric would be ignored: the best student is chosen on validation_benchmark, never on a test."
            )
        power = self.best_metric.removeprefix("pass_at_")
        if self.best_metric not in ("avg_at_k", "best_at_k") and not (power.isdigit() and power != self.best_metric):
            raise ValueError(f"best_metric must be avg_at_k, best_at_k or pass_at_N, got {self.best_metric!r}.")
        if power.isdigit() and not 1 <= int(power) <= self.benchmark_samples:
            raise ValueError(f"best_metric: {self.best_metric} needs benchmark_samples of at least {power}.")
        if used:
            self.sampling(max_new_tokens=1, seed=0)

    @property
    def tests(self) -> list[str]:
        """Names of the test benchmarks."""
        return [name.strip() for name in (self.test_benchmarks or "").split(",") if name.strip()]

    def sampling(self, *, max_new_tokens: int, seed: int) -> Sampling:
        """How answers are drawn."""
        return Sampling(
            samples=self.benchmark_samples,
            temperature=self.benchmark_temperature,
            top_p=self.benchmark_top_p,
            max_new_tokens=self.benchmark_max_new_tokens or max_new_tokens,
            batch_size=self.benchmark_batch_size,
            seed=seed,
        )


def load_benchmarks(
    config: BenchmarkConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    max_new_tokens: int,
    tools: Sequence[Callable] = (),
) -> dict[str, Benchmark]:
    """The benchmarks of a run, the validation set first.

    Args:
        context, max_new_tokens: the student's context, and the most tokens of an answer where the config says nothing.
        tools: what the student may call while it answers.

    Raises:
        ValueError: a test benchmark with problems of the validation set; two benchmarks of one name; a prompt that leaves
            no room for an answer; tools, and prompts that are no chats.
    """
    found: dict[str, Benchmark] = {}
    for source in [*([config.validation_benchmark] if config.validation_benchmark else []), *config.tests]:
        benchmark = load_benchmark(source, has_template=bool(tokenizer.chat_template), limit=config.benchmark_limit)
        wanted = config.benchmark_max_new_tokens or max_new_tokens
        if tools and benchmark.format != "chat":
            raise ValueError(f"{source}: its prompts are text, and tools are called in chats. Give chat messages.")
        try:
            prompts = encode_prompts(tokenizer, benchmark.problems, rendering(tools, tokenizer))
            room_for(prompts, context, wanted, wanted)
        except ValueError as error:
            raise ValueError(f"{source}: {error} Or set benchmark_max_new_tokens.") from error
        if benchmark.name in found:
            raise ValueError(
                f"Two benchmarks are called {benchmark.name}: {source} and {found[benchmark.name].source}. Rename one of the files; a "
                "validation set must not be a test set."
            )
        found[benchmark.name] = benchmark
    if config.validation_benchmark:
        first, *tests = found.values()
        chosen = {statement_of(problem.prompt) for problem in first.problems}
        for test in tests:
            shared = sum(statement_of(problem.prompt) in chosen for problem in test.problems)
            if shared:
                raise ValueError(
                    f"test benchmark {test.name} shares {shared} problems with the validation benchmark {first.name}: a best "
                    "student chosen on test problems says nothing. Choose another validation_benchmark."
                )
    return found


class RolloutEngine:
    """The vLLM that writes the trainer's rollouts, as an `Engine`. It takes no seed: scores vary a little by chance.

    Every process asks at once and for as many answers, as vLLM's server needs it: short batches are filled up.
    """

    name = "vllm (rollouts)"

    def __init__(self, trainer: Any) -> None:
        self._trainer, self.tokenizer, self.context = trainer, trainer.processing_class, None

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
        """See `Engine`."""
        asked = [*prompts, *[prompts[-1]] * (sampling.batch_size - len(prompts))]
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
        with vllm_sampling(self._trainer, **chosen) as generation:
            _, written, _, _ = generation.generate(prompts=asked, images=None, num_generations=1)
        ends = set(self._trainer.eos_token_ids)
        return [answer_of(self.tokenizer, list(ids), ends) for ids in written[: len(prompts)]]


class _Watched:
    """An engine that can be left between two batches."""

    def __init__(self, engine: Engine, check: Callable[[], None]) -> None:
        self._engine, self._check = engine, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, seed: int) -> list[Answer]:
        """See `Engine`."""
        self._check()
        return self._engine.generate(prompts, sampling, seed)


class BenchmarkScores(TrainerCallback):
    """Scores the student every n updates into ``evaluations/step-N/`` and the log; keeps the best under ``best``.

    ``best`` is a link to ``best-step-N/``, moved in one stroke, with the score that made it best in ``score.json``. The
    random state of training is left alone: a run with benchmarks trains as one without.
    """

    def __init__(self, trainer: Any, config: BenchmarkConfig, benchmarks: dict[str, Benchmark]) -> None:
        self._trainer, self._config, self._benchmarks = trainer, config, benchmarks
        self._directory = Path(trainer.args.output_dir)
        self._sampling = config.sampling(max_new_tokens=trainer.args.max_completion_length, seed=trainer.args.seed)
        self._validation = next(iter(benchmarks)) if config.validation_benchmark else None
        self._scored_at: int | None = None
        self.seconds = 0.0
        trainer.scorer = self._score_if_due
        for benchmark in benchmarks.values():
            self._warn_of_training_problems(benchmark)

    def _warn_of_training_problems(self, benchmark: Benchmark) -> None:
        dataset = self._trainer.train_dataset
        seen = {statement_of(prompt) for prompt in dataset["prompt"]} if hasattr(dataset, "__len__") else set()
        shared = sum(statement_of(problem.prompt) in seen for problem in benchmark.problems)
        if shared:
            logger.warning(
                f"{shared} of {len(benchmark.problems)} problems of {benchmark.name} are among the training prompts: its score "
                "says how well they were learnt, not how the student does on new ones."
            )

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.score(state, control)

    def _score_if_due(self) -> None:
        """Called by the trainer where evaluations are: after the step's log, before its checkpoint."""
        state = self._trainer.state
        if state.global_step % self._config.benchmark_steps == 0 and state.global_step < state.max_steps:
            self.score(state, self._trainer.control)

    def score(self, state: Any, control: Any) -> None:
        """Score the student as it is now. Every process must call it."""
        trainer, step = self._trainer, state.global_step
        if self._scored_at == step:
            return
        self._scored_at, started = step, time.monotonic()
        is_main = trainer.accelerator.is_main_process
        logs: dict[str, float] = {}
        found: dict[str, Evaluation] = {}
        for name, benchmark in self._benchmarks.items():
            evaluation = found[name] = self._evaluate(benchmark, f"{name} at {step}")
            if not is_main:
                continue
            settings = {"model": str(self._directory), "step": step, "role": self._role(name)}
            settings["engine"] = self._engine_name
            folder = self._directory / EVALUATIONS / f"step-{step:06d}" / name
            summary = write_evaluation(folder, benchmark, self._sampling, evaluation, settings)
            prefix = (
                name if name == self._role(name) else f"{self._role(name)}/{name}"
            )  # a file may be called validation
            for metric in ("avg_at_k", "best_at_k", "mean_length"):
                logs[f"{prefix}/{metric}"] = summary[metric]["value"]
            logs[f"{prefix}/cut_off"] = summary["cut_off"]
            shown = summary["avg_at_k"]
            logger.info(
                f"update {step}, {name}: Avg@{summary['samples']} {shown['value']:.1f} "
                f"[{shown['low']:.1f}, {shown['high']:.1f}], {summary['mean_length']['value']:.0f} tokens"
            )
        if is_main:
            due = control.should_log  # this update's own log, which a log from here would take for done
            trainer.callback_handler.on_log(trainer.args, state, control, logs)
            control.should_log = due
        if self._validation is not None:
            self._keep_if_best(step, found[self._validation])
        self.seconds += time.monotonic() - started

    def _role(self, name: str) -> str:
        return "validation" if name == self._validation else "test"

    def _evaluate(self, benchmark: Benchmark, progress: str) -> Evaluation:
        """Processes share the batches; sharded models answer them all together, in step."""
        trainer, accelerator = self._trainer, self._trainer.accelerator
        tokenizer = trainer.processing_class
        sharded = (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled) and not trainer.use_vllm
        part = (0, 1) if sharded else (accelerator.process_index, accelerator.num_processes)
        shown = progress if accelerator.is_main_process and not trainer.args.disable_tqdm else None
        with ExitStack() as stack:
            if trainer.tools:
                engine: Engine = TurnsEngine(trainer)
                stack.enter_context(accelerator.autocast())
            elif trainer.use_vllm:
                engine = RolloutEngine(trainer)
            else:
                unwrapped = unwrap_model_for_generation(trainer.model_wrapped, accelerator)
                engine = TransformersEngine(stack.enter_context(unwrapped), tokenizer)
                stack.enter_context(accelerator.autocast())
            self._engine_name = engine.name
            engine = _Watched(engine, trainer.check_stop)
            template = rendering(trainer.tools, tokenizer)
            graded = draw(engine, benchmark.problems, self._sampling, part=part, progress=shown, template=template)
        return Evaluation.of(graded if part == (0, 1) else gather_object(graded))

    def _keep_if_best(self, step: int, evaluation: Evaluation) -> None:
        trainer, best = self._trainer, self._directory / BEST
        estimate = evaluation.estimate(self._config.best_metric)
        is_better = not best.exists() or read_json(best / SCORE)["value"] < estimate["value"]
        (is_better,) = broadcast_object_list([is_better])  # the first process decides
        if not is_better:
            return
        target = self._directory / f"{BEST}-step-{step:06d}"
        save_final(trainer, target, goes_on=True)
        if trainer.accelerator.is_main_process:
            score = {"step": step, "benchmark": self._validation, "metric": self._config.best_metric, **estimate}
            write_json(target / SCORE, score)
            old = best.resolve() if best.is_symlink() else None
            fresh = self._directory / f".{BEST}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(target.name)
            os.replace(fresh, best)
            if old is not None and old != target.resolve():
                shutil.rmtree(old, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()


def best_score(run: Path) -> dict[str, Any] | None:
    """Step, benchmark, metric and value of the student in ``best``, or None."""
    path = Path(run) / BEST / SCORE
    return read_json(path) if path.exists() else None
