"""Tokenizers that are missing, damaged, or cannot read the prompts."""

import json

import pytest

from badinput.harness import EVAL, Case, call, cases, check_refused
from oprd.training.trainer import OPRDTrainer
from tiny import merged_tokenizer, tiny_model, tiny_tokenizer

CHAT = {"prompt": [{"role": "user", "content": "ab"}], "answer": "1"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def tokenizer(change, *roles):
    """Change and save the tokenizers (of both models by default)."""

    def arrange(place):
        for role in roles or ("student", "teacher"):
            for path in (place / role).glob("*token*"):
                path.unlink()
            (place / role / "chat_template.jinja").unlink(missing_ok=True)
            made = tiny_tokenizer()
            change(made)
            made.save_pretrained(place / role)

    return arrange


def template(text, *roles, prompt=CHAT):
    """Chat prompts, and a chat template."""

    def arrange(place):
        tokenizer(lambda made: setattr(made, "chat_template", text), *roles)(place)
        place.rows(*[prompt] * 8)
        place.rows(*[prompt] * 8, name="problems.jsonl")

    return arrange


def no_end(made):
    made.eos_token = None


def no_end_at_all(*roles):
    """Neither the tokenizer nor the configs say what ends a response."""

    def arrange(place):
        tokenizer(no_end, *roles)(place)
        for role in roles:
            for name in ("config.json", "generation_config.json"):
                place.edit_json(f"{role}/{name}", eos_token_id=None)

    return arrange


def drop_files(*roles):
    def arrange(place):
        for role in roles:
            for path in (place / role).glob("*token*"):
                path.unlink()

    return arrange


def edit(change):
    """Change the student's tokenizer.json."""

    def arrange(place):
        path = place / "student/tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return arrange


def broken_merges(place):
    merged_tokenizer().save_pretrained(place / "student")
    edit(lambda content: content["model"].update(merges=[["q", "nothing-of-the-kind"]]))(place)


def other_words(place):
    place.remove("teacher/tokenizer.json")
    merged_tokenizer().save_pretrained(place / "teacher")
    tiny_model(seed=1, vocab_size=900).save_pretrained(place / "teacher")


def swap_two(content):
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]


def bad(name, culprit, remedy, arrange=None, **settings):
    return Case(name, culprit, remedy, arrange, settings=settings)


