"""A response in the student's tokens, read by a teacher with another tokenizer: where the two have consumed the same text.

A response is cut at added tokens (end of turn, ``<think>``). Runs of ordinary text are read again by the teacher's
tokenizer and aligned on bytes; an added token is handed over by its meaning: the student's end of turn is the teacher's,
a token of the same name is that token, a name that the teacher does not know is text, and a special token that it does
not know is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from oprd.states.vocabulary import vocabulary_of

NOWHERE = -1


@dataclass
class Crossed:
    """One response on the teacher's side. Positions count consumed tokens: 0 is the end of the prompt.

    ``partner[i]``: how many teacher tokens have consumed the same text as the student's first i, or -1. ``anchor[i]``: the
    last teacher boundary at or before that text, and ``residue[i]`` the bytes since. ``path[i]``: what the teacher must say
    for the student's token i, as steps ``(teacher position, bytes or token id)``; empty where it cannot say it. ``dropped``:
    what the first student token loses in decoding and the teacher does not spell either.
    """

    teacher_ids: list[int] = field(default_factory=list)
    partner: list[int] = field(default_factory=list)
    anchor: list[int] = field(default_factory=list)
    residue: list[bytes] = field(default_factory=list)
    path: list[list[tuple[int, bytes | int]]] = field(default_factory=list)
    dropped: bytes = b""


@dataclass(frozen=True)
class _Run:
    """Student tokens ``start..stop``: text, or one added token that is ``atom`` for the teacher (None: unknown to it)."""

    start: int
    stop: int
    is_text: bool
    atom: int | None = None


def readable(raw: bytes) -> tuple[str, list[int]]:
    """Text for the teacher and, for every byte offset of ``raw``, its offset in that text (-1 inside what was replaced).

    Bytes that are not UTF-8 become U+FFFD one by one; an incomplete last character is left out.
    """
    complete = len(raw)
    for tail in range(1, min(3, len(raw)) + 1):
        try:
            raw[len(raw) - tail :].decode()
        except UnicodeDecodeError as fault:
            if "unexpected end" in fault.reason and fault.start == 0:
                complete = len(raw) - tail
    places, end, text = [0], 0, []
    for character in raw[:complete].decode("utf-8", "surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            text.append("\ufffd")
            end += 3
            places.append(end)
        else:
            text.append(character)
            places += range(end + 1, end + len(character.encode()) + 1)
            end = places[-1]
    return "".join(text), places + [NOWHERE] * (len(raw) - complete)


class Crossing:
    """Reads responses of one tokenizer with another.

    Args:
        student, teacher: the tokenizers; both must concatenate bytes (`Vocabulary`).
        student_ends: every token that ends a student's response.
        teacher_end: the token that the teacher reads for them.
        teacher_ends: every token with which the teacher may end; their probabilities add up.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        student_ends: set[int],
        teacher_end: int,
        teacher_ends: set[int] | None = None,
    ) -> None:
        self.student, self.teacher = vocabulary_of(student), vocabulary_of(teacher)
        self.student_ends, self.teacher_end = student_ends, teacher_end
        self.teacher_ends = {teacher_end, *(teacher_ends or ())}

    @cached_property
    def meanings(self) -> dict[int, int | None]:
        """Student tokens that are handed over by meaning, and the teacher's token (None: it has no such token)."""
        known = {content: index for index, content in self.teacher.added.items()}
        found: dict[int, int | None] = {}
        for index, content in self.student.added.items():
            if content in known or index in self.student.special:
                found[index] = known.get(content)
        return found | dict.fromkeys(self.student_ends, self.teacher_end)

    def _runs(self, ids: Sequence[int]) -> list[_Run]:
        runs, start = [], 0
        for place, index in enumerate(ids):
            unknown = index >= self.student.size  # a padded row of the embeddings
            if unknown or index in self.meanings:
                if place > start:
                    runs.append(_Run(start, place, True))
                runs.append(_Run(place, place + 1, False, None if unknown else self.meanings[index]))
                start = place + 1
        return [*runs, _Run(start, len(ids), True)] if len(ids) > start else runs

    def read(self, ids: Sequence[int]) -> Crossed:
        """One response, from the student's ids to the teacher's."""
        crossed = Crossed(partner=[0], anchor=[0], residue=[b""])
        for run in self._runs(ids):
            if run.is_text:
                self._cross_text(ids[run.start : run.stop], run.start == 0, crossed)
            else:
                self._cross_atom(run.atom, crossed)
        return crossed

    def _cross_atom(self, atom: int | None, crossed: Crossed) -> None:
        here = len(crossed.teacher_ids)
        possible = atom is not None and not crossed.residue[-1]  # never in the middle of a character
        crossed.path.append([(here, atom)] if possible else [])
        if atom is not None:
            crossed.teacher_ids.append(atom)
        crossed.partner.append(here + 1 if atom is not None else NOWHERE)
        crossed.anchor.append(len(crossed.teacher_ids))
        crossed.residue.append(b"")

    def _cross_text(self, ids: Sequence[int], at_start: bool, crossed: Crossed) -> None:
        base = len(crossed.teacher_ids)
        raw, raw_ends = self.student.spell(ids, at_start=at_start)
        text, places = readable(raw)
        content = text.encode()
        teacher_ids, teacher_ends = self.teacher.read(text)
        before = self.teacher.before(teacher_ids)
        crossed.teacher_ids += teacher_ids
        # What the teacher spells may open with a space that is not in the text. It counts as consumed from the start.
        content, lead = before + content, len(before)
        # Where the teacher can stand, and how many of its tokens lie before: never in the middle of a token.
        consumed = {0: 0} | {end + lead: place + 1 for place, end in enumerate(teacher_ends) if end != NOWHERE}
        stands = sorted(consumed)
        now, cursor = lead, 0  # the student's place, and the last stand at or before it
        own = self.student.before(ids) if at_start else b""
        if own and own == before:  # both have the space still to say
            now = 0
        elif own:
            crossed.dropped = own
        if len(stands) > 1 and stands[1] == now:
            cursor = 1
        crossed.anchor[-1] = base + consumed[stands[cursor]]
        crossed.residue[-1] = content[stands[cursor] : now]
        for raw_end in raw_ends:
            end = places[raw_end] + lead
            if places[raw_end] == NOWHERE:  # inside an incomplete last character: all of the readable text, and a rest
                cursor = len(stands) - 1
                residue = content[stands[cursor] :] + raw[places.index(NOWHERE) - 1 : raw_end]
                crossed.path.append([])
            else:
                steps: list[tuple[int, bytes | int]] = []
                first = cursor
                while cursor + 1 < len(stands) and stands[cursor + 1] <= end:
                    cursor += 1
                last = cursor - 1 if stands[cursor] == end and cursor > first else cursor
                for whole in range(consumed[stands[first]], consumed[stands[last]]):
                    steps.append((base + whole, teacher_ids[whole]))
                if end > now:  # the token that covers the student's place: whatever starts with these bytes
                    steps.append((base + consumed[stands[last]], content[stands[last] : end]))
                residue, now = content[stands[cursor] : end], end
                crossed.path.append(steps)
            crossed.partner.append(NOWHERE if residue else base + consumed[stands[cursor]])
            crossed.anchor.append(base + consumed[stands[cursor]])
            crossed.residue.append(residue)
