import hashlib
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd import prompts
from oprd.evaluation.benchmarks import SUFFIX, Benchmark, Problem, add_suffix, load_benchmark, problem_id
from oprd.prompts import as_messages

PUBLISHED = SUFFIX.replace("{}", "{{}}")  # as some published files have it


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def as_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def as_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def as_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


WRITERS = {"parquet": as_parquet, "json": as_json, "jsonl": as_jsonl}


def user(text):
    return [{"role": "user", "content": text}]


LAYOUTS = {
    "chat": lambda text, answer: {"prompt": user(text), "reward_model": {"ground_truth": answer, "style": "rule"}},
    "text": lambda text, answer: {"prompt": text, "answer": answer},
    "problem": lambda text, answer: {"id": 7, "problem": text, "solution": "no", "answer": answer},
    "question": lambda text, answer: {"question": text, "answer": answer},
    "worked": lambda text, answer: {
        "question": text,
        "answer": f"Two steps.\n#### One\n1+1=<<1+1={answer}>>.\n#### {answer}",
    },
}
PAIRS = [("What is 1+1?", "2"), ("What is 2+2?", "4"), ("Größer als 2²?", "\\frac{1}{2}")]


@pytest.fixture
def load(tmp_path):
    def write_and_load(rows, kind="jsonl", *, has_template=True, **settings):
        path = tmp_path / f"some.set.{kind}"
        WRITERS[kind](path, rows)
        return load_benchmark(str(path), has_template=has_template, **settings)

    return write_and_load


def plain_id(statement, answer):
    return hashlib.sha256((statement + "\0" + answer).encode()).hexdigest()[:16]


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout(load, tmp_path, kind, layout, has_template):
    made = load([LAYOUTS[layout](*pair) for pair in PAIRS], kind, has_template=has_template)
    form = "chat" if has_template and layout != "text" else "text"
    expected = []
    for text, answer in PAIRS:
        said = text if layout == "text" else f"{text} {SUFFIX}"
        expected.append(Problem(plain_id(text, answer), user(said) if form == "chat" else said, answer))
    assert made == Benchmark("some.set", str(tmp_path / f"some.set.{kind}"), tuple(expected), form)


# What is read

