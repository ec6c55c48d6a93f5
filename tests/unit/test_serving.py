"""The service: nothing without the token, bounded and checked requests, one line for what is wrong, and it lives on."""

import hashlib
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load, save

from oprd.bridge import TeacherSide, model_fingerprint
from oprd.serving import app as app_of_service
from oprd.serving.host import MOST_PROJECTIONS, Host
from oprd.serving.secret import VARIABLE, read_token
from oprd.serving.wire import CHECKSUM, TEACHER
from served import TOKEN, host_of, service_of
from tiny import VOCAB, reference_states, tiny_model

WIDTH, DEPTH = 16, 3
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
ROUTES = [
    ("GET", "/v1/teacher"),
    ("GET", "/v1/head"),
    ("GET", "/v1/files/config.json"),
    ("PUT", "/v1/projections/" + "0" * 64),
    ("POST", "/v1/states"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return host_of(tmp_path_factory.mktemp("teacher"), max_tokens=64, max_answer_bytes=20_000)


@pytest.fixture(scope="module")
def url(host):
    with service_of(host, most_projection_bytes=2**16) as url:
        yield url


@pytest.fixture
def http(url):
    with httpx2.Client(base_url=url, headers=AUTHORIZED, trust_env=False, timeout=10) as client:
        yield client


def question(**changes):
    """Two rows of four tokens, with layers 1 and 3 at two places; None leaves a tensor out."""
    tensors = {
        "ids": torch.arange(8).view(2, 4) + 2,
        "mask": torch.ones(2, 4),
        "layers": torch.tensor([[1, 1], [2, 3]]),
        "states": torch.tensor([1, 6]),
    } | changes
    return save({name: t.to(torch.int32) for name, t in tensors.items() if t is not None})


def projection(rank=4, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps, means = (torch.randn(*shape, generator=generator) for shape in ((DEPTH, rank, width), (DEPTH, width)))
    body = TeacherSide(maps, means).content()
    return hashlib.sha256(body).hexdigest(), body


@pytest.mark.parametrize(
    "token", [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"Basic {TOKEN}"]
)
def test_nothing_without_the_token(url, token):
    headers = {} if token is None else {"authorization": token}
    extra = [
        (m, p) for m in ("GET", "OPTIONS", "DELETE") for p in ("/", "/docs", "/openapi.json", "/nothing", "/v1/states")
    ]
    with httpx2.Client(base_url=url, headers=headers, trust_env=False) as client:
        for method, path in ROUTES + extra:
            answer = client.request(method, path, content=question())
            assert (answer.status_code, answer.content) == (401, b'{"error":"no valid token"}')
            assert TEACHER not in answer.headers and "server" not in answer.headers


def test_two_tokens_are_none(url):
    both = [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer other")]
    with httpx2.Client(base_url=url, trust_env=False) as client:
        for headers in (both, both[::-1]):
            assert client.get("/v1/teacher", headers=headers).status_code == 401


def test_what_is_no_http_gets_no_answer(url):
    import socket

    for content in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=5) as connection:
            connection.sendall(content)
            assert connection.recv(100) == b""


def test_about_files_and_head(http, host, tmp_path):
    about = http.get("/v1/teacher").json()
    model = tiny_model(seed=1)
    assert about["fingerprint"] == model_fingerprint(model)
    assert about["head"] == {"shape": [VOCAB, WIDTH], "dtype": "float32", "bias": False}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= set(about["files"])
    for name, digest in about["files"].items():
        answer = http.get(f"/v1/files/{name}")
        assert hashlib.sha256(answer.content).hexdigest() == digest == answer.headers[CHECKSUM]
        assert answer.headers[TEACHER] == about["teacher"]
    assert load(http.get("/v1/head").content)["weight"].equal(model.lm_head.weight)
    for name in ("model.safetensors", "nothing.json", "..%2fconfig.json", "%2e%2e"):
        assert http.get(f"/v1/files/{name}").status_code == 404


def test_the_digest_is_of_all_that_matters(tmp_path):
    def digest(name, model=None, **changes):
        host = host_of(tmp_path / name, model)
        return Host(host.teacher, host.files | changes).about["teacher"]

    first = digest("a")
    assert first == digest("b")
    others = [
        digest("c", tiny_model(seed=2)),
        digest("d", tiny_model(seed=1).bfloat16()),
        digest("e", **{"vocab.txt": b"a"}),
    ]
    assert len({first, *others}) == 4


def test_states_are_those_of_a_plain_forward(http):
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 7]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    body = question(ids=ids, mask=mask, outputs=torch.tensor([2]), chains=torch.tensor([3, 4]))
    found = load(http.post("/v1/states", content=body, params={"last": "1"}).content)
    model = tiny_model(seed=1).eval()
    with torch.no_grad():
        flat = torch.cat(
            [reference_states(model, row) for row in ids], 1
        )  # [layers, 8, d]; the padded place is not asked for
    expected = {"layers.1": flat[1, [1, 6]], "layers.2": flat[3, [1, 6]], "at_states": flat[3, [1, 6]]}
    expected |= {"at_outputs": flat[3, [2]], "at_chains": flat[3, [3, 4]]}
    assert found.keys() == expected.keys()
    for name, states in expected.items():
        torch.testing.assert_close(found[name], states, atol=1e-5, rtol=1e-5)


def test_two_student_layers_may_share_a_teachers(http):
    found = load(http.post("/v1/states", content=question(layers=torch.tensor([[1, 2], [3, 2]]))).content)
    assert found["layers.1"].equal(found["layers.3"]) and found["layers.1"].abs().min() > 0


REFUSED = {
    "no safetensors": (b"nothing", {}, 400, "not safetensors"),
    "pickle": (b"\x80\x04K*.", {}, 400, "not safetensors"),
    "cut off": (question()[:-1], {}, 400, "not safetensors"),
    "a token that is not there": (question(ids=torch.full((2, 4), VOCAB)), {}, 422, f"ids must lie in 0..{VOCAB - 1}"),
    "a token below 0": (question(ids=torch.full((2, 4), -1)), {}, 422, "ids must lie in"),
    "a place that is not there": (question(states=torch.tensor([8])), {}, 422, "states must lie in 0..7"),
    "a layer that is not there": (question(layers=torch.tensor([[1, 4]])), {}, 422, "layers 1..3"),
    "layer 0": (question(layers=torch.tensor([[1, 0]])), {}, 422, "layers must lie in"),
    "a layer twice": (question(layers=torch.tensor([[1, 1], [1, 2]])), {}, 422, "comes twice"),
    "three columns of layers": (question(layers=torch.ones(1, 3)), {}, 422, "layers must be pairs"),
    "no mask": (question(mask=None), {}, 422, "mask is missing"),
    "a mask of another shape": (question(mask=torch.ones(2, 3)), {}, 422, "of the shape of ids"),
    "a row of padding": (
        question(mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
        {},
        422,
        "first token of a row real",
    ),
    "no ids": (question(ids=None), {}, 422, "ids must be a matrix"),
    "empty ids": (question(ids=torch.ones(0, 4)), {}, 422, "not empty"),
    "floats": (save({"ids": torch.ones(2, 4)}), {}, 422, "must be int32"),
    "another tensor": (question(more=torch.ones(1)), {}, 422, "tensors are"),
    "nothing asked for": (question(layers=torch.ones(0, 2)), {}, 422, "nothing is asked for"),
    "too many tokens": (
        question(ids=torch.ones(5, 13), mask=torch.ones(5, 13)),
        {},
        413,
        "65 tokens, this service reads 64",
    ),
    "too large an answer": (question(states=torch.zeros(200)), {}, 413, "the answer would have 25,600 bytes"),
    "rows beyond the context": (None, {}, 422, "context has 40"),
    "lengths that do not fit": (
        question(ids=torch.ones(1, 8), mask=None, lengths=torch.tensor([3, 4]), positions=torch.zeros(1, 8)),
        {},
        422,
        "must cover ids",
    ),
    "packed and padded": (question(lengths=torch.tensor([4, 4])), {}, 422, "without a mask"),
    "another parameter": (question(), {"layers": "1"}, 422, "parameters are"),
    "another precision": (question(), {"autocast": "int8"}, 422, "parameters are"),
    "an unknown projection": (question(), {"projection": "0" * 64}, 409, "unknown projection"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(http, host, case, monkeypatch):
    body, parameters, status, reason = REFUSED[case]
    if body is None:
        import dataclasses

        monkeypatch.setattr(host, "limits", dataclasses.replace(host.limits, context=40))
        body = question(ids=torch.ones(1, 41), mask=torch.ones(1, 41))
    forwards = []
    handle = host.teacher.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    answer = http.post("/v1/states", content=body, params=parameters)
    handle.remove()
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"] and "\n" not in answer.json()["error"]
    assert not forwards
    assert http.post("/v1/states", content=question()).status_code == 200


def test_projections(http, host):
    digest, body = projection()
    ask = {"content": question(), "params": {"projection": digest}}
    plain = load(http.post("/v1/states", content=question()).content)
    assert http.post("/v1/states", **ask).status_code == 409
    assert http.put(f"/v1/projections/{digest}", content=body).status_code == 204
    projected = load(http.post("/v1/states", **ask).content)
    side = load(body)
    for layer in (1, 2):
        expected = (plain[f"layers.{layer}"] - side["means"][layer - 1]) @ side["maps"][layer - 1].T
        assert projected[f"layers.{layer}"].shape == (2, 4)
        torch.testing.assert_close(projected[f"layers.{layer}"], expected)
    too_deep = question(layers=torch.tensor([[4, 1]]))
    assert (
        "projection has layers 1..3" in http.post("/v1/states", content=too_deep, params=ask["params"]).json()["error"]
    )
    for seed in range(1, MOST_PROJECTIONS + 1):  # the oldest makes room
        other, content = projection(seed=seed)
        assert http.put(f"/v1/projections/{other}", content=content).status_code == 204
    assert http.post("/v1/states", **ask).status_code == 409


@pytest.mark.parametrize(
    ("body", "digest", "status", "reason"),
    [
        (projection()[1], "0" * 64, 422, "not what its sha256 says"),
        (projection()[1], "short", 422, "named by its sha256"),
        (projection(width=15)[1], None, 422, "16 wide"),
        (projection(rank=17)[1], None, 422, "1..16 dimensions"),
        (
            save({"maps": torch.full((1, 2, WIDTH), float("nan")), "means": torch.zeros(1, WIDTH)}),
            None,
            422,
            "not finite",
        ),
        (save({"maps": torch.zeros(1, 2, WIDTH), "means": torch.zeros(2, WIDTH)}), None, 422, "do not belong together"),
        (save({"maps": torch.zeros(1, 2, WIDTH)}), None, 422, "maps and means"),
        (b"\x00" * 9, None, 400, "not safetensors"),
        (b"\x00" * (2**16 + 1), None, 413, "may have 65,536 bytes"),
    ],
)
def test_projections_that_are_refused(http, body, digest, status, reason):
    answer = http.put(f"/v1/projections/{digest or hashlib.sha256(body).hexdigest()}", content=body)
    assert answer.status_code == status and reason in answer.json()["error"]


def test_a_body_without_a_declared_length_is_bounded(http):
    chunks = (b"\x00" * 2**14 for _ in range(8))
    answer = http.put("/v1/projections/" + "0" * 64, content=chunks)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 507, "ran out of memory"),
        (MemoryError(), 507, "ran out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            507,
            "ran out of memory",
        ),
        (RuntimeError("/home/user/secret.py went wrong"), 500, "internal error"),
        (IndexError("/home/user/secret.py"), 500, "internal error"),
    ],
)
def test_a_forward_that_fails_leaves_the_service_alive(http, host, error, status, reason, caplog):
    def fail(*_):
        raise error

    with caplog.at_level(logging.CRITICAL, logger="oprd"):
        handle = host.teacher.model.register_forward_pre_hook(fail)
        answer = http.post("/v1/states", content=question())
        handle.remove()
    assert answer.status_code == status and reason in answer.json()["error"]
    assert "secret" not in answer.text and "Traceback" not in answer.text
    assert http.post("/v1/states", content=question()).status_code == 200


def test_numbers_that_are_none_are_only_numbers(http, host):
    """A teacher whose states are NaN is answered with NaN, not with an error."""
    handle = host.teacher.model.layers[0].register_forward_hook(lambda m, a, out: out * float("nan"))
    answer = http.post("/v1/states", content=question())
    handle.remove()
    assert answer.status_code == 200 and load(answer.content)["layers.1"].isnan().all()


def test_one_forward_at_a_time(url, host):
    """Eight askers at once: all are answered right, and no two forwards overlap."""
    running, most, answers = [], [], {}

    def enter(*_):
        running.append(1)
        most.append(len(running))

    def leave(*_):
        running.pop()

    def ask(number):
        body = question(ids=torch.full((2, 4), number + 2))
        with httpx2.Client(base_url=url, headers=AUTHORIZED, trust_env=False, timeout=30) as client:
            answers[number] = client.post("/v1/states", content=body).content

    hooks = [host.teacher.model.register_forward_pre_hook(enter), host.teacher.model.register_forward_hook(leave)]
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    assert len(most) == 8 and max(most) == 1
    for number, content in answers.items():
        with torch.no_grad():
            expected = reference_states(host.teacher, torch.full((4,), number + 2))[1, 1]
        torch.testing.assert_close(load(content)["layers.1"][0], expected, atol=1e-5, rtol=1e-5)


def test_told_to_stop_it_finishes_the_forward_in_progress(tmp_path):
    host = host_of(tmp_path)
    is_running, go_on, answers = threading.Event(), threading.Event(), {}

    def hold(*_):
        is_running.set()
        assert go_on.wait(10)

    def ask(name):
        with httpx2.Client(base_url=url, headers=AUTHORIZED, trust_env=False, timeout=30) as client:
            answers[name] = client.post("/v1/states", content=question()).status_code

    host.teacher.model.register_forward_pre_hook(hold)
    with service_of(host) as url:
        threads = [threading.Thread(target=ask, args=(name,)) for name in ("running", "waiting")]
        threads[0].start()
        assert is_running.wait(10)
        threads[1].start()
        while host.service._waiting < 2:
            time.sleep(0.01)
        host.service.stop()
        go_on.set()
        for thread in threads:
            thread.join()
    assert answers == {"running": 200, "waiting": 503}


def test_too_many_askers_are_told_to_come_again(http, monkeypatch):
    monkeypatch.setattr(app_of_service, "MOST_WAITING", 0)
    answer = http.post("/v1/states", content=question())
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


def test_packed_rows_that_the_teacher_cannot_read(tmp_path):
    """Soft-capped attention takes no packing: told beforehand, and refused, while padded rows are read."""
    model = tiny_model("gemma2", seed=1, tied=True)
    host = host_of(tmp_path, model)
    packed = question(ids=torch.ones(1, 8), mask=None, lengths=torch.tensor([4, 4]), positions=torch.zeros(1, 8))
    with service_of(host) as url, httpx2.Client(base_url=url, headers=AUTHORIZED, trust_env=False) as client:
        assert "reads no packed rows" in client.get("/v1/teacher").json()["why_not_packed"]
        answer = client.post("/v1/states", content=packed)
        assert answer.status_code == 422 and "reads no packed rows" in answer.json()["error"]
        assert client.post("/v1/states", content=question()).status_code == 200


# ------------------------------------------------------------------------------------------------------------ tokens


def test_tokens(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_token(None) is None
    monkeypatch.setenv(VARIABLE, "0123456789abcdef\n")
    assert read_token(None) == "0123456789abcdef"
    file = tmp_path / "token"
    file.write_text("fedcba9876543210\n")
    assert read_token(file) == "fedcba9876543210"
    for content in (b"short", b"with a space in the middle", b"\xff" * 20, b"", b"line one is here\nline two is here"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"{file}") as caught:
            read_token(file)
        assert content not in str(caught.value).encode() or not content
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_token(tmp_path / "none")


def test_the_token_is_compared_in_constant_time():
    """Timing cannot be asserted in a test that must not flake; that `hmac.compare_digest` is what compares can."""
    source = Path(app_of_service.__file__).read_text()
    assert "hmac.compare_digest(" in source and "== self._expected" not in source


def test_without_the_packages_the_command_that_installs_them_is_told():
    """And at once: nothing heavy is imported before that is known."""
    hide = "import sys; sys.modules['uvicorn'] = None; sys.modules['tenacity'] = None\n"
    call = "from oprd.cli import main; status = main(['serve-teacher', '--model', 'miniature:teacher'])\n"
    code = hide + call + "sys.exit(status + 2 * ('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert 'pip install "oprd[serve]"' in done.stderr


def test_hypothesis_finds_no_way_in():
    """A small part of what `make fuzz` does."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks are scripts of the repository
    from benchmarks.fuzz import fuzz

    found = fuzz(60)
    assert found["server_errors"] == 0 and set(found["by_status_without_token"]) <= {401, "cut off"}
    assert found["requests_with_token"] >= 50 and found["requests_without_token"] >= 25
    assert {200, 400, 422} <= set(found["by_status"])
