"""``oprd serve-teacher`` as a process, and ``oprd train`` with ``teacher_url``: the same run as with the teacher inside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import yaml

from oprd.cli import main
from oprd.lineage.manifest import read_manifest
from oprd.models import resolve_path
from oprd.serving.host import Host
from oprd.training.callbacks import read_metrics
from oprd.training.run import run
from served import TOKEN, service_of

RECIPE = {
    "model_name_or_path": "miniature:student",
    "dataset_name": "miniature:train.jsonl",
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 16,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


class Server:
    """The command in a process of its own."""

    def __init__(self, *arguments, port=0):
        environment = {name: value for name, value in os.environ.items() if name != "OPRD_TEACHER_TOKEN"}
        command = [sys.executable, "-m", "oprd", "serve-teacher", "--model", "miniature:teacher", "--port", str(port)]
        command += arguments
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def wait_until_it_listens(self):
        """Requests are then taken, and answered once the weights are loaded."""
        first = self.process.stderr.readline()
        self.url = re.search(r"http://\S+:\d+", first).group()
        self.port = int(self.url.rpartition(":")[2])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()  # so that it never blocks
        return self

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module", autouse=True)
def token(tmp_path_factory):
    """In the environment of the runs, and in a file for the services."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN + "\n")
    os.environ["OPRD_TEACHER_TOKEN"] = TOKEN
    yield file
    del os.environ["OPRD_TEACHER_TOKEN"]


@pytest.fixture(scope="module")
def servers(token):
    """The module's services; the last one runs."""
    running = [Server("--token_file", str(token)).wait_until_it_listens()]
    yield running
    for server in running:
        if server.process.poll() is None:
            server.kill()


def train(folder, name, **settings):
    """What the command runs before it draws plots; the run's folder."""
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder / name)} | settings))
    return run(["--config", str(recipe)])[0]


def outcome(folder):
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return losses, read_manifest(folder)["final"]["hash"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, servers, token):
    """One run with the teacher inside; one with it elsewhere, whose service is killed and started again half-way."""
    folder = tmp_path_factory.mktemp("runs")
    first, killed = servers[0], threading.Event()

    def kill_and_start_again():
        metrics = folder / "there" / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count('"loss"') >= 2):
            time.sleep(0.005)
        first.kill()
        killed.set()
        servers.append(Server("--token_file", str(token), port=first.port).wait_until_it_listens())

    here = train(folder, "here", teacher_model_name_or_path="miniature:teacher")
    threading.Thread(target=kill_and_start_again, daemon=True).start()
    there, recipe = folder / "there", folder / "there.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(there), "teacher_url": first.url}))
    assert main(["train", "--config", str(recipe)]) == 0
    assert killed.is_set() and len(servers) == 2
    return folder, here, there


def test_the_run_is_the_same_though_the_service_was_killed(runs):
    _, here, there = runs
    assert outcome(here) == outcome(there)
    assert len(outcome(here)[0]) == RECIPE["max_steps"]


def test_the_manifest_says_who_taught_and_no_file_holds_the_token(runs, servers):
    _, here, there = runs
    teacher = read_manifest(there)["teacher"]
    assert teacher["name"] == servers[0].url and len(teacher["hash"]) == 64 and teacher["dtype"] == "float32"
    assert read_manifest(here)["teacher"]["name"] == "miniature:teacher"
    for path in there.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_the_run_can_be_repeated(runs):
    folder, _, there = runs
    again, _ = run(["--from", str(there), "--output_dir", str(folder / "again")])
    assert outcome(again) == outcome(there)


def test_another_teacher_behind_the_address_is_refused_on_resume(runs, capsys):
    recipe = runs[0] / "there.yaml"
    with service_of(Host.load(resolve_path("miniature:student"))) as url:
        again = ["train", "--config", str(recipe), "--teacher_url", url, "--resume", "--max_steps", "6"]
        assert main(again) == 1
    told = capsys.readouterr().err
    assert "began with other inputs: teacher:" in told and told.count("oprd: error") == 1


def test_the_teacher_of_such_a_run_is_not_evaluated_here(runs, capsys):
    assert main(["eval", str(runs[2]), "--of", "teacher", "--on", "miniature:test.jsonl"]) == 1
    assert "Evaluate it where they are" in capsys.readouterr().err


def test_a_plan_wants_both_models_here(runs, capsys):
    assert main(["plan", "--config", str(runs[0] / "there.yaml"), "--gpu_memory", "24"]) == 1
    assert "A plan is of models here" in capsys.readouterr().err


def test_a_bridge_is_fitted_and_trained_through(tmp_path, servers):
    """``bridge: auto`` with the teacher elsewhere: packed, in fewer dimensions."""
    settings = {"bridge": "auto", "bridge_rank": 8, "bridge_prompts": 32, "max_steps": 1, "save_strategy": "no"}
    settings |= {"max_tokens_per_microbatch": 400, "lm_head": "keep", "per_device_train_batch_size": 16}
    teachers = {"here": {"teacher_model_name_or_path": "miniature:teacher"}, "there": {"teacher_url": servers[-1].url}}
    outcomes = []
    for name, teacher in teachers.items():
        made = train(tmp_path, name, **settings, **teacher)
        report = json.loads((made / "bridge" / "bridge.json").read_text())["report"]
        outcomes.append((outcome(made), report["cosine"], report["explained"], report["prediction"]))
        assert ("random_teacher" in report["controls"]) == (name == "here") and "shuffled_pairs" in report["controls"]
    assert outcomes[0] == outcomes[1]


# --------------------------------------------------------------------------------------------- starting and stopping


def test_what_stops_it_before_weights_are_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Host, "load", None)  # not called
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "short").write_bytes(b"short")
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases = {
            "Cannot listen on 127.0.0.1 port": ["--port", str(taken.getsockname()[1])],
            "Cannot listen on 192.0.2.1 port": ["--host", "192.0.2.1"],
            "holds no token": ["--token-file", str(tmp_path / "short")],
            "cannot be read: No such file": ["--token_file", str(tmp_path / "none")],
            "has no config.json": ["--model", str(tmp_path / "empty")],
            "nowhere/at-all": ["--model", "nowhere/at-all"],
            "--max_tokens must be at least 1": ["--max_tokens", "0"],
        }
        for told, arguments in cases.items():
            assert main(["serve-teacher", "--model", "miniature:teacher", "--port", "0", *arguments]) == 1
            out, err = capsys.readouterr()
            assert out == "" and told in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_token_on_the_command_line_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["serve-teacher", "--model", "miniature:teacher", "--token", "0123456789abcdef"])
    assert stopped.value.code == 2 and "unrecognized arguments: --token" in capsys.readouterr().err


def test_it_ends_well_when_told_to(servers):
    assert servers[-1].kill(signal.SIGTERM) == 0
