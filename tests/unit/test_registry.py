import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from oprd import records
from oprd.lineage import hashing
from oprd.lineage.registry import ALIVE, Registry


def make_run(folder, content="weights", *, manifest=True):
    """A run with the files that count and one that does not."""
    final = folder / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}")
    (final / "model.safetensors").write_text(content)
    (final / "README.md").write_text("prose")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps({"made": content}))
    return folder


def model_hash(run):
    return hashing.combined_hash(hashing.folder_hashes(run / "final"))


def passed(run, **more):
    return {"passed": True, "model_hash": model_hash(run), **more}


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """A kill loses nothing that was written; what reaches the disk when has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


@pytest.fixture
def runs(tmp_path):
    """The n-th run."""
    return lambda n: (
        run if (run := tmp_path / "runs" / str(n)).exists() else make_run(tmp_path / "runs" / str(n), f"weights {n}")
    )


@pytest.fixture
def promote(registry, runs):
    """Promote the n-th run."""
    return lambda n, **more: registry.promote(runs(n), **{"gate": passed(runs(n)), **more})


def snapshot(registry):
    """All that a refused call must leave alone."""
    files = (path for path in registry.directory.rglob("*") if path.is_file() and path.name != ".lock")
    content = {str(path.relative_to(registry.directory)): path.read_bytes() for path in files}
    link = registry.directory / "current"
    return content, os.readlink(link) if link.is_symlink() else None


def states(registry):
    return {entry["version"]: entry["state"] for entry in registry.versions()}


# ---------------------------------------------------------------------------------------------------- the rules


def test_nothing_promoted_yet(registry):
    assert registry.versions() == [] and registry.current() is None
    assert not registry.directory.exists()
    for use in (registry.verify, lambda: registry.retire(1, "why"), lambda: registry.rollback("why")):
        with pytest.raises(ValueError, match="There is no registry"):
            use()
    assert not registry.directory.exists()


def test_a_promoted_run_is_copied_recorded_and_current(registry, runs):
    run, before = runs(1), time.time()
    gate = passed(run, scores={"math": 0.5})
    assert registry.promote(run, gate=gate, note="the first") == 1
    [entry] = registry.versions()
    assert entry == registry.current()
    assert before - 1 <= datetime.fromisoformat(entry.pop("promoted")).timestamp() <= time.time()
    files = hashing.folder_hashes(run / "final")
    assert entry == {
        "version": 1,
        "state": "active",
        "source": str(run),
        "model_hash": model_hash(run),
        "files": files | {"run-manifest.json": hashing.file_hash(run / "manifest.json")},
        "gate": gate,
        "note": "the first",
    }
    folder = registry.folder(1)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "config.json": "{}",
        "model.safetensors": "weights 1",
        "README.md": "prose",
        "run-manifest.json": '{"made": "weights 1"}',
    }
    assert hashing.combined_hash(hashing.folder_hashes(folder)) == entry["model_hash"]  # gates can judge it again
    assert os.readlink(registry.directory / "current") == "versions/0001"
    assert registry.verify() == []
    assert model_hash(run) == gate["model_hash"] and (run / "manifest.json").exists()


def test_the_newest_promotion_is_current_and_history_tells_all(registry, promote):
    assert [promote(1), promote(2), promote(3)] == [1, 2, 3]
    registry.retire(2, "worse")
    assert registry.rollback("broken") == 1
    assert promote(4, gate=None, force_reason="in a hurry") == 4
    record = json.loads((registry.directory / "registry.json").read_text())
    assert (record["schema"], record["current"]) == (1, 4)
    assert [[step[key] for key in ("action", "version", "reason", "from")] for step in record["history"]] == [
        ["promote", 1, None, None],
        ["promote", 2, None, 1],
        ["promote", 3, None, 2],
        ["retire", 2, "worse", 3],
        ["rollback", 1, "broken", 3],
        ["promote", 4, "in a hurry", 1],
    ]
    assert all(datetime.fromisoformat(step["at"]).utcoffset().total_seconds() == 0 for step in record["history"])
    assert states(registry) == {1: "active", 2: "retired", 3: "retired", 4: "active"}
    assert record["versions"][2]["retired"] == {"at": record["history"][4]["at"], "reason": "broken"}
    assert registry.verify() == []


@pytest.mark.parametrize(
    ("remove", "named"),
    [(["config.json"], "config.json"), (["model.safetensors"], r"\*.safetensors"), (["."], r"config.json and \*.safe")],
)
def test_a_run_without_a_model_is_refused(registry, runs, remove, named):
    final = runs(1) / "final"
    for name in remove:
        shutil.rmtree(final) if name == "." else (final / name).unlink()
    with pytest.raises(ValueError, match=f"final lacks {named}"):
        registry.promote(runs(1), gate=None, force_reason="whatever")
    assert not registry.directory.exists()


@pytest.mark.parametrize(
    ("gate", "why"),
    [
        (None, "no gates ran"),
        ([True], "no gates ran"),
        ({}, "did not pass"),
        ({"passed": False}, "did not pass"),
        ({"passed": "yes"}, "did not pass"),
        ({"passed": True}, "judged other files"),
        ({"passed": True, "model_hash": "0" * 64}, "judged other files"),
    ],
)
def test_a_student_needs_its_gates_or_a_reason(registry, runs, gate, why):
    with pytest.raises(ValueError, match=f"{why}.*say why to do without"):
        registry.promote(runs(1), gate=gate)
    for empty in ("", "  ", 7):
        with pytest.raises(ValueError, match="The reason is empty"):
            registry.promote(runs(1), gate=gate, force_reason=empty)
    assert not registry.directory.exists()
    assert registry.promote(runs(1), gate=gate, force_reason="known fault") == 1
    entry = registry.current()
    assert why in entry["forced"]["over"] and entry["forced"]["reason"] == "known fault"
    assert entry["gate"] == gate


def test_a_reason_that_was_not_needed_forces_nothing(registry, promote):
    promote(1, force_reason="to be sure")
    assert "forced" not in registry.current()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_file_changed_after_the_gates_is_refused(registry, runs, name):
    gate = passed(runs(1))
    (runs(1) / "final" / name).write_text("other")
    with pytest.raises(ValueError, match="judged other files"):
        registry.promote(runs(1), gate=gate)
    assert not registry.directory.exists()


def test_prose_may_change_after_the_gates(registry, runs):
    gate = passed(runs(1))
    (runs(1) / "final" / "README.md").write_text("edited")
    assert registry.promote(runs(1), gate=gate) == 1


def test_a_file_changed_while_it_is_copied_is_refused(registry, runs, promote, monkeypatch):
    promote(1)
    before = snapshot(registry)
    copy = shutil.copyfile

    def changing(source, target):
        (runs(2) / "final" / "model.safetensors").write_text("still training")
        return copy(source, target)

    gate = passed(runs(2))
    monkeypatch.setattr(shutil, "copyfile", changing)
    with pytest.raises(ValueError, match="changed while it was copied"):
        registry.promote(runs(2), gate=gate)
    assert snapshot(registry) == before


def test_what_cannot_be_recorded_is_refused_before_the_copy(registry, runs):
    with pytest.raises(ValueError, match="The gate or the note cannot be written as JSON"):
        registry.promote(runs(1), gate=passed(runs(1), score=float("nan")))
    assert not registry.directory.exists()


def test_an_active_model_is_not_promoted_twice(registry, promote, tmp_path, monkeypatch):
    promote(1)
    promote(2)
    twin = make_run(tmp_path / "twin", "weights 1")
    before = snapshot(registry)
    with monkeypatch.context() as patch:
        patch.setattr(hashing, "copy_folder", None)  # said before anything large is copied
        for force in (None, "really"):
            with pytest.raises(ValueError, match="the active version 1 already"):
                registry.promote(twin, gate=passed(twin), force_reason=force)
    assert snapshot(registry) == before
    registry.retire(1, "to bring it back")
    assert registry.promote(twin, gate=passed(twin)) == 3
    assert states(registry) == {1: "retired", 2: "active", 3: "active"}


def test_retiring_keeps_the_files(registry, promote):
    promote(1)
    promote(2)
    registry.retire(1, "superseded")
    entry = registry.versions()[0]
    assert (entry["state"], entry["retired"]["reason"]) == ("retired", "superseded")
    assert registry.folder(1).is_dir() and registry.current()["version"] == 2 and registry.verify() == []
    shutil.rmtree(registry.folder(1))  # for a person to do
    assert registry.verify() == []
    assert promote(3) == 3


def test_refused_retirements(registry, promote):
    promote(1)
    promote(2)
    registry.retire(1, "superseded")
    before = snapshot(registry)
    for version, reason, why in [
        (2, "worse", "Roll back first, or promote another"),
        (1, "again", r"no active version 1\. Versions: 1 \(retired\), 2 \(active\)"),
        (7, "worse", r"no active version 7\. Versions: 1 \(retired\), 2 \(active\)\."),
        (1, " ", "The reason is empty"),
    ]:
        with pytest.raises(ValueError, match=why):
            registry.retire(version, reason)
    assert snapshot(registry) == before


def test_rolling_back_goes_to_the_newest_active_version_before(registry, promote):
    for n in range(1, 6):
        promote(n)
    registry.retire(4, "worse")
    assert registry.rollback("broken") == 3
    assert registry.rollback("also broken", to=1) == 1
    assert states(registry) == {1: "active", 2: "active", 3: "retired", 4: "retired", 5: "retired"}
    assert [entry["retired"]["reason"] for entry in registry.versions()[2:]] == ["also broken", "worse", "broken"]
    assert os.readlink(registry.directory / "current") == "versions/0001"
    before = snapshot(registry)
    for to, why in [
        (None, "No active version came before"),
        (1, "is the current one"),
        (3, "no active version 3"),
        (9, "no active version 9"),
    ]:
        with pytest.raises(ValueError, match=why):
            registry.rollback("once more", to=to)
    with pytest.raises(ValueError, match="The reason is empty"):
        registry.rollback("", to=2)
    assert snapshot(registry) == before
    assert registry.rollback("the older one was worse", to=2) == 2  # forward, to one that was passed over
    assert registry.current()["version"] == 2 and states(registry)[1] == "retired"


def test_no_rollback_to_files_that_are_gone(registry, promote):
    promote(1)
    promote(2)
    shutil.rmtree(registry.folder(1))
    with pytest.raises(ValueError, match="The files of version 1 are gone"):
        registry.rollback("broken")
    assert registry.current()["version"] == 2


def test_no_rollback_to_files_that_are_damaged(registry, promote):
    promote(1)
    promote(2)
    (registry.folder(1) / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match=r"Version 1: model.safetensors changed\. Restore version 1, or name another"):
        registry.rollback("broken")
    assert registry.current()["version"] == 2


def test_no_reason_is_good_enough_for_files_that_their_run_did_not_write(registry, runs):
    run = runs(1)
    (run / "manifest.json").write_text(json.dumps({"final": {"hash": passed(run)["model_hash"]}}))
    (run / "final" / "model.safetensors").write_text("other")
    with pytest.raises(ValueError, match="has changed since its run wrote it"):
        registry.promote(run, gate=None, force_reason="in a hurry")
    assert not registry.versions()


def test_links_are_copied_as_what_they_lead_to(registry, tmp_path):
    blob = tmp_path / "cache" / "blobs" / hashing.hashlib.sha256(b"large").hexdigest()
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"large")
    run = make_run(tmp_path / "run", manifest=False)
    (run / "final" / "model.safetensors").unlink()
    (run / "final" / "model.safetensors").symlink_to(blob)
    registry.promote(run, gate=passed(run))
    shutil.rmtree(tmp_path / "cache")
    copy = registry.folder(1) / "model.safetensors"
    assert copy.read_bytes() == b"large" and not copy.is_symlink()
    assert registry.verify() == []


def test_a_blob_that_is_not_what_its_name_says_is_refused(registry, tmp_path):
    blob = tmp_path / "cache" / "blobs" / ("0" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"cut short")
    run = make_run(tmp_path / "run")
    (run / "final" / "model.safetensors").unlink()
    (run / "final" / "model.safetensors").symlink_to(blob)
    with pytest.raises(ValueError, match="or was misread"):
        registry.promote(run, gate=passed(run))
    assert registry.versions() == [] and list((registry.directory / "versions").iterdir()) == []


def other_file_system(tmp_path):
    for place in (Path("/dev/shm"), Path.home(), Path("/var/tmp")):
        if place.is_dir() and os.access(place, os.W_OK) and place.stat().st_dev != tmp_path.stat().st_dev:
            return place
    pytest.skip("there is one file system only")


def test_a_run_on_another_file_system(registry, tmp_path):
    with tempfile.TemporaryDirectory(dir=other_file_system(tmp_path)) as elsewhere:
        run = make_run(Path(elsewhere) / "run")
        assert registry.promote(run, gate=passed(run)) == 1
    assert registry.verify() == []


# ---------------------------------------------------------------------------------------------------- verify


def test_verify_finds_a_flipped_byte(registry, promote):
    promote(1)
    promote(2)
    weights = registry.folder(1) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[3] ^= 1
    weights.write_bytes(content)
    assert registry.verify() == ["Version 1: model.safetensors changed."]
    registry.retire(1, "damaged")
    assert registry.verify() == ["Version 1: model.safetensors changed."]


def test_verify_finds_what_else_can_be_wrong(registry, promote):
    for n in range(1, 4):
        promote(n)
    (registry.folder(1) / "model.safetensors").unlink()
    (registry.folder(1) / "adapter.bin").write_text("new")
    (registry.folder(1) / "run-manifest.json").write_text("{}")
    (registry.folder(1) / "README.md").write_text("prose is free")
    shutil.rmtree(registry.folder(2))
    shutil.copytree(registry.folder(3), registry.folder(8))
    (registry.directory / "current").unlink()
    (registry.directory / "current").symlink_to("versions/0001")
    assert [fault.replace(str(registry.directory) + "/", "") for fault in registry.verify()] == [
        "Version 1: adapter.bin was added.",
        "Version 1: model.safetensors is missing.",
        "Version 1: run-manifest.json changed.",
        "Version 2: There is no folder versions/0002. Restore it, or name one that exists.",
        "versions/0008 has no entry. Delete it if a promotion was interrupted, or restore a newer registry.json.",
        "current does not lead to version 3.",
    ]
    assert promote(4) == 9  # and the link is mended
    assert not any("current" in fault for fault in registry.verify())


def test_any_change_mends_the_link(registry, promote):
    promote(1)
    promote(2)
    link = registry.directory / "current"
    for damage in (lambda: None, lambda: link.symlink_to("versions/0001"), lambda: link.symlink_to("nowhere")):
        link.unlink()
        damage()
        with pytest.raises(ValueError, match="is the current one"):
            registry.retire(2, "refused, but a change all the same")
        assert os.readlink(link) == "versions/0002"
    link.unlink()
    link.mkdir()
    with pytest.raises(ValueError, match="is in the way"):
        registry.retire(1, "why")
    assert states(registry) == {1: "active", 2: "active"}


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "damaged"),
        ('{"schema": 1, "curr', "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "current": 2, "versions": [], "history": []}', "damaged"),
        ('{"schema": 1, "current": null, "versions": [{"version": 1, "state": "active"}], "history": []}', "damaged"),
        ('{"schema": 1, "current": 1, "versions": [{"version": 1, "state": "retired"}], "history": []}', "damaged"),
        (b"\xff\xfe", "damaged"),
        ('{"schema": 2, "students": []}', "has schema 2, not 1. Use the version of oprd that wrote it"),
        (None, "is gone, though"),
    ],
)
def test_a_registry_that_cannot_be_read_is_left_alone(registry, promote, content, why):
    promote(1)
    path = registry.directory / "registry.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(registry)
    for use in (
        registry.versions,
        registry.current,
        registry.verify,
        lambda: promote(2),
        lambda: registry.retire(1, "why"),
        lambda: registry.rollback("why"),
    ):
        with pytest.raises(ValueError, match=why):
            use()
    assert snapshot(registry) == before


# ---------------------------------------------------------------------------------------------------- kills

WRITES = {"open", "os.mkdir", "os.rename", "os.symlink", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}


def killed_before_step(step, directory, action):
    """Run ``action`` in a process of its own, killed before its ``step``-th change of the registry; whether it was."""
    child = os.fork()
    if child == 0:
        left = [step]

        def hook(event, arguments):
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in WRITES and not reads and any(str(directory) in str(argument) for argument in arguments):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def whole(registry):
    """The version that ``current`` leads to; all that is recorded is there, as it was recorded."""
    known = states(registry)
    linked = int(os.readlink(registry.directory / "current").removeprefix("versions/"))
    assert (registry.directory / "current" / "config.json").is_file() and linked in known
    faults = [f for f in registry.verify() if "has no entry" not in f and "does not lead" not in f]
    assert faults == [] and registry.current()["state"] == "active"
    return linked


def test_a_promotion_killed_at_any_moment(registry, runs, promote):
    promote(0)
    taken, outcomes = {1}, set()
    for step in range(1, 200):
        before, linked_before = registry.versions(), whole(registry)
        gate = passed(runs(step))
        was_killed = killed_before_step(
            step, registry.directory, lambda n=step, g=gate: registry.promote(runs(n), gate=g)
        )
        after, linked = registry.versions(), whole(registry)
        new = after[len(before) :]
        assert after[: len(before)] == before and len(new) <= 1
        assert linked in {linked_before, registry.current()["version"]}
        folders = {int(path.name) for path in (registry.directory / "versions").iterdir() if path.name.isdecimal()}
        # No number twice: not after a folder without an entry either.
        assert not taken & {entry["version"] for entry in new}
        outcomes.add((len(folders - taken), len(new), linked != linked_before))
        taken |= folders
        number = promote(1000 + step)
        assert number == max(taken) + 1
        taken.add(number)
        assert whole(registry) == number == registry.current()["version"]
        leftovers = [path.name for path in registry.directory.rglob(".*") if path.name != ".lock"]
        assert leftovers == []
        if not was_killed:
            break
    assert step > 15 and not was_killed
    # Before the folder has its number, before the entry, before the link, and afterwards.
    assert outcomes == {(0, 0, False), (1, 0, False), (1, 1, False), (1, 1, True)}


def test_a_first_promotion_killed_at_any_moment(tmp_path, runs):
    gates = passed(runs(1)), passed(runs(2))
    for step in range(1, 200):
        registry = Registry(tmp_path / f"registry-{step}")
        was_killed = killed_before_step(step, registry.directory, lambda r=registry: r.promote(runs(1), gate=gates[0]))
        assert states(registry) in ({}, {1: "active"})
        taken = registry.folder(1).exists()
        assert registry.promote(runs(2), gate=gates[1]) == (2 if taken else 1)
        assert whole(registry) == registry.current()["version"]
        if not was_killed:
            break
    assert step > 20


@pytest.mark.parametrize("action", ["retire", "rollback"])
def test_a_change_killed_at_any_moment(registry, promote, action):
    promote(0)
    outcomes = set()
    for step in range(1, 100):
        first, second = promote(2 * step), promote(2 * step + 1)
        before = registry.versions()
        act = {"retire": lambda v=first: registry.retire(v, "why"), "rollback": lambda: registry.rollback("why")}[
            action
        ]
        was_killed = killed_before_step(step, registry.directory, act)
        linked, current = whole(registry), registry.current()["version"]
        changed = registry.versions() != before
        outcomes.add((changed, current == first, linked == first))
        assert current == (first if action == "rollback" and changed else second)
        assert states(registry)[first if action == "retire" else second] == ("retired" if changed else "active")
        if not was_killed:
            break
    expected = {"retire": {(False, False, False), (True, False, False)}}
    expected["rollback"] = {(False, False, False), (True, True, False), (True, True, True)}
    assert outcomes == expected[action] and not was_killed


def test_each_step_is_on_disk_before_the_next(registry, runs, monkeypatch):
    (runs(1) / "final" / "sub").mkdir()
    (runs(1) / "final" / "sub" / "more.json").write_text("{}")
    (runs(1) / "final" / ".hidden").write_text("")
    steps = []

    def noted(name, function):
        def call(*arguments):
            steps.append((name, [Path(argument).relative_to(registry.directory) for argument in arguments]))
            return function(*arguments)

        return call

    monkeypatch.setattr(records, "sync", noted("sync", records.sync))
    monkeypatch.setattr(os, "rename", noted("rename", os.rename))
    monkeypatch.setattr(os, "replace", noted("replace", os.replace))
    registry.promote(runs(1), gate=passed(runs(1)))
    names, paths = zip(*steps, strict=True)
    assert names == ("sync", "rename", "sync", "replace", "sync", "replace", "sync")
    copied = {path for path in registry.folder(1).rglob("*")}
    incoming = paths[1][0]
    assert {path.relative_to(incoming) for path in paths[0]} == {Path("."), Path(ALIVE)} | {
        path.relative_to(registry.folder(1)) for path in copied
    }
    assert paths[1][1] == Path("versions/0001") and paths[2] == [Path("versions")]
    assert paths[3][1] == Path("registry.json") and paths[5][1] == Path("current")
    assert paths[4] == paths[6] == [Path(".")]


# ---------------------------------------------------------------------------------------------------- company

PROMOTE_SOME = """
import sys, time
from pathlib import Path
from oprd.lineage.hashing import combined_hash, folder_hashes
from oprd.lineage.registry import Registry
registry, go, runs = Registry(sys.argv[1]), Path(sys.argv[2]), [Path(run) for run in sys.argv[3:]]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for run in runs:
    gate = {"passed": True, "model_hash": combined_hash(folder_hashes(run / "final"))}
    try:
        print(registry.promote(run, gate=gate), flush=True)
    except ValueError as error:
        assert "active version" in str(error), error
