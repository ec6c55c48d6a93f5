"""eval, compare, report, gate, plan and registry on folders that are missing, foreign or damaged."""

import json

import pytest

from badinput.harness import Case, cases, check_refused

SUMMARY = "runs/one/evaluations/final/quiz/summary.json"
RESPONSES = "runs/one/evaluations/final/quiz/responses.jsonl"
MANIFEST = "runs/one/manifest.json"


def text(name, content):
    return lambda place: place.write(name, content)


def edit(name, **changes):
    return lambda place: place.edit_json(name, **changes)


def last_line(name, content):
    """A file with another line before its last one."""

    def arrange(place):
        lines = (place / name).read_text().splitlines()
        place.write(name, "\n".join([*lines[:-1], content, lines[-1]]) + "\n")

    return arrange


def answers(**changes):
    """The first line of responses.jsonl changed; None removes a key."""

    def arrange(place):
        first, *rest = (place / RESPONSES).read_text().splitlines()
        row = {key: value for key, value in (json.loads(first) | changes).items() if value is not None}
        place.write(RESPONSES, "\n".join([json.dumps(row), *rest]) + "\n")

    return arrange


def typed(name, command, culprit, remedy, arrange=None):
    return Case(name, culprit, remedy, arrange, command=tuple(command.split()))


EVAL = "eval student --on problems.jsonl --out results"


def other_settings(place):
    place.write("results/problems/settings.json", json.dumps({"sampling": {"samples": 3}}))


@cases(
    typed("no samples", f"{EVAL} --samples 0", "samples must be at least 1", "got 0"),
    typed("a temperature below 0", f"{EVAL} --temperature -1", "temperature must be a number that is not negative", r"got -1"),
    typed("a temperature of NaN", f"{EVAL} --temperature nan", "temperature must be a number that is not negative", "got nan"),
    typed("top_p over 1", f"{EVAL} --top_p 2", "top_p must lie in", r"\(0, 1\], got 2"),
    typed("greedy sixteen times", f"{EVAL} --temperature 0", "temperature: 0 is greedy", "Set samples: 1"),
    typed("no problems", f"{EVAL} --limit 0", "limit must be at least 1", "got 0"),
    typed("an empty batch", f"{EVAL} --batch_size -2", "batch_size must be at least 1", "got -2"),
    typed("more than the context", f"{EVAL} --max_new_tokens 500", r"problems\.jsonl: Problem \d: .* context of 128", "Lower max_new_tokens"),
    typed("template arguments that are no JSON", f"{EVAL} --chat_template_kwargs {{{{'a'", "--chat_template_kwargs is not JSON", "Expecting property name"),
    typed("template arguments that are a list", f"{EVAL} --chat_template_kwargs [1]", "--chat_template_kwargs must be a JSON object", r"got \[1\]"),
    typed("a device that is not there", f"{EVAL} --device cuda:7", "--device cuda:7 is not there", "Name one of this machine"),
    typed("a device that is not", f"{EVAL} --device abacus", "--device abacus is not there", "such as cpu"),
    typed("a dtype that is not", f"{EVAL} --dtype float7", "float7", "float32"),
    typed("vLLM that is not installed", f"{EVAL} --engine vllm", "vLLM is not installed", "use engine: transformers"),
    typed("options of vLLM alone", f"{EVAL} --max_model_len 64", "max_model_len would be ignored", "options of engine: vllm"),
    typed("a benchmark that is not", "eval student --on aime99 --out results", "no benchmark 'aime99'", "give aime24"),
    typed("a benchmark that is not there", "eval student --on gone.jsonl --out results", "There is no file gone.jsonl", "Give a parquet"),
    typed("a benchmark without answers", EVAL, r"problems\.jsonl, line 2: no answer", "set answer_column",
        lambda p: p.rows({"prompt": "a", "answer": "1"}, {"prompt": "b"}, name="problems.jsonl")),
    typed("a benchmark that is a zip", "eval student --on problems.zip --out results", "'?problems.zip'?", "unpack it", text("problems.zip", "PK")),
    typed("a benchmark with a way out", "eval student --on nobody/.. --out results", r"would be called '\.\.'", "Rename"),
    typed("a benchmark with steps", "eval student --on ../../etc/passwd --out results", r"\.\./\.\./etc/passwd", "file"),
    typed("two benchmarks of one name", "eval student --on problems.jsonl sub/problems.jsonl --out results", "Two benchmarks are called problems", "Rename one",
        lambda p: p.write("sub/problems.jsonl", (p / "problems.jsonl").read_bytes())),
    typed("a split of a file", f"{EVAL} --split test", "split=test would be ignored", r"problems\.jsonl is a file"),
    typed("roles of a model", f"{EVAL} --of teacher", "student is not a run of oprd train", "--of teacher says nothing"),
    typed("a best that was not kept", "eval runs/one --on problems.jsonl --of best", "runs/one holds no best student", "Set validation_benchmark"),
    typed("a revision of a run", "eval runs/one --on problems.jsonl --revision main", "revision would be ignored", "the model is a run"),
    typed("a folder of nothing", "eval runs --on problems.jsonl", "runs is neither a model", r"no config\.json"),
    typed("results that are a file", "eval student --on problems.jsonl --out gates.yaml", r"gates\.yaml", "Choose another --out"),
    typed("results of other settings", f"{EVAL} --samples 1 --temperature 0 --max_new_tokens 4", "results/problems holds an evaluation with other settings", "Choose another --out",
        other_settings),
    typed("a run whose manifest is damaged", "eval runs/one --on problems.jsonl", r"manifest\.json, line 1: not valid JSON", "Restore", text(MANIFEST, "{'")),
)  # fmt: skip
def test_eval(case, place, capfd):
    check_refused(case, place, capfd)


