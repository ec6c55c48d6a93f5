import json
import os

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from oprd.cli import main
from oprd.insight.compare import compare, open_contenders, shared_benchmarks, table_rows
from oprd.insight.plots import plot_bubbles
from runs import VARIED, evaluate_run, make_run, quiz, write_answers

FEW, MORE = [1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]


@pytest.fixture
def first(tmp_path):
    return make_run(tmp_path / "first", FEW, seconds=90, memory=2 * 10**9, tokens=1234567)


@pytest.fixture
def second(tmp_path):
    return make_run(tmp_path / "second", MORE, seconds=60, processes=2, memory=10**9)


def rows_of(*paths, **more):
    return compare(open_contenders([str(path) for path in paths]), **more)


def run_compare(tmp_path, *arguments):
    return main(["compare", *map(str, arguments), "--plot", str(tmp_path / "plots" / "all.png")])


def test_differences_are_those_of_the_problems(first, second):
    (base, row), notes = rows_of(first, second)
    assert notes == []
    assert [one["model"] for one in (base, row)] == ["first", "second"]
    assert "against_baseline" not in base
    assert (base["summary"]["avg_at_k"]["value"], row["summary"]["avg_at_k"]["value"]) == (25, 62.5)
    found = row["against_baseline"]
    assert found["difference"] == 37.5 and found["problems"] == 8  # 3 of 8 problems gained, none lost
    assert 0 <= found["low"] < 37.5 < found["high"] <= 100
    assert found["p_value"] == 2 / 2**3  # of the 8 sign patterns, all + and all - are as far out
    (_, back), _ = rows_of(second, first)
    assert back["against_baseline"]["difference"] == -37.5
    assert -100 <= back["against_baseline"]["low"] < -37.5 < back["against_baseline"]["high"] <= 0


def test_every_later_one_is_held_against_the_first(first, second, tmp_path):
    third = make_run(tmp_path / "third", [0] * 8)
    rows, _ = rows_of(first, second, third)
    assert [row["against_baseline"]["difference"] for row in rows[1:]] == [37.5, -25]


def test_another_metric(first, tmp_path):
    longer = make_run(tmp_path / "longer", FEW, answered={"tokens": [12, 14, 16, 18, 10, 10, 10, 10]})
    (_, row), _ = rows_of(first, longer, metric="mean_length")
    assert row["against_baseline"]["difference"] == 2.5
    assert row["against_baseline"]["p_value"] == 2 / 2**4
    with pytest.raises(ValueError, match="There is no metric 'median'"):
        rows_of(first, longer, metric="median")


def test_what_a_run_cost_stands_beside_it(first, second, tmp_path):
    rows, _ = rows_of(first, second, write_answers(tmp_path / "hub" / "model", FEW))
    one, two, folder = table_rows(rows)
    assert (one["minutes"], one["peak GB"], one["tokens trained"]) == ("1.5", "2.00", "1,234,567")
    assert (two["minutes"], two["device hours"], one["device hours"]) == ("1.0", "0.0333", "0.025")
    assert [folder[name] for name in ("minutes", "device hours", "peak GB", "tokens trained")] == [""] * 4
    assert rows[2]["cost"] == {}
    assert two["difference (avg_at_k)"].startswith("37.5 [") and two["p"] == "0.25"
    assert (one["difference (avg_at_k)"], one["p"]) == ("", "")


def test_with_unequal_samples_both_are_shown_and_noted(first, tmp_path):
    twice = make_run(tmp_path / "twice", [[1, 0]] * 8)
    rows, notes = rows_of(first, twice)
    assert notes == ["quiz: first and twice differ in samples 1 and 2."]
    one, two = table_rows(rows)
    assert one["Avg@1"].startswith("25.0 [") and one["Avg@2"] == ""
    assert two["Avg@2"].startswith("50.0 [") and two["Avg@1"] == ""
    assert rows[1]["against_baseline"]["difference"] == 25


@pytest.mark.parametrize(("name", "value"), [("temperature", 1.0), ("top_p", 0.5), ("max_new_tokens", 32)])
def test_unequal_settings_are_noted(first, tmp_path, name, value, capsys):
    other = make_run(tmp_path / "other")
    evaluate_run(other, FEW, sampling={name: value})
    before = {"temperature": 0.7, "top_p": 0.95, "max_new_tokens": 64}[name]
    note = f"quiz: first and other differ in {name} {before} and {value}."
    assert rows_of(first, other)[1] == [note]
    assert run_compare(tmp_path, first, other) == 0
    assert f"oprd: {note}" in capsys.readouterr().err


def test_what_changes_no_answer_is_not_noted(first, tmp_path):
    other = make_run(tmp_path / "other")
    evaluate_run(other, FEW, sampling={"batch_size": 3})
    assert rows_of(first, other)[1] == []


