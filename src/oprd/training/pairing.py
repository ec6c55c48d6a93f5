"""How the teacher reads what the student wrote: the same tokens, its own prompt before them, or its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from oprd.models import apply_template
from oprd.objectives.prefix_marginal import PrefixTable
from oprd.states import Crossing, PrefixIndex, Reading, TeacherText
from oprd.states.crossing import NOWHERE, Crossed
from oprd.training.privileged import PromptTemplate

ENOUGH_TO_JUDGE = 64  # response tokens below which a share of pairs says nothing


def agreement(crossing: Crossing | None) -> Callable[[Tensor, Tensor], Tensor]:
    """Whether a student's and a teacher's token are one, ``[n]`` twice -> bool ``[n]``; across tokenizers, whether one's text
    begins with the other's."""
    if crossing is None:
        return lambda own, other: own == other

    def one(own: int, other: int) -> bool:
        if own in crossing.meanings:
            return crossing.meanings[own] == other
        a, b = crossing.student.tokens[own], crossing.teacher.tokens[other]
        return bool(a and b) and (a.startswith(b) or b.startswith(a))

    return lambda own, other: torch.tensor([one(*pair) for pair in zip(own.tolist(), other.tolist(), strict=True)])


@dataclass
class TeacherReader:
    """Turns prompts and responses into what the teacher reads (`oprd.states.TeacherText`), as tensors of a batch.

    Args:
        tokenizer: the teacher's.
        crossing: how the student's tokens are read again; None if both have one vocabulary, so that only the prompt is the
            teacher's own.
        context: the teacher's, to refuse what does not fit.
        template: keyword arguments of the chat template.
        prompt_template: where the teacher's prompt holds what the student's does not.
        longest_prompt: tokens of such a prompt, for which its privileged text is shortened; what the context leaves beside the
            response, where that is less.
    """

    tokenizer: PreTrainedTokenizerBase
    crossing: Crossing | None
    context: int | None
    template: dict[str, Any]
    prompt_template: PromptTemplate | None = None
    longest_prompt: int | None = None

    def __post_init__(self) -> None:
        self.index = None if self.crossing is None else PrefixIndex(self.crossing)

    def prompt_ids(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """The prompt in the teacher's own template and tokens."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        rendered = apply_template(
            self.tokenizer, prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **self.template
        )
        return rendered["input_ids"]

    def prompt_of(self, row: Mapping[str, Any], response: int) -> tuple[list[int], int]:
        """The teacher's prompt for a row, and how many characters of privileged text had to go for a ``response`` of so many
        tokens to fit."""
        if self.prompt_template is None:
            return self.prompt_ids(row["prompt"]), 0
        limits = [self.longest_prompt, None if self.context is None else max(self.context - response, 0)]
        room = min((limit for limit in limits if limit is not None), default=None)
        return self.prompt_template.fit(row, self.prompt_ids, room)

    def _cross(self, ids: Sequence[int]) -> Crossed:
        if self.crossing is not None:
            return self.crossing.read(ids)
        places = list(range(len(ids) + 1))
        return Crossed(list(ids), places, places, [b""] * len(places), [[]] * len(ids))

    def read(
        self, given: Sequence[Mapping[str, Any]], completion_ids_BC: Tensor, completion_mask_BC: Tensor
    ) -> dict[str, Tensor]:
        """Tensors with one row per response, to be split with the rest of a batch; `text_of` puts them together again.

        Args:
            given: the dataset's rows.

        Raises:
            ValueError: a response that the teacher's context cannot hold.
        """
        device, width = completion_ids_BC.device, completion_ids_BC.shape[1]
        rows, columns, chains, left_out = [], [], [], []
        masks = completion_mask_BC.bool().cpu()
        for row, ids, mask in zip(given, completion_ids_BC.cpu(), masks, strict=True):
            crossed = self._cross(ids[mask].tolist())
            before, characters = self.prompt_of(row, len(crossed.teacher_ids))
            left_out.append(characters)
            rows.append([*before, *crossed.teacher_ids])
            if self.context is not None and len(rows[-1]) > self.context:
                raise ValueError(
                    f"A prompt of {len(before)} and a response of {len(crossed.teacher_ids)} teacher tokens do not fit the "
                    f"teacher's context of {self.context}. Lower max_completion_length"
                    + (" or max_prompt_length, or shorten teacher_prompt_template." if self.prompt_template else ".")
                )
            columns.append(self._columns(crossed, len(before), mask, width))
            chains.append(self._chains(crossed, len(before), mask.nonzero().flatten().tolist()))
        longest = max(map(len, rows))
        steps = max(1, max(map(len, chains)))
        reading_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        reading_mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        chain = torch.full((len(rows), steps, 4), -1, dtype=torch.long)
        for row, (ids, links) in enumerate(zip(rows, chains, strict=True)):
            reading_ids[row, : len(ids)], reading_mask[row, : len(ids)] = torch.tensor(ids), True
            if links:
                chain[row, : len(links)] = torch.tensor(links)
        stacked = torch.stack(columns)
        tensors = {"ids": reading_ids, "mask": reading_mask, "columns": stacked, "chain": chain}
        tensors["left_out"] = torch.tensor(left_out)
        return {f"teacher_{name}": tensor.to(device) for name, tensor in tensors.items()}

    def _columns(self, crossed: Crossed, prompt: int, mask: Tensor, width: int) -> Tensor:
        """``[C, 4]``: before, after, anchor, residue of each response token."""
        columns = torch.full((width, 4), NOWHERE, dtype=torch.long)
        columns[:, 3] = 0

        def column(place: int) -> int:
            return NOWHERE if place == NOWHERE else prompt + place - 1

        found = [
            (
                column(crossed.partner[i]),
                column(crossed.partner[i + 1]),
                column(crossed.anchor[i]),
                0 if self.index is None else self.index.residue(crossed.residue[i], b"" if i else crossed.dropped),
            )
            for i in range(len(crossed.path))
        ]
        if found:
            columns[mask] = torch.tensor(found)
        return columns

    def _chains(self, crossed: Crossed, prompt: int, places: list[int]) -> list[tuple[int, int, int, int]]:
        """Steps of the sampled tokens that take several teacher tokens."""
        links = []
        for place, path in zip(places, crossed.path, strict=True):
            for position, said in path if len(path) > 1 else ():
                span = self.index.span(said) if isinstance(said, bytes) else self.index.of_token(said)
                links.append((place, prompt + position - 1, *span))
        return links

    def text_of(self, batch: dict[str, Tensor]) -> TeacherText:
        """What `read` made, for one micro-batch; columns that nobody uses are dropped."""
        width = int(batch["teacher_mask"].sum(1).max())
        reading = Reading(batch["teacher_ids"][:, :width], batch["teacher_mask"][:, :width])
        return TeacherText(reading, *batch["teacher_columns"].unbind(-1), batch["teacher_chain"])

    def table_of(self, residues_N: Tensor) -> tuple[PrefixTable, Tensor]:
        """The table of the residues that occur, and each one's row in it."""
        occurring, rows_N = residues_N.unique(return_inverse=True)
        return self.index.table(occurring.tolist() or [0], residues_N.device), rows_N

    def check_pairs(self, batch: dict[str, Tensor], generated_BC: Tensor, least: float, share: float) -> None:
        """Refuse to compare states at few places.

        Args:
            generated_BC: response tokens of this process; ``share`` of all processes' have a partner.

        Raises:
            ValueError: with a response in both tokenizations.
        """
        if share >= least or int(generated_BC.sum()) < ENOUGH_TO_JUDGE:
            return
        row = int(generated_BC.sum(1).argmax())
        own = batch["completion_ids"][row][generated_BC[row]].tolist()
        other = self._cross(own).teacher_ids
        show = [
            "|".join(tokenizer.convert_ids_to_tokens(ids[:24]))
            for tokenizer, ids in ((self.crossing.student.tokenizer, own), (self.tokenizer, other))
        ]
        raise ValueError(
            f"Only {share:.0%} of the student's positions end where a teacher token ends (min_paired_share: {least:g}), too few "
            f"for the states to be compared.\n  student: {show[0]}\n  teacher: {show[1]}\nLower min_paired_share, or set "
            "representation_weight: 0 and distil through output_loss: top_k, which supervises every position."
        )
