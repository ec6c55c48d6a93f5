"""The run's end: what is tried again, what fails at once, and that nothing half-made is ever used."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import save

from oprd.bridge import Bridge
from oprd.serving import connect
from oprd.serving.client import Client, Rejected, check_url
from oprd.serving.files import check_names
from oprd.serving.remote import RemoteTeacher
from oprd.serving.wire import CHECKSUM, TEACHER, expected, read_answer, write_answer
from oprd.states import Question, Reading, TeacherStates, answer, visit_states
from served import TOKEN, host_of, remote_of, service_of
from tiny import VOCAB, canned_trainer, random_bridge, tiny_model

CONTENT = b"the content"


def reply(status=200, content=CONTENT, *, teacher="a" * 64, digest=None, **headers):
    digest = hashlib.sha256(content).hexdigest() if digest is None else digest
    return httpx2.Response(status, content=content, headers={TEACHER: teacher, CHECKSUM: digest, **headers})


def scripted(*script, patience=5.0):
    """A client whose requests are answered from a script; exceptions in it are raised. The last entry repeats."""
    client, asked = Client("http://127.0.0.1:1", TOKEN, patience=patience), []

    def handle(request):
        entry = script[min(len(asked), len(script) - 1)]
        asked.append(request)
        if isinstance(entry, Exception):
            raise entry
        return httpx2.Response(entry.status_code, content=entry.content, headers=entry.headers)

    client._http = httpx2.Client(transport=httpx2.MockTransport(handle), headers=client._http.headers)
    return client, asked


def ask(client, **more):
    return client.request("GET", "/v1/head", **{"most_bytes": 100, **more})


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


@pytest.mark.parametrize(
    "trouble",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("peer closed connection without sending complete message body"),
        reply(502, teacher=""),
        reply(503),
        reply(504, teacher=""),
        reply(408),
        reply(digest="0" * 64),
    ],
    ids=repr,
)
def test_what_is_tried_again(trouble):
    client, asked = scripted(trouble, trouble, reply())
    assert ask(client) == CONTENT and len(asked) == 3


def test_the_last_failure_says_where_how_often_and_how_long():
    client, asked = scripted(httpx2.ConnectError("connection refused"), patience=0.3)
    with pytest.raises(
        ConnectionError, match=r"http://127.0.0.1:1 gave no answer in \d+ attempts over \d+ s"
    ) as caught:
        ask(client)
    assert "connection refused" in str(caught.value) and "oprd serve-teacher" in str(caught.value)
    assert f"{len(asked)} attempts" in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (reply(401, b'{"error":"no valid token"}'), "refuses the token: OPRD_TEACHER_TOKEN"),
        (reply(422, b'{"error":"ids must lie in 0..3"}'), "refuses: ids must lie in 0..3"),
        (reply(507, b'{"error":"the teacher ran out of memory"}'), "ran out of memory"),
        (reply(500, b"<html>", teacher="a" * 64), "refuses: status 500"),
        (reply(200, b"x" * 101), "longer than the 100 bytes"),
        (httpx2.Response(200, content=CONTENT), "is no oprd serve-teacher"),
        (httpx2.Response(200, content=CONTENT, headers={TEACHER: "a" * 64}), "has no checksum"),
        (httpx2.Response(302, headers={"location": "http://elsewhere/"}), "is no oprd serve-teacher"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fails_at_once(wrong, told):
    client, asked = scripted(wrong)
    with pytest.raises(Rejected, match=told):
        ask(client)
    assert len(asked) == 1
    assert asked[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_another_teacher_is_noticed_in_every_answer():
    client, _ = scripted(reply(), reply(teacher="b" * 64))
    ask(client)
    with pytest.raises(Rejected, match=r"Another teacher answers at .* now: b{12}, not a{12}"):
        ask(client)


def test_no_token_is_ever_shown():
    client, _ = scripted(httpx2.ConnectError("no"), reply(401))
    with pytest.raises(Rejected) as caught:
        ask(client)
    assert TOKEN not in str(caught.value) and TOKEN not in repr(client)


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://host", "an address such as"),
        ("host:8765", "an address such as"),
        ("http://", "an address such as"),
        ("http://user:secret@host", "no user, password"),
        ("http://host/?token=secret", "no user, password"),
        ("http://host:99999", "ort"),
    ],
)
def test_addresses_that_cannot_be(url, told):
    with pytest.raises(ValueError, match=told) as caught:
        check_url(url)
    assert "secret" not in str(caught.value)


def test_addresses():
    assert check_url("http://127.0.0.1:8765/") == "http://127.0.0.1:8765"
    assert check_url("https://host/teacher/") == "https://host/teacher"
    assert check_url("http://[::1]:8765") == "http://[::1]:8765"


def test_without_a_token_nothing_is_asked(monkeypatch):
    monkeypatch.delenv("OPRD_TEACHER_TOKEN", raising=False)
    with pytest.raises(ValueError, match="set OPRD_TEACHER_TOKEN, or teacher_token_file"):
        connect("http://127.0.0.1:1")


@pytest.mark.parametrize(
    "name", ["../config.json", "/etc/passwd", "config.json/../x", "model.safetensors", "", "x.py", 3, None]
)
def test_file_names_from_a_service_are_not_trusted(name):
    with pytest.raises(ValueError, match="lists files that no tokenizer or config has"):
        check_names(["config.json", name])


def test_a_service_that_lists_such_a_file_gets_nothing_written(tmp_path):
    about = {
        "protocol": 1,
        "teacher": "a" * 64,
        "fingerprint": "f",
        "why_not_packed": None,
        "files": {"../../evil": "0" * 64},
    }
    client, asked = scripted(reply(content=json.dumps(about).encode()))
    with pytest.raises(ValueError, match="lists files"):
        RemoteTeacher(client)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("content", "told"), [(b"<html>", "is no oprd serve-teacher"), (b'{"protocol": 9}', "speaks protocol 9")]
)
def test_another_service(content, told):
    with pytest.raises(ValueError, match=told):
        scripted(reply(content=content))[0].about()


# ---------------------------------------------------------------------------------------------- answers are checked

QUESTION = Question(Reading(torch.ones(2, 4).long(), torch.ones(2, 4).bool()), torch.tensor([1, 6, 6]), {1: 1, 2: 3})
WANTED = expected(QUESTION, 16, torch.float32)


def states(count=3, width=16, dtype=torch.float32):
    return torch.zeros(count, width, dtype=dtype)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (save({"layers.1": states()}), "holds"),
        (save({"layers.1": states(), "layers.2": states(), "at_outputs": states()}), "holds"),
        (save({"layers.1": states(), "layers.2": states(count=2)}), r"layers.2 of shape \(2, 16\)"),
        (save({"layers.1": states(), "layers.2": states(width=8)}), r"layers.2 of shape \(3, 8\)"),
        (save({"layers.1": states(), "layers.2": states(dtype=torch.float16)}), "in torch.float16"),
        (write_answer(TeacherStates({1: states(), 2: states()}, None, None))[:-1], "cannot be read"),
    ],
)
def test_an_answer_to_another_question_is_not_used(body, told):
    with pytest.raises(ValueError, match=told):
        read_answer(body, WANTED)


def test_an_answer_is_read():
    given = TeacherStates({1: states() + 1, 2: states() + 2}, states(), None, None)
    found = read_answer(
        write_answer(given), expected(dataclasses.replace(QUESTION, last_at_states=True), 16, torch.float32)
    )
    assert all(found.layers[layer].equal(given.layers[layer]) for layer in (1, 2))
    assert found.at_states.equal(given.at_states) and found.at_outputs is None
    half = expected(dataclasses.replace(QUESTION, dtype=torch.bfloat16), 16, torch.float32)
    assert half["layers.1"] == ((3, 16), {torch.bfloat16})


# -------------------------------------------------------------------------------------------------------- stand-in


def test_what_stands_for_the_teacher(tmp_path):
    with remote_of(tmp_path / "files") as remote:
        model = tiny_model(seed=1)
        assert remote.config.hidden_size == 16 and remote.generation_config.eos_token_id == 1
        assert not remote.has_head and remote.lm_head.weight.shape == (VOCAB, 16)
        with pytest.raises(RuntimeError, match="runs elsewhere"):
            visit_states(remote, QUESTION.reading, [1], lambda *_: None)
        remote.fetch_head()
        assert remote.lm_head.weight.equal(model.lm_head.weight) and not remote.lm_head.weight.requires_grad
        folder = Path(remote.folder)
        assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
        assert remote.record["name"].startswith("http://127.0.0.1:") and len(remote.record["hash"]) == 64
        remote._folder.cleanup()
        assert not folder.exists()


def test_the_head_comes_only_where_something_needs_it(tmp_path):
    with remote_of(tmp_path / "files") as remote:
        fetched = []
        fetch = remote.client.request
        remote.client.request = lambda *a, **k: (fetched.append(a[1]), fetch(*a, **k))[1]
        trainer = canned_trainer(tmp_path, teacher=remote, lm_head="keep", logit_weight=0)
        trainer.train()
        assert "/v1/head" not in fetched and "/v1/states" in fetched
        canned_trainer(tmp_path, teacher=remote, lm_head="keep", logit_weight=1)
        canned_trainer(tmp_path, teacher=remote)
        assert fetched.count("/v1/head") == 1


def test_a_projection_is_sent_once_and_again_to_a_service_that_lost_it(tmp_path):
    bridge = random_bridge(4, teacher_width=16, teacher_layers=3)
    question = dataclasses.replace(QUESTION, through=bridge)
    host = host_of(tmp_path)
    with service_of(host) as url:
        remote = RemoteTeacher(Client(url, TOKEN, patience=5.0))
        sent, fetch = [], remote.client.request
        remote.client.request = lambda *a, **k: (sent.append(a[0]), fetch(*a, **k))[1]
        first, second = answer(remote, question), answer(remote, question)
        assert sent == ["POST", "PUT", "POST", "POST"]
        host._projections.clear()  # what a restart does
        third = answer(remote, question)
        assert sent[4:] == ["POST", "PUT", "POST"]
        local = answer(tiny_model(seed=1).eval(), question)
    for found in (first, second, third):
        assert all(found.layers[layer].equal(local.layers[layer]) for layer in (1, 2))


def test_the_digest_of_a_bridge_is_of_its_teachers_side():
    bridge, other = random_bridge(4), random_bridge(4, seed=1)
    again = Bridge(
        bridge.layer_map, *(bridge._tensors[n] for n in ("student_map", "student_mean", "teacher_map", "teacher_mean"))
    )
    assert bridge.teacher_side.digest == again.teacher_side.digest != other.teacher_side.digest


def test_a_service_that_is_another_one_after_a_restart_is_refused(tmp_path):
    with service_of(host_of(tmp_path / "a")) as url:
        remote = RemoteTeacher(Client(url, TOKEN, patience=5.0))
        answer(remote, QUESTION)
    port = int(url.rpartition(":")[2])
    with service_of(host_of(tmp_path / "b"), port):  # the same weights
        answer(remote, QUESTION)
    with (
        service_of(host_of(tmp_path / "c", tiny_model(seed=2)), port),
        pytest.raises(Rejected, match="Another teacher"),
    ):
        answer(remote, QUESTION)


def test_no_batch_is_trained_on_if_its_answer_is_wrong(tmp_path, monkeypatch):
    """A service that drops a row of every answer: the run stops before its first update."""
    import oprd.serving.host as host

    def short(found):
        layers = {layer: rows[:-1] for layer, rows in found.layers.items()}
        return write_answer(dataclasses.replace(found, layers=layers))

    with remote_of(tmp_path / "files") as remote:
        trainer = canned_trainer(tmp_path, teacher=remote)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        monkeypatch.setattr(host.wire, "write_answer", short)
        with pytest.raises(ValueError, match="was asked for"):
            trainer.train()
    assert all(p.equal(before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.state.global_step == 0


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"teacher_model_name_or_path": "somewhere"}, "Two teachers.*Remove one"),
        ({"teacher_load_in_8bit": True}, "teacher_load_in_8bit would be ignored.*serve-teacher"),
        ({"offload_teacher": True}, "offload_teacher would be ignored"),
        ({"teacher_model_revision": "main"}, "teacher_model_revision would be ignored"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "teacher_model_init_kwargs would be ignored.*--dtype"),
        ({"teacher_url": None, "teacher_token_file": "file"}, "teacher_token_file would be ignored"),
        ({"teacher_url": "http://a:b@host"}, "no user, password"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, told):
    from oprd import OPRDConfig

    with pytest.raises(ValueError, match=told):
        OPRDConfig(str(tmp_path), use_cpu=True, **{"teacher_url": "http://127.0.0.1:8765", **settings})


def test_a_teacher_by_its_address(tmp_path, monkeypatch):
    monkeypatch.setenv("OPRD_TEACHER_TOKEN", TOKEN)
    from datasets import Dataset

    from oprd import OPRDConfig, OPRDTrainer
    from tiny import tiny_tokenizer

    with service_of(host_of(tmp_path / "files")) as url:
        args = OPRDConfig(
            str(tmp_path / "run"), use_cpu=True, teacher_url=url, report_to="none", max_completion_length=8
        )
        further = {
            "args": args,
            "train_dataset": Dataset.from_dict({"prompt": ["ab"] * 8}),
            "processing_class": tiny_tokenizer(),
        }
        trainer = OPRDTrainer(tiny_model(), **further)
        assert isinstance(trainer.teacher_model, RemoteTeacher) and trainer.lm_head == "teacher"
        with pytest.raises(ValueError, match="pass teacher_model or set teacher_url"):
            OPRDTrainer(tiny_model(), tiny_model(seed=1), **further)
        os.environ["OPRD_TEACHER_TOKEN"] = "another-token-that-is-wrong"
        with pytest.raises(ValueError, match="refuses the token"):
            OPRDTrainer(tiny_model(), **further)


def test_a_coarser_teacher_is_told(tmp_path, caplog):
    with remote_of(tmp_path / "files", tiny_model(seed=1).bfloat16()) as remote:
        canned_trainer(tmp_path, teacher=remote).train()
    assert "torch.bfloat16 where they are served" in caplog.text