def test_undecided_is_shown_where_there_is_some(first, second):
    rows, _ = rows_of(first, second)
    assert all("undecided %" not in row for row in table_rows(rows))
    rows[1]["summary"]["undecided"] = 12.5
    assert [row["undecided %"] for row in table_rows(rows)] == ["0.0", "12.5"]


def test_benchmarks_in_common_in_the_order_of_the_first(tmp_path):
    def made(name, *benchmarks):
        run = make_run(tmp_path / name)
        for benchmark in benchmarks:
            evaluate_run(run, FEW, on=quiz(benchmark, 8))
        return run

    one, two, three = made("one", "a", "b", "c"), made("two", "c", "d", "a"), made("three", "e")
    rows, _ = rows_of(one, two)
    assert [(row["benchmark"], row["model"]) for row in rows] == [
        ("a", "one"), ("a", "two"), ("c", "one"), ("c", "two")]  # fmt: skip
    assert [row["benchmark"] for row in rows_of(one, two, benchmarks=["c"])[0]] == ["c", "c"]
    assert [row["benchmark"] for row in rows_of(one)[0]] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="two was not evaluated on b; it has a, c, d"):
        rows_of(one, two, benchmarks=["a", "b"])
    with pytest.raises(ValueError, match=r"No benchmark in common \(one: a, b, c; three: e\)"):
        shared_benchmarks(open_contenders([str(one), str(three)]))


def test_same_name_and_other_problems_are_refused(first, tmp_path):
    shorter = make_run(tmp_path / "shorter", FEW[:6])
    with pytest.raises(ValueError, match=r"first and shorter answered different problems \(2 are"):
        rows_of(first, shorter)


def labels(*paths):
    return [one.label for one in open_contenders([str(path) for path in paths])]


def test_labels_are_names_where_they_tell_apart(first, second, tmp_path):
    twin = make_run(tmp_path / "elsewhere" / "first", FEW)
    alone = write_answers(tmp_path / "gpt" / "teacher", FEW)
    assert labels(first, second) == ["first", "second"]
    assert labels(first, second, twin) == [str(first), "second", str(twin)]
    assert labels(alone, alone.parent, first) == ["teacher/quiz", "teacher", "first"]


def test_a_renamed_run_is_told_from_its_copy(first, tmp_path):
    copy = tmp_path / "copy"
    os.rename(first, copy)
    assert labels(copy, make_run(tmp_path / "first", FEW)) == [str(copy), str(tmp_path / "first")]


def test_the_folder_here_has_a_name(tmp_path, monkeypatch):
    write_answers(tmp_path / "model", FEW)
    monkeypatch.chdir(tmp_path / "model")
    assert labels(".") == ["model"]
    assert labels("quiz") == ["model/quiz"]
    monkeypatch.chdir("quiz")
    assert labels(".", "..") == ["model/quiz", "model"]


def test_a_run_stands_for_its_final_student(tmp_path):
    run = make_run(tmp_path / "run", steps=4)
    for who, right in (("student", [0] * 8), ("teacher", [1] * 8), ("step-000002", [0] * 8)):
        evaluate_run(run, right, who=who)
    with pytest.raises(ValueError, match=f"{run} has no evaluation of its final student: oprd eval {run} --on"):
        rows_of(run)
    evaluate_run(run, FEW, who="step-000004")
    assert rows_of(run)[0][0]["summary"]["avg_at_k"]["value"] == 25
    evaluate_run(run, MORE)
    assert rows_of(run)[0][0]["summary"]["avg_at_k"]["value"] == 62.5
    (_, row), _ = rows_of(run / "evaluations" / "student", run / "evaluations" / "teacher" / "quiz")
    assert row["against_baseline"]["difference"] == 100


def test_a_table_and_a_plot_of_runs(first, second, tmp_path, capsys):
    assert run_compare(tmp_path, first, second) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 4 and lines[0].split()[:2] == ["model", "benchmark"]
    assert lines[2].startswith("first ") and lines[3].startswith("second ") and "37.5 [" in lines[3]
    assert (tmp_path / "plots" / "all.png").read_bytes().startswith(b"\x89PNG")
    assert f"Plot: {tmp_path / 'plots' / 'all.png'}" in printed.err


def test_no_plot_without_a_cost(tmp_path, capsys):
    assert run_compare(tmp_path, write_answers(tmp_path / "a", FEW), write_answers(tmp_path / "b", MORE)) == 0
    printed = capsys.readouterr()
    assert "37.5 [" in printed.out and "Plot" not in printed.err
    assert not (tmp_path / "plots").exists()


