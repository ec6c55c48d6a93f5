import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.lineage.gates import GATES, Candidate, Verdict, is_passed, read_gates, run_gates
from runs import STUCK, VARIED, answers, quiz

N = 8
ALL, NONE = [1] * N, [0] * N
SPLIT, FLIPPED = [1] * 4 + [0] * 4, [0] * 4 + [1] * 4  # their differences are 4 x +100 and 4 x -100
SOME_STUCK, OTHERS_STUCK = [VARIED] * 4 + [STUCK] * 4, [STUCK] * 4 + [VARIED] * 4
HOURS = {"wall_seconds": 7200.0, "device_hours": 4.0, "peak_memory_bytes": 8 * 10**9}


def student(label="student", right=ALL, *, cost=None, on=None, **more):
    on = on or quiz(count=len(right))
    return Candidate(label, {on.name: answers(right, on=on, **more)}, HOURS if cost is None else cost)


def judge(config, own, baseline=None):
    (verdict,) = run_gates(config, own, baseline)
    return verdict


# Of 8 equal shares, 95 % intervals are Wilson's: 100 % -> [67.6, 100], 0 % -> [0, 32.4], 20 % -> [4.6, 56.5] (by hand from
# z = 1.96). Equal lengths and equal differences have no width.
CASES = [
    ("accuracy", "min", 67, {}, None, "pass"),
    ("accuracy", "min", 68, {}, None, "undecided"),
    ("accuracy", "min", 32, {"right": NONE}, None, "undecided"),
    ("accuracy", "min", 33, {"right": NONE}, None, "fail"),
    ("accuracy", "min_gain", 100, {}, {"right": NONE}, "pass"),
    ("accuracy", "min_gain", 1, {}, {}, "fail"),
    ("accuracy", "min_gain", 0, {"right": NONE}, {}, "fail"),
    ("accuracy", "min_gain", 0, {"right": SPLIT}, {"right": FLIPPED}, "undecided"),
    ("accuracy", "max_drop", 0, {}, {}, "pass"),
    ("accuracy", "max_drop", 0, {}, {"right": NONE}, "pass"),
    ("accuracy", "max_drop", 100, {"right": NONE}, {}, "pass"),
    ("accuracy", "max_drop", 99, {"right": NONE}, {}, "fail"),
    ("accuracy", "max_drop", 10, {"right": SPLIT}, {"right": FLIPPED}, "undecided"),
    ("length", "max", 10, {"tokens": 10}, None, "pass"),
    ("length", "max", 9.9, {"tokens": 10}, None, "fail"),
    ("length", "max", 45, {"tokens": [10, 20, 30, 40, 50, 60, 70, 80]}, None, "undecided"),
    ("length", "max_increase_percent", 20, {"tokens": 12}, {"tokens": 10}, "pass"),
    ("length", "max_increase_percent", 19, {"tokens": 12}, {"tokens": 10}, "fail"),
    ("length", "max_increase_percent", 0, {"tokens": 5}, {"tokens": 10}, "pass"),
    ("length", "max_increase_percent", -49, {"tokens": 5}, {"tokens": 10}, "pass"),
    ("length", "max_increase_percent", -51, {"tokens": 5}, {"tokens": 10}, "fail"),
    ("length", "max_increase_percent", 0, {"tokens": [15] * 4 + [5] * 4}, {"tokens": 10}, "undecided"),
    ("repetition", "min_distinct_4", 67, {"text": VARIED}, None, "pass"),
    ("repetition", "min_distinct_4", 68, {"text": VARIED}, None, "undecided"),
    ("repetition", "min_distinct_4", 57, {"text": STUCK}, None, "fail"),
    ("repetition", "max_drop", 80, {"text": STUCK}, {"text": VARIED}, "pass"),
    ("repetition", "max_drop", 79, {"text": STUCK}, {"text": VARIED}, "fail"),
    ("repetition", "max_drop", 0, {"text": VARIED}, {"text": STUCK}, "pass"),
    ("repetition", "max_drop", 5, {"text": SOME_STUCK}, {"text": OTHERS_STUCK}, "undecided"),
    ("cut_off", "max", 33, {"cut_off": False}, None, "pass"),
    ("cut_off", "max", 5, {"cut_off": False}, None, "undecided"),
    ("cut_off", "max", 67, {"cut_off": True}, None, "fail"),
    ("cut_off", "max_increase", 0, {"cut_off": False}, {"cut_off": True}, "pass"),
    ("cut_off", "max_increase", 99, {"cut_off": True}, {"cut_off": False}, "fail"),
    ("cut_off", "max_increase", 0, {"cut_off": SPLIT}, {"cut_off": FLIPPED}, "undecided"),
    ("no_box", "max", 33, {"no_box": False}, None, "pass"),
    ("no_box", "max", 5, {"no_box": False}, None, "undecided"),
    ("no_box", "max", 67, {"no_box": True}, None, "fail"),
    ("no_box", "max_increase", 0, {"no_box": False}, {"no_box": True}, "pass"),
    ("no_box", "max_increase", 99, {"no_box": True}, {"no_box": False}, "fail"),
    ("no_box", "max_increase", 0, {"no_box": SPLIT}, {"no_box": FLIPPED}, "undecided"),
    ("cost", "max_wall_hours", 2, {}, None, "pass"),
    ("cost", "max_wall_hours", 1.99, {}, None, "fail"),
    ("cost", "max_device_hours", 4, {}, None, "pass"),
    ("cost", "max_device_hours", 3.99, {}, None, "fail"),
    ("cost", "max_peak_memory_gb", 8, {}, None, "pass"),
    ("cost", "max_peak_memory_gb", 7.99, {}, None, "fail"),
    ("cost", "max_increase_percent", 0, {}, {}, "pass"),
    ("cost", "max_increase_percent", 100, {}, {"cost": {"device_hours": 2.0}}, "pass"),
    ("cost", "max_increase_percent", 99, {}, {"cost": {"device_hours": 2.0}}, "fail"),
    ("cost", "max_increase_percent", -49, {}, {"cost": {"device_hours": 8.0}}, "pass"),
]


