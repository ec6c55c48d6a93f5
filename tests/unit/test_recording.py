import json
import random
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.evaluation import evaluate as module
from oprd.evaluation.benchmarks import Benchmark, Problem, problem_id
from oprd.evaluation.evaluate import (
    batch_seed,
    batches_of,
    draw,
    encode_prompts,
    evaluate,
    read_evaluation,
    record,
    room_for,
    write_evaluation,
)
from oprd.evaluation.grading import Verdict
from oprd.evaluation.sampling import Answer, Sampling, TransformersEngine
from oprd.evaluation.summary import Evaluation, Graded
from tiny import tiny_model, tiny_tokenizer

IDENTITY = {"model": "some/model", "revision": None, "model_hash": "abc"}
FILES = ("problems.json", "responses.jsonl", "settings.json", "summary.json")


def problem(prompt, answer):
    return Problem(problem_id(prompt, answer), prompt, answer)


def benchmark_of(*problems):
    return Benchmark("some", "some.jsonl", problems, "text")


BENCHMARK = benchmark_of(problem("abcd", "1"), problem("a", "2"), problem("abc", "3"))
SAMPLING = Sampling(samples=2, max_new_tokens=4, batch_size=2, seed=5)


class Pen:
    """An engine that writes what its seed says, and stops where it is told to."""

    name, context, tokenizer = "pen", 128, tiny_tokenizer()

    def __init__(self, stop_at=None, meanwhile=lambda: None):
        self.stop_at, self.meanwhile, self.calls = stop_at, meanwhile, []

    def generate(self, prompts, sampling, seed):
        if self.stop_at == len(self.calls):
            raise RuntimeError("killed")
        self.calls.append((prompts, seed))
        self.meanwhile()
        generator = random.Random(f"{seed} {prompts}")
        texts = [f"é\n\u2028\\boxed{{{generator.randint(1, 3)}}}" for _ in prompts]
        return [Answer(text, generator.randint(1, 4), generator.random() < 0.5) for text in texts]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module.os, "fsync", lambda handle: None)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def write(folder, engine=None, *, benchmark=BENCHMARK, sampling=SAMPLING, identity=IDENTITY, **settings):
    return record(engine or Pen(), benchmark, sampling, folder, identity=identity, **settings)


# Batches


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 4), st.integers(1, 9))
def test_batches_hold_every_answer_once_in_order_of_length(lengths, samples, batch_size):
    prompts = [[2] * length for length in lengths]
    batches = batches_of(prompts, Sampling(samples=samples, batch_size=batch_size))
    jobs = [job for batch in batches for job in batch]
    assert sorted(jobs) == [(place, sample) for place in range(len(lengths)) for sample in range(samples)]
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= batch_size
    widths = [lengths[place] for place, _ in jobs]
    assert widths == sorted(widths)


def test_seeds_of_batches_are_their_own():
    seeds = [batch_seed(seed, batch) for seed in range(10) for batch in range(100)]
    assert len(set(seeds)) == 1000
    assert seeds == [batch_seed(seed, batch) for seed in range(10) for batch in range(100)]
    assert all(0 <= seed < 2**32 for seed in seeds)


# Prompts and the context


@pytest.mark.parametrize(
    ("lengths", "context", "wanted", "most", "room"),
    [
        ([3, 5], 10, None, 99, 5),
        ([3, 5], 10, None, 4, 4),
        ([3, 5], 10, 5, 99, 5),
        ([3, 5], 10, 5, 2, 5),
        ([3, 5], None, None, 99, 99),
        ([3, 5], None, 7, 99, 7),
        ([3, 5], None, 700, 99, 700),
        ([9], 10, None, 99, 1),
    ],
)
def test_room(lengths, context, wanted, most, room):
    assert room_for([[2] * length for length in lengths], context, wanted, most) == room


@pytest.mark.parametrize(
    ("lengths", "wanted", "message"),
    [
        (
            [3, 5, 4],
            6,
            r"Problem 2: a prompt of 5 tokens leaves 5 of the context of 10 .*, not 6\. Lower max_new_tokens",
        ),
        ([3, 5, 10], None, r"Problem 3: a prompt of 10 tokens leaves 0 of the context of 10 for an answer\.$"),
        ([12, 5, 10], 1, r"Problem 1: a prompt of 12 tokens leaves 0 .*, not 1\."),
    ],
)
def test_no_room_names_the_longest_problem(lengths, wanted, message):
    with pytest.raises(ValueError, match=message):
        room_for([[2] * length for length in lengths], 10, wanted, 99)