@cases(
    bad("none", r"student \S+/student has no tokenizer \(no tokenizer\.json\)", r"AutoTokenizer\.from_pretrained", drop_files("student")),
    bad("none of the teacher", r"teacher \S+/teacher has no tokenizer", r"AutoTokenizer\.from_pretrained", drop_files("teacher")),
    bad("cut short", r"student's \S+/tokenizer\.json cannot be read", "Copy or download it again", lambda p: p.cut("student/tokenizer.json")),
    bad("of the teacher cut short", r"teacher's \S+/tokenizer\.json cannot be read", "Copy or download it again", lambda p: p.cut("teacher/tokenizer.json")),
    bad("of no bytes", r"student's \S+/tokenizer\.json cannot be read", "Copy or download it again", lambda p: p.write("student/tokenizer.json", b"")),
    bad("not UTF-8", r"student's \S+/tokenizer\.json cannot be read", "Copy or download it again", lambda p: p.write("student/tokenizer.json", b"\xff\xfe{}")),
    bad("of an unknown model", r"student's \S+/tokenizer\.json cannot be read", "Copy or download it again", edit(lambda c: c["model"].update(type="Guess"))),
    bad("of broken merges", r"student's \S+/tokenizer\.json cannot be read \(.*nothing-of-the-kind", "Copy or download it again", broken_merges),
    bad("settings that are no JSON", r"student's \S+/tokenizer_config\.json is not valid JSON", "Restore the file", lambda p: p.cut("student/tokenizer_config.json")),
    bad("without an end", "student's tokenizer has no end token", "Set tokenizer.eos_token and save it", no_end_at_all("student", "teacher")),
    bad("an end that is no token", "eos_token '<over>' is not a token of the student's tokenizer", "Choose one of its tokens", eos_token="<over>"),
    bad("another end of the teacher", "student's responses end with <eos>, the teacher's with z", "Set eos_token: 'z'",
        tokenizer(lambda made: setattr(made, "eos_token", "z"), "teacher")),
    bad("chats without a template", "Prompts are chat messages but the student's tokenizer has no chat template", "Set tokenizer.chat_template", lambda p: p.rows(*[CHAT] * 8)),
    bad("a template of bad syntax", r"chat template of \S+/student cannot render .*TemplateSyntaxError", "Mend its chat_template", template("{% for m in %}{{ m }}")),
    bad("a template of bad syntax of the teacher", r"chat template of \S+/teacher cannot render .*TemplateSyntaxError", "Mend its chat_template",
        lambda p: (template(TEMPLATE)(p), template("{% if %}", "teacher")(p))),
    bad("a template that refuses", r"chat template of \S+/student cannot render .*no users here", "change the messages",
        template("{% for m in messages %}{{ raise_exception('no users here') }}{% endfor %}")),
    bad("a template that refuses a later row", r"chat template of \S+/student cannot render .*no system here", "change the messages",
        lambda p: (template("{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.content }}{% endfor %}")(p),
            p.rows(*[CHAT] * 7, {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}))),
    bad("a template of unknown names", r"chat template of \S+/student cannot render .*UndefinedError", "Mend its chat_template",
        template("{{ conversation.first.words }}")),
    bad("a template that renders nothing", "row 1: the prompt has no tokens", "row", template("{% if false %}a{% endif %}")),
    bad("another vocabulary", "different tokenizers", "output_loss: top_k", other_words),
    bad("two tokens swapped", "different tokenizers .*'a' is 3 and 2, 'b' is 2 and 3", "output_loss: top_k", edit(swap_two)),
    bad("another vocabulary and logits", "logit_weight compares logits of one vocabulary", "Use output_loss: top_k", other_words, representation_weight=0.0, logit_weight=1.0),
)  # fmt: skip
def test_training(case, place, capfd):
    check_refused(case, place, capfd)


@cases(
    Case("eval without one", r"model \S+/student has no tokenizer", r"AutoTokenizer\.from_pretrained", drop_files("student"), command=EVAL),
    Case("eval of one cut short", r"model's \S+/tokenizer\.json cannot be read", "Copy or download it again", lambda p: p.cut("student/tokenizer.json"), command=EVAL),
    Case("eval of a broken template", r"problems\.jsonl: The chat template of \S+/student", "Mend its chat_template", template("{% for %}"), command=EVAL),
    Case("eval as chat without a template", "prompt_format: chat needs a chat template", "Use prompt_format: text", command=(*EVAL, "--prompt_format", "chat")),
    Case("eval without an end", "no end token", "Set", no_end_at_all("student"), command=EVAL),
)  # fmt: skip
def test_other_commands(case, place, capfd):
    check_refused(case, place, capfd)


@pytest.mark.parametrize("gap", [1, 20])
def test_holes_in_the_ids_count(place, capfd, gap):
    """The highest id decides, not how many there are."""
    edit(lambda content: content["model"]["vocab"].update({"é": 36 + gap}))(place)
    place.write("teacher/tokenizer.json", (place / "student/tokenizer.json").read_bytes())
    said = check_refused(
        Case("", f"37 embeddings for a tokenizer whose ids go up to {36 + gap}", "resize"), place, capfd
    )
    assert "student" in said


def test_no_pad_token_is_no_fault(place, capfd):
    """The end token pads."""
    tokenizer(lambda made: setattr(made, "pad_token", None))(place)
    with pytest.raises(AssertionError, match="a step was begun"):
        call(Case("", "", "").prepare(place), capfd)


def test_an_end_that_only_the_generation_config_knows(place, capfd, monkeypatch):
    """The tokenizer of a base model may name none; its generation config does."""
    tokenizer(no_end)(place)
    seen = []
    monkeypatch.setattr(OPRDTrainer, "train", lambda trainer, **_: seen.append(trainer.eos_token_ids) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(Case("", "", "").prepare(place), capfd)
    assert seen == [[1]]
