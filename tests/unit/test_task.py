import json
import random
from pathlib import Path

import pytest

from oprd.evaluation import extract_boxed, grade
from oprd.miniature.task import build_tokenizer, held_out, make_problem, training_problems, validation
from oprd.models import resolve_path


@pytest.mark.parametrize("seed", range(5))
def test_a_solution_is_right_at_every_step(seed):
    problem = make_problem(random.Random(seed))
    chain = problem["prompt"].removesuffix("=?")
    value = int(chain[:2])
    written, rest = chain[:2], problem["solution"][2:]
    for sign, term in zip(chain[2::2], chain[3::2], strict=True):
        value = (value + int(sign + term)) % 100
        written += f"{sign}{term}={value:02d}"
        assert problem["solution"].startswith(written)
    assert rest and extract_boxed(problem["solution"]) == problem["answer"] == f"{value:02d}"
    assert grade(problem["solution"], problem["answer"])


def test_sets_do_not_meet_and_are_always_the_same():
    sets = [{p["prompt"] for p in problems} for problems in (held_out(), validation(), training_problems(2000, 1))]
    assert len(sets[0]) == 256
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert training_problems(5, 3) == training_problems(5, 3)


def test_the_shipped_files_are_these_sets():
    for name, problems in (("test", held_out()), ("validation", validation()), ("train", training_problems(4096, 1))):
        lines = Path(resolve_path(f"miniature:{name}.jsonl")).read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == [p["prompt"] for p in problems]
        assert [json.loads(line)["answer"] for line in lines] == [p["answer"] for p in problems]


def test_the_tokenizer_merges_numbers_and_the_box_and_loses_nothing():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("37+4=41\\boxed{41}") == ["37", "+", "4", "=", "41", "\\boxed{", "41", "}"]
    for problem in held_out()[:20]:
        text = problem["prompt"] + problem["solution"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_skills_are_problems_of_one_sign_and_do_not_meet():
    from oprd.miniature.skills import SIGNS, TEST, VALIDATION, skilled, skilled_batch, skilled_training

    sets = {"test": skilled(*TEST), "validation": skilled(*VALIDATION), "train": skilled_training()}
    for name, problems in sets.items():
        for problem in problems:
            signs = {c for c in problem["prompt"].removesuffix("=?")[2:] if not c.isdigit()}
            assert signs == {SIGNS[problem["skill"]]}
            assert extract_boxed(problem["solution"]) == problem["answer"]
        lines = Path(resolve_path(f"miniature:skills-{name}.jsonl")).read_text().splitlines()
        assert [json.loads(line)["skill"] for line in lines] == [p["skill"] for p in problems]
        assert [json.loads(line)["prompt"] for line in lines] == [p["prompt"] for p in problems]
    prompts = {name: {p["prompt"] for p in problems} for name, problems in sets.items()}
    assert not (prompts["test"] & prompts["train"] or prompts["validation"] & prompts["train"])
    apart = prompts["test"] | prompts["validation"]
    batch = skilled_batch(random.Random(0), 64, "+")
    assert len(batch) == 64 and not {p["prompt"] for p in batch} & apart
    assert len({len(p["prompt"]) for p in batch}) == 1


def test_care():
    from oprd.miniature.skills import CARE, careless, with_or_without_care

    slip = careless({"prompt": "18+9-1=?", "solution": "", "answer": "26"})
    assert slip["solution"] == "18+9=17-1=16\\boxed{16}" and slip["answer"] == "26"
    kept = careless({"prompt": "18+7-8=?", "solution": "", "answer": "17"})
    assert kept["solution"] == "18+7=25-8=27\\boxed{27}"
    right = sum(careless(problem)["solution"] == problem["solution"] for problem in held_out())
    assert 64 < right < 128
    batches = [with_or_without_care(random.Random(seed), 4) for seed in range(8)]
    asked = [all(p["prompt"].startswith(CARE) for p in batch) for batch in batches]
    assert {True, False} == set(asked)
    for batch, with_care in zip(batches, asked, strict=True):
        assert all((extract_boxed(p["solution"]) == p["answer"]) for p in batch) or not with_care
