import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from oprd.miniature.task import validation
from oprd.prompts import load_prompts


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


CHAT_ROWS = [
    {"prompt": user("1+1?"), "reward_model": {"ground_truth": "2", "style": "rule"}, "extra": 1},
    {"prompt": user("2+2?"), "reward_model": {"ground_truth": "4", "style": "rule"}, "extra": 2},
]


@pytest.fixture
def load(tmp_path):
    """Write rows in a format and read them back."""

    def write_and_load(rows, kind="jsonl", **settings):
        path = tmp_path / f"data.{kind}"
        WRITERS[kind](path, rows)
        return load_prompts(str(path), **settings)

    return write_and_load


@pytest.mark.parametrize("kind", WRITERS)
def test_chat_prompts_with_a_ground_truth(load, kind):
    dataset = load(CHAT_ROWS, kind)
    assert dataset.to_list() == [{"prompt": user("1+1?"), "answer": "2"}, {"prompt": user("2+2?"), "answer": "4"}]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
def test_text_prompts_with_an_answer(load, kind, column):
    dataset = load([{"id": 7, column: "1+1?", "answer": 2}, {"id": 8, column: " 2+2?\n", "answer": 4}], kind)
    assert dataset.to_list() == [{"prompt": "1+1?", "answer": "2"}, {"prompt": " 2+2?\n", "answer": "4"}]


@pytest.mark.parametrize("kind", WRITERS)
def test_named_columns_win(load, kind):
    rows = [{"prompt": "not this", "task": "1+1?", "answer": "not this", "gold": "2"}]
    dataset = load(rows, kind, prompt_column="task", answer_column="gold")
    assert dataset.to_list() == [{"prompt": "1+1?", "answer": "2"}]


def test_prompt_comes_before_problem_and_question(load):
    rows = [{"question": "third", "problem": "second", "prompt": "first"}]
    assert load(rows)["prompt"] == ["first"]
    assert load([{"question": "third", "problem": "second"}])["prompt"] == ["second"]


@pytest.mark.parametrize("kind", WRITERS)
def test_as_chat(load, kind):
    dataset = load([{"problem": "1+1?", "answer": "2"}], kind, as_chat=True)
    assert dataset.to_list() == [{"prompt": user("1+1?"), "answer": "2"}]
    assert load(CHAT_ROWS, kind, as_chat=True).to_list() == load(CHAT_ROWS, kind).to_list()


def test_as_chat_makes_mixed_prompts_one_kind(load):
    dataset = load([{"prompt": "a"}, {"prompt": user("b")}], as_chat=True)
    assert dataset["prompt"] == [user("a"), user("b")]


def test_messages_keep_role_and_content_only(load):
    conversation = [
        {"role": "system", "content": "", "name": "x"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "weight": 0},
        {"role": "user", "content": "sure?"},
    ]
    bare = [{"role": message["role"], "content": message["content"]} for message in conversation]
    assert load([{"prompt": conversation}])["prompt"] == [bare]


def asking(arguments, **more):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}, **more}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("as_text", [False, True], ids=["mapping", "json"])
def test_calls_and_their_results_are_kept(load, kind, as_text):
    """Templates read arguments as a mapping, and ask whether a message has calls: so no key without a value."""
    told = [{"terms": "1+1"}, {"terms": "2+2"}]
    first, second = (asking(json.dumps(t) if as_text else t, id=f"c{n}") for n, t in enumerate(told))
    chat = [
        {"role": "user", "content": "1+1 and 2+2?"},
        {"role": "assistant", "content": None, "tool_calls": [first, second]},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "c0"},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"},
    ]
    dataset = load([{"prompt": chat, "answer": "2, 4"}, {"prompt": user("3+3?"), "answer": "6"}], kind)
    calls = [asking(t, id=f"c{n}") for n, t in enumerate(told)]
    expected = [chat[0], {"role": "assistant", "content": "", "tool_calls": calls}, *chat[2:]]
    assert dataset.to_list() == [{"prompt": expected, "answer": "2, 4"}, {"prompt": user("3+3?"), "answer": "6"}]
    assert dataset["prompt"][1] == user("3+3?") and dataset.select([0])[0]["prompt"] == expected


def test_calls_in_other_layouts(load):
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "now"}, asking(None)]}
    (row,) = load([{"prompt": [*user("a"), bare, {"role": "tool", "content": "b"}]}])
    calls = [{"type": "function", "function": {"name": "now", "arguments": {}}}, asking({})]
    assert row["prompt"][1:] == [
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "b"},
    ]


BAD_CALLS = {
    "no list": {"name": "add"},
    "no mapping": ["add"],
    "no name": [{"type": "function", "function": {"arguments": {}}}],
    "arguments that are no JSON": [asking("{")],
    "arguments that are a list": [asking([1])],
}


@pytest.mark.parametrize("fault", BAD_CALLS)
def test_bad_calls(load, fault):
    message = {"role": "assistant", "content": "", "tool_calls": BAD_CALLS[fault]}
    with pytest.raises(ValueError, match=r"line 1: tool_calls must be a list of .*arguments as a mapping or its JSON"):
        load([{"prompt": [*user("a"), message, {"role": "tool", "content": "b"}]}])


def test_no_answer_column_unless_every_row_has_one(load):
    assert load([{"prompt": "a"}, {"prompt": "b"}]).column_names == ["prompt"]
    assert load([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}]).column_names == ["prompt"]
    assert load([{"prompt": "a", "answer": 0}, {"prompt": "b", "answer": ""}])["answer"] == ["0", ""]