HUB = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "aimo": ("AI-MO/aimo-validation-amc", None, "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
SPELLINGS = {"AIME-24": "aime24", "aime_2024": "aime24", "aime2025": "aime25", "AIME-2025": "aime25", "amc": "aimo"}
SPELLINGS |= {"AMC": "aimo", "MATH-500": "math500", "GSM8K": "gsm8k"} | {name: name for name in HUB}


@pytest.fixture
def hub(monkeypatch):
    asked = []

    def load_dataset(name, config=None, *, split):
        asked.append((name, config, split))
        return [{"problem": text, "answer": answer} for text, answer in PAIRS]

    monkeypatch.setattr(prompts, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_lead_to_the_hub(hub, spelling):
    name = SPELLINGS[spelling]
    made = load_benchmark(spelling, has_template=True)
    assert hub == [HUB[name]]
    assert (made.name, made.source, len(made.problems)) == (name, HUB[name][0], 3)


@pytest.mark.parametrize("name", ["gsm8k", "aime24"])
def test_the_split_can_be_another(hub, name):
    load_benchmark(name, has_template=True, split="validation")
    load_benchmark(name, has_template=True)
    assert hub == [(*HUB[name][:2], "validation"), HUB[name]]


def test_a_hub_id_is_taken_as_it_is(hub):
    made = load_benchmark("Some-Body/AIME_24", has_template=True)
    assert (made.name, made.source) == ("AIME_24", "Some-Body/AIME_24")
    load_benchmark("Some-Body/AIME_24", has_template=True, split="train")
    assert hub == [("Some-Body/AIME_24", None, "test"), ("Some-Body/AIME_24", None, "train")]


def test_a_file_of_the_package():
    made = load_benchmark("miniature:test.jsonl", has_template=False, limit=2)
    assert (made.name, made.source, len(made.problems)) == ("test", "miniature:test.jsonl", 2)


def test_the_limit_counts_problems_and_not_rows(load):
    rows = [LAYOUTS["problem"](*PAIRS[at]) for at in (0, 0, 1, 0, 2)]
    assert [problem.answer for problem in load(rows).problems] == ["2", "4", "\\frac{1}{2}"]
    assert [problem.answer for problem in load(rows, limit=2).problems] == ["2", "4"]
    assert len(load(rows, limit=9).problems) == 3


def test_the_first_of_two_equal_prompts_stays(load):
    rows = [{"prompt": user("a"), "answer": "1"}, {"prompt": user("a"), "answer": "2"}]
    assert [problem.answer for problem in load(rows).problems] == ["1"]


def test_named_columns_win(load):
    rows = [{"problem": "not this", "question": "1+1?", "answer": "not this", "gold": 2}]
    problem = load(rows, prompt_column="question", answer_column="gold", suffix="").problems[0]
    assert (problem.prompt, problem.answer) == (user("1+1?"), "2")


# The instruction

STATEMENTS = st.text(alphabet="ab {}\\.\n?é", min_size=1).filter(lambda text: text.strip() and "\\boxed" not in text)
SUFFIXES = st.sampled_from([SUFFIX, PUBLISHED, "Box it: \\boxed{N}.", "Answer briefly!"])
BEFORE = st.sampled_from(["", "You are kind.", "b"])


@given(STATEMENTS, SUFFIXES, BEFORE)
def test_the_suffix_is_added_once_to_the_last_message(text, suffix, before):
    chat = [{"role": "system", "content": before}, {"role": "user", "content": text}]
    once = add_suffix(text, suffix)
    assert once == text.rstrip() + " " + suffix
    said = add_suffix(chat, suffix)
    assert said == [chat[0], {"role": "user", "content": once}]
    assert chat[1]["content"] == text
    assert add_suffix(once, suffix) == once
    assert add_suffix(said, suffix) == said


@given(STATEMENTS, st.sampled_from([SUFFIX, PUBLISHED, "Use \\boxed{}", "\\boxed"]), SUFFIXES, st.booleans())
def test_a_prompt_that_asks_for_a_box_is_left_alone(text, has, suffix, first):
    prompt = f"{has} {text}" if first else f"{text} {has}"
    if "\\boxed" in suffix:
        assert add_suffix(prompt, suffix) == prompt
        chat = [{"role": "system", "content": prompt}, *user(text)]
        assert add_suffix(chat, suffix) is chat
    else:
        assert add_suffix(prompt, suffix).count(suffix) == 1


@pytest.mark.parametrize("has", [SUFFIX, PUBLISHED])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_prompts_are_left_alone(load, layout, has):
    made = load([LAYOUTS[layout](f"{text} {has}", answer) for text, answer in PAIRS])
    said = [as_messages(problem.prompt)[0]["content"] for problem in made.problems]
    assert said == [f"{text} {has}" for text, _ in PAIRS]
    assert [problem.id for problem in made.problems] == [plain_id(*pair) for pair in PAIRS]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("suffix", "said"), [("", " 1+1?\n"), ("Say it.", " 1+1? Say it.")])
def test_an_own_suffix(load, layout, suffix, said):
    made = load([LAYOUTS[layout](" 1+1?\n", "2")], suffix=suffix, prompt_format="text")
    assert made.problems[0].prompt == said


@pytest.mark.parametrize("prompt_format", ["auto", "text", "chat"])
def test_text_in_a_prompt_column_is_verbatim(load, prompt_format):
    prompt = load([{"prompt": " Q: 1+1?\nA:  ", "answer": "2"}], prompt_format=prompt_format).problems[0].prompt
    assert prompt == (user(" Q: 1+1?\nA:  ") if prompt_format == "chat" else " Q: 1+1?\nA:  ")


# Ids


@given(STATEMENTS, st.sampled_from(["2", "x^2", " 3 "]), st.sampled_from([SUFFIX, PUBLISHED]))
def test_ids_do_not_know_suffix_or_format(text, answer, has):
    expected = plain_id(text.strip(), answer.strip())
    with_suffix = text.rstrip() + " " + has
    for prompt in (text, with_suffix, user(text), user(with_suffix)):
        assert problem_id(prompt, answer) == expected


@given(STATEMENTS, STATEMENTS, st.sampled_from(["1", "2"]), st.sampled_from(["1", "2"]))
def test_ids_tell_problems_and_answers_apart(one, other, answer, second):
    same = (one.strip(), answer) == (other.strip(), second)
    assert (problem_id(one, answer) == problem_id(user(other), second)) is same


def test_a_system_message_is_part_of_the_problem():
    assert problem_id([{"role": "system", "content": "In base 3."}, *user("1+2?")], "10") != problem_id("1+2?", "10")


def test_settings_of_prompts_leave_ids_and_change_the_hash(load):
    rows = [LAYOUTS["problem"](*pair) for pair in PAIRS]
    settings = [{}, {"suffix": ""}, {"suffix": "Go."}, {"prompt_format": "text"}, {"has_template": False}]
    made = [load(rows, **setting) for setting in settings]
    assert len({tuple(problem.id for problem in one.problems) for one in made}) == 1
    assert [one.hash == made[3].hash for one in made] == [False, False, False, True, True]  # the last two ask alike
    assert len({str(one.problems) for one in made[:4]}) == 4
    assert load(rows[:2]).hash != made[0].hash != load(rows[::-1]).hash


# Text or chat

SYSTEM = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}]


