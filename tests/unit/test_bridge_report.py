import json
import struct

import pytest
import torch
import torch.nn.functional as F

from oprd.bridge import BridgeFitter
from oprd.bridge.report import SAMPLE_ROWS, Sample, build_report, cosine_by_rank, layer_scores, ranks_up_to
from oprd.insight.bridges import control_rows, plot_bridge, rank_rows, verdict

STUDENT, TEACHER, LAYERS = 12, 10, 2
RIDGE = 1e-8


def pair_of_states(n, *, seed, shift=0.0):
    """A teacher that is partly a map of the student, with falling variances; ``[layers, n, d]``."""
    generator = torch.Generator().manual_seed(1)
    linear = torch.randn(LAYERS, STUDENT, TEACHER, generator=generator) * torch.logspace(0, -1, TEACHER)
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(LAYERS, n, STUDENT, generator=generator) + 0.5
    noise = torch.randn(LAYERS, n, TEACHER, generator=generator) * 0.5
    return student + shift, student @ linear + noise + 1


@pytest.fixture
def fitter():
    """With as many held-out rows as a sample holds, so that the sample is all of them."""
    fitter = BridgeFitter([1, 4], STUDENT, TEACHER)
    fitter.update(*pair_of_states(800, seed=2))
    fitter.update(*pair_of_states(300, seed=3), held_out=True)
    return fitter


def projections(solution, student, teacher):
    """Both sides in the bridge, all directions."""
    student = student.double() - (0 if solution.student_mean is None else solution.student_mean)
    return student @ solution.student_map.T, (teacher.double() - solution.teacher_mean) @ solution.directions.T


# ------------------------------------------------------------------------------------------------ the sample


def numbered(numbers):
    """Rows that carry their number in every layer and on both sides."""
    column = torch.as_tensor(numbers, dtype=torch.float32).unsqueeze(1)
    return [column, column + 0.25], [torch.cat([column, column + 0.5], 1), torch.cat([column, column + 0.75], 1)]


def kept(sample):
    return sorted(int(number) for number in sample.student[0][:, 0])


@pytest.mark.parametrize(("offered", "expected"), [(0, 0), (3, 3), (8, 8), (500, 8)])
@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_a_sample_keeps_at_most_its_size(offered, expected, chunk):
    sample = Sample(8)
    for start in range(0, offered, chunk):
        sample.add(*numbered(range(start, min(start + chunk, offered))))
        assert len(sample) == min(8, min(start + chunk, offered))
    assert len(sample) == expected
    if offered:
        assert len(set(kept(sample))) == expected
        assert all(len(rows) == expected for rows in (*sample.student, *sample.teacher))
        storage = sum(rows.untyped_storage().nbytes() for rows in (*sample.student, *sample.teacher))
        assert storage == 4 * expected * (1 + 1 + 2 + 2)  # what was dropped is not kept alive behind a view


def test_a_sample_keeps_pairs_and_layers_together():
    sample = Sample(5)
    for start in (0, 40, 80):
        sample.add(*numbered(range(start, start + 40)))
    first = sample.student[0]
    assert sample.student[1].equal(first + 0.25)
    assert sample.teacher[0].equal(torch.cat([first, first + 0.5], 1))
    assert sample.teacher[1].equal(torch.cat([first, first + 0.75], 1))


def test_a_sample_is_uniform_over_chunks():
    counts = torch.zeros(20)
    for seed in range(1000):
        sample = Sample(5, seed)
        for numbers in (range(1), range(1, 9), range(9, 20)):
            sample.add(*numbered(numbers))
        counts[kept(sample)] += 1
    assert counts.sum() == 1000 * 5
    assert (counts / 1000 - 0.25).abs().max() < 0.05  # 3.6 standard errors


def test_merged_samples_are_uniform():
    """Of 5 and 15 rows, also where either sample has dropped some: a quarter of what is kept is the first one's."""
    counts = torch.zeros(20)
    for seed in range(1000):
        one, other = Sample(4, seed), Sample(4, seed + 10_000)
        one.add(*numbered(range(5)))
        other.add(*numbered(range(5, 20)))
        one.merge(other)
        assert len(one) == 4
        counts[kept(one)] += 1
    assert (counts / 1000 - 0.2).abs().max() < 0.05
    assert counts[:5].sum() / counts.sum() == pytest.approx(0.25, abs=0.03)


def test_merging_samples_with_nothing_in_them():
    full, empty = Sample(4), Sample(4)
    full.add(*numbered(range(9)))
    before = kept(full)
    full.merge(empty)
    empty.merge(full)
    assert kept(full) == kept(empty) == before
    assert empty.teacher[1].equal(full.teacher[1])


