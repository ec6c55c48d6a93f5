import logging
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

import oprd
from oprd.cli import build_parser, main
from oprd.training.options import BENCHMARK_HELP, CHOICES, DATA_HELP, HELP


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def run(capsys):
    """``main`` in this process: exit status, stdout, stderr. The log handler that it sets up is taken off again."""
    events = logging.getLogger("oprd")
    before = events.handlers, events.propagate, events.level

    def call(*arguments):
        capsys.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    yield call
    events.handlers, events.propagate = before[:2]
    events.setLevel(before[2])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["train", "-h"], ["demo", "--help"], ["prune", "--help"]]
)
def test_help_does_not_wait(arguments):
    started = time.perf_counter()
    done = python("-m", "oprd", *arguments)
    assert time.perf_counter() - started < 2
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: oprd{' ' + arguments[0] if len(arguments) > 1 else ''} ")


@pytest.mark.parametrize(
    "what",
    [
        "import oprd, oprd.cli",
        """
import contextlib, io
from oprd.cli import build_parser, main
helps = [[], ["bridge", "fit"], ["bridge", "inspect"], ["registry", "promote"], *([name] for name in build_parser().commands.choices)]
for words in helps:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        try:
            main([*words, "--help"])
        except SystemExit as stop:
            assert stop.code == 0
    assert told.getvalue().startswith(" ".join(["usage: oprd", *words])), words
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["recipes"]) == main(["show", "miniature"]) == main(["completion", "bash"]) == 0
""",
        """
import contextlib, io
from oprd.cli import main
recipes = [["train"], ["plan"], ["bridge", "fit"], ["show"]]
for words in [*([*words, "--config", "minature"] for words in recipes), ["report", "gone"], ["diagnose", "gone"], ["diagnose"]]:
    with contextlib.redirect_stderr(io.StringIO()) as told:
        assert main([word for word in words if words[0] != "show" or word != "--config"]) == 1
    assert told.getvalue().startswith("oprd: error: "), words
""",
    ],
    ids=["imports", "every help", "frequent mistakes"],
)
def test_nothing_heavy_is_imported_first(what):
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'numpy'}"
    done = python("-c", f"import sys\n{what}\nprint(sorted({heavy} & set(sys.modules)))")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_help_lists_every_command_once_in_order_and_the_version(run):
    status, out, _ = run("--help")
    assert status == 0
    parser = build_parser()
    told = {action.dest: action.help for action in parser.commands._choices_actions}
    assert [name for names in parser.groups.values() for name in names] == list(told)
    lines = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2:3].isalpha()]
    assert [name for name in lines if name in told] == list(told)
    for name, line in told.items():  # one line each, in one form: verb first, no full stop
        assert line == line[0].lower() + line[1:] and line[-1] != "." and not line.split()[0].endswith("s"), name
    assert all(len(line) <= 100 for line in out.splitlines())
    assert out.count("oprd demo") == 1 and "oprd show miniature > my.yaml" in out
    assert run("--version") == (0, f"oprd {version('oprd')}\n", "")


def test_train_help_names_every_setting(run):
    status, out, err = run("train", "--help")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    for name in [*HELP, *DATA_HELP, *BENCHMARK_HELP]:
        choices = f" [{'|'.join(CHOICES[name])}]" if name in CHOICES else ""
        assert lines.count(f"  --{name}{choices}") == 1
    flat = " ".join(out.split())
    for text in [*HELP.values(), *DATA_HELP.values(), *BENCHMARK_HELP.values()]:
        assert text in flat


def test_the_settings_in_the_help_are_those_that_the_parser_takes():
    from dataclasses import fields

    from oprd import OPRDConfig
    from oprd.training.recipe import DataConfig

    assert {field.name for field in fields(DataConfig)} == {*DATA_HELP, "resume", "then"}
    assert set(HELP) <= {field.name for field in fields(OPRDConfig)} | {"resume"}


def test_train_alone_shows_how_and_fails(run):
    status, out, err = run("train")
    assert (status, err) == (2, "")
    assert out == run("train", "--help")[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "'nothing'"),
        ([], "COMMAND"),
        (["demo", "--nothing"], "--nothing"),
        (["demo", "--steps", "x"], "x"),
    ],
)
def test_bad_usage(run, arguments, named):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert named in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "usage", "meant"),
    [
        (["trian"], "usage: oprd [-h]", "did you mean train?"),
        (["diagnose", "--studnet", "x"], "usage: oprd diagnose", "did you mean --student?"),
        (["registry", "promote", "r", "s", "--noet", "x"], "usage: oprd registry", "did you mean --note?"),
        ([], "usage: oprd [-h]", "oprd --help lists them"),
    ],
)
def test_a_misspelt_word_is_told_with_the_nearest_one(run, arguments, usage, meant):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith(usage) and meant in err.splitlines()[-1]


def one_line(outcome):
    """The message of a run that ended with status 1 and one line on stderr."""
    status, out, err = outcome
    assert (status, out) == (1, "")
    assert err.startswith("oprd: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", ["nothing", "nothing.yaml", "nowhere/miniature.yaml"])
def test_an_unknown_recipe(run, name):
    message = one_line(run("train", "--config", name))
    assert f"no recipe {name}" in message
    shipped = message.partition("ships with oprd: ")[2].partition(". [")[0].split(", ")
    assert shipped == sorted(path.stem for path in (Path(oprd.__file__).parent / "recipes").glob("*.yaml"))
    assert "miniature" in shipped


def test_no_folder_is_made_for_what_is_no_run(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("report", "diagnose"):
        assert "gone is not a run of oprd train" in one_line(run(command, "gone"))
    from oprd.insight.report import write_report

    with pytest.raises(ValueError, match="not a run"):
        write_report(Path("gone"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_key(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run\nuse_cpu: true\nlearning_rat: 1.0e-5\n")
    assert "unknown key 'learning_rat'; did you mean learning_rate?" in one_line(run("train", "--config", str(recipe)))
    assert "--no_such_key" in one_line(run("train", "--config", "miniature", "--no_such_key", "3"))


def test_a_setting_that_cannot_be(run, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: {tmp_path}/run\nuse_cpu: true\nreduction: sum\n")
    assert "reduction must be one of sequence, token, got 'sum'" in one_line(run("train", "--config", str(recipe)))
    recipe.write_text(f"output_dir: {tmp_path}/run\nuse_cpu: true\n")
    assert "No student: set model_name_or_path" in one_line(run("train", "--config", str(recipe)))
    assert not (tmp_path / "run").exists()


def test_traceback_on_request(run):
    with pytest.raises(ValueError, match="no recipe nothing"):
        run("--traceback", "train", "--config", "nothing")


def test_config_without_a_recipe_and_a_recipe_that_is_no_yaml(run, tmp_path):
    assert "--config needs a recipe: a YAML file, or the name of one" in one_line(run("train", "--config"))
    path = tmp_path / "r.yaml"
    path.write_text("a: [1,\n")
    for arguments in (["--config", str(path)], [f"--config={path}"]):
        status, _, error = run("train", *arguments)
        assert status == 1
        assert error.startswith(f"oprd: error: The recipe {path} is not valid YAML")
