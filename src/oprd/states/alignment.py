"""Pairs of places where two token sequences have consumed the same text. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def align_ends(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[tuple[int, int]]:
    """Index pairs ``(i, j)`` whose tokens end at the same byte.

    Args:
        student_ends, teacher_ends: byte offset after each token, never falling. Tokens without bytes repeat an offset;
            the first of such a group pairs with the first, the second with the second, and so on.

    Returns:
        Pairs, rising on both sides.

    Raises:
        ValueError: offsets that fall.
    """
    for side, ends in (("student", student_ends), ("teacher", teacher_ends)):
        if any(later < earlier for earlier, later in pairwise(ends)):
            raise ValueError(f"{side}_ends must never fall; they are byte offsets after each token.")
    pairs, i, j = [], 0, 0
    while i < len(student_ends) and j < len(teacher_ends):
        if student_ends[i] == teacher_ends[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif student_ends[i] < teacher_ends[j]:
            i += 1
        else:
            j += 1
    return pairs
