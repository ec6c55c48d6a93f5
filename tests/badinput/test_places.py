"""Where a run writes, and what it must reach: folders, disks, ports, servers, checkpoints."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from importlib.machinery import ModuleSpec

import pytest
import yaml

from badinput.harness import SECONDS, Case, cases, check_refused, error_line, snapshot
from oprd.training import surroundings

Usage = namedtuple("Usage", "total used free")


def where(name, culprit, remedy, arrange=None, command=None, **settings):
    return Case(name, culprit, remedy, arrange, settings, *([] if command is None else [tuple(command.split())]))


def finished(place):
    shutil.copytree(place / "runs/one", place / "out")


def begun(place):
    place.write("out/checkpoint-3/trainer_state.json", "{}")
    place.write("out/checkpoint-3/model.safetensors", "")


def weights_of_nothing(place):
    place.write("elsewhere/notes.txt", "words")


@cases(
    where("a file", r"output_dir \S*gates\.yaml cannot be a folder: \S+gates\.yaml is a file", "Choose another output_dir", output_dir="gates.yaml"),
    where("inside a file", r"output_dir \S*gates\.yaml/run cannot be a folder: \S+gates\.yaml is a file", "Choose another output_dir", output_dir="gates.yaml/run"),
    where("a link to nothing", r"output_dir link/run cannot be a folder", "Choose another output_dir", lambda p: (p / "link").symlink_to("gone"), output_dir="link/run"),
    where("where nobody can write", "output_dir /proc/oprd-run cannot be written to: /proc", "Choose another output_dir, or mend its permissions", output_dir="/proc/oprd-run"),
    where("a finished run", "out holds a finished run", "Choose another output_dir, or remove it", finished),
    where("a run that was begun", "out already holds checkpoint-3", "Continue it with --resume, or choose another output_dir", begun),
    where("a checkpoint that is not there", r"resume_from_checkpoint: there is no folder \S*checkpoint-9", "Name a checkpoint-N folder", resume_from_checkpoint="out/checkpoint-9"),
    where("a checkpoint of nothing", r"resume_from_checkpoint: elsewhere is no checkpoint \(no trainer_state\.json\)", "Name a checkpoint-N folder", weights_of_nothing,
        resume_from_checkpoint="elsewhere"),
    where("a second stage where nobody can write", "output_dir /proc/oprd-run cannot be written to", "Choose another", output_dir="/proc/oprd-run", then={"output_loss": "full"}),
    where("a bridge where nobody can write", "bridge /proc/bridge cannot be written to", "Choose another bridge", command="bridge fit --config {root}/recipe.yaml --bridge /proc/bridge"),
    where("results where nobody can write", "--out /proc/results/problems cannot be written to", "Choose another --out",
        command="eval {root}/student --on problems.jsonl --samples 1 --temperature 0 --out /proc/results"),
    where("a page where nobody can write", "--out /proc cannot be written to", "Choose another --out", command="report {root}/runs/one --out /proc/page.html"),
    where("a registry where nobody can write", r"/proc/registry", "Choose another", command="registry promote /proc/registry {root}/runs/one --without_gate x"),
    where("a plot where nobody can write", r"--plot /proc cannot be written to", "Choose another --plot", command="compare {root}/runs/one --plot /proc/plot.png"),
)  # fmt: skip
def test_folders(case, place, capfd):
    check_refused(case, place, capfd)


def test_a_disk_that_is_full(place, capfd, monkeypatch):
    """Known before a token is sampled: the student alone would not fit."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    said = check_refused(Case("", r"output_dir \S+/out: the disk of \S+ has 0\.00 GB left", "Free some"), place, capfd)
    assert "needed at least" in said


def test_a_disk_that_fills_up_later(place, capfd, monkeypatch):
    """A write that fails is told with the file, and the old file stays."""
    import oprd.records

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(oprd.records.os, "fsync", full)
    case = Case("", r"report\.html: No space left on device", "Free some", command=("report", "{root}/runs/one"))
    check_refused(case, place, capfd)


@pytest.fixture
def taken():
    """A port that somebody listens on and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken(place, capfd, monkeypatch, taken):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(taken)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_refused(
        Case("", f"MASTER_PORT {taken} is taken by another process", "Set MASTER_PORT to a free one"), place, capfd
    )


@pytest.fixture
def with_vllm(monkeypatch):
    """As if vLLM were installed."""
    found = surroundings.find_spec
    monkeypatch.setattr(
        surroundings, "find_spec", lambda name: ModuleSpec("vllm", None) if name == "vllm" else found(name)
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("as_url", [True, False])
def test_a_server_that_does_not_answer(place, capfd, with_vllm, as_url):
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    where = {"vllm_server_base_url": url} if as_url else {"vllm_server_host": "127.0.0.1", "vllm_server_port": port}
    case = Case(
        "",
        f"vLLM server at {url} does not answer",
        "Start it first",
        settings={"use_vllm": True, "vllm_mode": "server", **where},
    )
    check_refused(case, place, capfd)


def test_a_server_whose_address_is_none(place, capfd, with_vllm):
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "localhost:8000"}
    check_refused(
        Case("", "vllm_server_base_url: localhost:8000", "such as http://localhost:8000", settings=settings),
        place,
        capfd,
    )


def test_a_server_that_answers_is_taken():
    """Somebody who listens will do for this check."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        threading.Thread(target=listener.accept, daemon=True).start()
        surroundings.check_server(f"http://127.0.0.1:{listener.getsockname()[1]}")


# ---------------------------------------------------------------------------------------------- in processes of their own


def oprd(place, *words):
    """The command as a user runs it: exit code, stderr, seconds with imports (none where others keep the machine busy)."""
    started, others = time.perf_counter(), os.getloadavg()[0] > 1
    done = subprocess.run(
        [sys.executable, "-m", "oprd", *words], capture_output=True, text=True, cwd=place.root, timeout=90
    )
    return done.returncode, done.stderr, 0 if others else time.perf_counter() - started


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        (
            {"learning_rat": 1},
            ["train", "--config", "recipe.yaml"],
            "unknown key 'learning_rat'; did you mean learning_rate",
        ),
        ({}, ["eval", "student", "--on", "gone.jsonl"], "There is no file gone.jsonl"),
    ],
)
def test_from_outside(place, changes, words, told):
    place.write("recipe.yaml", yaml.safe_dump(place.settings | changes))
    before = snapshot(place.root)
    status, stderr, seconds = oprd(place, *words)
    assert status == 1, stderr
    assert told in error_line(stderr)
    assert seconds < SECONDS
    assert snapshot(place.root) == before


def test_a_file_that_may_not_grow(place):
    """A limit on the size of files stands for a disk that fills up while the page is written."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from oprd.cli import main; sys.exit(main(['report', 'runs/one']))"
    )
    before = snapshot(place.root)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place.root, timeout=90)
    assert done.returncode == 1, done.stderr
    assert "runs/one/report.html: File too large" in error_line(done.stderr)
    assert snapshot(place.root) == before
