"""Tools by name, what is asked of them, and what a student said itself."""

from functools import partial
from types import SimpleNamespace

import pytest

from oprd.training import engines, tools
from oprd.training.tools import (
    check_functions,
    check_one_rendering,
    check_tools,
    load_tools,
    moved,
    rendering,
    tool_records,
)
from oprd.training.turns import own_answer
from tooled import TEMPLATE, add, tooled_tokenizer, user

GOOD = '''
"""Two tools."""
runs = []
runs.append(1)


def double(number: int) -> int:
    """
    Doubles.

    Args:
        number: Which.
    """
    return 2 * number


def half(number: float) -> float:
    """
    Halves.

    Args:
        number: Which.
    """
    return number / 2
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tools.py").write_text(GOOD)
    return tmp_path


def test_functions_of_a_file(folder):
    double, half = load_tools("my_tools.py:double , my_tools.py:half")
    assert (double(4), half(4.0)) == (8, 2.0)
    assert double.__globals__["runs"] == half.__globals__["runs"] == [1]  # the file has run once
    assert load_tools(None) == load_tools("") == []


def test_a_function_of_a_module(folder, monkeypatch):
    monkeypatch.syspath_prepend(str(folder))
    (folder / "named_module.py").write_text(GOOD)
    (double,) = load_tools("named_module:double")
    assert double(3) == 6
    assert (
        tool_records("named_module:double")["tool double"]["hash"]
        == tool_records("my_tools.py:half")["tool half"]["hash"]
    )


def test_records_are_of_content(folder):
    before = tool_records("my_tools.py:double")
    assert before["tool double"]["name"] == "my_tools.py:double"
    (folder / "my_tools.py").write_text(GOOD.replace("2 * number", "3 * number"))
    assert tool_records("my_tools.py:double")["tool double"]["hash"] != before["tool double"]["hash"]


def test_names_in_another_folder(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert moved("my_tools.py:half, os.path:join", folder) == f"{folder}/my_tools.py:half, os.path:join"
    assert load_tools(moved("my_tools.py:half", folder))[0](3) == 1.5
    monkeypatch.chdir(folder)
    assert moved("my_tools.py:half", folder / "other") == "my_tools.py:half"


BROKEN = {
    "syntax": ("def broken(:", "f", "cannot be imported .SyntaxError"),
    "raises": ("raise RuntimeError('no key')", "f", "cannot be imported .RuntimeError: no key"),
    "no such function": (GOOD, "duoble", "has no function 'duoble'; it has double, half"),
    "no function": ("f = 3", "f", "3 is no function"),
    "a class": ("class f: pass", "f", "is no function"),
    "no type hint": (
        'def f(x):\n    """F.\n\n    Args:\n        x: X.\n    """',
        "f",
        "f cannot be described .*type hint",
    ),
    "no docstring": ("def f(x: int): pass", "f", "f cannot be described .*docstring"),
    "an argument without a line": ('def f(x: int):\n    """F."""', "f", "f cannot be described .*argument 'x'"),
    "async": ('async def f(x: int):\n    """F.\n\n    Args:\n        x: X.\n    """', "f", "f is async"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files(folder, fault):
    text, name, told = BROKEN[fault]
    (folder / "broken.py").write_text(text)
    tools.sys.modules.pop(tools._module_name(folder / "broken.py"), None)
    with pytest.raises(ValueError, match=f"tools: .*{told}"):
        load_tools(f"broken.py:{name}")


NAMES = {
    "nothing there": ("gone.py:f", "there is no file gone.py"),
    "no function named": ("my_tools.py", "does not say which function"),
    "no file named": (":double", "does not say which function"),
    "not a name": ("my_tools.py:double()", "does not say which function"),
    "no module": ("no_such_module_here:f", "cannot be imported .ModuleNotFoundError"),
    "twice": ("my_tools.py:double, my_tools.py:double", "two are called double"),
}


@pytest.mark.parametrize("fault", NAMES)
def test_bad_names(folder, fault):
    name, told = NAMES[fault]
    with pytest.raises(ValueError, match=f"tools: .*{told}"):
        load_tools(name)


def test_what_has_no_name_of_its_own():
    with pytest.raises(ValueError, match="is no function"):
        check_functions([partial(add, "1+1")])


ONE = {"world_size": 1, "chat_template_kwargs": None, "use_vllm": False, "vllm_mode": "server"}


def arguments(**settings):
    return SimpleNamespace(**ONE | {"vllm_tensor_parallel_size": 1} | settings)


def test_prompts_and_templates():
    args, prompt = arguments(), user("1+2")
    check_tools([], args, tooled_tokenizer(template=None), "text")  # without tools nothing is asked
    check_tools([add], args, tooled_tokenizer(), prompt)
    with pytest.raises(ValueError, match=r"prompts are text.*as_chat: true"):
        check_tools([add], args, tooled_tokenizer(), "1+2")
    with pytest.raises(ValueError, match="does not show calls"):
        check_tools([add], args, tooled_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}"), prompt)
    with pytest.raises(ValueError, match="does not show calls"):
        check_tools([add], args, tooled_tokenizer(template=None), prompt)
    with pytest.raises(ValueError, match=r"not one that TRL knows.*response_template"):
        check_tools([add], args, tooled_tokenizer(responses=None), prompt)
    with pytest.raises(ValueError, match="chat_template_kwargs: tools is set by tools"):
        check_tools([add], arguments(chat_template_kwargs={"tools": []}), tooled_tokenizer(), prompt)


def test_a_template_that_forgets():
    """One that shows results only while they are new, and is none that TRL can replace."""
    forgets = TEMPLATE.replace("<end>{% endif %}{% for", "{{ messages|length }}<end>{% endif %}{% for", 1)
    forgets = forgets.replace("{% for message", "{{ messages|length }}{% for message", 1)
    with pytest.raises(ValueError, match=r"not one that TRL knows.*leave earlier ones as they are"):
        check_tools([add], arguments(), tooled_tokenizer(forgets), user("1+2"))


@pytest.mark.parametrize(
    ("settings", "sharded", "told"),
    [
        pytest.param({}, False, None, id="ddp"),
        pytest.param({}, True, "sharded student", id="sharded"),
        pytest.param({"use_vllm": True}, False, "vllm_mode: server", id="server"),
        pytest.param({"use_vllm": True, "vllm_mode": "colocate"}, True, None, id="colocate"),
        pytest.param(
            {"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": 2},
            False,
            "tensor_parallel",
            id="tp",
        ),
    ],
)
def test_processes_that_would_wait_for_each_other(monkeypatch, settings, sharded, told):
    monkeypatch.setattr(tools, "is_sharded", lambda args: sharded)
    assert tools.is_sharded is not engines.is_sharded
    check_tools([add], arguments(**settings), tooled_tokenizer(), user("1+2"))  # one process waits for nobody
    args = arguments(world_size=2, **settings)
    if told is None:
        check_tools([add], args, tooled_tokenizer(), user("1+2"))
        return
    with pytest.raises(ValueError, match=f"tools: .*{told}"):
        check_tools([add], args, tooled_tokenizer(), user("1+2"))


def test_one_rendering():
    check_one_rendering(tooled_tokenizer(), tooled_tokenizer(), [add], user("1+2"))
    for other in (TEMPLATE.replace("<result>", "<result> "), TEMPLATE.replace("<tools>", ""), None):
        with pytest.raises(ValueError, match="one chat_template"):
            check_one_rendering(tooled_tokenizer(), tooled_tokenizer(other), [add], user("1+2"))


def test_rendering():
    tokenizer = tooled_tokenizer()
    assert rendering([], tokenizer) == {}
    assert rendering([add], tokenizer) == {"tools": [add], "chat_template": None}
    shown = tokenizer.apply_chat_template(user("a"), tokenize=False, **rendering([add], tokenizer))
    assert shown == "<tools>add<end><user>a<end>"


def test_what_a_student_said_itself():
    tokenizer = tooled_tokenizer()
    ids = tokenizer("a<call>b</call><end><result>\\boxed{9}</result><assistant>c<end>")["input_ids"]
    first, last = ids.index(tokenizer.convert_tokens_to_ids("<result>")), len(ids) - 2
    own = [int(not first <= place < last) for place in range(len(ids))]
    answer = own_answer(tokenizer, ids, own, cut_off=False)
    assert (answer.text, answer.tokens) == ("a<call>b</call>c", sum(own))
