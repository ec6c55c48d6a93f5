import hashlib
import os

import huggingface_hub
import pytest

from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.inputs import data_record, model_record, run_of_model
from oprd.models import resolve_path
from runs import make_run


def fill(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_a_folder(tmp_path):
    folder = fill(tmp_path / "model", config__json="{}", model__safetensors="w", README__md="prose")
    made = model_record(str(folder))
    assert (made["name"], made["revision"]) == (str(folder), None)
    assert made["files"].keys() == {"config.json", "model.safetensors"}
    assert made["files"]["model.safetensors"] == hashlib.sha256(b"w").hexdigest()
    assert made["hash"] == combined_hash(made["files"])
    fill(folder, README__md="other prose")
    assert model_record(str(folder)) == made
    fill(folder, model__safetensors="x")
    assert model_record(str(folder))["hash"] != made["hash"]


def test_a_model_of_the_package():
    made = model_record("miniature:student")
    assert (made["name"], made["revision"]) == ("miniature:student", None)
    assert made["hash"] == model_record(resolve_path("miniature:student"))["hash"]
    assert made["hash"] != model_record("miniature:teacher")["hash"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub model in a cache: the folder of its commit, and what was asked for."""
    folder, calls = tmp_path / "models--some--model" / "snapshots" / ("c0ffee" * 6 + "c0ff"), []

    def download(name, **asked):
        calls.append((name, asked["revision"], asked["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fill(folder, config__json="{}", model__safetensors="w", tokenizer__json="t"), calls


def test_a_model_of_the_hub(hub):
    folder, calls = hub
    made = model_record("some/model", "main")
    ((name, revision, patterns),) = calls
    assert (name, revision) == ("some/model", "main")
    assert {"*.safetensors", "*.json"} <= set(patterns) and "*.bin" not in patterns
    assert (made["name"], made["revision"]) == ("some/model", folder.name)
    assert made["files"] == folder_hashes(folder)


def test_what_else_is_in_the_cache_makes_no_other_model(hub):
    """The first run finds an empty cache, the next one what other programs fetched in between."""
    folder, _ = hub
    made = model_record("some/model")
    fill(folder, pytorch_model__bin="w in another format", model__gguf="and another")
    fill(folder / "onnx", model__onnx="and another")
    assert model_record("some/model") == made
    fill(folder, model__safetensors="x")
    assert model_record("some/model")["hash"] != made["hash"]


def test_weights_that_are_not_safetensors_count_where_there_are_no_others(hub):
    folder, calls = hub
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    made = model_record("some/model")
    assert "*.bin" in calls[-1][2]
    assert made["files"].keys() == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_a_large_file_of_a_cache_is_known_by_its_blob(hub, tmp_path):
    folder, _ = hub
    blob = fill(tmp_path / "blobs") / ("7" * 64)
    blob.write_text("gigabytes")
    (folder / "model.safetensors").unlink()
    os.symlink(blob, folder / "model.safetensors")
    assert model_record("some/model")["files"]["model.safetensors"] == "7" * 64


ROWS = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}, {"prompt": [{"role": "user", "content": "é"}]}]


def test_data_is_its_rows_in_order():
    made = data_record("some.jsonl", ROWS)
    assert (made["name"], made["rows"], len(made["hash"])) == ("some.jsonl", 3, 64)
    assert data_record("other.parquet", iter(ROWS))["hash"] == made["hash"]
    assert data_record("x", [dict(reversed(row.items())) for row in ROWS])["hash"] == made["hash"]
    others = [
        ROWS[::-1],
        ROWS[:2],
        [*ROWS, ROWS[0]],
        [ROWS[0] | {"answer": "2"}, *ROWS[1:]],
        [ROWS[0] | {"answer": 1}, *ROWS[1:]],
        [*ROWS[:2], {"prompt": [{"role": "user", "content": "e"}]}],
    ]
    hashes = {data_record("x", rows)["hash"] for rows in others}
    assert len(hashes) == len(others) and made["hash"] not in hashes


def test_no_data():
    assert data_record("x", [])["rows"] == 0


def test_the_run_that_made_a_model(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    for name in ("best-step-000004", "checkpoint-20"):
        fill(run / name, config__json="{}")
    os.symlink("best-step-000004", run / "best")
    os.symlink(run / "final", tmp_path / "current")
    for model in ("final", "best", "best-step-000004", "checkpoint-20", "final/"):
        assert run_of_model(str(run / model)) == run
    assert run_of_model(str(tmp_path / "current")) == run
    monkeypatch.chdir(run)
    assert run_of_model("final") == run
    monkeypatch.chdir(run / "final")
    assert run_of_model(".") == run


def test_a_second_stage_is_a_run_of_its_own(tmp_path):
    make_run(tmp_path / "run")
    second = make_run(tmp_path / "run" / "then")
    assert run_of_model(str(second / "final")) == second


def test_models_that_no_run_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "model", config__json="{}")
    for name in (str(folder), "model", "missing", "some/model", "miniature:student", "."):
        assert run_of_model(name) is None
    run = make_run(tmp_path / "run")
    for name in ("evaluations", "bridge"):
        fill(run / name, bridge__json="{}")
        assert run_of_model(str(run / name)) is None


def test_somebody_elses_manifest_beside_a_model_says_nothing(tmp_path):
    """A web application keeps one too."""
    fill(tmp_path, manifest__json='{"name": "app", "icons": []}')
    assert run_of_model(str(fill(tmp_path / "model", config__json="{}"))) is None
