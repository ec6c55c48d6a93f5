"""Every fenced block of the README and of the pages is held against what it claims to be. None is passed over in silence.

What a block is, its language says: ``python`` is executed, all blocks of a page in one namespace and one empty folder;
``bash`` is parsed by the real parsers; ``yaml`` is a recipe, or a part of one; ``text`` is output. A comment in front of a
block says otherwise:

    <!-- run: --max_steps 2 -->   bash: run it too, with these arguments added
    <!-- check: compile -->       python: names models that are not here; compiled, and our classes know its arguments
    <!-- check: gates -->         yaml: the thresholds of oprd gate
"""

import ast
import importlib
import inspect
import re
import shlex
import tempfile
import tomllib
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL
)
MARK = re.compile(r"<!-- (check|run): ?(.*?) -->\n *\Z")
COMMAND = re.compile(
    r"^    ((?:OMP_NUM_THREADS=1 )?(?:python|oprd|make) (?:.*\\\n)*.*)$", re.MULTILINE
)  # results.md indents
CHECKS = {"python": ("", "compile"), "bash": ("",), "yaml": ("", "gates"), "text": ("",), "": ("",)}
NOT_OURS = ("cd", "chmod", "git", "openssl", "trackio", "trl")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    check: str
    added: str | None  # arguments for a run, None if it is not run

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.added is not None or (self.language == "python" and not self.check)


def blocks_of(path: Path) -> list[Block]:
    text, found = path.read_text(encoding="utf-8"), []
    assert text.count("\n```") % 2 == 0, f"{path}: a fence is not closed"
    for fence in FENCE.finditer(text):
        mark = MARK.search(text[: fence.start()])
        kind, said = mark.groups() if mark else ("", "")
        body = inspect.cleandoc(fence["text"]) if fence["indent"] else fence["text"]
        line = text.count("\n", 0, fence.start()) + 1
        added = said if kind == "run" else None
        check = said if kind == "check" else ""
        found.append(Block(path.relative_to(ROOT).as_posix(), line, fence["language"].strip(), body, check, added))
    return found


BLOCKS = [block for path in PAGES for block in blocks_of(path)]


def of(language: str, check: str = "") -> list[Block]:
    return [block for block in BLOCKS if (block.language, block.check) == (language, check)]


def test_every_block_has_a_check():
    for block in BLOCKS:
        assert block.language in CHECKS, f"{block}: nothing here knows what {block.language!r} is"
        assert block.check in CHECKS[block.language], f"{block}: no check {block.check!r} of {block.language}"
        assert block.added is None or block.language == "bash", f"{block}: only bash is run by a mark"
    assert len(BLOCKS) > 60
    assert len({block.page for block in BLOCKS if block.runs}) >= 4


# ------------------------------------------------------------------------------------------------------------ commands


def commands_of(text: str) -> list[list[str]]:
    """Words of every command, without comments, settings of the environment and where the output goes."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        if substituted := re.search(r"\$\((.*)\)", line):  # eval "$(oprd ...)"
            line = substituted[1]
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        words = list(lexer)
        for is_joint, group in groupby(words, lambda word: word in ("&&", ";", "|", "&")):
            if not is_joint:
                command = list(takewhile(lambda word: word not in (">", ">>", "<"), group))
                commands.append(command[1:] if "=" in command[0] else command)
    return commands


def parse_ours(words: list[str]) -> None:
    """``oprd WORDS`` as the command line reads it, short of doing it.

    Raises:
        SystemExit, ValueError: an unknown command, flag or key; a value that a setting does not take.
    """
    from oprd.cli import OWN_KEYS, _underscored, build_parser
    from oprd.commands.bridge import _bridge_parser

    words = [_underscored(word) for word in words]
    if "--version" in words:
        return
    options, rest = build_parser().parse_known_args(words)
    if hasattr(options, "keys_after"):
        parse_recipe_keys(["--config", options.recipe, *rest])
    elif options.command not in OWN_KEYS:
        assert not rest, rest
    elif {"-h", "--help"} & set(rest):
        return
    elif options.command == "bridge" and rest[0] != "fit":
        _bridge_parser().parse_args(rest)
    elif options.command == "plan":
        parse_recipe_keys(plan_keys(rest))
    else:
        parse_recipe_keys(rest[1:] if options.command == "bridge" else rest, options.command)


def plan_keys(words: list[str]) -> list[str]:
    """What ``oprd plan`` leaves to the recipe's parser."""
    from oprd.commands.plan import run_plan

    class Reached(Exception):
        pass

    def stop(arguments, **_):
        raise Reached(arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Reached) as reached:
        patch.setattr("oprd.insight.recipe_plan.plan_recipe", stop)
        patch.setattr("oprd.commands.plan.check_recipe_named", lambda _: None)  # a reader's own recipe is not here
        run_plan(words)
    return reached.value.args[0]


