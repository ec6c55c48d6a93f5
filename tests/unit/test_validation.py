"""Scores during training where no run is needed to see them: the settings, and vLLM's side."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from oprd.evaluation.benchmarks import load_benchmark
from oprd.evaluation.evaluate import draw
from oprd.evaluation.sampling import Sampling
from oprd.models import resolve_path
from oprd.training.validation import BenchmarkConfig, RolloutEngine


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_path("miniature:student"))


class FakeVLLM:
    """Stands in for TRL's ``VLLMGeneration``: notes its settings at every call, and answers with each prompt's length."""

    def __init__(self, tokenizer):
        self.temperature, self.top_p, self.top_k, self.min_p = 1.0, 1.0, 50, 0.1
        self.repetition_penalty, self.max_completion_length = 1.3, 44
        self._tokenizer, self.calls, self.synced = tokenizer, [], 0

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations):
        self.calls.append({k: v for k, v in vars(self).items() if k in SETTINGS} | {"asked": len(prompts)})
        written = [[*self._tokenizer(str(len(p)))["input_ids"], self._tokenizer.eos_token_id, 5] for p in prompts]
        return prompts, written, None, None


SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length")


@pytest.fixture
def trainer(tokenizer):
    return SimpleNamespace(
        vllm_generation=FakeVLLM(tokenizer),
        _last_loaded_step=3,
        state=SimpleNamespace(global_step=4),
        processing_class=tokenizer,
        eos_token_ids=[tokenizer.eos_token_id],
    )


def test_vllm_answers_with_the_present_weights_and_the_benchmarks_sampling(trainer):
    vllm = trainer.vllm_generation
    before = {name: getattr(vllm, name) for name in SETTINGS}
    sampling = Sampling(samples=2, temperature=0.5, top_p=0.9, max_new_tokens=7, batch_size=4)
    answers = RolloutEngine(trainer).generate([[5, 6], [7, 8, 9]], sampling, seed=0)
    assert [(answer.text, answer.tokens, answer.cut_off) for answer in answers] == [("2", 2, False), ("3", 2, False)]
    wanted = {"temperature": 0.5, "top_p": 0.9, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    assert vllm.calls == [wanted | {"max_completion_length": 7, "asked": 4}]
    assert {name: getattr(vllm, name) for name in SETTINGS} == before
    assert (vllm.synced, trainer._last_loaded_step) == (1, 4)
    RolloutEngine(trainer).generate([[5]], sampling, seed=0)
    assert vllm.synced == 1  # these weights are there


def test_vllm_gets_its_sampling_back_after_an_error(trainer):
    vllm = trainer.vllm_generation
    vllm.generate = None
    with pytest.raises(TypeError):
        RolloutEngine(trainer).generate([[5]], Sampling(max_new_tokens=7), seed=0)
    assert (vllm.temperature, vllm.max_completion_length) == (1.0, 44)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_process_asks_as_often_and_together_they_have_all(trainer, processes):
    benchmark = load_benchmark("miniature:test.jsonl", has_template=False, limit=7)
    sampling = Sampling(samples=2, max_new_tokens=7, batch_size=4)  # four batches, the last of two
    parts, calls = [], set()
    for process in range(processes):
        trainer.vllm_generation.calls = []
        parts += draw(RolloutEngine(trainer), benchmark.problems, sampling, part=(process, processes))
        calls.add((len(trainer.vllm_generation.calls), *(call["asked"] for call in trainer.vllm_generation.calls)))
    assert len(calls) == 1
    whole = draw(RolloutEngine(trainer), benchmark.problems, sampling)
    assert sorted(parts, key=lambda a: (a.index, a.sample)) == sorted(whole, key=lambda a: (a.index, a.sample))


def test_several_test_benchmarks_in_either_spelling():
    for spelled in ("aime24, aime25", ["aime24", "aime25"]):
        assert BenchmarkConfig(test_benchmarks=spelled, benchmark_steps=5).tests == ["aime24", "aime25"]
    assert BenchmarkConfig().tests == []


@pytest.mark.parametrize("metric", ["avg_at_k", "best_at_k", "pass_at_4"])
def test_metrics_that_can_be_best(metric):
    BenchmarkConfig(validation_benchmark="aime24", benchmark_steps=1, best_metric=metric)
