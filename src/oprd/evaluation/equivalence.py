"""Whether two tidied answers mean the same, and the process that finds out (``python -m oprd.evaluation.equivalence``).

sympy can hang inside C code or eat all memory, where no exception and no signal handler helps. So expressions are
compared in a process that may be killed; ``grading`` holds the caller's end of it. No torch in here: it must start fast.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

SOFT_MEMORY = 1 << 30  # bytes in use: past it, "not equal" is not believed, for sympy swallows MemoryError
HARD_MEMORY = 4 << 30  # bytes of address space

_DECIMAL = re.compile(r"[+-]?(?:\d+\.?(\d*)|\.(\d+))(?:[eE]([+-]?\d{1,3}))?", re.ASCII)
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d+)?\\frac\{(?P<top>-?\d+)\}\{(?P<bottom>-?\d+)\}|(?P<a>[+-]?\d+)/(?P<b>\d+)", re.ASCII
)
_REPEATING = re.compile(r"([+-]?\d*\.)(\d*)\\(?:overline|bar)\{(\d+)\}", re.ASCII)
_COLUMN = re.compile(r"\\begin\{[pb]matrix\}([^&]*)\\end\{[pb]matrix\}")
_WORDS = re.compile(r"[A-Za-z](?:[A-Za-z '.]|(?<=[A-Za-z]{2})-(?=[A-Za-z]{2}))+")  # a-b is a difference
_PHRASE = re.compile(r"[\d :.,]*(?:[A-Z]{2,}|[A-Z]?[a-z]+)")  # 10 AM
_CHOICE = re.compile(r"\(?([A-Z])\)?")
_BASE = re.compile(r"([0-9A-F]*\d[0-9A-F]*)_\{?(\d+)\}?", re.ASCII)
_LABEL = re.compile(r"\\?[A-Za-z]+(?: [A-Za-z]+)*(?:_(?:\w|\{\w+\}))?(?:\(\w+(?:,\w+)*\))? ?(?:=|\\in(?![a-z]))")
_INEQUALITY = re.compile(r"[<>]|\\(?:[lg]e|[lg]eq|[lg]t)(?![a-z])")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENERS, _CLOSERS = {"(", "[", "{", r"\{", r"\langle"}, {")", "]", "}", r"\}", r"\rangle"}


# What means the same


def number(text: str) -> tuple[Fraction, int] | None:
    """Exact value of a plain decimal or fraction, and the decimal places that it is written with (a fraction: 0)."""
    if match := _DECIMAL.fullmatch(text):
        return Fraction(text), len(match[1] or match[2] or "") - int(match[3] or 0)
    if (match := _FRACTION.fullmatch(text)) and (bottom := int(match["bottom"] or match["b"])):
        value = Fraction(int(match["top"] or match["a"]), bottom) + int(match["whole"] or 0)
        return (-value if match["sign"] == "-" else value), 0
    if match := _REPEATING.fullmatch(text):
        once, twice = (Fraction(match[1] + match[2] + digits + "0") for digits in (match[3], match[3] * 2))
        return once + (twice - once) / (1 - Fraction(1, 10 ** len(match[3]))), 0
    return None


def close(value: Any, decimal: Any, places: int) -> bool:
    """A decimal with six or more places stands for what agrees with it in all of them; a shorter one is exact."""
    return value == decimal or (places >= 6 and abs(value - decimal) < Fraction(1, 10**places))


def same_number(answer: str, reference: str) -> bool | None:
    """Whether two plain numbers are equal, None if one is something else. Decimals and decimals compare exactly."""
    ours, theirs = number(answer), number(reference)
    if ours is None or theirs is None:
        return None
    places = 0 if _DECIMAL.fullmatch(answer) and _DECIMAL.fullmatch(reference) else max(ours[1], theirs[1])
    return close(ours[0], theirs[0], places)


def same(answer: str, reference: str) -> bool:
    """Whether two tidied answers mean the same. May hang: not for the caller's process."""
    if answer == reference:
        return True
    if (equal := same_number(answer, reference)) is not None:
        return equal
    if _WORDS.fullmatch(answer) and _WORDS.fullmatch(reference):
        ours, theirs = (re.sub("[^a-z]", "", text.lower()) for text in (answer, reference))
        if max(len(ours), len(theirs)) > 2:  # two letters may be a product, and its letters change places
            return ours == theirs
    if answer.lower() == reference.lower() and _PHRASE.fullmatch(answer) and _PHRASE.fullmatch(reference):
        return True
    choices = [_CHOICE.fullmatch(text) for text in (answer, reference)]
    if all(choices):
        return choices[0][1] == choices[1][1]
    bases = [_BASE.fullmatch(text) for text in (answer, reference)]
    if any(bases):  # the base may be left out, not changed
        (ours, our_base), (theirs, their_base) = (
            match.groups() if match else (text, None) for match, text in zip(bases, (answer, reference), strict=True)
        )
        return ours == theirs and (our_base == their_base or None in (our_base, their_base))
    if answer.endswith("%") or reference.endswith("%"):
        ours, theirs = answer.removesuffix("%").strip(), reference.removesuffix("%").strip()
        hundredth = rf"\frac{{{ours if answer.endswith('%') else theirs}}}{{100}}"
        one_sided = answer.endswith("%") != reference.endswith("%")
        return same(ours, theirs) or (one_sided and same(hundredth, theirs if answer.endswith("%") else ours))
    ours, theirs = _LABEL.match(answer), _LABEL.match(reference)
    if bool(ours) != bool(theirs) and not (
        ("=" in answer and "=" in reference) or _INEQUALITY.search(answer + reference)
    ):
        return same(*(text[m.end() :].strip() if m else text for m, text in ((ours, answer), (theirs, reference))))
    return _same_list(answer, reference)


