"""No file that is read may run code, and nothing is written outside of the run."""

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
import yaml

import oprd
from oprd.cli import main
from oprd.model_files import warn_of_code
from tiny import tiny_model, tiny_tokenizer

PACKAGE = Path(oprd.__file__).parent
ROOT = PACKAGE.parents[1]
FILES = sorted(path for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "examples") for path in folder.rglob("*.py"))

# ------------------------------------------------------------------------------------------------------- what the code says

UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "tarfile",
    "zipfile",
}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {"os.system", "os.popen", "torch.load", "shutil.unpack_archive", "yaml.unsafe_load", "yaml.full_load"}


def dotted(node):
    """``a.b.c`` of an expression, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call, name):
    """The value of a keyword where it is a constant, else the expression; None if it is not given."""
    given = next((k.value for k in call.keywords if k.arg == name), None)
    return given.value if isinstance(given, ast.Constant) else given


def faults(source):
    """Everything in some source that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, ast.Dict):
            keys = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
            if isinstance(keys.get("trust_remote_code"), ast.Constant) and keys["trust_remote_code"].value is True:
                found.append("trust_remote_code: True")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in UNSAFE_NAMES | UNSAFE_CALLS:
            found.append(f"calls {name}")
        if name in ("np.load", "numpy.load") and keyword(node, "allow_pickle") not in (None, False):
            found.append("np.load with pickles")
        if keyword(node, "shell") not in (None, False):
            found.append(f"{name} in a shell")
        if name == "yaml.load" and dotted(keyword(node, "Loader")) not in ("yaml.SafeLoader", "_Loader"):
            found.append("yaml.load without a safe loader")
        if keyword(node, "trust_remote_code") is True:
            found.append(f"{name} trusts remote code")
        loads = name.endswith(".from_pretrained") and name.startswith(("AutoModel", "transformers.AutoModel"))
        if loads and keyword(node, "use_safetensors") is not True:
            found.append(f"{name} may read a pickle")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_code_runs_what_a_file_says(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "np.load('x', allow_pickle=True)",
        "eval('1')",
        "exec(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "import tarfile",
        "from zipfile import ZipFile",
        "load(name, trust_remote_code=True)",
        "how = {'trust_remote_code': True}",
        "AutoModelForCausalLM.from_pretrained(path)",
        "AutoModelForCausalLM.from_pretrained(path, use_safetensors=False)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    ["model.eval()", "yaml.safe_load(text)", "np.load('x', allow_pickle=False)", "json.load(file)", "subprocess.run(['ls'])",
     "AutoTokenizer.from_pretrained(path)", "load(name, trust_remote_code=args.trust_remote_code)"],
)  # fmt: skip
def test_the_scan_lets_good_code_through(source):
    assert faults(source) == []


def test_the_loader_of_recipes_makes_plain_values_only():
    from oprd import yaml_file

    assert issubclass(yaml_file._Loader, yaml.SafeLoader)
    assert not [tag for tag in yaml_file._Loader.yaml_constructors if tag and "python" in tag]
    assert not [tag for tag in yaml_file._Loader.yaml_multi_constructors if tag and "python" in tag]


@pytest.mark.parametrize("brings_code", [True, False])
def test_remote_code_is_announced(tmp_path, caplog, brings_code):
    """Once it is asked for; a folder without Python files has none to run."""
    if brings_code:
        (tmp_path / "modeling_own.py").write_text("")
    for asked in (False, True):
        caplog.clear()
        warn_of_code(str(tmp_path), asked)
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert said == ([f"trust_remote_code is on: Python code from {tmp_path} will run here, with all that you may do."]
                        if asked and brings_code else [])  # fmt: skip


# --------------------------------------------------------------------------------------------------- what a hostile file does


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


PICKLES = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "adapter_model.bin",
           "pytorch_model-00001-of-00002.bin")  # fmt: skip


def poison(folder, mark):
    """Pickles under every name that a library might look for."""
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Payload(mark)))


@pytest.fixture
def place(tmp_path):
    """Two whole models beside hostile pickles, prompts, a recipe; and the mark that a payload would leave."""
    mark = tmp_path / "code-ran"
    for role, seed in (("student", 0), ("teacher", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / role)
        tiny_tokenizer().save_pretrained(tmp_path / role)
        poison(tmp_path / role, mark)
    rows = [{"prompt": "abc"[: 1 + n % 3] + str(n), "answer": str(n)} for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "prompts.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.parametrize("name", ["student/optimizer.pt", "teacher/pytorch_model.bin"])
def test_the_payload_would_run(place, name):
    """Were it loaded as it asks to be: the mark below means something."""
    pickle.loads((place / name).read_bytes())
    assert (place / "code-ran").exists()


@pytest.mark.parametrize(
    "command",
    [
        "train --config recipe.yaml",
        "eval student --on prompts.jsonl --samples 1 --temperature 0 --max_new_tokens 4 --limit 2 --out results",
        "bridge fit --config recipe.yaml --bridge bridge --bridge_controls false --bridge_held_out 0.2",
        "plan --config recipe.yaml",
    ],
)
def test_pickles_beside_a_model_are_never_read(place, monkeypatch, command):
    """And every model is asked for as safetensors."""
    monkeypatch.chdir(place)
    asked, load = [], transformers.PreTrainedModel.from_pretrained.__func__
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, *a, **how: asked.append(how.get("use_safetensors")) or load(cls, *a, **how)),
    )
    assert main(command.split()) in (0, 3)
    assert set(asked) <= {True}
    assert len(asked) >= (0 if command.startswith("plan") else 2)
    assert not (place / "code-ran").exists()


def test_pickles_in_a_checkpoint_are_never_read(place, monkeypatch):
    """A run that resumes from a hostile checkpoint refuses it, or goes on without them."""
    monkeypatch.chdir(place)
    assert main(["train", "--config", "recipe.yaml", "--save_strategy", "steps", "--save_steps", "1"]) == 0
    shutil.rmtree(place / "out/final")
    (checkpoint,) = (place / "out").glob("checkpoint-*")
    poison(checkpoint, place / "code-ran")
    main(["train", "--config", "recipe.yaml", "--save_strategy", "no", "--max_steps", "2", "--resume"])
    assert not (place / "code-ran").exists()


# ------------------------------------------------------------------------------------------------------ where a run writes

CACHES = (
    ".cache/huggingface",
    ".cache/matplotlib",
    ".config/matplotlib",
    ".cache/torch",
    ".triton",
)  # of libraries, under HOME


def files_below(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_run_writes_into_its_folder_alone(place):
    """Beside it only caches of libraries, under HOME; temporary files are removed."""
    for name in ("home", "temporary", "elsewhere"):
        (place / name).mkdir()
    before = files_below(place)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_", "MPL", "TORCH"))}
    moved = {"HOME": str(place / "home"), "TMPDIR": str(place / "temporary"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-B", "-m", "oprd", "train", "--config", str(place / "recipe.yaml")],
        cwd=place / "elsewhere",
        env=kept | moved,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    after = files_below(place)
    assert {name: after.get(name) for name in before} == before
    fresh = {name for name in after.keys() - before.keys() if not name.startswith("out/")}
    assert {name for name in fresh if not name.startswith(tuple(f"home/{cache}" for cache in CACHES))} == set()
    assert (place / "out/final/model.safetensors").exists()
