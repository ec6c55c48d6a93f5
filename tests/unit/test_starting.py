import subprocess
import sys
import textwrap

import pytest
from accelerate import PartialState

from oprd.durability.folders import staged
from oprd.lineage.manifest import read_manifest
from oprd.records import write_json
from oprd.training import starting
from oprd.training.starting import Start, locked, plan_start
from runs import identity, make_run

SETTINGS = identity()["config"]


@pytest.fixture(autouse=True)
def _state():
    PartialState()


def unfinished(run, *steps, status="running", **changes):
    """A run that was killed: its manifest, and checkpoints that are whole."""
    make_run(run)
    write_json(run / "manifest.json", read_manifest(run) | {"status": status, "final": None} | changes)
    for path in (run / "final").iterdir():
        path.unlink()
    (run / "final").rmdir()
    for step in steps:
        with staged(run / f"checkpoint-{step}", with_checksums=True) as staging:
            (staging / "model.safetensors").write_text(str(step))
    return run


def plan(run, settings=None, *, resume=False, named=None, max_steps=10):
    return plan_start(run, {**SETTINGS, **(settings or {})}, resume=resume, named=named, max_steps=max_steps)


def test_nothing_there(tmp_path):
    assert plan(tmp_path / "run") == Start()


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_the_same_settings_continue_by_themselves(tmp_path, caplog, status):
    run = unfinished(tmp_path / "run", 20, 40, status=status)
    with caplog.at_level("INFO"):
        assert plan(run) == Start(str(run / "checkpoint-40"), goes_on=True)
    assert [r.getMessage() for r in caplog.records] == [f"{run} continues from checkpoint-40."]
    assert plan(run, {"output_dir": "spelt/otherwise"}).checkpoint == str(run / "checkpoint-40")
    assert plan(run, named=str(run / "checkpoint-20")).checkpoint == str(run / "checkpoint-20")


def test_other_settings_are_named_and_need_resume(tmp_path):
    run = unfinished(tmp_path / "run", 40)
    with pytest.raises(ValueError, match=r"learning_rate: 0\.0001 there, 0\.5 now.*--resume"):
        plan(run, {"learning_rate": 0.5})
    assert plan(run, {"learning_rate": 0.5}, resume=True).checkpoint == str(run / "checkpoint-40")


def test_a_folder_without_a_manifest_needs_resume(tmp_path):
    run = unfinished(tmp_path / "run", 40)
    (run / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"already holds checkpoint-40\. Continue it with --resume"):
        plan(run)
    assert plan(run, resume=True) == Start(str(run / "checkpoint-40"), goes_on=True)


def test_killed_before_the_first_checkpoint(tmp_path, caplog):
    run = unfinished(tmp_path / "run")
    (run / "best-step-000000").mkdir()
    (run / "best").symlink_to("best-step-000000")
    (run / ".saving-checkpoint-20").mkdir()
    with caplog.at_level("INFO"):
        assert plan(run) == Start(None, goes_on=True)
    told = " ".join(r.getMessage() for r in caplog.records)
    assert "half-way (.saving-checkpoint-20)" in told and "starts from the beginning" in told
    assert not list(run.glob("best*")) and not (run / ".saving-checkpoint-20").exists()
    assert plan(run, {"learning_rate": 0.5}) == Start()  # nothing is lost by starting over


def test_a_finished_run(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a finished run"):
        plan(run)
    assert plan(run, resume=True).is_done
    longer = {"learning_rate": 0.5, "max_steps": 20}
    assert plan(run, longer, resume=True, max_steps=20) == Start()
    write_json(run / "manifest.json", read_manifest(run) | {"last_update": 20})
    assert plan(run, longer, resume=True, max_steps=20).is_done


def test_killed_between_the_student_and_the_record_of_it(tmp_path):
    run = make_run(tmp_path / "run")
    write_json(run / "manifest.json", read_manifest(run) | {"status": "running"})
    assert plan(run) == Start(goes_on=True, is_trained=True)
    with pytest.raises(ValueError, match="holds a finished run"):
        plan(run, {"learning_rate": 0.5})
    # A final student of before: the run went on and was killed on its way.
    write_json(run / "manifest.json", read_manifest(run) | {"final": None})
    assert plan(run) == Start(None, goes_on=True)


def test_a_best_student_that_nothing_links_to_goes(tmp_path):
    run = unfinished(tmp_path / "run", 4)
    for step in (2, 4):
        (run / f"best-step-{step:06d}").mkdir()
    (run / "best").symlink_to("best-step-000002")
    plan(run)
    assert sorted(path.name for path in run.glob("best*")) == ["best", "best-step-000002"]


def test_one_process_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(starting, "LOCK_SECONDS", 0.1)
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
        import sys
        from filelock import FileLock
        import pathlib
        pathlib.Path({str(run)!r}).mkdir()
        with FileLock({str(run / ".lock")!r}):
            print("held", flush=True)
            sys.stdin.read()
        """)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="Another process is at work in"), locked(run):
            pytest.fail("two at once")
    finally:
        holder.kill()
        holder.wait()
    with locked(run):  # the lock died with its holder
        (run / "metrics.jsonl").write_text("")
    assert run.exists()


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="bad"), locked(tmp_path / "run"):
        raise ValueError("bad")
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").exists()


def test_another_number_of_processes_needs_resume(tmp_path):
    run = unfinished(tmp_path / "run", 40)
    manifest = read_manifest(run)
    manifest["sessions"][-1]["hardware"]["processes"] = 2
    write_json(run / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"run by 2 processes and this is 1: .* fewer responses.*--resume"):
        plan(run)
    assert plan(run, resume=True).checkpoint == str(run / "checkpoint-40")
