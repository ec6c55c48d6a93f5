"""What a sharded run cannot take is refused; what leads into several processes is checked before any starts."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch import nn

import oprd
from oprd import OPRDConfig
from oprd.commands import launching
from oprd.training.engines import check_engine, fsdp_version, is_sharded, redirected, zero_stage

CONFIGS = sorted((Path(oprd.__file__).parent / "launch").glob("*.yaml"))


class Plugin:
    def __init__(self, stage):
        self.zero_stage = stage


@pytest.fixture
def make(tmp_path):
    def made(*, fsdp=None, zero=None, **settings):
        args = OPRDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
        args.fsdp_plugin_args = None if fsdp is None else {"fsdp_version": fsdp}
        args.deepspeed_plugin = None if zero is None else Plugin(zero)
        return args

    return made


@pytest.mark.parametrize("environment", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_from_the_recipe_or_from_accelerate_launch(make, monkeypatch, environment, version):
    if environment:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", str(version))
        args = make()
    else:
        args = make(fsdp=version)
    assert fsdp_version(args) == version
    assert is_sharded(args)


def test_who_holds_whole_weights(make):
    assert [is_sharded(make(zero=stage)) for stage in (None, 1, 2, 3)] == [False, False, False, True]
    assert [zero_stage(make(zero=stage)) for stage in (None, 2)] == [0, 2]


@pytest.mark.parametrize(
    ("engine", "settings", "has_adapter", "told"),
    [
        ({"fsdp": 1}, {}, False, "Set fsdp_version: 2"),
        ({"fsdp": 2}, {"offload_teacher": True}, False, "FSDP places the teacher's weights itself"),
        ({"zero": 2}, {"offload_teacher": True}, False, "DeepSpeed places the teacher's weights itself"),
        ({"zero": 2}, {"on_nonfinite": "skip"}, False, "on_nonfinite: skip cannot be.*Use stop"),
        ({"fsdp": 2}, {"lm_head": "solved"}, False, "which FSDP shards. Use DDP or ZeRO-2"),
        ({"zero": 3}, {"lm_head": "solved"}, False, "which DeepSpeed ZeRO-3 shards. Use DDP or ZeRO-2"),
        ({"fsdp": 2}, {}, True, "LoRA under FSDP"),
        ({"zero": 3}, {}, True, "LoRA under DeepSpeed ZeRO-3"),
    ],
    ids=str,
)
def test_what_an_engine_cannot_take(make, engine, settings, has_adapter, told):
    with pytest.raises(ValueError, match=told):
        check_engine(make(**engine, **settings), has_adapter=has_adapter)


@pytest.mark.parametrize("engine", [{}, {"zero": 2}, {"zero": 1}])
def test_whole_weights_take_everything_else(make, engine):
    check_engine(make(**engine, lm_head="solved"), has_adapter=True)


def test_only_the_loss_goes_through_the_wrapper():
    """A wrapper that rounds its results, as mixed-precision policies do, changes neither the loss nor what is beside it."""

    class Rounds(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self):
            return self.inner().bfloat16()

    weight = nn.Parameter(torch.tensor(1.234567))
    model = nn.Module()
    beside = {"term": torch.tensor(7.654321)}

    def redirect(wrapper, model, inner):
        model.forward = inner
        return wrapper()

    loss, terms = redirected(redirect, Rounds(model), model, lambda: (weight * weight, beside))
    assert terms is beside
    assert loss.dtype == torch.float32 and loss.item() == (weight * weight).item()
    loss.backward()
    assert weight.grad.item() == pytest.approx(2 * 1.234567, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ launching


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "--module", "oprd", "train"])
    assert parsed.training_script == "oprd"
    if "fsdp2" in path.stem:
        assert config.fsdp_config["fsdp_version"] == 2
    if "zero" in path.stem:
        assert config.deepspeed_config["zero_stage"] == int(path.stem[4])
    assert ("nodes" in path.stem) == (config.num_machines > 1)
    assert path.stem in launching.LAUNCH_HELP["accelerate_config"]


def test_without_launch_settings_nothing_is_launched():
    assert launching.launch(["train"], ["--config", "x.yaml", "--max_steps", "3"]) is None


@pytest.fixture
def launched(monkeypatch):
    calls = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", calls.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return calls


def test_the_same_command_runs_in_the_processes(launched):
    given = ["--config", "x.yaml", "--accelerate_config", "zero2", "--num_processes=2", "--max_steps", "3"]
    assert launching.launch(["train"], given) == 0
    (parsed,) = launched
    assert parsed.config_file.endswith("zero2.yaml") and parsed.num_processes == 2 and parsed.module
    assert [parsed.training_script, *parsed.training_script_args] == [
        "oprd",
        "train",
        "--config",
        "x.yaml",
        "--max_steps",
        "3",
    ]


def test_a_file_of_ones_own(launched, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(CONFIGS[0].read_text())
    assert launching.launch(["bridge", "fit"], ["--accelerate_config", str(own), "--config", "x"]) == 0
    assert launched[0].config_file == str(own)
    assert launched[0].training_script_args == ["bridge", "fit", "--config", "x"]


def test_failed_processes_are_a_failed_command(launched, monkeypatch):
    class ChildFailedError(Exception):
        pass

    def fails(parsed):
        raise ChildFailedError("rank 1")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fails)
    assert launching.launch(["train"], ["--accelerate_config", "fsdp2"]) == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--accelerate_config", "zero4"], "neither a file nor one of fsdp2, fsdp2_nodes, multi_gpu"),
        (["--accelerate_config"], "--accelerate_config needs a value"),
        (["--num_processes", "2"], "say how with --accelerate_config NAME"),
    ],
)
def test_launches_that_cannot_be(launched, given, told):
    with pytest.raises(ValueError, match=told):
        launching.launch(["train"], given)
    assert not launched


@pytest.mark.parametrize("name", launching.NUMBERS)
def test_numbers_are_numbers(launched, name):
    with pytest.raises(ValueError, match=f"--{name} must be a whole number, got 'two'"):
        launching.launch(["train"], ["--accelerate_config", "zero2", f"--{name}", "two"])
    assert not launched


def test_what_all_processes_say_is_told_once(launched, monkeypatch, capsys):
    class ChildFailedError(Exception):
        failures = {2: SimpleNamespace(exitcode=-9, signal_name=lambda: "SIGKILL"), 0: SimpleNamespace(exitcode=1)}

    def fails(parsed):
        for rank, message in enumerate(["oprd: error: all", "oprd: error: all", "oprd: error: mine"]):
            monkeypatch.setenv("RANK", str(rank))
            launching.tell_error(message)
        raise ChildFailedError

    monkeypatch.setattr("accelerate.commands.launch.launch_command", fails)
    before = signal.getsignal(signal.SIGINT)
    assert launching.launch(["train"], ["--accelerate_config", "fsdp2"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "oprd: error: all",
        "oprd: error: mine",
        "oprd: error: process 2 was ended by SIGKILL (often: no main memory left).",
    ]
    assert signal.getsignal(signal.SIGINT) is before and launching.ERRORS not in os.environ
    launching.tell_error("alone")
    assert capsys.readouterr().err == "alone\n"


def test_ctrl_c_in_a_launch(launched, monkeypatch):
    class SignalException(Exception):
        sigval = signal.SIGINT

    def stopped(parsed):
        os.kill(os.getpid(), signal.SIGINT)  # the processes get it too; this one waits for them
        raise SignalException

    monkeypatch.setattr("accelerate.commands.launch.launch_command", stopped)
    assert launching.launch(["train"], ["--accelerate_config", "fsdp2"]) == 130


def test_not_twice(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="choose one of the two"):
        launching.launch(["train"], ["--accelerate_config", "zero2"])