@cases(
    typed("compare nothing", "compare ./gone", "gone is neither a run", r"no summary\.json"),
    typed("compare a folder of other things", "compare student", "student is neither a run", "nor an evaluation"),
    typed("compare a file", "compare gates.yaml", r"gates\.yaml is neither a run", "nor an evaluation"),
    typed("compare an unknown metric", "compare runs/one runs/two --metric charm", "charm", "avg_at_k"),
    typed("compare on an unknown benchmark", "compare runs/one runs/two --on aime24", "was not evaluated on aime24", "it has quiz"),
    typed("compare a summary that is no JSON", "compare runs/one", r"quiz/summary\.json, line 1: not valid JSON", "Restore", text(SUMMARY, "{'")),
    typed("compare a summary of nothing", "compare runs/one", r"quiz/summary\.json is no summary", "evaluate again", text(SUMMARY, "{}")),
    typed("compare a summary that is a list", "compare runs/one", r"quiz/summary\.json is no summary", "evaluate again", text(SUMMARY, "[]")),
    typed("compare settings that are a word", "compare runs/one", r"quiz/summary\.json is no summary", "evaluate again", edit(SUMMARY, settings="words")),
    typed("compare an answer that is no JSON", "compare runs/one", r"responses\.jsonl, line \d+: not valid JSON", "Remove that folder, then run oprd eval", last_line(RESPONSES, "{'")),
    typed("compare an answer without a verdict", "compare runs/one", "quiz: not a line of an evaluation .*verdict", "Remove that folder", answers(verdict=None)),
    typed("compare an answer that says more", "compare runs/one", "quiz: not a line of an evaluation .*mood", "Remove that folder", answers(mood="good")),
    typed("compare no answers", "compare runs/one", "quiz: Every problem needs the same number of samples", "Remove that folder", text(RESPONSES, "")),
    typed("compare a manifest without a cost", "compare runs/one", r"runs/one/manifest\.json is damaged: its cost must be an object", "Restore the file", edit(MANIFEST, cost=None)),
    typed("compare a manifest with a bare cost", "compare runs/one", r"runs/one/manifest\.json is damaged: its cost", "Restore the file", edit(MANIFEST, cost={"seconds": 3})),
    typed("report nothing", "report ./gone", "gone is not a run of oprd train", r"no manifest\.json"),
    typed("report a model", "report student", "student is not a run of oprd train", r"no manifest\.json"),
    typed("report a manifest that is no JSON", "report runs/one", r"manifest\.json, line 1: not valid JSON", "Restore", text(MANIFEST, "{'")),
    typed("report a manifest that is a list", "report runs/one", r"manifest\.json has another schema", "another version of oprd", text(MANIFEST, "[]")),
    typed("report a manifest of another schema", "report runs/one", r"manifest\.json has another schema", "another version of oprd", edit(MANIFEST, schema=99)),
    typed("report a manifest without sessions", "report runs/one", r"manifest\.json is damaged: its sessions", "Restore the file", edit(MANIFEST, sessions=[])),
    typed("report a manifest without a recipe", "report runs/one", r"manifest\.json is damaged: its config", "Restore the file", edit(MANIFEST, config=None)),
    typed("report a manifest whose student is a word", "report runs/one", r"manifest\.json is damaged: its student", "Restore the file", edit(MANIFEST, student="me")),
    typed("report a manifest whose student has no name", "report runs/one", r"manifest\.json is damaged: its student has no name", "Restore the file", edit(MANIFEST, student={"x": 1})),
    typed("report a log with a bad line", "report runs/one", r"metrics\.jsonl, line 4: not valid JSON", "Remove", last_line("runs/one/metrics.jsonl", "{'")),
    typed("report a log with a word", "report runs/one", r"metrics\.jsonl, line 4: .*object", "Remove", last_line("runs/one/metrics.jsonl", '"words"')),
    typed("report to where a file is", "report runs/one --out gates.yaml/page.html", r"gates\.yaml", "Choose another --out"),
    typed("repeat nothing", "train --from ./gone", "gone is not a run of oprd train", r"no manifest\.json"),
    typed("repeat a run whose recipe is damaged", "train --from runs/one", "manifest|recipe", "learning_rate must be a number", edit(MANIFEST, config={"learning_rate": "fast", "output_dir": "x"})),
    typed("repeat a run without an output_dir", "train --from runs/one", r"runs/one's recipe", "--output_dir", edit(MANIFEST, config={"learning_rate": 1e-5})),
    typed("repeat and a recipe", "train --from runs/one --config recipe.yaml", "--from and --config each name a recipe", "Give one of them"),
    typed("repeat no run", "train --from", "--from needs a run", r"manifest\.json"),
)  # fmt: skip
def test_what_runs_left(case, place, capfd):
    check_refused(case, place, capfd)


