"""Throw malformed, hostile and valid requests at a served tiny teacher, with the token and without.

    python -m benchmarks.fuzz --requests 5000

It fails on any answer but 401 without the token, on any status of 500 or more, and if the teacher gives another answer to
one known question at the end than at the start. Prints one JSON line of counts.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import socket
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from oprd.serving.app import MOST_PASSED_OVER
from served import TOKEN, host_of, service_of
from tiny import VOCAB

WIDTH, DEPTH, RANK = 16, 3, 4
LIMITS = {"max_tokens": 256, "max_answer_bytes": 2**20}
MOST_PROJECTION_BYTES = 2**20
METHODS = ["GET", "PUT", "POST", "HEAD", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"]
PATHS = ["/", "/docs", "/openapi.json", "/redoc", "/v1/teacher", "/v1/head", "/v1/states", "/v1/files/config.json",
         "/v1/files/../../etc/passwd", "/v1/files/%2e%2e%2fconfig.json", "/v1/files/", "/v1/projections/x", "//", "/%00"]  # fmt: skip
DTYPES = [torch.int32, torch.int64, torch.uint8, torch.bool, torch.float32, torch.bfloat16, torch.float64]
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


def side(value: float = 0.5) -> bytes:
    """A projection as a client sends it."""
    return save({"maps": torch.full((DEPTH, RANK, WIDTH), value), "means": torch.zeros(DEPTH, WIDTH)})


KNOWN = hashlib.sha256(side()).hexdigest()


def question(rows: int = 2, columns: int = 5, packed: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a question that can be answered."""
    ids = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns) % VOCAB
    tensors = {
        "layers": torch.tensor([[1, 1], [3, 3]]),
        "states": torch.tensor([0, 3, 3]),
        "outputs": torch.tensor([1]),
    }
    if packed:
        ids, lengths = ids.view(1, -1), torch.full((rows,), columns)
        return {"ids": ids, "lengths": lengths, "positions": torch.arange(columns).repeat(rows)[None], **tensors}
    return {"ids": ids, "mask": torch.ones_like(ids), **tensors}


def body_of(tensors: dict[str, torch.Tensor]) -> bytes:
    """As a client writes it."""
    return save({name: t.to(torch.int32) if t.dtype == torch.int64 else t for name, t in tensors.items()})


numbers = st.one_of(st.integers(-2, 40), st.sampled_from([-(2**31), 2**31 - 1, 255, 256, 1024, 1025]))