def test_json(first, second, tmp_path, capsys):
    for run in (first, second):
        evaluate_run(run, FEW, on=quiz("other", 8))
    assert run_compare(tmp_path, first, second, "--json", "--on", "quiz", "--metric", "mean_length") == 0
    rows = json.loads(capsys.readouterr().out)
    expected = rows_of(first, second, benchmarks=["quiz"], metric="mean_length")[0]
    assert rows == json.loads(json.dumps(expected))
    assert [(row["model"], row["benchmark"]) for row in rows] == [("first", "quiz"), ("second", "quiz")]
    assert rows[1]["against_baseline"]["difference"] == 0  # accuracy differs, length does not
    assert rows[0]["cost"]["peak_memory_bytes"] == 2 * 10**9


@pytest.mark.parametrize("kind", ["nothing there", "no evaluation", "unfinished"])
def test_what_cannot_be_compared_is_a_fault_with_its_remedy(tmp_path, capsys, kind):
    path = tmp_path / "run"
    if kind != "nothing there":
        make_run(path, finished=kind == "no evaluation")
    assert run_compare(tmp_path, path) == 1
    error = capsys.readouterr().err
    told = {"nothing there": "is neither a run", "no evaluation": f"oprd eval {path} --on BENCHMARK"}
    assert told.get(kind, "has not finished. The command that started it continues it") in error
    assert not (tmp_path / "plots").exists()


def row(model, benchmark="quiz", *, value=50.0, low=30.0, high=80.0, seconds=60.0, memory=10**9):
    cost = {} if seconds is None else {"wall_seconds": seconds, "peak_memory_bytes": memory}
    summary = {"samples": 4, "avg_at_k": {"value": value, "low": low, "high": high}}
    return {"model": model, "benchmark": benchmark, "summary": summary, "cost": cost}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw bubbles; the panels."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: figures.append(self))

    def draw(rows):
        assert plot_bubbles(rows, tmp_path / "plot.png") is True
        return figures.pop().axes

    return draw


def bubbles(panel):
    """(x, y, area) of each."""
    found = [one for one in panel.collections if isinstance(one, PathCollection)]
    return [(*np.asarray(one.get_offsets())[0], one.get_sizes()[0]) for one in found]


def test_bubbles_stand_at_time_and_accuracy_with_an_area_of_memory(drawn):
    (panel,) = drawn([
        row("a", value=40.0, seconds=600, memory=4 * 10**9), row("b", value=55.0, seconds=300, memory=10**9)])  # fmt: skip
    (x, y, area), (x2, y2, area2) = bubbles(panel)
    assert (x, y, x2, y2) == (10, 40, 5, 55)
    assert area == 4 * area2 > 0
    assert (panel.get_title(), panel.get_xlabel()) == ("quiz", "wall-clock minutes")
    assert panel.get_ylabel() == "Avg@4, % (95 % interval)"
    assert [text.get_text() for text in panel.get_legend().get_texts()] == ["a, 4 GB", "b, 1 GB"]


def test_the_whiskers_are_the_interval(drawn):
    (panel,) = drawn([row("a", value=40.0, low=25.0, high=70.0)])
    (whisker,) = [one for one in panel.collections if not isinstance(one, PathCollection)]
    (segment,) = whisker.get_segments()
    assert sorted(segment[:, 1]) == [25, 70]


@pytest.mark.parametrize(
    ("seconds", "unit", "x"),
    [
        (100, "seconds", 100),
        (120, "seconds", 120),
        (121, "minutes", 121 / 60),
        (7200, "minutes", 120),
        (7201, "hours", 7201 / 3600),
    ],
)
def test_the_unit_of_time_suits_the_longest(drawn, seconds, unit, x):
    (panel,) = drawn([row("a", seconds=seconds), row("b", seconds=1)])
    assert panel.get_xlabel() == f"wall-clock {unit}"
    assert bubbles(panel)[0][0] == pytest.approx(x)


def test_a_panel_for_each_benchmark_and_no_bubble_without_a_cost(drawn):
    rows = [row("a", "x"), row("hub", "x", seconds=None), row("a", "y"), row("b", "y"), row("hub", "z", seconds=None)]
    panels = drawn(rows)
    assert [panel.get_title() for panel in panels] == ["x", "y"]
    assert [len(bubbles(panel)) for panel in panels] == [1, 2]


def test_nothing_to_draw(tmp_path):
    assert plot_bubbles([row("hub", seconds=None)], tmp_path / "deep" / "plot.png") is False
    assert not (tmp_path / "deep").exists()


def test_a_run_that_was_not_measured_is_a_bubble_without_area(drawn):
    (panel,) = drawn([row("a", seconds=0, memory=0)])
    assert bubbles(panel) == [(0, 50, 0)]


def test_repeated_answers_are_told_from_varied_ones(tmp_path):
    varied = write_answers(tmp_path / "varied", FEW, text=VARIED)
    stuck = write_answers(tmp_path / "stuck", FEW, text="so so so so so")
    assert [shown["Dist-4g"] for shown in table_rows(rows_of(varied, stuck)[0])] == ["100.0", "50.0"]
