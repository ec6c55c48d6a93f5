"""Prompts and problems that cannot be read, or that nobody could answer."""

import gzip
import io
import json
import tarfile
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from badinput.harness import Case, call, cases, check_refused
from oprd.training.trainer import OPRDTrainer


def rows(*values):
    """Prompts with these rows."""
    return lambda place: place.rows(*values)


def raw(content, name="prompts.jsonl"):
    """A data file of these bytes."""
    return lambda place: place.write(name, content)


def table(columns, name="prompts.parquet"):
    """A parquet file."""

    def arrange(place):
        file = io.BytesIO()
        parquet.write_table(pyarrow.table(columns), file)
        place.write(name, file.getvalue())

    return arrange


def then(*steps):
    """One change after another."""
    return lambda place: [step(place) for step in steps]


def archive(name):
    """The good prompts in a zip or a tar, with a member that would lead out of the folder it is unpacked to."""

    def arrange(place):
        file = io.BytesIO()
        if name.endswith(".zip"):
            with zipfile.ZipFile(file, "w") as packed:
                packed.writestr("../../escaped.jsonl", '{"prompt": "a"}\n')
        else:
            with tarfile.open(fileobj=file, mode="w:gz") as packed:
                packed.add(place / "prompts.jsonl", "../../escaped.jsonl")
        place.write(name, file.getvalue())

    return arrange


def pickled(name):
    """A pickle that leaves a mark when it is loaded."""

    def arrange(place):
        from badinput.payload import pickle_of

        place.write(name, pickle_of(place))

    return arrange


def data(name, culprit, remedy, arrange=None, **settings):
    """A training run on bad prompts; ``file`` names another than prompts.jsonl."""
    if "file" in settings:
        settings["dataset_name"] = settings.pop("file")
    return Case(name, culprit, remedy, arrange, settings=settings)


GOOD = {"prompt": "abc", "answer": "1"}
CHAT = {"prompt": [{"role": "user", "content": "ab"}]}
ONE_LINE = r"prompts\.jsonl, line 2: "