@st.composite
def tensor(draw) -> torch.Tensor:
    """A small tensor of any kind; floats may be NaN or infinite."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    count = int(torch.tensor(shape).prod()) if shape else 1
    if dtype.is_floating_point:
        values = draw(st.lists(st.floats(width=16), min_size=count, max_size=count))
    else:
        values = draw(st.lists(numbers, min_size=count, max_size=count))
    wide = torch.tensor(values, dtype=torch.float64 if dtype.is_floating_point else torch.int64)
    return wide.to(dtype).reshape(shape)


@st.composite
def questions(draw) -> bytes:
    """A question: whole, with tensors replaced, numbers changed, bytes changed, cut off, or no question at all."""
    made = question(draw(st.integers(1, 4)), draw(st.integers(1, 80)), draw(st.booleans()))
    kind = draw(st.sampled_from(["whole", "whole", "replaced", "number", "number", "bytes", "cut", "header", "random"]))
    names = st.sampled_from([*made, "chains", "weights"])
    if kind == "replaced":
        for _ in range(draw(st.integers(1, 3))):
            made[draw(names)] = draw(tensor())
    elif kind == "number":
        for name in draw(st.lists(st.sampled_from(list(made)), min_size=1, max_size=3)):
            flat = made[name] = made[name].clone()
            flat.view(-1)[draw(st.integers(0, flat.numel() - 1))] = draw(st.integers(-3, 300))
    elif kind == "random":
        return draw(st.binary(max_size=300))
    body = bytearray(body_of(made))
    if kind == "bytes":
        for _ in range(draw(st.integers(1, 8))):
            body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        del body[draw(st.integers(0, len(body))) :]
    elif kind == "header":  # a length that the file does not have
        body[:8] = draw(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1])).to_bytes(8, "little")
    return bytes(body)


@st.composite
def requests(draw) -> tuple[str, str, bytes, dict[str, str]]:
    """Method, path, body and parameters."""
    kind = draw(st.sampled_from(["states", "states", "states", "projection", "any"]))
    if kind == "states":
        parameters = draw(st.fixed_dictionaries({}, optional={
            "projection": st.sampled_from([*[KNOWN] * 6, "0" * 64, "x", ""]),
            "autocast": st.sampled_from(["bfloat16", "float16", "float32", ""]),
            "last": st.sampled_from(["1", "1", "0"]),
        }))  # fmt: skip
        return "POST", "/v1/states", draw(questions()), parameters
    if kind == "projection":
        odd = draw(st.sampled_from([float("nan"), float("inf"), 0.25]))
        body = draw(
            st.one_of(st.just(side(odd)), st.just(side()), questions(), st.just(bytes(2 * MOST_PROJECTION_BYTES)))
        )
        right = hashlib.sha256(body).hexdigest()
        return "PUT", "/v1/projections/" + draw(st.sampled_from([right, right, "0" * 64, "x", "%2e%2e"])), body, {}
    body = draw(st.one_of(st.just(b""), questions(), st.binary(max_size=50)))
    return draw(st.sampled_from(METHODS)), draw(st.sampled_from(PATHS)), body, {}


tokens = st.one_of(
    st.just({}),
    st.sampled_from(["", "Bearer", f"bearer {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}",
                     TOKEN, f"Bearer  {TOKEN}", "Bearer null"]).map(lambda value: {"authorization": value}),
    st.just({"x-token": TOKEN}),
    st.just({"cookie": f"token={TOKEN}"}),
)  # fmt: skip


def raw(address: tuple[str, int], content: bytes) -> bytes:
    """What comes back for bytes that need be no HTTP."""
    with socket.create_connection(address, timeout=5) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65_536), b""))
        except OSError:
            return b""


def fuzz(count: int) -> dict[str, object]:
    """So many requests with the token, half as many without, a tenth as many that are no HTTP; counts by status.

    Raises:
        AssertionError: with the request that showed a fault.
    """
    seen: dict[str, collections.Counter[int | str]] = {"with": collections.Counter(), "without": collections.Counter()}
    started, raws = time.monotonic(), 0
    silent = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    with tempfile.TemporaryDirectory() as folder:
        host = host_of(folder, **LIMITS)
        with (
            service_of(host, most_projection_bytes=MOST_PROJECTION_BYTES) as url,
            httpx2.Client(base_url=url, trust_env=False, timeout=30) as http,
        ):
            where = ("127.0.0.1", int(url.rpartition(":")[2]))

            def known_answer() -> bytes:
                http.put(f"/v1/projections/{KNOWN}", content=side(), headers=AUTHORIZED).raise_for_status()
                answer = http.post(
                    "/v1/states", content=body_of(question()), params={"projection": KNOWN}, headers=AUTHORIZED
                )
                return answer.raise_for_status().content

            @silent
            @given(requests())
            def authorized(request: tuple) -> None:
                method, path, body, parameters = request
                try:
                    answer = http.request(method, path, content=body, params=parameters, headers=AUTHORIZED)
                except httpx2.TransportError:  # the service does not read such a body to its end
                    assert len(body) > MOST_PASSED_OVER, request
                    seen["with"]["cut off"] += 1
                    return
                seen["with"][answer.status_code] += 1
                assert answer.status_code < 500, (request, answer.text)
                if answer.status_code >= 400 and method != "HEAD":
                    reason = answer.json()["error"]
                    assert reason and "\n" not in reason and "/tmp" not in reason and "Traceback" not in reason

            @settings(silent, max_examples=max(count // 2, 1))
            @given(requests(), tokens)
            def anonymous(request: tuple, headers: dict[str, str]) -> None:
                method, path, body, parameters = request
                try:
                    answer = http.request(method, path, content=body, params=parameters, headers=headers)
                except httpx2.TransportError:
                    assert len(body) > MOST_PASSED_OVER, request
                    seen["without"]["cut off"] += 1
                    return
                seen["without"][answer.status_code] += 1
                assert answer.status_code == 401 and (
                    answer.content == b'{"error":"no valid token"}' or method == "HEAD"
                )

            @settings(silent, max_examples=max(count // 10, 1))
            @given(st.one_of(st.binary(max_size=200), st.binary(max_size=80).map(lambda b: b"GET / HTTP/1.1\r\n" + b)))
            def no_http(content: bytes) -> None:
                nonlocal raws
                raws += 1
                answer = raw(where, content)
                assert answer == b"" or answer.startswith(b"HTTP/1.1 401 ")

            before = known_answer()
            for attack in (authorized, anonymous, no_http):
                attack()
            assert known_answer() == before
    return {
        "requests_with_token": sum(seen["with"].values()),
        "requests_without_token": sum(seen["without"].values()),
        "raw": raws,
        "by_status": dict(sorted(seen["with"].items(), key=str)),
        "by_status_without_token": dict(seen["without"]),
        "server_errors": sum(n for status, n in seen["with"].items() if status != "cut off" and status >= 500),
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5000, help="with the token (default: %(default)s)")
    print(json.dumps(fuzz(parser.parse_args().requests)))