"""


def start(registry, go, *runs):
    command = [sys.executable, "-c", PROMOTE_SOME, str(registry.directory), str(go), *map(str, runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_six_processes_at_once_and_a_reader(registry, runs, promote, tmp_path):
    promote(0)
    shared = runs(100)  # everybody tries, one succeeds
    writers = [start(registry, tmp_path / "go", *(runs(3 * n + k) for k in (1, 2, 3)), shared) for n in range(6)]
    assert all(writer.stdout.readline() == "ready\n" for writer in writers)
    (tmp_path / "go").touch()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        record = json.loads((registry.directory / "registry.json").read_text())
        assert [entry["version"] for entry in record["versions"]] == list(range(1, len(record["versions"]) + 1))
        assert record["current"] == len(record["versions"])
        config = (registry.directory / "current" / "config.json").read_text()
        assert config == "{}"
        seen.add(record["current"])
    outcomes = [writer.communicate() for writer in writers]
    assert [error for _, error in outcomes if error] == []
    numbers = [int(line) for out, _ in outcomes for line in out.split()]
    assert sorted(numbers) == list(range(2, 21))  # 18 of their own, and the shared one once
    assert len({entry["model_hash"] for entry in registry.versions()}) == 20
    assert len(seen) > 3, "the reader came too late to see anything"
    assert registry.current()["version"] == 20 and registry.verify() == []
    assert [path.name for path in (registry.directory / "versions").glob(".*")] == []


def test_what_the_dead_left_is_removed_and_what_the_living_hold_is_not(registry, promote):
    promote(1)
    versions = registry.directory / "versions"
    dead, living = versions / ".incoming-1-dead", versions / f".incoming-{os.getpid()}-living"
    for folder in (dead, living):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    (registry.directory / ".registry.json.0123abcd").write_text("{")
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(living / ALIVE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert promote(2) == 2
        assert not dead.exists() and (living / "model.safetensors").exists()
        assert not (registry.directory / ".registry.json.0123abcd").exists()
        holder.kill()
    assert promote(3) == 3
    assert not living.exists()


def test_waiting_has_an_end(registry, runs, promote):
    promote(1)
    impatient = Registry(registry.directory, timeout=0.1)
    with FileLock(registry.directory / ".lock", thread_local=False):
        held = subprocess.run(
            [sys.executable, "-c", WAIT, str(registry.directory)], capture_output=True, text=True, check=True
        )
    assert ".lock was held for 0.1 s. Try again" in held.stdout
    impatient.promote(runs(2), gate=passed(runs(2)))


WAIT = """
import sys
from oprd.lineage.registry import Registry
registry = Registry(sys.argv[1], timeout=0.1)
assert registry.current()["version"] == 1  # readers need not wait
try:
    registry.retire(1, "why")
