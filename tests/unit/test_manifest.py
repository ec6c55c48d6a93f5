import copy
import json
import os
import threading
from types import SimpleNamespace

import pytest

from oprd.durability.stopping import Stopped
from oprd.lineage import manifest as module
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.manifest import Manifest, differing_inputs, read_manifest, run_name, total_cost
from runs import identity, make_run, record


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    time = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: time.now))
    return time


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def start(run, *, resumed=False, processes=1, **more):
    return Manifest.start(run, identity=identity(**more), processes=processes, resumed=resumed)


def test_nothing_is_on_disk_before_the_first_update(run):
    manifest = start(run)
    assert not run.exists()
    manifest.fail(ValueError("it never began"))
    assert not run.exists()
    manifest.update()
    assert [path.name for path in run.iterdir()] == ["manifest.json"]


def test_a_run_that_goes_on(run, clock):
    manifest = start(run, processes=2)
    clock.now += 90
    manifest.update(tokens_generated=5, updates=1)
    content = read_manifest(run)
    assert content == manifest.content
    assert (content["schema"], content["run"], content["status"]) == (1, "run", "running")
    assert content["final"] is None
    assert identity().items() <= content.items()
    (session,) = content["sessions"]
    assert (session["wall_seconds"], session["tokens_generated"], session["updates"]) == (90, 5, 1)
    assert session["hardware"]["processes"] == 2 and session["versions"]["torch"]
    assert session["git"].keys() == {"oprd", "here"}
    assert (content["cost"]["wall_seconds"], content["cost"]["device_hours"]) == (90, 0.05)


def test_finished_with_the_content_of_final(run):
    made = make_run(run)
    content = read_manifest(made)
    files = folder_hashes(made / "final")
    assert (content["status"], content["final"]) == ("finished", {"hash": combined_hash(files), "files": files})
    assert files.keys() == {"config.json", "model.safetensors"}


def test_a_full_disk_does_not_hide_what_went_wrong(run, clock, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    manifest = start(run)
    manifest.update()
    monkeypatch.setattr("oprd.lineage.manifest.write_json", full)
    manifest.fail(RuntimeError("the error itself"))
    assert manifest.content["status"] == "failed"


def test_a_run_whose_record_is_missing_goes_on_with_its_last_session(run, clock):
    manifest = start(run)
    clock.now += 40
    manifest.update(force=True)
    clock.now += 1000  # killed, and repeated much later
    again = Manifest.reopen(run)
    clock.now += 2
    again.update(force=True)
    content = read_manifest(run)
    assert len(content["sessions"]) == 1 and content["cost"]["wall_seconds"] == 42


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (RuntimeError("out of memory"), "failed", "RuntimeError: out of memory"),
        (SystemExit(1), "failed", "SystemExit: 1"),
        (KeyboardInterrupt(), "interrupted", "interrupted"),
        (Stopped("stopped by SIGTERM at step 3"), "interrupted", "stopped by SIGTERM at step 3"),
    ],
)
def test_an_error_is_kept(run, clock, error, status, told):
    manifest = start(run)
    manifest.update()
    clock.now += 2
    manifest.fail(error)
    content = read_manifest(run)
    assert (content["status"], content["sessions"][0]["error"]) == (status, told)
    assert content["sessions"][0]["wall_seconds"] == content["cost"]["wall_seconds"] == 2
    assert content["final"] is None


def test_writes_are_five_seconds_apart_unless_forced(run, clock):
    manifest = start(run)

    def written(**more):
        manifest.update(**more)
        return read_manifest(run)["sessions"][0]["updates"]

    assert written(updates=1) == 1
    clock.now += 4.9
    assert written(updates=2) == 1
    clock.now += 0.2
    assert written(updates=3) == 3
    assert written(updates=4) == 3
    assert written(updates=5, force=True) == 5
    clock.now += 4.9
    assert written(updates=6) == 5
    assert manifest.content["sessions"][0]["updates"] == 6


def test_a_resumed_run_adds_up(run, clock):
    manifest = start(run, processes=2)
    clock.now += 3600
    manifest.update(tokens_generated=100, tokens_trained=80, peak_memory_bytes=7, peak_memory_of="accelerator")
    manifest.update(benchmark_seconds=30.0)
    created = manifest.content["created"]
    manifest.fail(RuntimeError("killed"))
    clock.now += 10_000  # nobody's time
    manifest = start(run, resumed=True, processes=4)
    assert read_manifest(run)["status"] == "failed"
    clock.now += 1800
    manifest.update(force=True, tokens_generated=10, tokens_trained=10, peak_memory_bytes=5, peak_memory_of="host")
    manifest.update(force=True, benchmark_seconds=12.5)
    content = read_manifest(run)
    assert (content["status"], content["created"], len(content["sessions"])) == ("running", created, 2)
    assert content["sessions"][0]["error"] == "RuntimeError: killed" and "error" not in content["sessions"][1]
    assert {key: value for key, value in content["cost"].items() if key != "device"} == {
        "wall_seconds": 5400,
        "benchmark_seconds": 42.5,
        "device_hours": round((2 * (3600 - 30) + 4 * (1800 - 12.5)) / 3600, 4),
        "tokens_generated": 110,
        "tokens_trained": 90,
        "peak_memory_bytes": 7,
        "peak_memory_of": "host",
        "sessions": 2,
    }


def test_the_device_is_a_gpu_where_there_is_one():
    session = make_session = {
        "wall_seconds": 1.0,
        "hardware": {"processes": 1, "gpus": [], "processor": "a processor"},
        "tokens_generated": 0,
        "tokens_trained": 0,
        "peak_memory_bytes": 0,
        "peak_memory_of": "host",
    }
    assert total_cost([session])["device"] == "a processor"
    with_gpu = make_session | {"hardware": {"processes": 1, "gpus": ["a GPU", "a GPU"], "processor": "a processor"}}
    assert total_cost([session, with_gpu])["device"] == "a GPU"


