"""Is a response right: its last boxed answer against the reference."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from functools import lru_cache

_MARKERS = ("\\boxed{", "\\fbox{")


def extract_boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{...}`` whose braces balance, or None. Nested braces are kept."""
    end = len(text)
    while (start := max(text.rfind(marker, 0, end) for marker in _MARKERS)) >= 0:
        opening = text.index("{", start)
        depth = 0
        for position in range(opening, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[opening + 1 : position].strip()
        end = start  # unbalanced: an earlier one may be whole
    return None


_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")


def _number(text: str) -> Decimal | None:
    text = text.strip().strip("$")
    try:
        value = Decimal(text.replace(",", "") if _THOUSANDS.fullmatch(text) else text)
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


@lru_cache(maxsize=65536)
def equivalent(answer: str, reference: str) -> bool:
    """Whether two answers mean the same: ``142.0`` and 142, ``073`` and 73, ``\\frac12`` and 0.5.

    Plain numbers are compared exactly here; everything else goes to math-verify.
    """
    if answer == reference:
        return True
    ours, theirs = _number(answer), _number(reference)
    if ours is not None and theirs is not None:
        return ours == theirs
    import math_verify

    parsed = [math_verify.parse(f"\\boxed{{{text}}}") for text in (reference, answer)]
    return bool(all(parsed)) and math_verify.verify(*parsed)


def grade(response: str, answer: str) -> bool:
    """Whether the last boxed answer of ``response`` equals ``answer`` (which may be boxed itself). No box is wrong."""
    boxed = extract_boxed(response)
    if boxed is None:
        return False
    reference = extract_boxed(answer)
    return equivalent(boxed, (answer if reference is None else reference).strip())
