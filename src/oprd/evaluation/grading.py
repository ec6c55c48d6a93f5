"""Is a response right: its last boxed answer against the reference.

What counts as the same follows the graders of MATH, and is pinned case by case in ``tests/unit/grading_cases.py``:

- Units, currency, degree signs and a leading ``x =`` do not count. ``50\\%`` is 50, and also one half.
- Lists and sets have no order, but ``1,1,2`` is not ``1,2``. Tuples have one. ``1,2`` is (1,2). Ends of intervals count.
- Decimals and fractions are exact, but a decimal with six or more places may be a rounded one: 0.333333 is 1/3.
- Words ignore case, variables do not. ``(A)`` is A. A number without its base is the number with it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from enum import StrEnum
from functools import lru_cache

from oprd.evaluation.equivalence import same_number

LONGEST = 2000  # characters of an answer that is still read as mathematics
START_SECONDS = 120.0


class Verdict(StrEnum):
    """Outcome of :func:`judge`. UNDECIDED: the comparison ran over its time or memory, or its process died."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_BOX = "no box"
    UNDECIDED = "undecided"


def judge(response: str, answer: str, *, timeout: float = 5.0) -> Verdict:
    """Compare the last boxed answer of ``response`` with ``answer``, which may be boxed or in dollars itself.

    ``timeout`` is in seconds; starting the comparing process does not count. RIGHT and WRONG are remembered, UNDECIDED
    is tried again. An answer of more than 2000 characters is right only if it is the reference, letter by letter.
    Raises RuntimeError if the comparing process cannot be started.
    """
    boxed, reference = extract_boxed(response), extract_boxed(answer)
    if boxed is None:
        return Verdict.NO_BOX
    reference = answer.strip() if reference is None else reference
    try:
        return Verdict.RIGHT if boxed and _equal(boxed, reference, timeout) else Verdict.WRONG
    except _Undecided:
        return Verdict.UNDECIDED


def grade(response: str, answer: str) -> bool:
    """Whether :func:`judge` says RIGHT."""
    return judge(response, answer) is Verdict.RIGHT


class _Undecided(Exception):
    pass


@lru_cache(maxsize=1 << 14)  # which does not remember exceptions
def _equal(answer: str, reference: str, timeout: float) -> bool:
    if answer == reference:
        return True
    if max(len(answer), len(reference)) > LONGEST:
        return False
    answer, reference = _tidy(answer), _tidy(reference)
    if not answer or not reference:
        return False
    equal = answer == reference or same_number(answer, reference)
    if equal is None:
        equal = _WORKER.ask(answer, reference, timeout)
    if equal is None:
        raise _Undecided
    return equal


# The box

_MARKER = re.compile(r"\\(?:boxed|fbox)\s*(?:(?P<box>\{)|(?P<bare>[+-]?\.?\d[\d.,/]*))|[{}]")