@pytest.mark.parametrize(("group", "name", "threshold", "own", "base", "state"), CASES)
def test_every_gate_by_hand(group, name, threshold, own, base, state):
    baseline = None if base is None else student("before", **base)
    verdict = judge({group: {name: threshold}}, student(**own), baseline)
    assert (verdict.gate, verdict.state) == (f"{group}.{name}", state)
    assert verdict.benchmark == (None if group == "cost" else "quiz")
    words = {"pass": "meets", "fail": "misses", "undecided": "cannot be told from"}
    assert words[state] in verdict.reason


def test_the_cases_cover_every_gate():
    seen = {(group, name, state) for group, name, *_, state in CASES}
    for group, names in GATES.items():
        states = ("pass", "fail") if group == "cost" else ("pass", "fail", "undecided")
        assert all((group, name, state) in seen for name in names for state in states)


@pytest.mark.parametrize(
    ("config", "own", "base", "reason"),
    [
        ({"accuracy": {"min": 60}}, {}, None, "avg_at_k 100.0 [67.6, 100.0] meets at least 60"),
        ({"accuracy": {"max_drop": 0}}, {}, {}, "difference in avg_at_k 0.0 [0.0, 0.0] meets at least 0"),
        ({"accuracy": {"max_drop": 0.0}}, {}, {}, "difference in avg_at_k 0.0 [0.0, 0.0] meets at least 0"),
        ({"accuracy": {"max_drop": 2.5}}, {"right": NONE}, {}, "[-100.0, -100.0] misses at least -2.5"),
        ({"length": {"max": 9}}, {}, None, "mean_length 10.0 [10.0, 10.0] misses at most 9"),
        (
            {"length": {"max_increase_percent": 10}},
            {"tokens": 12},
            {},
            "change of mean_length in percent 20.0 [20.0, 20.0] misses at most 10",
        ),
        ({"cost": {"max_wall_hours": 1}}, {}, None, "2 hours misses at most 1"),
        ({"cost": {"max_peak_memory_gb": 9}}, {}, None, "8 GB meets at most 9"),
        (
            {"cost": {"max_increase_percent": 10}},
            {},
            {"cost": {"device_hours": 2.0}},
            "+100.0 % device hours (4 device hours after 2) misses at most 10",
        ),
    ],
)
def test_the_reason_gives_the_numbers(config, own, base, reason):
    verdict = judge(config, student(**own), None if base is None else student("before", **base))
    assert verdict.reason.endswith(reason)


