import math
import re
import warnings
import xml.etree.ElementTree as ElementTree

import pytest

from oprd.insight.charts import COLORS, INK, Curve, area_chart, interval_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"
NAN = math.nan


def parsed(chart):
    return ElementTree.fromstring(chart.svg)


def ids(chart):
    return [element.get("id") for element in parsed(chart).iter() if element.get("id")]


def texts(chart):
    return [element.text for element in parsed(chart).iter(f"{SVG}text")]


def drawn(chart, kind):
    """Groups of matplotlib's, such as ``line2d``, that bear one of the colours of charts, with something to see."""
    found = []
    for group in parsed(chart).iter(f"{SVG}g"):
        if re.fullmatch(rf"{re.escape(chart.name)}-{kind}_\d+", group.get("id", "")):
            inside = [e for e in group.iter() if any(color in (e.get("style") or "").lower() for color in COLORS)]
            found += [group] if inside else []
    return found


def pictures():
    """One of every kind, with the same data under the names that a page gives them."""
    band = Curve([0, 1, 2], [1.0, 3.0, 2.0], [0.5, 2.0, 1.0], [1.5, 4.0, 3.0])
    plain = Curve([0, 1, 2], [1.0, 2.0, 2.0])
    return [
        line_chart("loss", "Loss", {"total": plain, "states": band}, ylabel="nats", limits=(0, 5), whole_x=True),
        line_chart("rate", "Learning rate", {"": plain}),
        area_chart("time", "Seconds", {"rollout": plain, "teacher": plain, "student": plain}, ylabel="seconds"),
        interval_chart("interval0", "Avg@4", [("before", 40.0, 30.0, 50.0), ("after", 60.0, 50.0, 70.0)], xlabel="%"),
    ]


@pytest.fixture(scope="module")
def charts():
    return pictures()


def test_each_is_one_svg_without_a_prologue(charts):
    for chart in charts:
        assert chart.svg.startswith("<svg ") and chart.svg.rstrip().endswith("</svg>")
        root = parsed(chart)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img" and root.get("aria-label") == chart.title
        assert root.get("viewBox") and root.get("width") is None and root.get("height") is None
        assert "<metadata" not in chart.svg and "<script" not in chart.svg


def test_ids_are_unique_on_a_page_and_every_reference_leads_to_one(charts):
    page = [name for chart in [*charts, line_chart("loss2", "Loss", {"": Curve([0], [1])})] for name in ids(chart)]
    assert len(page) == len(set(page)) > 50
    for chart in charts:
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', chart.svg))
        assert used and used <= set(ids(chart))
        assert all(name.startswith(f"{chart.name}-") for name in ids(chart))


def test_ink_is_the_pages(charts):
    for chart in charts:
        assert INK not in chart.svg and "currentColor" in chart.svg
        fixed = {color.lower() for color in re.findall(r"#[0-9a-fA-F]{6}\b", chart.svg)} - set(COLORS)
        assert not fixed
        for text in parsed(chart).iter(f"{SVG}text"):
            assert "currentColor" in text.get("style", "")
        assert not re.search(r"(fill|stroke): ?(black|white)", chart.svg)


def test_text_stays_text(charts):
    loss, rate, time, interval = map(texts, charts)
    assert {"total", "states", "update", "nats"} <= set(loss)
    assert "Learning rate" not in rate and "update" in rate  # the title is the page's
    assert {"rollout", "teacher", "student", "seconds"} <= set(time)
    assert {"before", "after", "%"} <= set(interval)


def test_marks_are_what_is_drawn(charts):
    loss, rate, time, interval = charts
    assert (loss.marks, rate.marks, time.marks, interval.marks) == (3, 1, 3, 4)
    assert len(drawn(loss, "line2d")) - 2 == 2  # each with its line in the legend
    assert len(drawn(loss, "FillBetweenPolyCollection")) == 1
    assert len(drawn(rate, "line2d")) == rate.marks
    assert len(drawn(time, "FillBetweenPolyCollection")) == time.marks
    assert len(drawn(interval, "line2d")) == interval.marks


def test_one_curve_without_a_name_needs_no_legend(charts):
    named = line_chart("rate", "Learning rate", {"rate": Curve([0, 1], [1, 2])})
    assert "legend_1" in named.svg and "rate" in texts(named)
    assert "legend_1" not in charts[1].svg


