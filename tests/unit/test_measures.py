from itertools import pairwise
from math import ceil

import pytest
import torch

from oprd.objectives import measures, projection
from oprd.objectives.measures import entropy, evenly_spaced, measured, top_k_overlap
from oprd.objectives.projection import Projection


def test_entropy_and_overlap_by_hand():
    logits = torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert entropy(logits).item() == pytest.approx(0.6931472)
    student, teacher = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert top_k_overlap(student, teacher, k=2).item() == 0.5
    assert top_k_overlap(student, teacher, k=99).item() == 1.0


@pytest.mark.parametrize("count", [0, 1, 5, 256, 257, 1000])
def test_evenly_spaced_positions(count):
    at = evenly_spaced(count, 256, torch.device("cpu")).tolist()
    assert len(at) == min(count, 256)
    assert all(0 <= i < count for i in at)
    gaps = {b - a for a, b in pairwise(at)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)
    if at:
        assert at[0] == 0 and count - at[-1] <= ceil(count / len(at))


def test_a_sample_is_measured_in_chunks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(measures, "MEASURED_POSITIONS", 7)
    monkeypatch.setattr(projection, "CPU_COPY_BYTES", 3 * 8 * 19)
    states, others = torch.randn(2, 20, 4, dtype=torch.float64)
    heads = [Projection(torch.randn(19, 4, dtype=torch.float64), None, 1.5, None, 0.7, torch.float64) for _ in range(2)]
    sums = measured(*heads, states, others)
    at = [20 * i // 7 for i in range(7)]
    own, other = (h[at] @ w.weight_Vd.T * 1.5 / 0.7 for h, w in zip((states, others), heads, strict=True))
    p, q = own.softmax(-1), other.softmax(-1)
    tops = [[set(x.argsort(descending=True)[:16].tolist()) for x in logits] for logits in (own, other)]
    expected = {
        "entropy/student": -(p * p.log()).sum(),
        "entropy/teacher": -(q * q.log()).sum(),
        "overlap/top16": torch.tensor(sum(len(a & b) / 16 for a, b in zip(*tops, strict=True))),
    }
    assert sums.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(sums[name][0], value.float())
        assert sums[name][1] == 7
    assert measured(heads[0], None, states, others).keys() == {"entropy/student"}
    for total, count in measured(*heads, states[:0], others[:0]).values():
        assert total == count == 0