@cases(
    data("no prompt column", r"prompts\.jsonl, line 1: has none of the columns prompt, problem, question; it has text", "Set prompt_column", rows({"text": "a"})),
    data("another column in a later row", ONE_LINE + "has none of the columns", "Set prompt_column", rows(GOOD, {"text": "a"})),
    data("a prompt column that is not there", r"line 1: has no column 'words'; it has prompt", "Set prompt_column", prompt_column="words"),
    data("an answer column that is not there", r"line 1: has no column 'words'; it has prompt", "answer_column", answer_column="words"),
    data("an empty file", r"prompts\.jsonl has no rows", "Give a file with a prompt", raw("")),
    data("blank lines", r"prompts\.jsonl has no rows", "Give a file with a prompt", raw("\n\n \n")),
    data("a prompt that is a number", ONE_LINE + ".*got int", "must be text or a list of chat messages", rows(GOOD, {"prompt": 7})),
    data("a prompt that is null", ONE_LINE + ".*got NoneType", "must be text or a list of chat messages", rows(GOOD, {"prompt": None})),
    data("a prompt that is an object", ONE_LINE + ".*got dict", "must be text or a list of chat messages", rows(GOOD, {"prompt": {"text": "a"}})),
    data("an empty prompt", ONE_LINE + "the prompt is empty", "Correct or remove the row", rows(GOOD, {"prompt": ""})),
    data("a prompt of blanks", ONE_LINE + "the prompt is empty", "Correct or remove the row", rows(GOOD, {"prompt": " \n"})),
    data("a prompt of no messages", ONE_LINE + ".*got list", "a list of chat messages", rows(GOOD, {"prompt": []})),
    data("a list of words", ONE_LINE, r"a chat message must be \{role, content\}", rows(GOOD, {"prompt": ["a", "b"]})),
    data("a message without a role", ONE_LINE + "unknown role None", "roles are system, user", rows(CHAT, {"prompt": [{"content": "a"}]})),
    data("a message of an unknown role", ONE_LINE + "unknown role 'human'", "roles are system, user", rows(CHAT, {"prompt": [{"role": "human", "content": "a"}]})),
    data("a message without content", ONE_LINE, r"\{role, content\} with text content", rows(CHAT, {"prompt": [{"role": "user"}]})),
    data("a message of parts", ONE_LINE, "with text content", rows(CHAT, {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]})),
    data("a message within a message", ONE_LINE, "with text content", rows(CHAT, {"prompt": [{"role": "user", "content": {"role": "user", "content": "a"}}]})),
    data("messages that are empty", ONE_LINE + "every message is empty", "Correct or remove the row", rows(CHAT, {"prompt": [{"role": "user", "content": " "}]})),
    data("a chat that is over", ONE_LINE + "the last message is the assistant's", "nothing to answer",
        rows(CHAT, {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})),
    data("text and chat", ONE_LINE + "text and chat prompts are mixed", "set as_chat: true", rows(GOOD, CHAT)),
    data("a row that is a list", ONE_LINE + "expected an object with columns, got list", "Correct or remove the row", rows(GOOD, ["a"])),
    data("an answer that is a list", ONE_LINE + "the answer must be text or a number, got list", "Set answer_column", rows(GOOD, {"prompt": "a", "answer": ["1"]})),
    data("an answer within an answer", ONE_LINE + "the answer must be text or a number, got dict", "Set answer_column",
        rows(GOOD, {"prompt": "a", "reward_model": {"ground_truth": {"x": 1}}})),
    data("a row over the context", r"row 2: a prompt of 300 tokens .* context of 128", "max_prompt_length: 120 to drop", rows(GOOD, {"prompt": "a" * 300}, GOOD, GOOD)),
    data("no room for any response", r"row 3: a prompt of 4 tokens and a response of 500 .* context of 128", "Lower max_completion_length", max_completion_length=500),
    data("nothing left", "max_prompt_length=1 drops every prompt", "the shortest has 2 tokens", max_prompt_length=1),
    data("fewer prompts than a step takes", "has 1 prompts and one step needs 4", "add prompts", rows(GOOD)),
    data("not UTF-8", r"prompts\.jsonl: not UTF-8 text \(byte 12\)", "Save it as UTF-8", raw(b'{"prompt": "\xff\xfe"}\n')),
    data("a line cut short", r"prompts\.jsonl, line 3: not valid JSON", "Mend or remove the line", raw('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c')),
    data("a line nested too deep", r"prompts\.jsonl, line 1: nested too deep", "Mend or remove the line", raw('{"prompt": ' + "[" * 100_000 + "\n")),
    data("JSON over several lines", r"all\.json, line 1: not valid JSON", "one list of rows", raw('{\n"prompt": ["a"]\n}\n', "all.json"), file="all.json"),
    data("a list of JSON cut short", r"all\.json, line 2: not valid JSON", "not valid JSON", raw('[{"prompt": "a"},\n{"prompt": ', "all.json"), file="all.json"),
    data("parquet cut short", r"prompts\.parquet is truncated", "Copy or write it again",
        then(table({"prompt": ["abc"] * 8}), lambda place: place.cut("prompts.parquet")), file="prompts.parquet"),
    data("parquet by name alone", r"prompts\.parquet is truncated or no parquet", "Copy or write it again", raw("words", "prompts.parquet"), file="prompts.parquet"),
    data("parquet without the column", r"prompts\.parquet, row 1: has none of the columns", "Set prompt_column", table({"text": ["a"]}), file="prompts.parquet"),
    data("parquet of numbers", r"prompts\.parquet, row 1: .*got int", "must be text", table({"prompt": [1, 2]}), file="prompts.parquet"),
    data("parquet of no rows", r"prompts\.parquet has no rows", "Give a file", table({"prompt": pyarrow.array([], pyarrow.string())}), file="prompts.parquet"),
    data("a csv file", r"prompts\.csv is not a \.parquet, \.json, \.jsonl file", "one JSON object a line", raw("prompt\na\n", "prompts.csv"), file="prompts.csv"),
    data("a folder", r"/student is not a \.parquet", "Name one", file="{root}/student"),
    data("a file that is not there", r"There is no file gone\.jsonl", "Give a parquet, json or jsonl file", file="gone.jsonl"),
    data("a Hub id without a network", "nobody/nothing is no file here, and the Hub has not given it", "Name a .parquet", file="nobody/nothing"),
    data("a zip", r"prompts\.zip is not", "unpack it", archive("prompts.zip"), file="prompts.zip"),
    data("a tar", r"prompts\.tar\.gz is not", "unpack it", archive("prompts.tar.gz"), file="prompts.tar.gz"),
    data("gzipped lines", r"prompts\.jsonl\.gz is not", "unpack it", raw(gzip.compress(b"{}"), "prompts.jsonl.gz"), file="prompts.jsonl.gz"),
    data("a pickle", r"prompts\.pkl is not", "write its rows as jsonl", pickled("prompts.pkl"), file="prompts.pkl"),
    data("a torch file", r"prompts\.pt is not", "write its rows as jsonl", pickled("prompts.pt"), file="prompts.pt"),
    data("a bin", r"prompts\.bin is not", "write its rows as jsonl", pickled("prompts.bin"), file="prompts.bin"),
    data("a pickle that is called jsonl", r"prompts\.jsonl: not UTF-8|prompts\.jsonl, line 1: not valid JSON", "UTF-8|Mend", pickled("prompts.jsonl")),
    data("validation without answers", r"problems\.jsonl, line 1: no answer to grade against", "Fill or remove the row, or set answer_column",
        lambda place: place.rows({"prompt": "a"}, name="problems.jsonl"), validation_benchmark="problems.jsonl", benchmark_steps=1),
    data("a test that is the validation", "Two benchmarks are called problems", "Rename one", validation_benchmark="problems.jsonl",
        test_benchmarks="problems.jsonl", benchmark_steps=1),
    data("a test with the problems of the validation", "test benchmark other shares 8 problems", "Choose another validation_benchmark",
        lambda place: place.write("other.jsonl", (place / "problems.jsonl").read_bytes()), validation_benchmark="problems.jsonl",
        test_benchmarks="other.jsonl", benchmark_steps=1),
    data("a benchmark that is not", "no benchmark 'aime99'", "give aime24", validation_benchmark="aime99", benchmark_steps=1),
    data("a benchmark named like a way out", r"'\.\.\.jsonl'|\.\.\.jsonl", "Rename", lambda place: place.write("...jsonl", (place / "problems.jsonl").read_bytes()),
        validation_benchmark="...jsonl", benchmark_steps=1),
)  # fmt: skip
def test_data(case, place, capfd):
    if "dataset_name" in case.settings:
        case.settings["dataset_name"] = case.settings["dataset_name"].format(root=place.root)
    check_refused(case, place, capfd)
    assert not list(place.root.parent.rglob("escaped.jsonl"))


