"""Prompts with more in them than the student gets: filling, shortening, and what is refused."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from oprd.training.privileged import PromptTemplate


def words(prompt):
    """One token a word; of chat messages, of their contents."""
    text = prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
    return text.split()


def test_text_and_chat():
    template = PromptTemplate("{prompt} hint: {hint} \\boxed{{}}")
    assert template.columns == ("hint",)
    assert template.fill({"prompt": "2+2?", "hint": "four"}) == "2+2? hint: four \\boxed{}"
    history = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "2+2?"},
    ]
    filled = template.fill({"prompt": history, "hint": 4})
    assert filled == [*history[:3], {"role": "user", "content": "2+2? hint: 4 \\boxed{}"}]
    assert history[3]["content"] == "2+2?"  # the student's is left alone


def test_placeholders_in_the_values_are_text():
    assert PromptTemplate("{prompt}|{a}").fill({"prompt": "{a}", "a": "{prompt}{x}"}) == "{a}|{prompt}{x}"


def test_columns_come_once_in_their_order():
    assert PromptTemplate("{b}{prompt}{a}{b}").columns == ("b", "a")
    assert PromptTemplate("{prompt}, with care").columns == ()


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=12).map(" ".join),
    st.lists(st.text("xyz", min_size=1, max_size=4), min_size=0, max_size=9).map(" ".join),
    st.integers(0, 30),
)
def test_the_longest_beginning_that_fits(hint, other, room):
    """Against trying every length: hints lose their ends together, the question keeps all of its own."""
    template = PromptTemplate("{hint} and {other} so {prompt}")
    row = {"prompt": "what is it", "hint": hint, "other": other}
    ids, left_out = template.fit(row, words, room)
    longest = max(len(hint), len(other))
    fits = [limit for limit in range(longest + 1) if len(words(template.fill(row, limit))) <= room]
    best = max(fits, default=0)
    assert ids == words(template.fill(row, best)) or len(ids) == len(words(template.fill(row, best)))
    assert ids[-3:] == ["what", "is", "it"]
    assert len(ids) <= room or not fits
    assert (left_out == 0) == (best == longest)
    assert template.fit(row, words, None) == (words(template.fill(row)), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{hint}", r"has no \{prompt\}"),
        ("{prompt} {0}", r"\{0\} is not the name of a column"),
        ("{prompt} {}", r"\{\} is not the name of a column"),
        ("{prompt!r}", "is not the name of a column"),
        ("{prompt:>9}", "is not the name of a column"),
        ("{prompt[0]}", "is not the name of a column"),
        ("{prompt} {", "expected '}'|Single '{'"),
        ("{prompt} }", "Single '}'"),
    ],
)
def test_templates_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate(text)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"prompt": ["a"]}, "rows has no column 'hint', which teacher_prompt_template asks for; it has prompt"),
        ({"prompt": ["a", "b"], "hint": ["x", " "]}, "rows, row 2: hint is empty"),
        ({"prompt": ["a", "b"], "hint": [None, "x"]}, "rows, row 1: hint is empty"),
        ({"prompt": [[{"role": "system", "content": "a"}]], "hint": ["x"]}, "rows, row 1: no user message"),
    ],
)
def test_rows_that_cannot_be(rows, message):
    with pytest.raises(ValueError, match=message):
        PromptTemplate("{prompt}{hint}").check(Dataset.from_dict(rows), "rows")


def test_good_rows():
    rows = {"prompt": ["a", "b"], "hint": ["x", "y"]}
    PromptTemplate("{prompt}{hint}").check(Dataset.from_dict(rows), "rows")
    PromptTemplate("{prompt}{hint}").check(Dataset.from_dict(rows).to_iterable_dataset(), "rows")
