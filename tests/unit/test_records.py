"""Files that survive a kill."""

import json
import os

import pytest

from oprd.records import read_json, whole_lines, write_json


def test_json_is_written_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None], "a": "é"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": [\n    1,\n    null\n  ],\n  "a": "é"\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, {"deep": [object()]}])
def test_what_json_does_not_have_leaves_the_old_file(tmp_path, value):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match=r"a\.json cannot be written as JSON"):
        write_json(tmp_path / "a.json", value)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    write_json(tmp_path / "a.json", 1)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", 2)
    assert json.loads((tmp_path / "a.json").read_text()) == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_content_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("replace"), replace(*names)))
    write_json(tmp_path / "a.json", 1)
    assert steps == ["fsync", "replace", "fsync"]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"There is no .*a\.json"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{\n"a": }')
    with pytest.raises(ValueError, match=r"a\.json, line 2: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_lines_up_to_the_last_whole_one(tmp_path):
    path = tmp_path / "a.jsonl"
    assert whole_lines(path) == []
    first, second = '{"a": "\u2028é"}\n'.encode(), b'{"a": 2}\n'
    for cut in range(len(second)):
        path.write_bytes(first + second[:cut])
        assert whole_lines(path) == [({"a": "\u2028é"}, len(first))]
    path.write_bytes(first + second)
    assert [end for _, end in whole_lines(path)] == [len(first), len(first) + len(second)]
    path.write_bytes(first + b"{broken\n")  # whole, and wrong: only the last line can be a kill's
    assert [value for value, _ in whole_lines(path)] == [{"a": "\u2028é"}]
    path.write_bytes(b"{broken\n" + first)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not valid JSON"):
        whole_lines(path)
