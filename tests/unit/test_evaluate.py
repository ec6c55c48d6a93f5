import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd.evaluation.evaluate import batch_seed, evaluate
from oprd.miniature.task import MAX_RESPONSE_TOKENS, held_out
from oprd.models import resolve_path

PROBLEMS = held_out()[:5]  # of several lengths, and not in order of length


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_path("miniature:student"))


@pytest.fixture(scope="module")
def student():
    return AutoModelForCausalLM.from_pretrained(resolve_path("miniature:student"))


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForCausalLM.from_pretrained(resolve_path("miniature:teacher"))


def draw(model, tokenizer, problems=PROBLEMS, **settings):
    settings = {"samples": 2, "max_new_tokens": MAX_RESPONSE_TOKENS, "top_p": 1.0, **settings}
    return evaluate(model, tokenizer, problems, **settings)


def test_equals_generate_and_a_count_up_to_the_end_token(student, tokenizer):
    problem = PROBLEMS[1]
    result = draw(student, tokenizer, [problem], samples=4, seed=5)
    inputs = tokenizer([problem["prompt"]] * 4, return_tensors="pt")
    torch.manual_seed(batch_seed(5, 0))
    generated = student.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_RESPONSE_TOKENS,
        do_sample=True,
        temperature=0.7,
        top_k=0,
    )[:, inputs["input_ids"].shape[1] :]
    rows = []
    for row in generated.tolist():
        rows.append(row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row)
    assert result.lengths == [[len(row) for row in rows]]
    assert result.responses == [[tokenizer.decode(row, skip_special_tokens=True) for row in rows]]


def test_lengths_count_the_end_token(teacher, tokenizer):
    result = draw(teacher, tokenizer, temperature=0.01)
    assert result.responses == [[problem["solution"]] * 2 for problem in PROBLEMS]
    assert result.lengths == [[len(tokenizer(problem["solution"])["input_ids"]) + 1] * 2 for problem in PROBLEMS]
    assert len({length for row in result.lengths for length in row}) > 2


def test_a_response_that_is_cut_off_has_no_end_token(teacher, tokenizer):
    result = draw(teacher, tokenizer, temperature=0.01, max_new_tokens=5)
    assert result.lengths == [[5, 5]] * len(PROBLEMS)
    for problem, row in zip(PROBLEMS, result.responses, strict=True):
        assert row == [tokenizer.decode(tokenizer(problem["solution"])["input_ids"][:5])] * 2
    assert result.correct == [[False, False]] * len(PROBLEMS)


def test_outcomes_stay_with_their_problems(teacher, tokenizer):
    """A teacher that is all but certain: right with its own answers, wrong with its neighbour's."""
    prompts = [len(problem["prompt"]) for problem in PROBLEMS]
    assert prompts != sorted(prompts)
    assert draw(teacher, tokenizer, temperature=0.01).correct == [[True, True]] * len(PROBLEMS)
    swapped = [dict(problem) for problem in PROBLEMS]
    swapped[0]["answer"], swapped[3]["answer"] = swapped[3]["answer"], swapped[0]["answer"]
    assert swapped[0]["answer"] != swapped[3]["answer"]
    expected = [[index not in (0, 3)] * 2 for index in range(len(PROBLEMS))]
    # Batches of three cut through problems.
    assert draw(teacher, tokenizer, swapped, temperature=0.01, batch_size=3).correct == expected


def test_one_seed_one_outcome(student, tokenizer):
    first = draw(student, tokenizer, temperature=1.0, seed=1)
    assert draw(student, tokenizer, temperature=1.0, seed=1) == first
    assert draw(student, tokenizer, temperature=1.0, seed=2).responses != first.responses
    assert any(len(set(row)) == 2 for row in first.responses)  # the samples of a problem are separate draws


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_and_the_random_state_as_they_were(student, tokenizer, training):
    student.train(training)
    before = torch.get_rng_state()
    draw(student, tokenizer, PROBLEMS[:1])
    assert torch.get_rng_state().equal(before)
    assert student.training is training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in student.parameters())
    student.eval()
