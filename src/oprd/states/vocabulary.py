"""Every token of a tokenizer as the bytes that it stands for, read off the tokenizer's own decoder."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE: character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is not None and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder is not None:
        yield decoder


class Vocabulary:
    """The bytes of each token, and what its special tokens are.

    The bytes of a sequence are those of ``tokenizer.decode(ids, skip_special_tokens=True)``: special tokens have none,
    and where decoding drops a leading space, so does `spell`.

    Raises:
        ValueError: a tokenizer whose decoder is not a plain concatenation of bytes (WordPiece, CTC), or without one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no fast (tokenizers) backend, so the bytes of its tokens are not known. "
                "Convert it to a tokenizer.json."
            )
        self.tokenizer = tokenizer
        content = json.loads(backend.to_str())
        self.added = {token["id"]: token["content"] for token in content["added_tokens"]}
        self.special = frozenset(token["id"] for token in content["added_tokens"] if token["special"])
        self._read_decoder(content["decoder"])
        vocabulary = tokenizer.get_vocab()
        self.size = max(vocabulary.values()) + 1  # ids may have holes
        self.tokens: list[bytes] = [b""] * self.size
        for text, index in vocabulary.items():
            if index not in self.special:
                spelled = (self._prefix + self.added[index]).encode() if index in self.added else self._bytes_of(text)
                self.tokens[index] = spelled

    def _read_decoder(self, decoder: dict[str, Any] | None) -> None:
        self._byte_level, self._byte_fallback, self._first_has_no_spaces = False, False, False
        self._replacements: list[tuple[str, str]] = []
        self._prefix = "" if decoder else " "  # no decoder: decoding joins tokens with spaces
        self._leading_spaces = 0 if decoder else 1
        for step in _steps(decoder):
            kind = step["type"]
            if kind == "ByteLevel":
                self._byte_level = True
            elif kind == "ByteFallback":
                self._byte_fallback = True
            elif kind == "Replace" and "String" in step["pattern"]:
                self._replacements.append((step["pattern"]["String"], step["content"]))
            elif kind == "Metaspace":
                self._replacements.append((step["replacement"], " "))
                self._first_has_no_spaces = step.get("prepend_scheme") != "never"
            elif kind == "Strip" and step["content"] == " " and not step["stop"]:
                self._leading_spaces = step["start"]
            elif kind != "Fuse":
                raise ValueError(
                    f"The tokenizer decodes with {kind}, which does not concatenate the bytes of its tokens. Byte-level BPE "
                    "and SentencePiece tokenizers do; use a model with one of those."
                )

    def _bytes_of(self, token: str) -> bytes:
        if self._byte_level and all(character in _ALPHABET for character in token):
            return bytes(_ALPHABET[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return (self._prefix + token).encode()

    def spell(self, ids: Sequence[int], *, at_start: bool = True) -> tuple[bytes, list[int]]:
        """The text of a sequence as bytes, which need not be valid UTF-8, and the byte offset after each token.

        ``at_start``: the sequence opens a text, where decoding may drop a space.
        """
        pieces = [self.tokens[self._known(index)] for index in ids]
        if at_start and self._first_has_no_spaces:  # Metaspace drops every space of the first token
            first = next((place for place, index in enumerate(ids) if index not in self.special), None)
            if first is not None:
                pieces[first] = pieces[first].replace(b" ", b"")
        text = b"".join(pieces)
        spaces = len(text) - len(text.lstrip(b" "))
        dropped = min(spaces, self._leading_spaces) if at_start else 0
        end, ends = -dropped, []
        for piece in pieces:
            end += len(piece)
            ends.append(max(end, 0))
        return text[dropped:], ends

    def _known(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise ValueError(f"Token id {index} is outside the tokenizer's 0..{self.size - 1}.")
        return index

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, int]:
        """Ordinary tokens by their bytes; of tokens with equal bytes the one with the lowest id that is no byte token."""
        found: dict[bytes, int] = {}
        names = self.tokenizer.convert_ids_to_tokens(list(range(self.size)))
        for index in sorted(range(self.size), key=lambda i: bool(_BYTE_TOKEN.fullmatch(names[i] or ""))):
            if self.tokens[index]:
                found.setdefault(self.tokens[index], index)
        return found

    def before(self, ids: Sequence[int]) -> bytes:
        """What a sequence spells before its text: the space that decoding drops, where there is one."""
        spelled, whole = self.spell(ids)[0], self.spell(ids, at_start=False)[0]
        return whole[: len(whole) - len(spelled)] if whole.endswith(spelled) else b""

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a piece of text and the byte offset after each; -1 where a token does not end at a byte of its own.

        Special tokens spelled out in the text are read as text. Exact also where the tokenizer normalises what it reads:
        offsets are then those of the text that was given.
        """
        if not text:
            return [], []
        encoding = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, truncation=False
        )
        ids = encoding["input_ids"]
        spelled, ends = self.spell(ids)
        if spelled == text.encode():
            return ids, ends
        return ids, self._ends_in_original(text, spelled, ends, encoding["offset_mapping"])

    def _ends_in_original(
        self, text: str, spelled: bytes, ends: list[int], spans: Sequence[tuple[int, int]]
    ) -> list[int]:
        """Ends in the bytes of a text that the tokenizer changed while it read it.

        A normalizer is undone cluster by cluster (a character and what composes with it): its own offsets end a composed
        character before the mark. Any other change is left to the tokenizer's offsets.
        """
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        clusters = _clusters(text)
        normal = [normalizer.normalize_str(cluster).encode() for cluster in clusters] if normalizer else []
        if b"".join(normal) == spelled and normal:
            original, place, offsets = 0, 0, {0: 0}
            for cluster, changed in zip(clusters, normal, strict=True):
                original, place = original + len(cluster.encode()), place + len(changed)
                offsets[place] = original
            return [offsets.get(end, -1) for end in ends]
        size = [0]
        for character in text:
            size.append(size[-1] + len(character.encode()))
        inside = [after[0] < end for (_, end), after in pairwise([*spans, (len(text), len(text))])]
        return [-1 if cut else size[end] for cut, (_, end) in zip(inside, spans, strict=True)]


def _clusters(text: str) -> list[str]:
    """Characters with what may compose with them: combining marks, and the vowels and finals of Korean syllables."""
    clusters: list[str] = []
    for character in text:
        joins = unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"
        if joins and clusters:
            clusters[-1] += character
        else:
            clusters.append(character)
    return clusters


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Vocabulary]] = WeakKeyDictionary()


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """The tokenizer's `Vocabulary`, made once and again when tokens were added."""
    made = _known.get(tokenizer)
    if made is None or made[0] != len(tokenizer):
        made = (len(tokenizer), Vocabulary(tokenizer))
        _known[tokenizer] = made
    return made[1]


def token_byte_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Byte offset after each sampled token, in the bytes of ``tokenizer.decode(ids, skip_special_tokens=True)``.

    Exact for tokenizations that the tokenizer itself would not choose and for characters split over tokens, which text
    offsets cannot express. Special tokens have no bytes.

    Raises:
        ValueError: an id that the tokenizer does not have, or a tokenizer that does not concatenate bytes.
    """
    return vocabulary_of(tokenizer).spell(list(ids))[1]
