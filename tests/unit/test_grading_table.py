"""Grading: every case of the table, random strings, and a comparing process that hangs, dies or is left behind."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from oprd.evaluation import Verdict, grade, grading, judge
from unit.grading_cases import KNOWN_LIMITS, RIGHT, WRONG

CASES = [
    pytest.param(*case, verdict, id=f"{verdict}-{kind}-{case[0]}-{case[1]}")
    for verdict, table in (("right", RIGHT), ("wrong", WRONG))
    for kind, cases in table.items()
    for case in cases
] + [pytest.param(*case, id=f"limit-{case[0]}-{case[1]}") for case in KNOWN_LIMITS]
HANGS = r"\boxed{9^{9^{9^{9}}}}"  # inside one power of integers, in C


@pytest.fixture(autouse=True)
def nothing_remembered():
    grading._equal.cache_clear()


@pytest.fixture
def worker():
    """A process that is up: starting it is not what these tests time."""
    assert grade(r"\boxed{x+x}", "2x")
    grading._equal.cache_clear()
    return grading._WORKER


@pytest.fixture
def no_worker(monkeypatch):
    def ask(*_):
        raise AssertionError("This needs no process.")

    monkeypatch.setattr(grading._WORKER, "ask", ask)


@pytest.fixture
def path_of_worker(monkeypatch, tmp_path):
    """A folder that comes first on the module path of a new process."""
    grading._WORKER.stop()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    grading._WORKER.stop()


def gone(pid, within=5.0):
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


# What it says


@pytest.mark.parametrize(("boxed", "reference", "verdict"), CASES)
def test_verdict(boxed, reference, verdict):
    assert judge(f"Thus \\boxed{{{boxed}}}.", reference, timeout=20) == verdict


def test_the_table_is_large_and_says_each_thing_once():
    cases = [case.values[:2] for case in CASES]
    assert len(cases) >= 300
    assert len(set(cases)) == len(cases)


def test_no_box():
    assert judge("42", "42") is Verdict.NO_BOX
    assert judge(r"\boxed{42", "42") is Verdict.NO_BOX


def test_plain_numbers_and_equal_strings_need_no_process(no_worker):
    assert grade(r"\boxed{142.0}", "142") and not grade(r"\boxed{143}", "142")
    assert grade(r"\boxed{\dfrac 12}", "0.5") and grade(r"\boxed{5\text{ cm}}", "5")
    assert grade(r"\boxed{x^y+\foo}", r"x^y+\foo")
    with pytest.raises(AssertionError):
        grade(r"\boxed{x+1}", "1+x")


def test_long_answers_need_no_process(no_worker):
    long = "x+" * 1001
    assert judge(f"\\boxed{{{long}}}", long) is Verdict.RIGHT
    assert judge(f"\\boxed{{{long}}}", long + "1") is Verdict.WRONG
    assert judge(r"\boxed{x}", long) is Verdict.WRONG
    assert judge(f"\\boxed{{{'1' * 5000}}}", "1") is Verdict.WRONG


FRAGMENTS = [
    *"0123456789xyzinABe+-*/=<>()[]{},;:.%$^_|&!~'\"\\ \n\t\0\x07\x1b\x7f", r"\frac", r"\frac{1}{2}", r"\sqrt", r"\text{",
    r"\{", r"\}", r"\left(", r"\right)", r"\left", r"\cup", r"\infty", r"\pi", r"\pm", r"\%", r"\$", r"^\circ", r"\boxed{", r"\boxed 5",
    r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "1,000", "and", "cm", "−", "π", "½", "²", "√", "∞", "é", "漢", "\u202e", "\ud800", "😀", "１", "١",
]  # fmt: skip


def test_random_strings_never_raise(worker):
    draw = random.Random(0)
    verdicts = set()
    for _ in range(10_000):
        text = "".join(draw.choices(FRAGMENTS, k=draw.randint(0, 12)))
        if draw.random() < 0.25:
            text = f"\\boxed{{{text}}}"
        reference = draw.choice(["5", r"\frac12", "(1,2)", "x+1", text[7:-2], text])
        verdicts.add(judge(text, reference, timeout=1))
    assert verdicts >= {Verdict.RIGHT, Verdict.WRONG, Verdict.NO_BOX}


@pytest.mark.parametrize("fragment", [f for f in FRAGMENTS if len(f.strip()) > 1])
def test_repetition_takes_no_longer_than_asked(worker, fragment):
    start = time.monotonic()
    judge(f"\\boxed{{{fragment * (1900 // len(fragment))}x}}", "x", timeout=0.3)
    assert time.monotonic() - start < 3


# Its process


@pytest.mark.parametrize("boxed", [HANGS, r"\boxed{(x+y+z)^{400}}"])  # in C and in Python
def test_a_hanging_comparison_is_undecided_and_the_next_one_works(worker, boxed):
    start = time.monotonic()
    assert judge(boxed, "a+b", timeout=1) is Verdict.UNDECIDED
    assert time.monotonic() - start < 2
    assert grade(r"\boxed{x+x}", "2x")


def test_undecided_is_tried_again(worker, monkeypatch):
    monkeypatch.setattr(worker, "ask", lambda *_: None)
    assert judge(r"\boxed{x+x}", "2x") is Verdict.UNDECIDED and not grade(r"\boxed{x+x}", "2x")
    monkeypatch.undo()
    assert judge(r"\boxed{x+x}", "2x") is Verdict.RIGHT


def test_verdicts_are_remembered(worker, monkeypatch):
    assert grade(r"\boxed{x+x}", "2x") and not grade(r"\boxed{x+x}", "3x")
    monkeypatch.setattr(worker, "ask", None)
    assert grade(r"\boxed{x+x}", "2x") and not grade(r"\boxed{x+x}", "3x")


def test_a_comparison_that_wants_too_much_memory_is_undecided(worker):
    assert judge(r"\boxed{10^{10^{10}}!}", "a+b") is Verdict.UNDECIDED  # a table of all primes below
    assert grade(r"\boxed{x+x}", "2x")


def test_not_equal_is_not_believed_past_the_soft_limit_of_memory():
    program = "import sys; import oprd.evaluation; m = sys.modules['oprd.evaluation.equivalence']; m.SOFT_MEMORY = 1; m.serve()"
    requests = b'["x+x", "2x", 5]\n["x+x", "3x", 5]\n["x+x", "2x", 5]\n'
    answered = subprocess.run([sys.executable, "-c", program], input=requests, stdout=subprocess.PIPE)
    assert answered.stdout == b"true\ntrue\n" and answered.returncode == 1


def test_killed_from_outside(worker):
    first = worker._process.pid
    os.kill(first, signal.SIGKILL)
    worker._process.wait()
    assert grade(r"\boxed{x+x}", "2x") and worker._process.pid != first

    timer = threading.Timer(0.5, os.kill, (worker._process.pid, signal.SIGKILL))
    timer.start()
    assert judge(HANGS, "a+b", timeout=20) is Verdict.UNDECIDED  # amid a comparison
    assert grade(r"\boxed{y+y}", "2y")


def test_from_threads(worker):
    cases = [(f"\\boxed{{x+{n}x}}", f"{n + 1 + n % 2}x") for n in range(2, 42)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda case: grade(*case), cases)) == [n % 2 == 0 for n in range(2, 42)]


@pytest.fixture
def interrupts():
    """Processes that a script started in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_no_stale_reply(worker, interrupts):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        judge(r"\boxed{9^{9^{9}}}", "a+b", timeout=20)
    timer.join()
    assert worker._process is None
    assert not grade(r"\boxed{x+x}", "3x") and grade(r"\boxed{x+x}", "2x")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_its_own(worker):
    pid, (reading, writing) = worker._process.pid, os.pipe()
    child = os.fork()
    if child == 0:
        try:
            forgotten = worker._process is None
            own = grade(r"\boxed{x+x}", "2x") and not grade(r"\boxed{x+x}", "3x") and worker._process.pid != pid
            os.write(writing, b"ok" if forgotten and own else b"no")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 2) == b"ok"
    assert worker._process.pid == pid and grade(r"\boxed{y+y}", "2y") and worker._process.pid == pid
    os.close(reading), os.close(writing)