@pytest.mark.parametrize(
    ("row", "wanted", "has_template", "form"),
    [
        ({"prompt": SYSTEM}, "auto", True, "chat"),
        ({"prompt": SYSTEM}, "auto", False, "text"),
        ({"prompt": SYSTEM}, "chat", True, "chat"),
        ({"prompt": SYSTEM}, "text", True, "text"),
        ({"prompt": "1+1?"}, "auto", True, "text"),
        ({"prompt": "1+1?"}, "auto", False, "text"),
        ({"prompt": "1+1?"}, "chat", True, "chat"),
        ({"problem": "1+1?"}, "auto", True, "chat"),
        ({"problem": "1+1?"}, "auto", False, "text"),
        ({"question": "1+1?"}, "text", True, "text"),
        ({"question": "1+1?"}, "text", False, "text"),
    ],
)
def test_formats(load, row, wanted, has_template, form):
    made = load([row | {"answer": "2"}], prompt_format=wanted, has_template=has_template, suffix="")
    prompt = next(iter(row.values()))
    assert made.format == form
    if form == "chat":
        assert made.problems[0].prompt == as_messages(prompt)
    else:
        assert made.problems[0].prompt == (prompt if isinstance(prompt, str) else "Be kind.\n\n1+1?")


# What is refused

GOOD = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("answer", [None, "", " \n"])
def test_a_row_without_an_answer_is_named(load, kind, answer):
    rows = [GOOD, {"problem": "2+2?", "answer": answer}]
    with pytest.raises(ValueError, match=r"some\.set\.\w+, (row|line) 2: no answer .*answer_column"):
        load(rows, kind)
    assert len(load(rows, kind, limit=1).problems) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"problem": "", "answer": "2"}, "line 2: the prompt is empty"),
        ({"text": "a", "answer": "2"}, "line 2: has none of the columns .* Set prompt_column"),
        ({"prompt": user("1+2?"), "answer": "2"}, "line 2: text and chat prompts are mixed"),
        ("text", "line 2: expected an object"),
    ],
)
def test_a_bad_row_is_named(load, bad, message):
    with pytest.raises(ValueError, match=message):
        load([GOOD, bad])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("aime26", {}, "no benchmark 'aime26': give aime24, aime25, aimo, math500, gsm8k, a .parquet"),
        ("a.jsonl", {"split": "test"}, "split=test would be ignored: a.jsonl is a file"),
        ("a.jsonl", {}, "no file a.jsonl"),
        ("aime24", {"limit": 0}, "limit must be at least 1, got 0"),
        ("aime24", {"prompt_format": "xml"}, "prompt_format must be one of auto, chat, text, got 'xml'"),
        ("aime24", {"prompt_format": "chat"}, "chat needs a chat template"),
    ],
)
def test_bad_settings_are_refused(hub, name, settings, message):
    with pytest.raises(ValueError, match=message):
        load_benchmark(name, **{"has_template": False, **settings})


@pytest.mark.parametrize(
    "answer", ["6 * 7 = 42\n#### 42", "#### 42", "text\r\n#### 42\r\n", "so #### 42", "so\n####42 "]
)
def test_every_way_to_mark_a_worked_answer(load, answer):
    (problem,) = load([{"question": "6*7?", "answer": answer}]).problems
    assert problem.answer == "42"