except TimeoutError as error:
    print(error)
"""


def test_the_lock_is_free_while_a_model_is_copied(registry, runs, promote, monkeypatch):
    promote(1)
    promote(2)
    copy = hashing.copy_folder

    def slow(source, target):
        copy(source, target)
        Registry(registry.directory, timeout=0).retire(1, "meanwhile")

    monkeypatch.setattr(hashing, "copy_folder", slow)
    assert promote(3) == 3
    assert states(registry) == {1: "retired", 2: "active", 3: "active"}


# ---------------------------------------------------------------------------------------------------- all together


class AgainstAModel(RuleBasedStateMachine):
    """Any sequence of calls does to the registry what it does to a dict of what is active."""

    @initialize()
    def begin(self):
        self.root = Path(tempfile.mkdtemp())
        self.runs = [make_run(self.root / "runs" / str(n), f"weights {n}") for n in range(4)]
        self.registry = Registry(self.root / "registry")
        self.of, self.active, self.current = {}, {}, None  # version -> run; version -> whether; version

    def expect(self, allowed, call):
        if allowed:
            return call()
        with pytest.raises(ValueError):
            call()
        return None

    @rule(n=st.integers(0, 3), good=st.sampled_from([True, True, False]), force=st.booleans())
    def promote(self, n, good, force):
        taken = any(self.active[v] and run == n for v, run in self.of.items())
        gate = passed(self.runs[n]) | {"passed": good}
        reason = "forced" if force else None
        call = lambda: self.registry.promote(self.runs[n], gate=gate, force_reason=reason)  # noqa: E731
        version = self.expect((good or force) and not taken, call)
        if version is not None:
            assert version == len(self.of) + 1
            self.of[version], self.active[version], self.current = n, True, version

    @rule(version=st.integers(0, 6))
    def retire(self, version):
        allowed = self.active.get(version, False) and version != self.current
        self.expect(allowed, lambda: self.registry.retire(version, "why"))
        if allowed:
            self.active[version] = False

    @rule(to=st.none() | st.integers(0, 6))
    def rollback(self, to):
        older = [v for v, active in self.active.items() if active and v < self.current]
        goal = max(older, default=None) if to is None else to
        allowed = self.active.get(goal, False) and goal != self.current
        found = self.expect(allowed, lambda: self.registry.rollback("why", to=to))
        if allowed:
            assert found == goal
            self.active[self.current], self.current = False, goal

    @invariant()
    def agrees(self):
        expected = {v: "active" if active else "retired" for v, active in self.active.items()}
        assert states(self.registry) == expected
        current = self.registry.current()
        assert (current and current["version"]) == self.current
        if self.of:
            assert self.registry.verify() == []
            weights = (self.registry.directory / "current" / "model.safetensors").read_text()
            assert weights == f"weights {self.of[self.current]}"

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