def test_sampled_rows_are_plain_float32():
    states = torch.randn(LAYERS, 4, STUDENT, requires_grad=True).bfloat16()
    sample = Sample()
    sample.add(states, states)
    assert all(rows.dtype == torch.float32 and not rows.requires_grad for rows in (*sample.student, *sample.teacher))
    assert sample.rows == SAMPLE_ROWS


# ------------------------------------------------------------------------------------------------ cosines


@pytest.mark.parametrize(
    ("highest", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (10, [1, 2, 4, 8, 10]), (16, [1, 2, 4, 8, 16])],
)
def test_ranks_up_to(highest, expected):
    assert ranks_up_to(highest) == expected


@pytest.mark.parametrize("intercept", [True, False])
def test_cosines_by_rank_equal_the_rows(fitter, intercept):
    solutions = fitter.solutions(ridge=RIDGE, intercept=intercept)
    curve = cosine_by_rank(solutions, fitter.sample, 10)
    states = pair_of_states(300, seed=3)  # in another order, and all of them
    for rank in (1, 2, 4, 8, 10):
        layers = []
        for solution, student, teacher in zip(solutions, *states, strict=True):
            own, other = projections(solution, student, teacher)
            layers.append(F.cosine_similarity(own[:, :rank], other[:, :rank]).mean().item())
        assert curve[rank] == pytest.approx(sum(layers) / LAYERS, abs=1e-6)
    assert list(curve) == [1, 2, 4, 8, 10]
    assert max(curve.values()) > 0.6


@pytest.mark.parametrize("intercept", [True, False])
def test_report_curves_equal_the_rows(fitter, intercept):
    report = fitter.fit(rank=3, intercept=intercept).report
    solutions = fitter.solutions(ridge=RIDGE, intercept=intercept)
    pairs = [projections(*group) for group in zip(solutions, *pair_of_states(300, seed=3), strict=True)]
    cosine = report["cosine"]
    assert cosine["rows"] == 300
    assert report["ranks"] == [1, 2, 4, 8, 10]

    def direct(rank, first):
        return [F.cosine_similarity(own[:, first:rank], other[:, first:rank]).mean().item() for own, other in pairs]

    for place, rank in enumerate(report["ranks"]):
        assert [layer[place] for layer in cosine["after_by_layer"]] == pytest.approx(direct(rank, 0), abs=1e-6)
        assert cosine["after"][place] == pytest.approx(sum(direct(rank, 0)) / LAYERS, abs=1e-6)
    for taken in (1, 2, 4):
        beyond = [rank for rank in report["ranks"] if rank > taken]
        expected = [sum(direct(rank, taken)) / LAYERS for rank in beyond]
        assert cosine[f"without_first_{taken}"] == pytest.approx(expected, abs=1e-6)
    assert cosine["without_first_1"] != pytest.approx(cosine["after"][1:], abs=1e-3)


def test_directions_that_carry_the_cosine_can_be_taken_out():
    """One massive direction that the student knows, beside others that it does not."""
    student = torch.randn(1, 2000, 6)
    teacher = torch.cat([100 * student[..., :1], torch.randn(1, 2000, 5)], -1)
    fitter = BridgeFitter([1], 6, 6)
    fitter.update(student[:, :1500], teacher[:, :1500])
    fitter.update(student[:, 1500:], teacher[:, 1500:], held_out=True)
    cosine = fitter.fit().report["cosine"]
    assert cosine["after"][-1] > 0.95
    assert abs(cosine["without_first_1"][-1]) < 0.1


def test_before_is_random_and_near_zero():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 1500, 64, generator=generator)
    teacher = student @ torch.randn(64, 48, generator=generator)
    fitter = BridgeFitter(range(1, 7), 64, 48)
    fitter.update(student[:, :1000], teacher[:, :1000])
    fitter.update(student[:, 1000:], teacher[:, 1000:], held_out=True)
    report = fitter.fit().report
    before, after = report["cosine"]["before"], report["cosine"]["after"]
    assert len(before) == len(after) == len(report["ranks"])
    assert max(map(abs, before)) < 0.2
    assert any(value != 0 for value in before)
    assert min(after) > 0.999
    assert fitter.fit().report["cosine"]["before"] == before


def test_few_directions_have_no_curves_without_them():
    fitter = BridgeFitter([1], 2, 5)
    fitter.update(torch.randn(1, 50, 2), torch.randn(1, 50, 5))
    fitter.update(torch.randn(1, 20, 2), torch.randn(1, 20, 5), held_out=True)
    cosine = fitter.fit().report["cosine"]
    assert [name for name in cosine if name.startswith("without")] == ["without_first_1"]
    assert len(cosine["without_first_1"]) == 1