def test_a_run_that_begins_anew_forgets(run):
    make_run(run)
    manifest = start(run)
    manifest.update()
    content = read_manifest(run)
    assert (content["status"], content["final"], len(content["sessions"])) == ("running", None, 1)


def test_resumed_without_a_manifest_is_a_start(run):
    start(run, resumed=True).update()
    assert len(read_manifest(run)["sessions"]) == 1


MODEL = {"config.json": "1" * 64, "model.safetensors": "2" * 64, "a": "3" * 64, "b": "4" * 64}


def model(**changed):
    files = {name: digest for name, digest in (MODEL | changed).items() if digest}
    return record("some/model", combined_hash(files), files=files)


def test_a_resumed_run_with_other_inputs_is_refused(run):
    start(run, teacher=model()).update()
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(ValueError) as error:
        start(run, resumed=True, teacher=model(**{"model.safetensors": "9" * 64}))
    was, now = model()["hash"][:12], model(**{"model.safetensors": "9" * 64})["hash"][:12]
    told = f"teacher: some/model {was} there, some/model {now} now, in model.safetensors. Restore them, or start a new"
    assert f"{run} began with other inputs: {told}" in str(error.value)
    assert (run / "manifest.json").read_bytes() == before
    start(run, resumed=True, teacher=model() | {"name": "another/name"})  # content counts


def data(**hashes):
    return {name: {"name": f"{name}.jsonl", "rows": 1, "hash": digest * 64} for name, digest in hashes.items()}


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ({}, {}, []),
        ({"student": model()}, {"student": model(), "teacher": record("miniature:teacher", "b" * 64)}, []),
        ({"bridge": None}, {"bridge": record("b", "e" * 64)}, [f"bridge: none there, b {'e' * 12} now"]),
        ({"bridge": record("b", "e" * 64)}, {"bridge": None}, [f"bridge: b {'e' * 12} there, none now"]),
        ({"data": data(train="1")}, {"data": data(train="1")}, []),
        (
            {"data": data(train="1", eval="2")},
            {"data": data(train="3", test="4")},
            [
                f"data (eval): eval.jsonl {'2' * 12} there, none now",
                f"data (test): none there, test.jsonl {'4' * 12} now",
                f"data (train): train.jsonl {'1' * 12} there, train.jsonl {'3' * 12} now",
            ],
        ),
        ({"config": {"learning_rate": 1}}, {"config": {"learning_rate": 2}}, []),
        ({"seeds": {"seed": 1}}, {"seeds": {"seed": 2}}, []),
    ],
)
def test_inputs_that_differ(before, after, lines):
    base = {"student": model()}
    assert differing_inputs(identity(**base | before), identity(**base | after)) == lines


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"a": None}, "in a"),
        ({"new": "5" * 64}, "in new"),
        ({"b": "0" * 64, "a": "0" * 64, "config.json": "0" * 64}, "in a, b, config.json"),
        (dict.fromkeys(MODEL, "0" * 64), "in a, b, config.json and more"),
    ],
)
def test_files_that_differ_are_named(changed, told):
    (line,) = differing_inputs(identity(student=model()), identity(student=model(**changed)))
    assert line.startswith("student: some/model ") and line.endswith(f" now, {told}")


def test_the_manifest_is_replaced_in_one_stroke(run, monkeypatch):
    manifest = start(run)
    manifest.update(force=True)
    before = (run / "manifest.json").read_bytes()

    def killed(*_):
        raise OSError("the power is gone")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="power"):
        manifest.update(force=True, updates=7)
    assert (run / "manifest.json").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["manifest.json"]


def test_a_reader_sees_it_whole(run, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    manifest = start(run)
    manifest.update()
    seen, broken, done = set(), [], threading.Event()

    def read():
        while not done.is_set():
            try:
                seen.add(json.loads((run / "manifest.json").read_text())["sessions"][0]["updates"])
            except Exception as error:
                broken.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(150):
        manifest.update(force=True, updates=number)
    done.set()
    reader.join()
    assert not broken
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is not a run of oprd train: it holds no manifest.json"),
        ("{", "not valid JSON"),
        ("[]", "has another schema than 1"),
        ("{}", "has another schema than 1"),
        ('{"schema": 2}', "has another schema than 1"),
        ('{"schema": "1"}', "has another schema than 1"),
    ],
)
def test_what_is_no_manifest(run, content, told):
    run.mkdir()
    if content is not None:
        (run / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_manifest(run)
    if content is not None:
        with pytest.raises(ValueError, match=told):
            start(run, resumed=True)


def test_a_value_that_is_no_json_leaves_the_old_file(run):
    manifest = start(run)
    manifest.update()
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        manifest.update(force=True, updates=float("nan"))
    assert (run / "manifest.json").read_bytes() == before


def test_names_of_runs(tmp_path, monkeypatch):
    assert run_name(tmp_path / "one") == "one"
    assert run_name(tmp_path / "one" / "then") == "one-then"
    (tmp_path / "one" / "then").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "one")
    assert run_name(".") == "one"
    assert run_name("then") == "one-then"
    manifest = start("then")
    assert manifest.content["run"] == "one-then"


def test_what_was_passed_in_is_not_changed(run):
    given = identity()
    before = copy.deepcopy(given)
    manifest = Manifest.start(run, identity=given, processes=1, resumed=False)
    manifest.update(tokens_generated=3)
    assert given == before