def test_contradicting_rows_are_told(place, capfd, monkeypatch):
    """The run goes on: which row is right, only its author knows."""
    monkeypatch.setattr(OPRDTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    place.rows(GOOD, GOOD, {"prompt": "b", "answer": 2}, {"prompt": "abc", "answer": "3"})
    status, said = call(Case("", "", "").prepare(place), capfd)
    assert status == 130
    assert "1 rows repeat a prompt with another answer, first line 1 ('1') and line 4 ('3')" in said


def test_repeated_rows_that_agree_are_not(place, capfd, monkeypatch):
    monkeypatch.setattr(OPRDTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    place.rows(GOOD, GOOD, GOOD, {"prompt": "b", "answer": 2})
    status, said = call(Case("", "", "").prepare(place), capfd)
    assert (status, "repeat a prompt" in said) == (130, False)


@pytest.mark.parametrize("name", ["prompts.json", "prompts.jsonl"])
def test_a_corrected_command_runs_at_once(place, capfd, name):
    """A refusal leaves nothing behind that would stop the next try."""
    place.write(name, json.dumps(GOOD)[:-4])
    arguments = Case("", "", "", settings={"dataset_name": name}).prepare(place)
    assert call(arguments, capfd)[0] == 1
    place.write(name, json.dumps([GOOD] * 8) if name.endswith("json") else (json.dumps(GOOD) + "\n") * 8)
    with pytest.raises(AssertionError, match="a step was begun"):
        call(arguments, capfd)