GATE = "gate runs/two --against runs/one --config gates.yaml"


@cases(
    typed("no gates", "gate runs/two --config gone.yaml", "There is no gone.yaml", "A gates file says, for example"),
    typed("gates that are no YAML", GATE, "gates.yaml is not valid YAML", "line", text("gates.yaml", "a: [1,")),
    typed("gates that are a list", GATE, "gates.yaml must be a mapping", "such as accuracy", text("gates.yaml", "- a")),
    typed("gates that are empty", GATE, "gates.yaml must be a mapping", "such as accuracy", text("gates.yaml", "")),
    typed("gates that are not UTF-8", GATE, "gates.yaml is not (valid YAML|UTF-8)", "UTF-8|utf-8", text("gates.yaml", b"\xff\xfe\xfa: 1")),
    typed("an unknown gate", GATE, "gates.yaml: unknown key 'acuracy'", "did you mean accuracy", text("gates.yaml", "acuracy: {min: 1}")),
    typed("an unknown threshold", GATE, "gates.yaml, accuracy: unknown key 'minn'", "did you mean min", text("gates.yaml", "accuracy: {minn: 1}")),
    typed("a threshold of NaN", GATE, "gates.yaml: accuracy.min must be a finite number", "got nan", text("gates.yaml", "accuracy: {min: .nan}")),
    typed("a threshold that is a word", GATE, "gates.yaml: accuracy.min must be a finite number", "got 'high'", text("gates.yaml", "accuracy: {min: high}")),
    typed("a gate twice", GATE, "gates.yaml: 'accuracy' is there twice", "Remove one", text("gates.yaml", "accuracy: {min: 1}\naccuracy: {min: 2}\n")),
    typed("a gate without a baseline", "gate runs/two --config gates.yaml", "accuracy.max_drop compares with a baseline", "Name one with --against", text("gates.yaml", "accuracy: {max_drop: 1}")),
    typed("a gate for nothing", "gate ./gone --config gates.yaml", "gone is neither a run", r"no summary\.json"),
    typed("a baseline of nothing", "gate runs/two --against ./gone --config gates.yaml", "gone is neither a run", r"no summary\.json"),
    typed("a student that has changed", GATE, "runs/two/final has changed since it was evaluated on quiz", "oprd eval runs/two", text("runs/two/final/config.json", '{"a": 1}')),
    typed("plan no GPU", "plan --config miniature --gpus 0", "--gpus must be positive", "got 0"),
    typed("plan a GPU of NaN", "plan --config miniature --gpu_memory nan", "--gpu_memory must be positive", "got nan"),
    typed("plan a recipe that is no YAML", "plan --config recipe.yaml", r"recipe recipe\.yaml is not valid YAML", "line 2", text("recipe.yaml", "a: [1,\nb: }\n")),
    typed("plan an unknown key", "plan --config recipe.yaml", r"recipe\.yaml: unknown key 'learning_rat'", "did you mean learning_rate", text("recipe.yaml", "learning_rat: 1\n")),
    typed("plan a bridge of nothing", "plan --config recipe.yaml --bridge ./gone", "no bridge in gone", "oprd bridge fit"),
    typed("demo no steps", "demo --steps 0 --out out", "--steps must be at least 1", "got 0"),
)  # fmt: skip
def test_gates_and_plans(case, place, capfd):
    check_refused(case, place, capfd)


