import platform
import subprocess
from importlib.metadata import version

import numpy as np
import pytest

from oprd.lineage import machine
from oprd.lineage.machine import git_state, hardware, peak_memory_bytes, versions


@pytest.fixture
def git(tmp_path, monkeypatch):
    """A command in a fresh repository; ``git.folder`` is it."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "somebody")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "repository"

    def run(*arguments):
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    run.folder = folder
    folder.mkdir()
    run("init", "-q")
    return run


@pytest.fixture
def commit(git):
    """The first commit, of a package."""
    package = git.folder / "package"
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    (git.folder / ".gitignore").write_text("venv/\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return git("rev-parse", "HEAD")


def test_a_clean_repository(git, commit):
    assert len(commit) == 40
    clean = {"commit": commit, "modified": False}
    for path in (git.folder, git.folder / "package", git.folder / "package" / "__init__.py"):
        assert git_state(path) == clean


@pytest.mark.parametrize("staged", [False, True])
def test_a_change_anywhere_in_it_counts(git, commit, staged):
    (git.folder / "package" / "__init__.py").write_text("one = 2\n")
    if staged:
        git("add", ".")
    for path in (git.folder, git.folder / "package" / "__init__.py"):
        assert git_state(path) == {"commit": commit, "modified": True}
    git("commit", "-q", "-a", "-m", "second")
    assert git_state(git.folder) == {"commit": git("rev-parse", "HEAD"), "modified": False}
    assert git_state(git.folder)["commit"] != commit


def test_a_deleted_file_is_a_change(git, commit):
    (git.folder / "package" / "__init__.py").unlink()
    assert git_state(git.folder)["modified"] is True


def test_a_file_that_git_does_not_track_is_no_change_and_has_no_commit(git, commit):
    (git.folder / "notes.txt").write_text("notes")
    assert git_state(git.folder) == {"commit": commit, "modified": False}
    assert git_state(git.folder / "notes.txt") is None


def test_a_package_installed_into_a_repository_is_not_of_it(git, commit):
    installed = git.folder / "venv" / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("one = 1\n")
    assert git_state(installed / "__init__.py") is None


def test_outside_of_any_repository(git, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("")
    for path in (outside, outside / "file", tmp_path / "missing" / "file"):
        assert git_state(path) is None


def test_a_repository_without_a_commit(git):
    assert git_state(git.folder) is None


def test_no_git_at_all(git, commit, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(git.folder) is None


def test_a_git_that_is_too_slow_to_say_is_not_taken_for_clean(git, commit, monkeypatch):
    run = subprocess.run

    def slow(command, **more):
        if "status" in command:
            raise subprocess.TimeoutExpired(command, 10)
        return run(command, **more)

    monkeypatch.setattr(machine.subprocess, "run", slow)
    assert git_state(git.folder) == {"commit": commit, "modified": None}


def test_versions_of_what_is_installed():
    found = versions()
    assert found["python"] == platform.python_version()
    for name in ("oprd", "torch", "transformers", "trl", "math-verify"):
        assert found[name] == version(name)


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package-anywhere"))
    assert versions().keys() == {"python", "torch"}


def test_hardware(monkeypatch):
    import torch

    found = hardware(3)
    assert found["processes"] == 3 and hardware()["processes"] == 1
    assert found["processor"] and found["cores"] >= 1
    assert 0.1 < found["memory_gb"] < 100_000
    assert found["threads"] == torch.get_num_threads()
    assert found["gpus"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    assert found["platform"] == platform.platform()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert hardware()["gpus"] == ["GPU 0", "GPU 1"]


def test_the_peak_of_memory_is_in_bytes_and_never_falls():
    before = peak_memory_bytes()
    assert 20e6 < before < 1e12  # a Python with torch, not kilobytes of it
    block = np.ones(64 * 2**20 // 8)
    held = peak_memory_bytes()
    del block
    assert before <= held <= before + 2**30
    assert peak_memory_bytes() >= held