# ------------------------------------------------------------------------------------------------ shares


def r_squared_of_rows(solution, student, teacher):
    own, other = projections(solution, student, teacher)
    return 1 - (own - other).pow(2).mean(0) / (other - other.mean(0)).pow(2).mean(0)


def test_layers_and_shares_equal_the_rows(fitter):
    fitter.update(*pair_of_states(200, seed=4, shift=0.5), held_out=True)  # held-out rows with a mean of their own
    report = fitter.fit(rank=3, intercept=True).report
    solutions = fitter.solutions(ridge=RIDGE, intercept=True)
    fitted = pair_of_states(800, seed=2)
    parts = pair_of_states(300, seed=3), pair_of_states(200, seed=4, shift=0.5)
    held_out = [torch.cat(sides, 1) for sides in zip(*parts, strict=True)]
    shares = {"train": [], "held_out": []}
    for index, (entry, solution) in enumerate(zip(report["layers"], solutions, strict=True)):
        assert entry["layer"] == index + 1
        variance = torch.linalg.eigvalsh(torch.cov(fitted[1][index].double().T, correction=0)).flip(0)
        assert entry["variance"] == pytest.approx((variance / variance.sum()).tolist(), rel=1e-6)
        for name, rows in (("train", fitted), ("held_out", held_out)):
            expected = r_squared_of_rows(solution, rows[0][index], rows[1][index])
            assert entry[f"r2_{name}"] == pytest.approx(expected.tolist(), abs=1e-6)
            weighted = [(variance * expected)[:rank].sum() / variance[:rank].sum() for rank in report["ranks"]]
            shares[name].append(torch.stack(weighted))
    for name, layers in shares.items():
        assert report["explained"][name] == pytest.approx(torch.stack(layers).mean(0).tolist(), abs=1e-6)
    assert report["explained"]["held_out"][-1] < report["explained"]["train"][-1] - 0.02


def test_at_most_64_directions_are_listed():
    fitter = BridgeFitter([1], 70, 80)
    fitter.update(torch.randn(1, 300, 70), torch.randn(1, 300, 80))
    (layer,) = fitter.fit().report["layers"]
    assert len(layer["variance"]) == len(layer["r2_train"]) == 64
    assert layer["variance"] == sorted(layer["variance"], reverse=True)


@pytest.mark.parametrize("rank", [1, 4, 10, 99])
def test_layer_scores_equal_the_rows(fitter, rank):
    solutions = fitter.solutions(ridge=RIDGE, intercept=True)
    states = pair_of_states(300, seed=3)
    for index, solution in enumerate(solutions):
        scores = layer_scores(solution, fitter.held_out[index], fitter.sample, index, rank)
        own, other = projections(solution, states[0][index], states[1][index])
        cosine = F.cosine_similarity(own[:, :rank], other[:, :rank]).mean().item()
        explained = r_squared_of_rows(solution, states[0][index], states[1][index])[:rank]
        weight = solution.variance[:rank] / solution.variance[:rank].sum()
        assert scores == pytest.approx({"cosine": cosine, "explained": (weight * explained).sum().item()}, abs=1e-6)


def test_a_report_is_json(fitter):
    def plain(value):
        if isinstance(value, dict):
            assert all(type(name) is str for name in value)
            return all(plain(v) for v in value.values())
        if type(value) is list:
            return all(plain(v) for v in value)
        return value is None or type(value) in (str, int, float, bool)

    solutions = fitter.solutions(ridge=RIDGE, intercept=True)
    report = build_report(solutions, fitter.train, fitter.held_out, fitter.sample, 10)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert plain(report)
    whole = fitter.fit().report
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert plain(whole)
    assert set(report) == {"layers", "ranks", "explained", "cosine"}


def test_a_report_without_held_out_rows():
    fitter = BridgeFitter([1, 4], STUDENT, TEACHER)
    fitter.update(*pair_of_states(800, seed=2))
    report = fitter.fit().report
    assert "cosine" not in report
    assert list(report["explained"]) == ["train"]
    assert "r2_held_out" not in report["layers"][0]


# ------------------------------------------------------------------------------------------------ tables and pictures

PREDICTION = {"student_agreement": 0.5, "mapped_teacher_agreement": 0.75, "rows": 300}
CONTROLS = {
    "layers": [1, 2],
    "rank": 3,
    "bridge": {"cosine": 0.9, "explained": 0.8},
    "shuffled_pairs": {"cosine": 0.1, "explained": -0.01},
    "random_teacher": {"cosine": 0.4, "explained": 0.2},
}