def extract_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` or ``\\fbox{...}`` whose braces balance, or None.

    Nested braces are kept, escaped ones (``\\{``) do not count. A bare number may follow instead: ``\\boxed 5``.
    """
    best, content = -1, None
    opened: list[tuple[int, int]] = []  # braces still open: where their box starts (-1: no box), where its inside does
    for match in _MARKER.finditer(text):
        start, end = match.span()
        if match["bare"]:
            if start > best:
                best, content = start, match["bare"].rstrip(".,/")
        elif match["box"]:
            opened.append((start, end))
        elif _escaped(text, start):
            continue
        elif match[0] == "{":
            opened.append((-1, end))
        elif opened:
            box, inside = opened.pop()
            if box > best:
                best, content = box, text[inside:start].strip()
    return content


def _escaped(text: str, at: int) -> bool:
    first = at
    while first and text[first - 1] == "\\":
        first -= 1
    return (at - first) % 2 == 1


# Spelling

_SIGNS = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "—": "-",
        "×": r"\times ",
        "·": r"\cdot ",
        "÷": "/",
        "±": r"\pm ",
        "√": r"\sqrt ",
        "π": r"\pi ",
    }
    | {"∞": r"\infty ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge "}
    | {"∈": r"\in ", "≠": r"\ne ", "θ": r"\theta ", "²": "^2", "³": "^3", "½": r"\frac12", "¼": r"\frac14"}
    | {"¾": r"\frac34", "€": "", "£": "", "’": "'"}
)
_TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{"
_PART = r"(?:\{([^{}]*)\}|([0-9A-Za-z]|\\pi(?![a-z])))"
_UNIT = (
    r"(?: [msghL]|\s*(?:(?:sq(?:uare|\.)?|cubic) )?(?:[cmk]m|ft|feet|foot|in|inch(?:es)?|yards?|miles?|units?|degrees?|"
    r"(?:centi|milli|kilo)?met(?:er|re)s?|radians?|hours?|hrs?|min(?:ute)?s?|sec(?:ond)?s?|days?|weeks?|months?|years?|"
    r"dollars?|cents?|[km]g|(?:kilo)?grams?|pounds?|lbs?|lit(?:er|re)s?|mph|km/hr?|k?m/s|people|students|points?|ways))"
)
_VALUE, _END = r"([\d})]|\\pi)", r"(?:\^(?:\d|\{\d\}))?(?=\s*(?:[,;]|$))"
_NO_UNIT = r"(?!\s*(?:[ap]\.?\s?m\b|and\b|or\b|thousand|million|billion))"
# In this order; each for answers that math-verify does not read, or misreads.
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[\s\x00-\x1f\x7f]+", " "),
        (r"\*\*", "^"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\?\$|(?<!\\)\\(?:[!()\[\]]|(?:displaystyle|limits)(?![a-z]))", ""),
        (r"(?<!\\)\\(?:[,;:> ]|q?quad(?![a-z]))|~", " "),
        (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
        (r"[\s.,;:\\]+$", ""),
        (r"(?i)^(?:the )?(?:final )?answer(?: is\b)?\s*:?", ""),
        (r"\{,\}", ","),
        (r"\\(?:varnothing|emptyset)(?![a-z])|^\\\{\s*\\\}$", r"\\emptyset "),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (rf"\\frac\s*{_PART}\s*{_PART}", r"\\frac{\1\2}{\3\4}"),
        (r"(?<![\d.^])(\d+) (\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"(\d) \\frac\{", r"\1\\frac{"),
        (rf"(?i:{_VALUE}\s*{_TEXT}{_NO_UNIT}[^{{}}]*\}}{_END})", r"\1"),
        (rf"{_TEXT}([^{{}}]*)\}}", r"\1"),
        (rf"{_VALUE}{_UNIT}{_END}", r"\1"),
        (r"(\d) thousand\b", r"\1\\cdot10^{3}"),
        (r"(\d) million\b", r"\1\\cdot10^{6}"),
        (r"(\d) billion\b", r"\1\\cdot10^{9}"),
        (r"\s*(?:\\?%|\bper ?cent\b)", "%"),
        (r",?\s*\b(?:and|or)\b\s*", ", "),
        (r"(?<![\\A-Za-z])(sqrt|pi|infty|theta|sin|cos|tan|ln|log)(?![A-Za-z])", r"\\\1"),
        (r"(?<![\\A-Za-z])infinity(?![A-Za-z])", r"\\infty"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(\\(?:sin|cos|tan|cot|sec|csc)\D*\d+)\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)", r"\1\\cdot\\frac{\\pi}{180}"),
        (r"\s*(?:\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})|\\degree(?![a-z]))(?:\s*[CF]$)?", ""),
        (r"\s+", " "),
    ]
]
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?", re.ASCII)


def _tidy(text: str) -> str:
    """One spelling for what may be spelled in many ways. Takes linear time or nearly so."""
    text = unicodedata.normalize("NFKC", text.translate(_SIGNS))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text.startswith("{") and text.endswith("}") and "{" not in text[1:-1]:
        text = text[1:-1].strip()
    return text.replace(",", "").replace(" ", "") if _THOUSANDS.fullmatch(text) else text


# The process


class _Worker:
    """The caller's end of ``python -m oprd.evaluation.equivalence``: started at need, killed on overrun, one per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, answer: str, reference: str, timeout: float) -> bool | None:
        """Whether two answers mean the same; None if the process did not say so in time."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._exchange([answer, reference, timeout], timeout)

    def stop(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            _close_pipes(process)

    def forget(self) -> None:
        """For a forked child: the process is its parent's, and lives until everybody's end of the pipe is closed."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process:
            process.returncode = 0  # not ours to wait for
            _close_pipes(process)

    def _start(self) -> None:
        self.stop()
        command = [sys.executable, "-P", "-m", "oprd.evaluation.equivalence"]
        # One order of sets, one thread, and the modules that this process sees (a working directory is none of them).
        path = os.pathsep.join(entry for entry in sys.path if entry)
        settings = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | settings,
                start_new_session=True,  # Ctrl-C is for the caller
            )
            ready = self._exchange(None, START_SECONDS)
        except (OSError, TypeError) as error:
            ready = str(error)
        if ready is not True:
            self.stop()
            why = ready or f"no answer from `{' '.join(map(str, command))}`"
            raise RuntimeError(f"The process that compares answers cannot start: {why}. Is math-verify installed?")

    def _exchange(self, request: list | None, timeout: float) -> bool | str | None:
        """Send a line (None: nothing), read a line. None if the process died, by its own fault or for its slowness."""
        process = self._process
        overrun = threading.Timer(timeout, process.kill)
        overrun.daemon = True
        overrun.start()
        line = b""
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:  # on KeyboardInterrupt too: no reply may stay in the pipe
            overrun.cancel()
            overrun.join()
            if not line.endswith(b"\n"):
                self.stop()
        return json.loads(line) if line.endswith(b"\n") else None


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    process.stdin.close()
    process.stdout.close()


_WORKER = _Worker()
atexit.register(_WORKER.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_WORKER.forget)