PARENT = r"""
import os, sys, threading, time
from oprd.evaluation import grade, grading, judge
assert grade(r"\boxed{x+x}", "2x")
child = os.fork() if sys.argv[1] == "forked" else 0
if sys.argv[1] == "forked" and child == 0:
    time.sleep(60)
    os._exit(0)
print(grading._WORKER._process.pid, child, flush=True)
if sys.argv[1] == "busy":
    judge(r"\boxed{9^{9^{9^{9}}}}", "a+b", timeout=2)
if sys.argv[1] != "ends":
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["ends", "idle", "busy", "forked"])
def test_no_process_outlives_its_parent(how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True)
    pid, child = map(int, parent.stdout.readline().split())
    if how == "ends":
        assert parent.wait(20) == 0
    else:
        time.sleep(0.3)
        assert not gone(pid, within=0.1)
        parent.kill()
        parent.wait()
    parent.stdout.close()
    try:
        assert gone(pid)
    finally:
        if child:
            os.kill(child, signal.SIGKILL)


def test_what_cannot_start_is_an_error_not_a_wrong_answer(path_of_worker, monkeypatch):
    (path_of_worker / "math_verify.py").write_text("raise ImportError('nowhere to be found')")
    with pytest.raises(RuntimeError, match=r"cannot start: ImportError: nowhere to be found.*math-verify"):
        grade(r"\boxed{x+x}", "2x")
    (path_of_worker / "math_verify.py").unlink()
    for program in ("/bin/false", "/no/such/python", None):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(RuntimeError, match="cannot start"):
            grade(r"\boxed{x+x}", "2x")
    monkeypatch.undo()
    assert grade(r"\boxed{x+x}", "2x")


def test_what_libraries_print_does_not_reach_the_pipe(path_of_worker):
    (path_of_worker / "math_verify.py").write_text(
        "import os, sys\n"
        f"sys.path.remove({str(path_of_worker)!r})\n"
        "del sys.modules['math_verify']\n"
        "import math_verify as real\n"
        "verify = real.verify\n"
        "def noisy(*args, **options):\n"
        "    print('true', flush=True)\n"
        "    os.system('echo true; cat')\n"  # nor do they read from it
        "    return verify(*args, **options)\n"
        "real.verify = noisy\n"
    )
    assert not grade(r"\boxed{x+x}", "3x") and grade(r"\boxed{x+x}", "2x") and not grade(r"\boxed{x+x}", "4x")


def test_the_process_imports_no_torch():
    program = (
        "import sys; from oprd.evaluation.equivalence import same; assert same('x+x', '2x');"
        "print([name for name in ('torch', 'transformers', 'trl') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, stderr=subprocess.DEVNULL) == "[]\n"