@pytest.fixture
def report(fitter):
    return fitter.fit(rank=3).report


def test_rank_rows_are_the_curves(report):
    rows = rank_rows(report)
    assert [row["rank"] for row in rows] == [1, 2, 4, 8, 10]
    columns = {
        "cosine before": report["cosine"]["before"],
        "cosine after": report["cosine"]["after"],
        "R2 fitted rows": report["explained"]["train"],
        "R2 held out": report["explained"]["held_out"],
        "cosine w/o first 1": [None, *report["cosine"]["without_first_1"]],
        "cosine w/o first 2": [None, None, *report["cosine"]["without_first_2"]],
        "cosine w/o first 4": [None, None, None, *report["cosine"]["without_first_4"]],
    }
    for name, values in columns.items():
        assert [row[name] for row in rows] == values
    assert {len(row) for row in rows} == {1 + len(columns)}


def test_rank_rows_without_held_out_rows(report):
    del report["cosine"], report["explained"]["held_out"]
    assert [list(row) for row in rank_rows(report)] == [["rank", "R2 fitted rows"]] * 5


def test_control_rows(report):
    assert control_rows(report) == []
    assert control_rows(report | {"controls": CONTROLS}) == [
        {"fit": "bridge", "held-out cosine": 0.9, "held-out R2": 0.8},
        {"fit": "shuffled pairs", "held-out cosine": 0.1, "held-out R2": -0.01},
        {"fit": "random teacher", "held-out cosine": 0.4, "held-out R2": 0.2},
    ]


def test_verdict_names_rank_rows_and_intercept(fitter, report):
    first, second = verdict(report)
    rank = report["rank"]
    assert first == (
        f"rank 3: as asked (Theorem 3's rule says {rank['theorem']}; "
        f"the highest held-out cosine is at {rank['held_out_cosine']})"
    )
    assert second == "fitted on 800 positions, 300 held out; with an intercept"
    first, second = verdict(fitter.fit(intercept=False).report)
    assert first.startswith(f"rank {rank['theorem']}: Theorem 3's rule (the highest held-out cosine is at ")
    assert second.endswith("without an intercept")


@pytest.mark.parametrize(("mapped", "word"), [(0.75, "help"), (0.5, "do harm"), (0.25, "do harm")])
def test_verdict_predicts(report, mapped, word):
    line = verdict(report | {"prediction": {**PREDICTION, "mapped_teacher_agreement": mapped}})[-1]
    assert "student's own states 50.0%" in line
    assert f"mapped into the student's space {mapped:.1%}" in line
    assert f"will probably {word}" in line
    assert ("help" in line) is (word == "help")


def png(path):
    """The bytes of a whole picture of a sensible size."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    assert struct.unpack(">II", content[16:24]) == (912, 432)
    assert len(content) > 5000
    return content


def test_pictures(report, tmp_path):
    directory = tmp_path / "deep" / "plots"
    written = plot_bridge(report | {"controls": CONTROLS}, directory)
    assert [path.name for path in written] == ["bridge-rank.png", "bridge-directions.png", "bridge-controls.png"]
    assert sorted(directory.iterdir()) == sorted(written)
    pictures = [png(path) for path in written]
    assert len(set(pictures)) == 3
    report["layers"][0]["r2_held_out"][0] = 0.1
    report["cosine"]["after"][0] = 0.1
    again = [png(path) for path in plot_bridge(report, tmp_path / "again")]
    assert len(again) == 2
    assert again[0] != pictures[0]
    assert again[1] != pictures[1]


def test_pictures_of_a_bridge_without_held_out_rows(tmp_path):
    fitter = BridgeFitter([1, 4], STUDENT, TEACHER)
    fitter.update(*pair_of_states(100, seed=2))
    assert [len(png(path)) > 0 for path in plot_bridge(fitter.fit().report, tmp_path)] == [True, True]


def test_pictures_of_a_bridge_of_width_one(tmp_path):
    """One rank, one layer, and no direction that could be taken out."""
    fitter = BridgeFitter([1], 1, 4)
    for held_out in (False, True):
        fitter.update(torch.randn(1, 30, 1), torch.randn(1, 30, 4), held_out=held_out)
    report = fitter.fit().report
    assert list(rank_rows(report)[0])[:3] == ["rank", "cosine before", "cosine after"]
    assert all(png(path) for path in plot_bridge(report, tmp_path))
