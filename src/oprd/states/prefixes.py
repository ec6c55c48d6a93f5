"""The teacher's vocabulary sorted by bytes, in which "all tokens that start with these bytes" is a range: a trie, flat.

Built once for a pair of tokenizers; what each residue adds is computed when it first appears and kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from oprd.objectives.prefix_marginal import PrefixTable
from oprd.states.crossing import Crossing

Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # student tokens, rising; low; high


def _after(prefix: bytes) -> bytes | None:
    """The least byte string above everything that starts with ``prefix``; None if there is none."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1]) if head else None


class PrefixIndex:
    """Ranges of the teacher's tokens for (residue, student token).

    Args:
        crossing: the pair of vocabularies and which special tokens mean the same.
    """

    def __init__(self, crossing: Crossing) -> None:
        student, teacher = crossing.student, crossing.teacher
        atoms = crossing.meanings
        by_meaning = {atom for atom in atoms.values() if atom is not None} | crossing.teacher_ends
        ordinary = [index for index in range(teacher.size) if teacher.tokens[index] and index not in by_meaning]
        ordinary.sort(key=teacher.tokens.__getitem__)
        self._sorted = [teacher.tokens[index] for index in ordinary]
        # Tokens that are handed over by meaning are found by it, not by bytes: each has a place behind the others. The ways
        # to end a turn come first and together, so that their probabilities add up in one range.
        ends = sorted(crossing.teacher_ends)
        apart = by_meaning | {index for index in teacher.special if index < teacher.size}
        self.order = np.array([*ordinary, *ends, *sorted(apart - set(ends))], dtype=np.int64)
        self._place = {int(index): rank for rank, index in enumerate(self.order)}
        self._atoms = {
            own: (self._place[atom], self._place[atom] + 1)
            for own, atom in atoms.items()
            if atom is not None and own < student.size and own not in crossing.student_ends
        }
        # Of several student tokens that end a turn, its tokenizer's own is the one to learn.
        main = student.tokenizer.eos_token_id
        main = main if main in crossing.student_ends else min(crossing.student_ends, default=None)
        if main is not None:
            self._atoms[main] = (self._place[ends[0]], self._place[ends[-1]] + 1)
        self._by_bytes = {text: index for text, index in student.ids_by_bytes.items() if index not in atoms}
        self.size = student.size
        self._student_order([b"" if index in atoms else text for index, text in enumerate(student.tokens)])
        self._residues: dict[tuple[bytes, bytes], int] = {(b"", b""): 0}
        self._names: list[tuple[bytes, bytes]] = [(b"", b"")]
        self._entries: dict[int, Entries] = {}
        self._bounds: dict[int, tuple[int, int]] = {}
        self._order_on: dict[torch.device, tuple[Tensor, ...]] = {}
        self._on_device: dict[tuple[int, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def _student_order(self, tokens: Sequence[bytes]) -> None:
        """Rank of every student token by bytes, the last rank of those that extend it, and its listed double."""
        self.canonical = np.array(
            [self._by_bytes.get(text, index) if text else index for index, text in enumerate(tokens)]
        )
        ordered = sorted(
            range(self.size), key=lambda index: (tokens[index], self._by_bytes.get(tokens[index]) != index)
        )
        texts = [tokens[index] for index in ordered]
        self.rank, self.last = np.zeros(self.size, dtype=np.int64), np.zeros(self.size, dtype=np.int64)
        for rank, index in enumerate(ordered):
            self.rank[index] = self.last[index] = rank
            if texts[rank]:
                above = _after(texts[rank])
                self.last[index] = (len(texts) if above is None else bisect_left(texts, above, rank)) - 1

    def span(self, prefix: bytes) -> tuple[int, int]:
        """The range of teacher tokens that start with ``prefix``; empty bytes mean every token."""
        if not prefix:
            return 0, len(self.order)
        above = _after(prefix)
        low = bisect_left(self._sorted, prefix)
        return low, len(self._sorted) if above is None else bisect_left(self._sorted, above, low)

    def of_token(self, index: int) -> tuple[int, int]:
        """The range that holds one teacher token alone."""
        rank = self._place[index]
        return rank, rank + 1

    def residue(self, text: bytes, dropped: bytes = b"") -> int:
        """The number of a residue; 0 is none. ``dropped``: what a student token loses at its front here (a space that
        decoding drops and the teacher does not spell)."""
        if (text, dropped) not in self._residues:
            self._residues[text, dropped] = len(self._names)
            self._names.append((text, dropped))
        return self._residues[text, dropped]

    def entries(self, residue: int) -> Entries:
        """Every student token that one teacher token can say after the residue, with its range."""
        if residue not in self._entries:
            prefix, dropped = self._names[residue]
            self._bounds[residue] = self.span(prefix)
            if dropped:
                found = self._entries_without(prefix, dropped)
            else:
                found = self._first_entries() if not prefix else self._entries_after(prefix)
            tokens = sorted(found)
            ranges = np.array([found[token] for token in tokens], dtype=np.int64).reshape(-1, 2)
            self._entries[residue] = np.array(tokens, dtype=np.int64), ranges[:, 0], ranges[:, 1]
        return self._entries[residue]

    def _entries_without(self, prefix: bytes, dropped: bytes) -> dict[int, tuple[int, int]]:
        """Where tokens lose ``dropped``, a token that has it to lose is listed rather than its double that has not."""
        texts = {
            text.removeprefix(dropped): token for text, token in self._by_bytes.items() if text.startswith(dropped)
        }
        spans = ((token, self.span(prefix + text)) for text, token in texts.items())
        return {token: span for token, span in spans if span[1] > span[0]} | ({} if prefix else self._atoms)

    def _first_entries(self) -> dict[int, tuple[int, int]]:
        spans = ((token, self.span(text)) for text, token in self._by_bytes.items())
        return {token: span for token, span in spans if span[1] > span[0]} | self._atoms

    def _entries_after(self, prefix: bytes) -> dict[int, tuple[int, int]]:
        """By the few tokens that start with the prefix rather than by all of the student's."""
        low, high = self.span(prefix)
        found: dict[int, tuple[int, int]] = {}
        for rank in range(low, high):
            text = self._sorted[rank]
            for end in range(len(prefix) + 1, len(text) + 1):
                token = self._by_bytes.get(text[len(prefix) : end])
                if token is not None:
                    found[token] = (found[token][0] if token in found else rank, rank + 1)
        return found

    def table(self, residues: Sequence[int], device: torch.device | str = "cpu") -> PrefixTable:
        """The table of a batch: row i is ``residues[i]``."""
        device = torch.device(device)
        parts, bounds = [], []
        for row, residue in enumerate(residues):
            if (residue, device) not in self._on_device:
                arrays = (torch.from_numpy(array).to(device) for array in self.entries(residue))
                self._on_device[residue, device] = tuple(arrays)
            tokens, low, high = self._on_device[residue, device]
            parts.append((tokens + row * self.size, low, high))
            bounds.append(self._bounds[residue])
        keys, low, high = (torch.cat(column) for column in zip(*parts, strict=True))
        if not len(keys):  # nothing can be said: keep one entry that nobody asks for
            keys, low, high = keys.new_full((1,), -1), low.new_zeros(1), high.new_zeros(1)
        spans = torch.tensor(bounds, dtype=torch.long, device=device).reshape(-1, 2)
        if device not in self._order_on:
            self._order_on[device] = tuple(
                torch.from_numpy(a).to(device) for a in (self.order, self.rank, self.last, self.canonical)
            )
        order, rank, last, canonical = self._order_on[device]
        return PrefixTable(order, keys, low, high, spans[:, 0], spans[:, 1], rank, last, canonical)