def test_prompts_go_through_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ tail or 'zz' }}{% if add_generation_prompt %}q{% endif %}"  # fmt: skip
    chat = problem([{"role": "user", "content": "ab"}], "1")
    assert encode_prompts(tokenizer, [problem("ab", "1"), chat]) == [[2, 3], [2, 3, 27, 27, 18]]
    assert encode_prompts(tokenizer, [chat], {"tail": "c"}) == [[2, 3, 4, 18]]


def test_a_prompt_without_tokens_is_named():
    empty = problem("", "1")
    with pytest.raises(ValueError, match=rf"Problem 2 \({empty.id}\) has no tokens"):
        encode_prompts(tiny_tokenizer(), [problem("ab", "1"), empty])


# What is written


def test_files_say_everything(tmp_path):
    engine = Pen()
    made = write(tmp_path / "new" / "folder", engine, template={"x": 1})
    folder = tmp_path / "new" / "folder"
    settings = {
        **IDENTITY,
        "benchmark": {"name": "some", "source": "some.jsonl", "hash": BENCHMARK.hash},
        "prompt_format": "text",
        "chat_template_kwargs": {"x": 1},
        "engine": "pen",
        "sampling": vars(SAMPLING),
    }
    assert json.loads((folder / "settings.json").read_text()) == settings
    assert json.loads((folder / "problems.json").read_text()) == [vars(one) for one in BENCHMARK.problems]
    assert json.loads((folder / "summary.json").read_text()) == made
    assert made["settings"] == settings
    assert (made["problems"], made["samples"]) == (3, 2)
    jobs = [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]  # short prompts first
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert [(row["index"], row["sample"], row["batch"]) for row in rows] == [
        (*job, at // 2) for at, job in enumerate(jobs)
    ]
    prompts = {0: [2, 3, 4, 5], 1: [2], 2: [2, 3, 4]}
    assert engine.calls == [([prompts[place]] * 2, batch_seed(5, number)) for number, place in enumerate((1, 2, 0))]
    written = [answer for calls in engine.calls for answer in Pen().generate(calls[0], SAMPLING, calls[1])]
    for (place, _), row, answer in zip(jobs, rows, written, strict=True):
        box = answer.text[-2]
        assert (row["problem"], row["answer"]) == (BENCHMARK.problems[place].id, str(place + 1))
        assert (row["response"], row["tokens"], row["cut_off"]) == (answer.text, answer.tokens, answer.cut_off)
        assert (row["boxed"], row["verdict"]) == (box, "right" if box == str(place + 1) else "wrong")
    assert {row["verdict"] for row in rows} == {"right", "wrong"}


def test_the_summary_comes_last(tmp_path):
    seen = []
    write(tmp_path, Pen(meanwhile=lambda: seen.append((tmp_path / "summary.json").exists())))
    assert seen == [False] * 3
    assert (tmp_path / "summary.json").exists()


def test_a_batch_is_on_disk_before_the_next_is_drawn(tmp_path):
    path, seen = tmp_path / "responses.jsonl", []
    write(tmp_path, Pen(meanwhile=lambda: seen.append(len(path.read_bytes().splitlines()) if path.exists() else 0)))
    assert seen == [0, 2, 4]


def test_every_answer_is_graded_once(tmp_path, monkeypatch):
    calls = []

    def judge(response, answer):
        calls.append((response, answer))
        return Verdict.WRONG

    monkeypatch.setattr(module, "judge", judge)
    with pytest.raises(RuntimeError, match="killed"):
        write(tmp_path, Pen(stop_at=2))
    assert len(calls) == 4
    write(tmp_path)
    assert len(calls) == 6
    write(tmp_path)
    assert len(calls) == 6
    rows = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text("utf-8").split("\n")[:-1]]
    assert calls == [(row["response"], row["answer"]) for row in rows]


# Continuing


@pytest.fixture
def whole(tmp_path):
    write(tmp_path / "whole")
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("stop_at", range(4))
def test_an_error_costs_the_batch_that_it_struck(tmp_path, whole, stop_at):
    folder = tmp_path / "broken"
    if stop_at < 3:
        with pytest.raises(RuntimeError, match="killed"):
            write(folder, Pen(stop_at))
        assert len((folder / "responses.jsonl").read_bytes().splitlines()) == 2 * stop_at
        assert not (folder / "summary.json").exists()
    else:
        write(folder)
    engine = Pen()
    write(folder, engine)
    assert [seed for _, seed in engine.calls] == [batch_seed(5, number) for number in range(stop_at, 3)]
    assert contents(folder) == whole


def test_killed_again_and_again(tmp_path, whole):
    for stop_at in (1, 0, 1, 0):
        with pytest.raises(RuntimeError):
            write(tmp_path / "broken", Pen(stop_at))
        assert not (tmp_path / "broken" / "summary.json").exists()
    engine = Pen()
    write(tmp_path / "broken", engine)
    assert len(engine.calls) == 1
    assert contents(tmp_path / "broken") == whole