def test_accuracy_is_over_all_samples_not_the_best():
    half, full = student(right=[[1, 0]] * N), student("before", right=[[1, 1]] * N)
    for name, met, missed in (("min", 50, 50.1), ("max_drop", 50, 49.9), ("min_gain", -50, -49.9)):
        for threshold, state in ((met, "pass"), (missed, "fail")):
            assert judge({"accuracy": {name: threshold}, "decide_by": "value"}, half, full).state == state


def test_by_value_nothing_is_undecided():
    split, flipped = student(right=SPLIT), student("before", right=FLIPPED)
    for threshold, state in ((80, "pass"), (100, "pass"), (100.1, "fail")):
        assert judge({"accuracy": {"min": threshold}, "decide_by": "value"}, student()).state == state
    for threshold, state in ((0, "pass"), (-1, "fail")):
        assert judge({"accuracy": {"max_drop": threshold}, "decide_by": "value"}, split, flipped).state == state
    assert judge({"accuracy": {"min": 80}, "decide_by": "interval"}, student()).state == "undecided"


@pytest.mark.parametrize(
    ("states", "undecided", "passed"),
    [
        ([], None, True),
        (["pass"], None, True),
        (["pass", "undecided"], None, False),
        (["pass", "undecided"], "fail", False),
        (["pass", "undecided"], "pass", True),
        (["undecided", "fail"], "pass", False),
        (["pass", "fail"], None, False),
    ],
)
def test_what_passes(states, undecided, passed):
    config = {} if undecided is None else {"undecided": undecided}
    assert is_passed(config, [Verdict("a.b", None, state, "") for state in states]) is passed


def test_problems_are_paired_by_id_whatever_their_order():
    forward, backward = quiz(count=N), quiz(count=N, reverse=True)
    own, before = student(right=SPLIT[::-1], on=backward), student("before", right=SPLIT, on=forward)
    assert own.evaluations["quiz"].ids == before.evaluations["quiz"].ids[::-1]
    assert judge({"accuracy": {"max_drop": 0}}, own, before).state == "pass"


def test_other_problems_are_refused():
    own, before = student("after", on=quiz(count=N)), student("before", right=ALL[1:], on=quiz(count=N - 1))
    with pytest.raises(ValueError, match=r"before and after answered different problems \(1 are in one"):
        run_gates({"accuracy": {"max_drop": 0}}, own, before)


def two_benchmarks(label, *names):
    return Candidate(label, {name: answers(ALL, on=quiz(name, N)) for name in names}, HOURS)


def test_every_benchmark_in_common_is_judged_or_those_that_are_named():
    own, before = two_benchmarks("own", "a", "b", "c"), two_benchmarks("before", "c", "b", "d")

    def judged(config, baseline=before):
        return [(verdict.gate, verdict.benchmark) for verdict in run_gates(config, own, baseline)]

    assert judged({"accuracy": {"max_drop": 1}}) == [("accuracy.max_drop", "b"), ("accuracy.max_drop", "c")]
    assert judged({"accuracy": {"min": 1}}) == [("accuracy.min", name) for name in "abc"]  # no baseline in it
    both = {"accuracy": {"min": 1, "max_drop": 1}, "benchmarks": ["c"]}
    assert judged(both) == [("accuracy.min", "c"), ("accuracy.max_drop", "c")]


