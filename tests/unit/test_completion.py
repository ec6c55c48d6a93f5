"""`oprd completion`: the script completes in a real shell."""

import shutil
import subprocess
import sys

import pytest

from oprd.cli import main
from oprd.commands.launching import layouts
from oprd.training.options import CHOICES
from oprd.training.shipped import shipped

BASH = shutil.which("bash")
ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_oprd
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "oprd", "completion", "bash"], capture_output=True, text=True, check=True
    )
    path = tmp_path_factory.mktemp("completion") / "oprd.bash"
    path.write_text(done.stdout)
    return path


@pytest.fixture
def complete(script, tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "notes.txt").write_text("")

    def ask(*words):
        done = subprocess.run(
            [BASH, "--norc", "-c", ASK, "bash", str(script), "oprd", *words],
            capture_output=True, text=True, cwd=tmp_path, env={"PATH": "/nowhere"}, timeout=20,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        return set(done.stdout.split())

    return ask


@pytest.mark.skipif(BASH is None, reason="no bash")
def test_words_complete_in_bash(complete):
    """PATH is empty, so that no Python, nor anything else, is started by a Tab."""
    names = set(shipped())
    assert {"demo", "recipes", "train", "plan", "bridge", "eval", "serve-teacher"} <= complete("")
    assert complete("s") == {"show", "serve-teacher"}
    assert complete("bridge", "") == {"fit", "inspect"}
    assert complete("registry", "pro") == {"promote"}
    assert complete("train", "--representation_") == {"--representation_weight", "--representation_loss"}
    assert complete("plan", "--shard") == {"--sharding"} and complete("plan", "--sharding", "z") == {"zero2", "zero3"}
    for words in (
        ["train", "--config"],
        ["plan", "--config"],
        ["bridge", "fit", "--config"],
        ["show"],
        ["show", "--resolved"],
    ):
        assert complete(*words, "") == names | {"mine.yaml"}, words
    assert complete("train", "--config", "miniature", "--lm_head", "") == set(CHOICES["lm_head"])
    assert complete("train", "--accelerate_config", "") == set(layouts())
    assert complete("train", "--use_vllm", "t") == {"true"} and complete("train", "--learning_r") == {"--learning_rate"}
    assert complete("train", "--dataset_name", "no") == {"notes.txt"}
    assert complete("gate", "run", "--config", "m") == {"mine.yaml"}
    assert complete("eval", "--engine", "") == {"transformers", "vllm"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_can_read_theirs(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "miniature-tokenizer" in out and "accelerate_config" in out
    if shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=20)


def test_without_shtab_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err
