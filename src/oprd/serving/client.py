"""The run's end of the wire: one request, tried again while that can help, and checked before anybody uses its content."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import time
from typing import Any
from urllib.parse import urlsplit

from oprd.serving.server import check_installed
from oprd.serving.wire import CHECKSUM, PROTOCOL, TEACHER

logger = logging.getLogger(__name__)

FIRST_PATIENCE = 20.0  # seconds; a wrong address should not take long to be told
PATIENCE = 900.0  # a service that is started again has weights to load
READ_SECONDS = 600.0  # one forward, and those of other processes before it
AGAIN = frozenset({408, 429, 502, 503, 504})
MOST_REASON = 65_536


class _Later(Exception):
    """Something that may be over when it is tried again."""


class Rejected(ValueError):
    """An answer with a status that trying again does not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def check_url(url: str) -> str:
    """A service's address, without a slash at the end.

    Raises:
        ValueError: no http or https address, or one with a user, a query or a fragment in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"teacher_url: {error}.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("teacher_url must be an address such as http://127.0.0.1:8765.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "teacher_url must hold no user, password, query or fragment: the token is read from OPRD_TEACHER_TOKEN or "
            "teacher_token_file."
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Client:
    """Requests to one service about one teacher.

    Args:
        url: where it listens. token: what it wants to see.
        patience: seconds that a request is tried for; the first one of all at most `FIRST_PATIENCE`.

    Raises:
        ValueError: an address that cannot be, or packages that are not installed.
    """

    def __init__(self, url: str, token: str, *, patience: float = PATIENCE) -> None:
        check_installed()
        import httpx2

        self.url, self.patience = check_url(url), patience
        self.teacher: str | None = None  # who answers, from the first answer on
        self.seconds_waited = 0.0
        here = _is_loopback(self.url)
        if not here and self.url.startswith("http:"):
            logger.warning(
                f"{self.url} is not encrypted: token and states can be read on the way. Use https or an SSH tunnel."
            )
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {token}", "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(READ_SECONDS, connect=10.0, write=120.0),
            trust_env=not here,  # no proxy stands before this machine
        )

    def close(self) -> None:
        """Let the connections go."""
        self._http.close()

    def about(self) -> dict[str, Any]:
        """What the service says of its teacher.

        Raises:
            ValueError: another protocol, or not a service of this kind.
        """
        content = self.request("GET", "/v1/teacher", most_bytes=2**20, patience=min(FIRST_PATIENCE, self.patience))
        try:
            about = json.loads(content)
            protocol = about["protocol"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.url} is no oprd serve-teacher.") from error
        if protocol != PROTOCOL:
            raise ValueError(
                f"{self.url} speaks protocol {protocol}, and this oprd {PROTOCOL}: use one version of oprd."
            )
        return about

    def request(
        self,
        method: str,
        path: str,
        *,
        most_bytes: int,
        body: bytes | None = None,
        parameters: dict[str, str] | None = None,
        patience: float | None = None,
    ) -> bytes:
        """The whole content of an answer, of at most ``most_bytes``, as the service made it (by its sha256).

        Raises:
            ConnectionError: nothing came of it in all attempts.
            Rejected: the token, the request, or the answer is wrong, which another attempt would not change.
        """
        import tenacity

        patience = self.patience if patience is None else patience
        started, attempts = time.monotonic(), 0
        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Later),
            stop=tenacity.stop_before_delay(patience),
            wait=tenacity.wait_exponential_jitter(initial=0.25, max=5.0, jitter=1.0),
            before_sleep=self._say_that_it_waits,
            reraise=True,
        )
        try:
            for attempt in again:
                with attempt:
                    attempts += 1
                    return self._once(method, path, most_bytes, body, parameters)
        except _Later as error:
            elapsed = time.monotonic() - started
            raise ConnectionError(
                f"The teacher at {self.url} gave no answer in {attempts} attempts over {elapsed:.0f} s (last: {error}). Is "
                "oprd serve-teacher running there? The same command continues from the last checkpoint."
            ) from error
        raise AssertionError("tenacity returned without an answer")

    def _say_that_it_waits(self, state: Any) -> None:
        if state.attempt_number in (1, 4) or state.attempt_number % 10 == 0:
            logger.warning(f"The teacher at {self.url} does not answer ({state.outcome.exception()}); trying again.")

    def _once(
        self, method: str, path: str, most_bytes: int, body: bytes | None, parameters: dict[str, str] | None
    ) -> bytes:
        import httpx2

        try:
            with self._http.stream(method, self.url + path, content=body, params=parameters) as response:
                status = response.status_code
                limit = most_bytes if status < 300 else MOST_REASON
                content = bytearray()
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) > limit:
                        raise Rejected(
                            f"The answer of {self.url} is longer than the {limit:,} bytes it may have.", status
                        )
        except httpx2.TransportError as error:
            raise _Later(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        if status in AGAIN:
            raise _Later(f"status {status}")
        if status == 401:
            raise Rejected(
                f"{self.url} refuses the token: OPRD_TEACHER_TOKEN or teacher_token_file must hold that of oprd serve-teacher.",
                status,
            )
        self._check_teacher(response.headers.get(TEACHER), status)
        if status >= 300:
            raise Rejected(f"The teacher at {self.url} refuses: {_reason(bytes(content), status)}.", status)
        digest = response.headers.get(CHECKSUM)
        if digest is not None and digest != hashlib.sha256(content).hexdigest():
            raise _Later("the answer was damaged on its way")
        if digest is None and path != "/v1/teacher" and content:
            raise Rejected(f"The answer of {self.url} has no checksum.", status)
        return bytes(content)

    def _check_teacher(self, found: str | None, status: int) -> None:
        if found is None:
            raise Rejected(f"{self.url} is no oprd serve-teacher (status {status} without {TEACHER}).", status)
        if self.teacher is None:
            self.teacher = found
        elif found != self.teacher:
            raise Rejected(
                f"Another teacher answers at {self.url} now: {found[:12]}, not {self.teacher[:12]}. Serve the one that the run "
                "began with (same weights, tokenizer and --dtype), or start a new run.",
                status,
            )


def _reason(content: bytes, status: int) -> str:
    try:
        return str(json.loads(content)["error"])[:500].rstrip(".")
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