def _items(text: str) -> tuple[str, list[str]]:
    """Brackets and members of ``(1,2]`` or ``\\{1,2\\}``; no brackets for ``1,2``; one member for anything else."""
    if match := _COLUMN.fullmatch(text):
        return "()", [member.strip() for member in match[1].split(r"\\") if member.strip()]
    if not text or r"\begin" in text:
        return "", [text]
    tokens, depth, cuts, wrapped = _TOKEN.findall(text), 0, {0: [], 1: []}, True
    for at, token in enumerate(tokens):
        depth += (token in _OPENERS) - (token in _CLOSERS)
        wrapped &= depth > 0 or at == len(tokens) - 1
        if token in ",;" and depth in cuts:
            cuts[depth].append(at)
    wrapped &= depth == 0 and tokens[-1] in _CLOSERS
    if wrapped and (cuts[1] or tokens[0] == r"\{"):
        brackets = (tokens[0] + tokens[-1]).replace(r"\langle", "(").replace(r"\rangle", ")")
        ends = [0, *cuts[1], len(tokens) - 1]
    else:
        brackets, ends = "", [-1, *cuts[0], len(tokens)]
    members = ["".join(tokens[a + 1 : b]).strip() for a, b in pairwise(ends)]
    return brackets, members


def _same_list(answer: str, reference: str) -> bool:
    (our_brackets, ours), (their_brackets, theirs) = _items(answer), _items(reference)
    if len(ours) == len(theirs) == 1 and ours[0] == answer and theirs[0] == reference:
        return _same_expression(answer, reference)
    if not {our_brackets, their_brackets} <= {"", r"\{\}"}:
        if 1 in (len(ours), len(theirs)) or any(_INEQUALITY.search(text) for text in (answer, reference)):
            return _same_expression(answer, reference)
        if our_brackets != their_brackets and {our_brackets, their_brackets} != {"", "()"}:
            return False
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    ours, theirs = _spread(ours), _spread(theirs)
    if len(ours) != len(theirs):
        return all(map(_INEQUALITY.search, max(ours, theirs, key=len))) and _same_expression(answer, reference)
    left = list(theirs)
    for text in ours:  # the order of a list or set does not matter, how often a member occurs does
        found = next((other for other in left if same(text, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _spread(members: list[str]) -> list[str]:
    """``\\pm`` stands for two members."""
    signs = (("+", "-"), ("-", "+"))
    return [
        text.replace(r"\pm", plus).replace(r"\mp", minus).strip().removeprefix("+")
        for text in members
        for plus, minus in (signs if r"\pm" in text else signs[:1])
    ]


# math-verify's part


def _same_expression(answer: str, reference: str) -> bool:
    import math_verify

    if any(re.search(r"(?<![_^\d])\d+ \d", text) for text in (answer, reference)):
        return False  # it would add them: 12 34 is 46
    answer, reference = _tell_case_apart(answer, reference)
    ours, theirs = _expression(answer), _expression(reference)
    if ours is None or theirs is None:
        return False
    if ours == theirs:
        return True
    for text, value in ((answer, _value(theirs)), (reference, _value(ours))):
        if (plain := number(text)) and plain[1] >= 6 and value is not None and value.is_Float:
            return close(Fraction(str(value)), *plain)
    return math_verify.verify(
        _solution_set(theirs), _solution_set(ours), allow_set_relation_comp=True, timeout_seconds=None
    )


def _expression(text: str) -> Any:
    """sympy's object, None if there is none. Decimals are made exact: math-verify compares floats to six places."""
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig

    if text.endswith("\\") or "answer" in text.lower():
        return None  # it would look for a part that it can read: one half in `answer: \frac{1}{2}+3`
    # Its own removal of units takes variables too: 2t would be 2.
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    config = [math_verify.LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]
    found = math_verify.parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    if not found:
        return None
    exact = {value: sympy.Rational(str(value)) for value in found[0].atoms(sympy.Float)}
    imaginary = {symbol: sympy.I for symbol in found[0].free_symbols if symbol.name == "i"}
    return found[0].xreplace(exact | imaginary)


def _value(expression: Any) -> Any:
    """Its value to 30 digits. Also the place where a MemoryError comes up: math-verify would take it for not equal."""
    try:
        return expression.evalf(30)
    except MemoryError:
        raise
    except Exception:  # sympy raises whatever its evaluators do; what has no value equals nothing
        return None


def _solution_set(expression: Any) -> Any:
    """``x<1, x>2`` as a union of intervals."""
    import sympy

    if isinstance(expression, sympy.FiniteSet) and all(part.is_Relational or part.is_Boolean for part in expression):
        return sympy.Union(*(part.as_set() for part in expression))
    return expression


def _tell_case_apart(answer: str, reference: str) -> tuple[str, str]:
    """Rename X where x occurs too: the parser takes both for x."""
    letters = set(re.sub(r"\\[A-Za-z]+", "", answer + reference))
    free = [letter for letter in "uvwzpqkmnrstabchxy" if not letters & {letter, letter.upper()}]
    names = {
        letter: free.pop() for letter in sorted(letters) if letter.isupper() and letter.lower() in letters and free
    }

    def rename(text: str) -> str:
        return re.sub(r"\\[A-Za-z]+|[A-Z]", lambda match: names.get(match[0], match[0]), text)

    return rename(answer), rename(reference)


# The process


def serve() -> None:
    """Answer JSON lines ``[answer, reference, seconds]`` with true or false, until the pipe closes."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", 0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what libraries print must not reach the pipe
        os.dup2(nowhere, stream)
    logging.disable(logging.CRITICAL)
    try:
        ready = same("x+1", "1+x") or "math-verify cannot compare 1+x with x+1"  # the first parse builds tables: slow
    except Exception as error:
        ready = f"{type(error).__name__}: {error}"
    replies.write(json.dumps(ready).encode() + b"\n")
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (min(HARD_MEMORY, hard) if hard >= 0 else HARD_MEMORY, hard))
    for line in requests:
        answer, reference, seconds = json.loads(line)
        with _alarm(seconds + 1):
            try:
                equal = same(answer, reference)
            except MemoryError:
                os._exit(1)
            except Exception:  # what cannot be read is not equal
                equal = False
        if not equal and _peak_memory() > SOFT_MEMORY:
            os._exit(1)
        replies.write(json.dumps(equal).encode() + b"\n")


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """The kernel ends this process on overrun, in C code too: should the parent be gone, nobody else would."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


def _peak_memory() -> int:
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    serve()