def test_nothing_to_draw():
    empty = Curve([], [])
    assert line_chart("a", "A", {}) is None
    assert line_chart("a", "A", {"x": empty, "y": empty}) is None
    assert line_chart("a", "A", {"x": Curve([1, 2], [NAN, math.inf])}) is None
    assert area_chart("a", "A", {}) is None
    assert area_chart("a", "A", {"x": empty}) is None
    assert interval_chart("a", "A", [], xlabel="%") is None


def test_curves_without_points_are_left_out():
    curves = {"full": Curve([0, 1], [1.0, 2.0]), "empty": Curve([], []), "lost": Curve([0, 1], [NAN, NAN])}
    chart = line_chart("a", "A", curves)
    assert chart.marks == 1
    assert "full" in texts(chart) and not {"empty", "lost"} & set(texts(chart))
    assert area_chart("a", "A", curves).marks == 1


ODD = ["a < b & c > d", "\"quoted\" and 'quoted'", "</svg><script>", "$x^2$ and $\\broken{$", "été 数学", "100 %"]


@pytest.mark.parametrize("odd", ODD)
def test_names_and_titles_are_only_text(odd):
    curve = Curve([0, 1], [1.0, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's own font lacks; the page has others
        made = [
            line_chart("a", odd, {odd: curve, "other": curve}, xlabel=odd, ylabel=odd),
            area_chart("b", odd, {odd: curve}, ylabel=odd),
            interval_chart("c", odd, [(odd, 1.0, 0.0, 2.0)], xlabel=odd),
        ]
    for chart in made:
        assert parsed(chart).get("aria-label") == odd
        assert texts(chart).count(odd) >= 2
        assert not list(parsed(chart).iter(f"{SVG}script"))


def test_numbers_that_are_none_do_not_break_a_picture():
    gaps = Curve([0, 1, 2, 3], [1.0, NAN, math.inf, 2.0], [0.5, NAN, 0.0, 1.0], [2.0, NAN, math.inf, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = [
            line_chart("a", "A", {"x": gaps}),
            line_chart("a", "A", {"x": gaps}, limits=(0, 1), whole_x=True),
            area_chart("b", "B", {"x": Curve([0, 1, 2], [1.0, NAN, 1.0]), "y": Curve([0, 1, 2], [1.0, 1.0, 1.0])}),
            interval_chart("c", "C", [("x", 1.0, NAN, NAN), ("y", NAN, NAN, NAN)], xlabel="%"),
        ]
    for chart in made:
        assert not re.search(r"\bnan\b|\binf\b", chart.svg.lower())
        assert parsed(chart).tag == f"{SVG}svg"


def marker_uses(chart):
    return [use for group in drawn(chart, "line2d") for use in group.iter(f"{SVG}use")]


def test_few_points_have_markers_and_many_have_none():
    few, many = (line_chart("a", "A", {"": Curve(range(n), range(n))}) for n in (11, 12))
    assert len(marker_uses(few)) == 11 and not marker_uses(many)


def test_more_curves_than_colours_begin_again():
    chart = line_chart("a", "A", {str(n): Curve([0, 1], [n, n]) for n in range(len(COLORS) + 1)})
    assert chart.marks == len(COLORS) + 1
    strokes = re.findall(r"stroke: (#[0-9a-f]{6}); stroke-width: 1\.7", chart.svg)
    assert {strokes.count(color) for color in COLORS[1:]} == {2} and strokes.count(COLORS[0]) == 4


def points(chart):
    """Places of the markers, as drawn."""
    return [(float(use.get("x")), float(use.get("y"))) for use in marker_uses(chart)]


def test_up_is_more_and_rows_go_down():
    (x0, y0), (x1, y1) = points(line_chart("a", "A", {"": Curve([0, 1], [1.0, 2.0])}))
    assert x0 < x1 and y0 > y1  # pixels count down
    (x0, y0), (x1, y1) = points(interval_chart("c", "C", [("x", 2.0, 1.0, 3.0), ("y", 1.0, 0.0, 2.0)], xlabel="%"))
    assert x0 > x1 and y0 < y1


def test_a_note_stays_with_its_chart():
    curve = Curve([0, 1], [1.0, 2.0])
    assert line_chart("a", "A", {"": curve}, note="of eight").note == "of eight"
    assert interval_chart("a", "A", [("x", 1.0, 0.0, 2.0)], xlabel="%", note="of nine").note == "of nine"
