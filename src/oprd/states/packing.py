"""What nobody needs is not read: pairs without a use, columns behind the last pair, padding.

Packed, a rollout is one row of documents. A document is a row's tokens up to its last supervised position. With ``suffix``, those before its first supervised one are
read apart, without gradient, and the rest goes on from their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from oprd.states.views import PositionPairs, Reading, Rollout


def only(rollout: Rollout, *, states: bool, outputs: bool) -> Rollout:
    """Without the pairs that no term uses, and read no further than the last one of the others."""
    none = torch.zeros(0, dtype=torch.long, device=rollout.student.ids_BS.device)
    changes: dict[str, object] = {}
    if not states:
        changes |= {"state_pairs": PositionPairs(none, none, none), "state_weights_N": rollout.state_weights_N[:0]}
        changes |= {"transition_weights_N": None}
    if not outputs:
        changes |= {"output_pairs": PositionPairs(none, none, none), "output_weights_N": rollout.output_weights_N[:0]}
        changes |= {"output_tokens_N": none, "prefix": None}
    rollout = replace(rollout, **changes)
    pairs = rollout.state_pairs, rollout.output_pairs
    return replace(
        rollout,
        student=_up_to(rollout.student, [p.student_N for p in pairs]),
        teacher=_up_to(rollout.teacher, [column_N for _, column_N in _teacher_uses(rollout)]),
    )


def _up_to(reading: Reading, columns: Sequence[Tensor]) -> Reading:
    """A padded reading without the columns behind the last used one."""
    used_N = torch.cat(list(columns))
    width = int(used_N.max()) + 1 if len(used_N) else 1
    return Reading(reading.ids_BS[:, :width], reading.mask_BS[:, :width])


def _teacher_uses(rollout: Rollout) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of the teacher that are read."""
    uses = [(pairs.row_N, pairs.teacher_N) for pairs in (rollout.state_pairs, rollout.output_pairs)]
    return uses + ([] if rollout.prefix is None else [(rollout.prefix.chain_row_E, rollout.prefix.chain_column_E)])