def parse_recipe_keys(words: list[str], command: str = "train") -> None:
    from oprd.commands.launching import KEY, _config_file, _taken
    from oprd.training.recipe import find_recipe, parse

    launched, words = _taken([word for word in words if word != "--json"])
    if launched:
        _config_file(launched[KEY])
    if "--from" in words:
        words[words.index("--from") : words.index("--from") + 2] = ["--config", "miniature"]
    place = words.index("--config") + 1
    try:
        recipe = yaml.safe_load(find_recipe(words[place]).read_text())
    except ValueError:
        assert words[place].endswith(".yaml"), words[place]  # a reader's own
        recipe = yaml.safe_load(find_recipe("miniature").read_text())
        if "--teacher_url" in words:
            del recipe["teacher_model_name_or_path"]
    with tempfile.TemporaryDirectory() as folder:
        words[place] = f"{folder}/recipe.yaml"
        Path(words[place]).write_text(yaml.safe_dump(recipe | {"bf16": False, "use_cpu": True}))
        parse(words, command)


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "oprd":
        parse_ours(rest)
    elif program == "accelerate":
        assert rest[0] == "launch"
        parse_ours(rest[rest.index("oprd") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets)
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extras in re.findall(r"(?:oprd|\.)\[([\w,]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(known)
    elif program in ("python", "pytest"):
        module = rest[rest.index("-m") + 1] if "-m" in rest else None
        if module in (None, "pytest"):
            paths = [word for word in rest if "/" in word and not word.startswith(("-", "runs/"))]
            assert paths and all(
                any(ROOT.glob(path)) for path in paths if path.startswith(("benchmarks", "tests", "ex"))
            )
        elif module in ("http.server",):
            importlib.import_module(module)
        else:
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    else:
        assert program in NOT_OURS, f"no check for {program}"


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_bash(block):
    for words in commands_of(block.text):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_indented_commands(page):
    for words in commands_of("\n".join(COMMAND.findall(FENCE.sub("", page.read_text(encoding="utf-8"))))):
        check_command(words)


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_recipe(block, tmp_path):
    """Complete where it names a dataset; else what is left out comes from the miniature's recipe."""
    from oprd.training.recipe import find_recipe, parse, second_stage

    said = yaml.safe_load(block.text)
    base = {} if "dataset_name" in said else yaml.safe_load(find_recipe("miniature").read_text())
    if {"bridge", "teachers", "teacher_model_kind", "lm_head", "representation_weight"} & said.keys():
        base.pop("lm_head", None)
    if {"teachers", "teacher_model_kind", "teacher_url"} & said.keys():
        base.pop("teacher_model_name_or_path", None)
    if "gradient_scope" in said and "positions" not in said:
        base |= {"positions": "last_k", "position_k": 8}
    recipe = {**base, **said, "bf16": False, "use_cpu": True}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    configs = parse(["--config", str(path)])
    if configs.data.then:
        second_stage(["--config", str(path)], configs.data.then, tmp_path / "run")


@pytest.mark.parametrize("block", of("yaml", "gates"), ids=str)
def test_gates(block, tmp_path):
    from oprd.lineage.gates import read_gates

    path = tmp_path / "gates.yaml"
    path.write_text(block.text)
    assert read_gates(path)


# -------------------------------------------------------------------------------------------------------------- python


@pytest.mark.parametrize("block", of("python", "compile"), ids=str)
def test_python_compiles(block):
    """Every call of a class of ours has arguments that it takes."""
    import oprd

    tree, ours = ast.parse(block.text, filename=str(block)), 0
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in oprd.__all__:
            ours += 1
            taken = inspect.signature(getattr(oprd, call.func.id)).parameters
            assert {word.arg for word in call.keywords} - {None} <= set(taken), block
    assert ours, f"{block}: nothing of ours is called; can it be executed instead?"


@pytest.fixture
def tables_as_they_were():
    """A page adds an objective."""
    from oprd.objectives import REPRESENTATION_KINDS
    from oprd.training.options import CHOICES

    before = [(table, dict(table)) for table in (REPRESENTATION_KINDS, CHOICES)]
    yield
    for table, content in before:
        table.clear()
        table.update(content)


@pytest.mark.usefixtures("tables_as_they_were")
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.runs}))
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    """From top to bottom, as a reader would."""
    from oprd.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"__name__": "page"}
    for block in (block for block in BLOCKS if block.page == page and block.runs):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, ROOT / page, "exec"), names)
            continue
        for words in commands_of(block.text):
            assert words[0] == "oprd", f"{block}: only oprd is run"
            status = main([*words[1:], *shlex.split(block.added)])
            assert status == 0, f"{block}: {' '.join(words)}\n{capsys.readouterr().err}"