def test_blank_lines_are_passed_over_but_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert load_prompts(str(path))["prompt"] == ["a", "b"]
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match="line 4"):
        load_prompts(str(path))


def test_a_json_file_may_hold_lines(tmp_path):
    path = tmp_path / "data.json"
    as_jsonl(path, [{"prompt": "a"}, {"prompt": "b"}])
    assert load_prompts(str(path))["prompt"] == ["a", "b"]


def test_files_of_the_package():
    dataset = load_prompts("miniature:validation.jsonl")
    assert dataset["prompt"] == [problem["prompt"] for problem in validation()]
    assert dataset["answer"] == [problem["answer"] for problem in validation()]


GOOD = {"prompt": "fine", "answer": "1"}


@pytest.mark.parametrize(
    ("bad", "settings", "message"),
    [
        ({"prompt": ""}, {}, "the prompt is empty"),
        ({"prompt": " \n"}, {}, "the prompt is empty"),
        ({"prompt": 7}, {}, "text or a list of chat messages, got int"),
        ({"prompt": None}, {}, "text or a list of chat messages, got NoneType"),
        ({"prompt": []}, {}, "text or a list of chat messages"),
        ({"prompt": ["hello"]}, {}, "{role, content}"),
        ({"prompt": [{"role": "user"}]}, {}, "{role, content}"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "text content"),
        ({"prompt": [{"role": "human", "content": "a"}]}, {}, "unknown role 'human'; roles are system, user"),
        ({"prompt": [{"content": "a"}]}, {}, "unknown role None"),
        ({"prompt": [*user("a"), {"role": "assistant", "content": "b"}]}, {}, "the last message is the assistant's"),
        ({"prompt": user(" ")}, {}, "every message is empty"),
        ({"prompt": user("a")}, {}, "text and chat prompts are mixed. .*as_chat"),
        ({"text": "a", "n": 1}, {}, "none of the columns prompt, problem, question; it has text, n. Set prompt_column"),
        ({"question": "a"}, {"prompt_column": "prompt"}, "has no column 'prompt'; it has question. Set prompt_column"),
        ({"prompt": "a", "gold": "1"}, {"answer_column": "answer"}, "has no column 'answer'; it has prompt, gold"),
        (["a"], {}, "expected an object with columns, got list"),
        ("a", {}, "expected an object with columns, got str"),
    ],
)
def test_a_bad_row_is_named(load, bad, settings, message):
    rows = [GOOD, GOOD, bad, GOOD]
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 3: .*{message}"):
        load(rows, "jsonl", **settings)
    with pytest.raises(ValueError, match=rf"data\.json, row 3: .*{message}"):
        load(rows, "json", **settings)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([GOOD, {**GOOD, "prompt": ""}], {}, "row 2: the prompt is empty"),
        ([{"prompt": user("a")}, {"prompt": [{"role": "human", "content": "a"}]}], {}, "row 2: unknown role 'human'"),
        ([GOOD], {"prompt_column": "task"}, "row 1: has no column 'task'; it has prompt, answer"),
    ],
)
def test_a_bad_row_of_a_parquet_file_is_named(load, rows, settings, message):
    with pytest.raises(ValueError, match=rf"data\.parquet, {message}"):
        load(rows, "parquet", **settings)


def test_a_line_that_is_not_json(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": "c"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 2: not valid JSON"):
        load_prompts(str(path))


def test_a_list_that_is_not_json(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[\n {"prompt": "a"},\n {"prompt": }\n]')
    with pytest.raises(ValueError, match=r"data\.json, line 3: not valid JSON"):
        load_prompts(str(path))


@pytest.mark.parametrize(("name", "text"), [("data.jsonl", ""), ("data.jsonl", "\n\n"), ("data.json", "[]")])
def test_an_empty_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{name} has no rows"):
        load_prompts(str(path))


@pytest.mark.parametrize("kind", WRITERS)
def test_no_such_file(tmp_path, kind):
    with pytest.raises(ValueError, match=rf"There is no file .*nowhere\.{kind}"):
        load_prompts(str(tmp_path / f"nowhere.{kind}"))


def test_an_unknown_kind_of_file(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt\na\n")
    with pytest.raises(ValueError, match=r"data\.csv is not a \.parquet, \.json, \.jsonl file"):
        load_prompts(str(path))


def test_an_unknown_file_of_the_package():
    with pytest.raises(ValueError, match=r"miniature:nothing\.jsonl.*miniature:train\.jsonl"):
        load_prompts("miniature:nothing.jsonl")


def test_line_separators_inside_json_strings(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a\u2028b", "answer": "1"}\n{"prompt": "c\u0085d", "answer": "2"}\n', encoding="utf-8-sig"
    )
    assert load_prompts(str(path))["prompt"] == ["a\u2028b", "c\u0085d"]


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match=r"p\.jsonl: not UTF-8"):
        load_prompts(str(path))


def test_an_answer_beside_an_empty_reward_model(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "1", "reward_model": {"style": "rule"}}')
    assert load_prompts(str(path))["answer"] == ["1"]


def test_duplicates_are_dropped_aloud(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f'{{"prompt": "{prompt}", "answer": "{n}"}}\n' for n, prompt in enumerate("abacb")))
    assert load_prompts(str(path))["prompt"] == list("abacb")
    with caplog.at_level("INFO", logger="oprd.prompts"):
        kept = load_prompts(str(path), drop_duplicates=True)
    assert (list(kept["prompt"]), list(kept["answer"])) == (["a", "b", "c"], ["0", "1", "3"])
    assert "dropped 2 rows" in caplog.text