def shared(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Rollouts of the same rows for several teachers, each read as far as `only` left it: the student reads them as far as the
    longest."""
    widest = max((rollout.student for rollout in rollouts), key=lambda reading: reading.ids_BS.shape[1])
    return [replace(rollout, student=widest) for rollout in rollouts]


def pack(rollout: Rollout, *, suffix: bool = False) -> Rollout:
    """`pack_all` of one."""
    return pack_all([rollout], suffix=suffix)[0]


def pack_all(rollouts: Sequence[Rollout], *, suffix: bool = False) -> list[Rollout]:
    """The same rollouts in packed readings; every pair stays, in its order, and so do the weights.

    Rows that hold no pair are not read. If none holds one, a single token is, so that there is a graph.

    Args:
        rollouts: one, or one for each of several teachers over the same rows of the student.
        suffix: cut the student's documents before their first supervised position: ``student_prefix`` is what lies before.
    """
    student = max((rollout.student for rollout in rollouts), key=lambda reading: reading.ids_BS.shape[1])
    rows, device = student.ids_BS.shape[0], student.ids_BS.device
    uses = [(p.row_N, p.student_N) for rollout in rollouts for p in (rollout.state_pairs, rollout.output_pairs)]
    first, last = (_per_row(rows, uses, reduce) for reduce in ("amin", "amax"))
    teachers_last = [_per_row(rows, _teacher_uses(rollout), "amax") + 1 for rollout in rollouts]
    limits = torch.stack([first, last + 1, *teachers_last]).tolist()  # the one wait for the device
    starts, ends, *teachers_ends = ([int(x) for x in row] for row in limits)
    starts = [start if suffix and end else 0 for start, end in zip(starts, ends, strict=True)]
    if not any(ends):
        ends[0] = 1
    documents, offset_B = _documents(student, starts, ends)
    before = None
    if any(starts):
        kept = [end > start for start, end in zip(starts, ends, strict=True)]
        before, _ = _documents(student, [0] * rows, starts, kept)
    offset_B = offset_B.to(device)
    return [
        replace(_with_packed_teacher(rollout, teacher_ends, offset_B), student=documents, student_prefix=before)
        for rollout, teacher_ends in zip(rollouts, teachers_ends, strict=True)
    ]


def _with_packed_teacher(rollout: Rollout, ends: list[int], student_offset_B: Tensor) -> Rollout:
    """The teacher's reading packed up to ``ends``, and the pairs moved on both sides."""
    if not any(ends):
        ends[0] = 1
    teacher, offset = _documents(rollout.teacher, [0] * len(ends), ends)
    offset_B = offset.to(student_offset_B.device)

    def moved(pairs: PositionPairs) -> PositionPairs:
        return PositionPairs(
            torch.zeros_like(pairs.row_N),
            pairs.student_N + student_offset_B[pairs.row_N],
            pairs.teacher_N + offset_B[pairs.row_N],
        )

    prefix = rollout.prefix
    if prefix is not None:
        column_E = prefix.chain_column_E + offset_B[prefix.chain_row_E]
        prefix = replace(prefix, chain_row_E=torch.zeros_like(prefix.chain_row_E), chain_column_E=column_E)
    return replace(
        rollout,
        teacher=teacher,
        state_pairs=moved(rollout.state_pairs),
        output_pairs=moved(rollout.output_pairs),
        prefix=prefix,
    )


def _per_row(rows: int, uses: Sequence[tuple[Tensor, Tensor]], reduce: str) -> Tensor:
    """Lowest or highest column that is used in each row, ``[B]``; -1 where none is."""
    row_N, column_N = (torch.cat(parts) for parts in zip(*uses, strict=True))
    found_B = torch.full((rows,), -1, dtype=column_N.dtype, device=column_N.device)
    return found_B.scatter_reduce(0, row_N, column_N, reduce, include_self=False)


def _documents(
    reading: Reading, starts: Sequence[int], ends: Sequence[int], kept: Sequence[bool] | None = None
) -> tuple[Reading, Tensor]:
    """Columns ``start .. end`` of every row, one after another, and what to add to a row's column to find it there.

    ``kept`` rows are documents even if they are empty; by default those that are not.
    """
    start_B, end_B = torch.tensor(starts), torch.tensor(ends)
    length_B = end_B - start_B
    offset_B = length_B.cumsum(0) - length_B - start_B
    row_T = torch.repeat_interleave(torch.arange(len(starts)), length_B)
    column_T = torch.arange(len(row_T)) - offset_B[row_T]
    device = reading.ids_BS.device
    row_T, column_T = row_T.to(device), column_T.to(device)
    kept = [length > 0 for length in length_B.tolist()] if kept is None else kept
    lengths = [length for length, keep in zip(length_B.tolist(), kept, strict=True) if keep]
    packed = Reading(
        ids_BS=reading.ids_BS[row_T, column_T].unsqueeze(0),
        mask_BS=reading.mask_BS[row_T, column_T].unsqueeze(0),
        positions_BS=column_T.unsqueeze(0),
        lengths=tuple(lengths),
    )
    return packed, offset_B


def fill(lengths: Sequence[int], budget: int, at_least: int = 1) -> list[list[int]]:
    """Rows into micro-batches of at most ``budget`` tokens: longest first, each into the fullest that has room.

    Args:
        lengths: tokens of each row.
        budget: most tokens of a micro-batch; a longer row has one of its own.
        at_least: cut further until there are so many (empty ones if rows run out), for processes that go in step.

    Returns:
        Row numbers of each micro-batch, ascending; the fullest micro-batch first.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fits = [g for g, size in enumerate(sizes) if size + lengths[row] <= budget]
        if fits:
            group = max(fits, key=lambda g: sizes[g])
            groups[group].append(row)
            sizes[group] += lengths[row]
        else:
            groups.append([row])
            sizes.append(lengths[row])
    while len(groups) < at_least:
        largest = max(groups, key=len, default=[])
        half = len(largest) // 2
        groups.append(largest[half:] if half else [])
        del largest[half if half else len(largest) :]
    groups.sort(key=lambda group: -sum(lengths[row] for row in group))
    return [sorted(group) for group in groups]


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Rows to ``hands`` of equally many, with totals as equal as longest-first gives: row numbers of each.

    Raises:
        ValueError: the rows cannot be dealt out evenly.
    """
    if len(lengths) % hands:
        raise ValueError(f"{len(lengths)} rows cannot be dealt evenly to {hands}.")
    share = len(lengths) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    totals = [0] * hands
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        hand = min((h for h in range(hands) if len(dealt[h]) < share), key=lambda h: totals[h])
        dealt[hand].append(row)
        totals[hand] += lengths[row]
    return [sorted(hand) for hand in dealt]