def registry(**changes):
    """A registry with one version, changed."""
    entry = {
        "version": 1,
        "state": "active",
        "promoted": "then",
        "source": "runs/one",
        "model_hash": "a" * 64,
        "files": {},
        "note": None,
    }
    content = {"schema": 1, "current": 1, "versions": [entry | changes.pop("entry", {})], "history": []} | changes
    return text("registry/registry.json", json.dumps(content))


@cases(
    typed("list nothing", "registry list registry", "registry holds no version yet", "oprd registry promote"),
    typed("verify nothing", "registry verify registry", "There is no registry registry", "Promote a run to start one"),
    typed("promote nothing", "registry promote registry ./gone", r"gone/final lacks config\.json", "Name the directory of a run"),
    typed("promote a model", "registry promote registry student", r"student/final lacks config\.json", "a run that has finished"),
    typed("promote without gates", "registry promote registry runs/one", "runs/one/final is not promoted: no gates ran", "oprd gate"),
    typed("promote what did not pass", "registry promote registry runs/one", "it did not pass its gates", "--without_gate REASON", text("runs/one/gate.json", '{"passed": false}')),
    typed("promote on a gate that is no JSON", "registry promote registry runs/one", r"gate\.json, line 1: not valid JSON", "Restore", text("runs/one/gate.json", "{'")),
    typed("promote what has changed", "registry promote registry runs/one --without_gate x", "runs/one/final has changed since its run wrote it", "Restore it",
        text("runs/one/final/config.json", '{"a": 1}')),
    typed("promote on a manifest that is no JSON", "registry promote registry runs/one --without_gate x", r"manifest\.json", "Restore", text(MANIFEST, "{'")),
    typed("a registry that is no JSON", "registry list registry", r"registry\.json is damaged", "Restore it from a backup", text("registry/registry.json", "{'")),
    typed("a registry of another schema", "registry list registry", r"registry\.json has schema 9", "Use the version of oprd that wrote it", registry(schema=9)),
    typed("a version that is a path", "registry verify registry", r"registry\.json is damaged .*version", "Restore it from a backup", registry(entry={"version": "../../student"}, current="../../student")),
    typed("a version without files", "registry verify registry", r"registry\.json is damaged .*files", "Restore it from a backup", registry(entry={"files": None})),
    typed("retire the current one", "registry retire registry 1 --reason x", "Version 1 is the current one", "Roll back first", registry()),
    typed("retire one that is not there", "registry retire registry 7 --reason x", "no version 7|[Vv]ersion 7", "1|oprd registry list", registry()),
    typed("roll back to nothing", "registry rollback registry --reason x", "No active version came before", "Promote another", registry()),
    typed("a registry that is a file", "registry promote gates.yaml runs/one --without_gate x", "gates.yaml", "[Cc]hoose|Name"),
)  # fmt: skip
def test_registry(case, place, capfd):
    if case.name in ("retire the current one", "retire one that is not there", "roll back to nothing"):
        (place / "registry/versions/0001").mkdir(parents=True)
        place.write("registry/.lock", "")
        (place / "registry/current").symlink_to("versions/0001")
    check_refused(case, place, capfd)


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "runs/one", "runs/two"],
        ["report", "runs/one"],
        ["registry", "promote", "r", "runs/one", "--without_gate", "x"],
    ],
)
def test_good_folders_are_taken(place, capfd, words):
    """What the cases spoil is good otherwise."""
    from badinput.harness import call

    assert call(words, capfd)[0] == 0