def test_cut_at_every_byte(tmp_path, whole, monkeypatch):
    content = whole["responses.jsonl"]
    ends = [end for end in range(len(content) + 1) if content[:end].endswith(b"\n")]
    monkeypatch.setattr(
        module, "judge", lambda response, answer: Verdict.WRONG if response[-2] != answer else Verdict.RIGHT
    )
    monkeypatch.setattr(Evaluation, "summary", lambda self: {"right": self.correct})
    monkeypatch.setattr(module, "write_json", lambda path, value: path.write_text(json.dumps(value)))
    write(tmp_path)
    summary = (tmp_path / "summary.json").read_bytes()
    assert len(content) > 800
    for cut in range(len(content) + 1):
        (tmp_path / "responses.jsonl").write_bytes(content[:cut])
        engine = Pen()
        write(tmp_path, engine)
        assert len(engine.calls) == 3 - sum(end <= cut for end in ends[1::2])
        assert (tmp_path / "responses.jsonl").read_bytes() == content
        assert (tmp_path / "summary.json").read_bytes() == summary


@pytest.mark.parametrize("lines", range(7))
def test_a_batch_that_is_not_whole_is_drawn_again(tmp_path, whole, lines):
    write(tmp_path)
    (tmp_path / "responses.jsonl").write_bytes(b"".join(whole["responses.jsonl"].splitlines(keepends=True)[:lines]))
    engine = Pen()
    write(tmp_path, engine)
    assert len(engine.calls) == 3 - lines // 2
    assert contents(tmp_path) == whole


def test_what_follows_the_last_batch_is_cut_off(tmp_path, whole):
    write(tmp_path)
    with (tmp_path / "responses.jsonl").open("ab") as file:
        file.write(whole["responses.jsonl"].splitlines(keepends=True)[0] + b'{"half')
    engine = Pen()
    write(tmp_path, engine)
    assert not engine.calls
    assert contents(tmp_path) == whole


def test_no_summary_stands_beside_answers_that_are_drawn_again(tmp_path, whole):
    write(tmp_path)
    (tmp_path / "responses.jsonl").write_bytes(whole["responses.jsonl"][:-1])
    with pytest.raises(RuntimeError):
        write(tmp_path, Pen(0))
    with pytest.raises(ValueError, match="no finished evaluation"):
        read_evaluation(tmp_path)


def test_a_broken_line_before_others_is_not_passed_over(tmp_path, whole):
    write(tmp_path)
    lines = whole["responses.jsonl"].split(b"\n")
    (tmp_path / "responses.jsonl").write_bytes(b"\n".join([*lines[:2], b"{", *lines[3:]]))
    with pytest.raises(ValueError, match=r"responses\.jsonl, line 3: not valid JSON"):
        write(tmp_path)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"identity": IDENTITY | {"model_hash": "abd"}}, "model_hash: abc there, abd now"),
        ({"identity": IDENTITY | {"revision": "main"}}, "revision: None there, main now"),
        (
            {"benchmark": benchmark_of(*BENCHMARK.problems[:2])},
            r"benchmark\.hash: [0-9a-f]{12}\.\.\. there, [0-9a-f]{12}\.\.\. now",
        ),
        (
            {"benchmark": Benchmark("some", "some.jsonl", BENCHMARK.problems, "chat")},
            "prompt_format: text there, chat now",
        ),
        (
            {"sampling": Sampling(samples=2, max_new_tokens=4, batch_size=2, seed=6)},
            r"sampling\.seed: 5 there, 6 now",
        ),
        (
            {"sampling": Sampling(samples=2, max_new_tokens=4, batch_size=3, seed=5)},
            r"sampling\.batch_size: 2 there, 3 now",
        ),
        ({"template": {"enable_thinking": False}}, r"chat_template_kwargs\.enable_thinking: None there, False now"),
    ],
)
def test_other_settings_are_named_and_change_nothing(tmp_path, whole, other, told):
    write(tmp_path)
    engine = Pen()
    with pytest.raises(ValueError, match=rf"holds an evaluation with other settings \({told}\)\. Choose another --out"):
        write(tmp_path, engine, **other)
    assert not engine.calls
    assert contents(tmp_path) == whole


def test_another_engine_is_other_settings(tmp_path):
    write(tmp_path)
    engine = Pen()
    engine.name = "vllm"
    with pytest.raises(ValueError, match="engine: pen there, vllm now"):
        write(tmp_path, engine)


def test_settings_that_cannot_be_carried_out_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="Lower max_new_tokens"):
        write(tmp_path, sampling=Sampling(samples=2, max_new_tokens=126))
    assert write(tmp_path)["samples"] == 2