def test_what_a_threshold_needs_and_is_not_there():
    own, before = two_benchmarks("own", "a", "b"), two_benchmarks("before", "b")
    drop = {"accuracy": {"max_drop": 1}}
    with pytest.raises(ValueError, match=r"accuracy\.max_drop compares with a baseline.*--against"):
        run_gates(drop, own, None)
    with pytest.raises(ValueError, match="before was not evaluated on a: oprd eval before --on a"):
        run_gates(drop | {"benchmarks": ["a"]}, own, before)
    with pytest.raises(ValueError, match="own was not evaluated on c"):
        run_gates({"accuracy": {"min": 1}, "benchmarks": ["c"]}, own, None)
    with pytest.raises(ValueError, match="own and its baseline share no evaluation"):
        run_gates(drop, own, two_benchmarks("before", "c"))


@pytest.mark.parametrize("name", GATES["cost"])
def test_a_cost_that_nobody_counted(name):
    config = {"cost": {name: 1}}
    with pytest.raises(ValueError, match=rf"cost\.{name} needs a cost, and folder is not a finished run"):
        run_gates(config, student("folder", cost={}), student("before"))
    if name == "max_increase_percent":
        with pytest.raises(ValueError, match="and before is not a finished run"):
            run_gates(config, student(), student("before", cost={}))
        with pytest.raises(ValueError, match=r"max_increase_percent compares with a baseline"):
            run_gates(config, student(), None)
    else:
        assert judge(config, student(), student("before", cost={})).state == "fail"  # the baseline's is not asked for


def test_no_percentage_of_nothing():
    with pytest.raises(ValueError, match="before has a mean_length of 0 on quiz"):
        run_gates({"length": {"max_increase_percent": 5}}, student(), student("before", tokens=0))
    with pytest.raises(ValueError, match="before cost 0 device hours"):
        run_gates({"cost": {"max_increase_percent": 5}}, student(), student("before", cost={"device_hours": 0.0}))


SCORES = [(g, n, m) for g, names in GATES.items() if g != "cost" for n, (m, _, _) in names.items()]
ROWS = st.lists(
    st.tuples(*(st.booleans() for _ in range(4)), st.integers(1, 50), st.sampled_from([VARIED, STUCK])),
    min_size=2,
    max_size=9,
)


def drawn(label, rows):
    right, cut_off, no_box, _, tokens, text = zip(*rows, strict=True)
    return student(label, right=list(right), cut_off=list(cut_off), no_box=list(no_box), tokens=tokens, text=text)


@settings(max_examples=20, deadline=None)
@given(rows=ROWS, threshold=st.floats(0, 100), decide_by=st.sampled_from(["interval", "value"]))
def test_a_student_is_no_worse_than_itself(rows, threshold, decide_by):
    config = {group: {name: threshold} for group, name, _ in SCORES if name == "max_drop"} | {"decide_by": decide_by}
    assert len(config) == 3
    assert all(verdict.state == "pass" for verdict in run_gates(config, drawn("a", rows), drawn("b", rows)))


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, gate=st.sampled_from(SCORES), thresholds=st.lists(st.floats(-100, 100), min_size=2, max_size=5),
       decide_by=st.sampled_from(["interval", "value"]), order=st.randoms())  # fmt: skip
def test_a_looser_threshold_never_fails_what_a_tighter_one_passed(rows, gate, thresholds, decide_by, order):
    group, name, _ = gate
    other = list(rows)
    order.shuffle(other)
    own, before = drawn("own", rows), drawn("before", other)
    tight_to_loose = sorted(thresholds, reverse=name.startswith("min"))
    rank = {"fail": 0, "undecided": 1, "pass": 2}
    states = [
        rank[judge({group: {name: threshold}, "decide_by": decide_by}, own, before).state]
        for threshold in tight_to_loose
    ]
    assert states == sorted(states)


def written(tmp_path, content):
    path = tmp_path / "gates.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_good_file(tmp_path):
    text = (
        "accuracy: {min: 40, max_drop: 2.5}\ncost:\n  max_wall_hours: 3\nbenchmarks: [a, b]\n"
        "decide_by: value\nundecided: pass\n"
    )
    assert read_gates(written(tmp_path, text)) == {
        "accuracy": {"min": 40, "max_drop": 2.5},
        "cost": {"max_wall_hours": 3},
        "benchmarks": ["a", "b"],
        "decide_by": "value",
        "undecided": "pass",
    }
    every = "".join(f"{group}: {{{', '.join(f'{name}: 1' for name in GATES[group])}}}\n" for group in GATES)
    assert read_gates(written(tmp_path, every)).keys() == GATES.keys()


