import time

import pytest

from oprd.evaluation import extract_boxed, grade


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{42}.", "42"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} is it", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b_{1}}}}", r"\sqrt{\frac{a}{b_{1}}}"),
        (r"\boxed{  7 }", "7"),
        (r"\fbox{9}", "9"),
        (r"\boxed{1} \fbox{2}", "2"),
        (r"\fbox{1} \boxed{2}", "2"),
        (r"\boxed{5} and then \boxed{6", "5"),  # cut off: the last box is not whole
        (r"\boxed{5} and then \boxed{\frac{1}{2}", "5"),
        (r"\boxed{cut \boxed{8}", "8"),  # the first one never closes, the last one does
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        (r"\boxed{\boxed{1", None),
        (r"\boxed {7}", "7"),
        ("\\boxed\n{7}", "7"),
        (r"\boxed 5$", "5"),
        (r"\boxed -1.5, so", "-1.5"),
        (r"\boxed{4}, that is \boxed 5.", "5"),
        (r"\boxed 5 is \boxed{4}", "4"),
        (r"write it in \boxed and stop", None),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1,2\right.}", r"\left\{1,2\right."),  # an escaped brace closes and opens nothing
        (r"\boxed{x\}}", r"x\}"),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),  # a line break, a brace
        (r"\\boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"} } \boxed{5} } {", "5"),
        (r"\boxed{5} \boxes{6} \boxed x", "5"),
        ("the answer is 42", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    "text",
    ["\\boxed{", "{", "}", "\\", "\\{", "\\boxed ", "\\boxed{\\boxed{}", "\\boxed 1", "\\boxed{1}", "{\\boxed"],
    ids=repr,
)
def test_extraction_takes_linear_time(text):
    start = time.monotonic()
    extract_boxed(text * 100_000 + "{}}}" + " " * 100_000)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [
        ("142.0", "142"),
        ("073", "73"),
        ("73", "073"),
        ("-5", "-5.00"),
        ("$12$", "12"),
        ("1,234", "1234"),
        ("1,234,567.5", "1234567.50"),
        (r"\frac{1}{2}", "0.5"),
        ("0.5", r"\frac12"),
        (r"\dfrac{2}{4}", r"\frac{1}{2}"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x=5", "5"),
        ("(1, 2)", "(1,2)"),
        ("east", "east"),
        (r"\text{east}", "east"),
        ("east", r"\text{east}"),
    ],
)
def test_right_answers(boxed, answer):
    assert grade(f"Thus \\boxed{{{boxed}}}.", answer) is True


@pytest.mark.parametrize(
    ("boxed", "answer"),
    [
        ("143", "142"),
        ("142.01", "142"),
        ("-73", "73"),
        ("1,234", "1235"),
        (r"\frac{1}{3}", "0.5"),
        ("0.333", r"\frac{1}{3}"),
        ("(1, 2)", "(2, 1)"),
        ("east", "west"),
        ("", "3"),
        ("nan", "3"),
    ],
)
def test_wrong_answers(boxed, answer):
    assert grade(f"Thus \\boxed{{{boxed}}}.", answer) is False


def test_the_reference_may_be_boxed_itself():
    assert grade(r"\boxed{0.5}", r"\boxed{\frac{1}{2}}")
    assert grade(r"\boxed{7}", r"we find \boxed{6}, no: \boxed{07}")
    assert not grade(r"\boxed{6}", r"we find \boxed{6}, no: \boxed{07}")


def test_only_the_last_box_counts_and_no_box_is_wrong():
    assert grade(r"\boxed{1} \boxed{2}", "2")
    assert not grade(r"\boxed{2} \boxed{1}", "2")
    assert not grade("2", "2")
    assert not grade("", "2")
    assert not grade(r"\boxed{2", "2")


def test_space_around_the_reference_does_not_matter():
    assert grade(r"\boxed{east}", " east\n")
    assert grade(r"\boxed{ 12 }", " 12 ")


def test_a_pair_is_not_a_number():
    assert not grade(r"\boxed{1,2}", "12")
    assert not grade(r"\boxed{12}", "1,2")
    assert grade(r"\boxed{12,345}", "12345")