def test_the_second_writer_is_refused(tmp_path, whole):
    second = Pen()

    def intrude():
        with pytest.raises(ValueError, match=r"Another process is evaluating into .* choose another --out"):
            write(tmp_path, second)

    write(tmp_path, Pen(meanwhile=intrude))
    assert not second.calls
    assert contents(tmp_path) == whole
    write(tmp_path, second)  # the lock is gone


# In memory

TINY = [{"prompt": "ab", "answer": "1"}, {"prompt": "abcdef", "answer": "2"}, {"prompt": "c", "answer": "3"}]


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_parts_make_the_whole(parts):
    model, tokenizer, problems = tiny_model(), tiny_tokenizer(), [problem(**one) for one in TINY]
    settings = {"samples": 3, "batch_size": 2, "max_new_tokens": 4, "temperature": 1.0, "seed": 3}
    expected = evaluate(model, tokenizer, TINY, **settings)
    engine = TransformersEngine(model, tokenizer)
    pieces = [draw(engine, problems, Sampling(**settings), part=(at, parts)) for at in range(parts)]
    rows = [answer for piece in reversed(pieces) for answer in piece]
    assert len(rows) == 9
    assert Evaluation.of(rows) == expected
    assert len({answer.response for answer in rows}) > 5


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_generate_equally_often(parts):
    engines = [Pen() for _ in range(parts)]
    pieces = [draw(one, BENCHMARK.problems, SAMPLING, part=(at, parts)) for at, one in enumerate(engines)]
    assert {len(one.calls) for one in engines} == {-(-3 // parts)}
    assert sorted(answer.batch for piece in pieces for answer in piece) == [0, 0, 1, 1, 2, 2]


def test_problems_may_be_of_either_kind():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    made = evaluate(model, tokenizer, TINY, samples=1, max_new_tokens=2)
    assert made == evaluate(model, tokenizer, [problem(**one) for one in TINY], samples=1, max_new_tokens=2)
    assert made.ids == [problem_id(one["prompt"], one["answer"]) for one in TINY]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from(list(Verdict))), min_size=1, max_size=4), st.booleans())
def test_written_and_read_back(tmp_path_factory, rows, cut_off):
    problems = [problem(f"p{at}", answer) for at, (_, answer, _) in enumerate(rows)]
    answers = [
        Graded(one.id, at, 0, 0, one.answer, None, str(verdict), 2, cut_off, response)
        for at, (one, (response, _, verdict)) in enumerate(zip(problems, rows, strict=True))
    ]
    folder, chosen = tmp_path_factory.mktemp("made"), Sampling(samples=1)
    made = write_evaluation(folder, benchmark_of(*problems), chosen, Evaluation.of(answers), IDENTITY)
    assert read_evaluation(folder) == (Evaluation.of(answers), made)


def test_a_recorded_evaluation_is_read_back(tmp_path):
    made = write(tmp_path)
    evaluation, summary = read_evaluation(tmp_path)
    assert summary == made
    assert evaluation.ids == [one.id for one in BENCHMARK.problems]
    assert evaluation.summary() | {"settings": made["settings"]} == made


def test_an_evaluation_made_in_memory_replaces_and_continues(tmp_path):
    pen = Pen()
    pen.name = "transformers"
    write(tmp_path / "recorded", pen)
    evaluation, _ = read_evaluation(tmp_path / "recorded")
    folder = tmp_path / "made"
    write(folder)
    summary = write_evaluation(folder, BENCHMARK, SAMPLING, evaluation, IDENTITY)
    assert summary == json.loads((tmp_path / "recorded" / "summary.json").read_text())
    assert read_evaluation(folder) == (evaluation, summary)
    assert write(folder, pen) == summary
    assert contents(folder) == contents(tmp_path / "recorded")


def test_the_summary_is_the_last_to_be_replaced(tmp_path, monkeypatch):
    write(tmp_path)
    evaluation, _ = read_evaluation(tmp_path)
    for stop in range(3):
        with monkeypatch.context() as patch:
            step = count()

            def fail(path, value, step=step, stop=stop):
                if next(step) == stop:
                    raise OSError("disk full")
                path.write_text(value if isinstance(value, str) else json.dumps(value))

            patch.setattr(module, "write_json", fail)
            patch.setattr(module, "write_text", fail)
            with pytest.raises(OSError, match="disk full"):
                write_evaluation(tmp_path, BENCHMARK, SAMPLING, evaluation, IDENTITY)
        assert not (tmp_path / "summary.json").exists()


def test_a_folder_without_an_evaluation_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"holds no finished evaluation \(summary\.json is missing\)"):
        read_evaluation(tmp_path)
    write(tmp_path)
    (tmp_path / "responses.jsonl").write_text('{"problem": 1}\n')
    with pytest.raises(ValueError, match="not a line of an evaluation"):
        read_evaluation(tmp_path)