NUMBER = "accuracy.min must be a finite number, got"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("accuracy: {min: 40", "is not valid YAML"),
        ("accuracy:\n\tmin: 40", "is not valid YAML"),
        (b"accuracy: {min: 40} # \xff", "is not UTF-8 text"),
        ("", "must be a mapping"),
        ("# nothing but words", "must be a mapping"),
        ("- accuracy", "must be a mapping"),
        ("{}", "holds no threshold"),
        ("accuracy: {}", "holds no threshold"),
        ("decide_by: value\nbenchmarks: [a]", "holds no threshold"),
        ("acuracy: {min: 40}", "unknown key 'acuracy'; did you mean accuracy?"),
        ("cutoff: {max: 5}", "unknown key 'cutoff'; did you mean cut_off?"),
        ("benchmark: [a]\naccuracy: {min: 1}", "unknown key 'benchmark'; did you mean benchmarks?"),
        ("1: 2", "unknown key 1."),
        ("accuracy: {max_dropp: 1}", "accuracy: unknown key 'max_dropp'; did you mean max_drop?"),
        ("length: {min_distinct_4: 1}", "length: unknown key 'min_distinct_4'."),
        ("accuracy: 40", "accuracy must be a mapping of min, min_gain, max_drop."),
        ("accuracy:", "accuracy must be a mapping"),
        ("accuracy: [min]", "accuracy must be a mapping"),
        ("accuracy: {min: '40'}", f"{NUMBER} '40'"),
        ("accuracy: {min: 40 %}", f"{NUMBER} '40 %'"),
        ("accuracy: {min: true}", f"{NUMBER} True"),
        ("accuracy: {min: }", f"{NUMBER} None"),
        ("accuracy: {min: [40]}", f"{NUMBER} [40]"),
        ("accuracy: {min: .nan}", f"{NUMBER} nan"),
        ("accuracy: {min: .inf}", f"{NUMBER} inf"),
        ("accuracy: {min: -.inf}", f"{NUMBER} -inf"),
        ("accuracy: {min: 1}\ndecide_by: mean", "decide_by must be interval or value, got 'mean'."),
        ("accuracy: {min: 1}\ndecide_by:", "decide_by must be interval or value, got None."),
        ("accuracy: {min: 1}\nundecided: maybe", "undecided must be fail or pass, got 'maybe'."),
        ("accuracy: {min: 1}\nbenchmarks: aime24", "benchmarks must be a list of names."),
        ("accuracy: {min: 1}\nbenchmarks: [24]", "benchmarks must be a list of names."),
    ],
)
def test_a_bad_file_says_what_is_wrong_with_it(tmp_path, content, told):
    path = written(tmp_path, content)
    with pytest.raises(ValueError) as error:
        read_gates(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_and_a_folder(tmp_path):
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ValueError, match=f"There is no {path}.*for example"):
            read_gates(path)


def test_a_verdict_for_each_threshold_in_the_order_of_the_file():
    config = {"length": {"max": 10}, "accuracy": {"max_drop": 0, "min": 60}, "cost": {"max_wall_hours": 3}}
    verdicts = run_gates(config, student(), student("before"))
    assert [v.gate for v in verdicts] == ["length.max", "accuracy.max_drop", "accuracy.min", "cost.max_wall_hours"]
    assert {v.state for v in verdicts} == {"pass"}


def test_samples_of_a_problem_count_together():
    """One of two right in every problem: Wilson's interval of 8 trials at 1/2, not of 16."""
    own, z = student(right=[[1, 0]] * N), 1.959964
    reach = 50 * z / math.sqrt(N + z * z)
    for limit, state in ((50 - reach, "pass"), (50 + reach, "fail")):
        for offset in (-0.01, 0.01):
            inside = (offset > 0) == (state == "pass")
            assert judge({"accuracy": {"min": limit + offset}}, own).state == ("undecided" if inside else state)
