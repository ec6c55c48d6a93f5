"""`report_to` left open: trackio where it is installed, nothing where it is not, and the same run either way."""

import json
import socket
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainingArguments

from oprd.cli import main
from oprd.lineage.hashing import folder_hashes
from oprd.lineage.manifest import read_manifest
from oprd.training import dashboard, starting
from oprd.training.dashboard import choose_dashboard
from oprd.training.recipe import parse, resolved
from oprd.training.shipped import shipped
from oprd.training.surroundings import say_if_prompt_alone

CREATED = "2030-01-02T03:04:05"


@pytest.fixture
def chosen(tmp_path, monkeypatch, caplog):
    for name in dashboard.ELSEWHERE:
        monkeypatch.delenv(name, raising=False)

    def choose(*, installed, is_open=True, **settings):
        monkeypatch.setattr(dashboard, "find_spec", lambda name: object() if installed else None)
        args = TrainingArguments(output_dir=str(tmp_path / "first"), use_cpu=True, **settings)
        args.report_to_is_open = is_open
        caplog.clear()
        with caplog.at_level("INFO"):
            choose_dashboard(args, CREATED)
        return args, caplog.text

    return choose


def test_trackio_where_it_is_installed_and_nothing_leaves_the_machine(chosen):
    args, told = chosen(installed=True)
    assert (args.report_to, args.project, args.run_name) == (["trackio"], "oprd", "first 2030-01-02 03:04")
    assert args.trackio_space_id is None and args.trackio_static_space_id is False
    assert "trackio show --project oprd" in told and "report_to: none" in told


def test_nothing_where_it_is_not_or_where_the_recipe_says_so(chosen):
    for args, told in (chosen(installed=False), chosen(installed=True, is_open=False, report_to="none")):
        assert args.report_to == [] and args.project == "huggingface" and not told


def test_what_a_recipe_names_is_kept(chosen, monkeypatch):
    args, told = chosen(installed=True, is_open=False, report_to="trackio", project="mine", run_name="this")
    assert (args.report_to, args.project, args.run_name) == (["trackio"], "mine", "this")
    assert "--project mine" in told and "report_to: none" not in told
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    assert "this machine" not in chosen(installed=True)[1]


def test_no_record_hangs_on_it(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(f"output_dir: {tmp_path}/run\nuse_cpu: true\n")
    assert "report_to" not in resolved(parse(["--config", str(own)]))
    assert resolved(parse(["--config", str(own), "--report_to", "none"]))["report_to"] == []
    assert not starting.same_settings({"report_to": []}, {}) and starting.same_settings({"seed": 1}, {})


@pytest.mark.parametrize("name", [name for name in shipped() if name.startswith("miniature")])
def test_the_miniature_starts_none(name):
    assert yaml.safe_load(shipped()[name].read_text())["report_to"] == "none"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"positions": "first_k"}, "positions: first_k supervises"),
        ({"positions": "last_k", "output_loss": "full"}, "output_loss supervises"),
        ({"positions": "last_k"}, None),
        ({"positions": "first_k", "gradient_scope": "full"}, None),
    ],
    ids=["first_k", "output", "last_k", "full"],
)
def test_a_suffix_that_is_everything_is_told(settings, told, caplog):
    say_if_prompt_alone(
        SimpleNamespace(**{"gradient_scope": "suffix", "output_loss": "none", "output_weight": 1.0} | settings)
    )
    assert (told in caplog.text) if told else not caplog.text


def test_real_runs_with_and_without_are_the_same(tmp_path, monkeypatch, capsys):
    """trackio itself, offline: its curves have our metrics, the student is the same bit for bit, and nobody is called."""
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    called = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    recipe = yaml.safe_load(shipped()["miniature"].read_text())
    recipe |= {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "max_completion_length": 36}
    del recipe["report_to"]
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(recipe))
    for name, given in (("with", []), ("without", ["--report_to", "none"])):
        assert main(["train", "--config", str(own), "--output_dir", str(tmp_path / name), "--json", *given]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)[0]["steps"] == 2  # trackio prints, and not there
        assert ("Dashboard on this machine" in err) == (name == "with")
    run = f"with {read_manifest(tmp_path / 'with')['created'][:16].replace('T', ' ')}"
    losses = [row["train/loss"] for row in SQLiteStorage.get_logs("oprd", run) if "train/loss" in row]
    assert len(losses) == 2 and not called
    assert folder_hashes(tmp_path / "with" / "final") == folder_hashes(tmp_path / "without" / "final")
