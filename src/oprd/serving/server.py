"""From options to a running service: the port first, then the weights, then requests, until a signal."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from importlib.util import find_spec
from typing import Any

from oprd.serving.secret import new_token, read_token

logger = logging.getLogger(__name__)

PACKAGES = ("starlette", "uvicorn", "httpx2", "tenacity")


def check_installed() -> None:
    """The packages of the extra are there.

    Raises:
        ValueError: with the command that installs them.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f'A teacher elsewhere needs {", ".join(missing)}: pip install "oprd[serve]".')


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in it until there is a teacher to answer them.

    Raises:
        ValueError: a busy port, or an address that is not this machine's.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"--port must lie in 0..65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(128)
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"Cannot listen on {host} port {port}: {reason}. Choose another --port or --host.") from error
    return made


def serve(
    model: str,
    *,
    host: str,
    port: int,
    token_file: str | None,
    revision: str | None,
    trust_remote_code: bool,
    **loading: Any,
) -> None:
    """Hold a teacher and answer questions about it until SIGTERM or Ctrl-C; the forward in progress is finished.

    Args:
        loading: further arguments of `oprd.serving.host.Host.load`.

    Raises:
        ValueError: anything that is wrong with the options, before weights are loaded.
    """
    check_installed()
    token = read_token(token_file)
    with bind(host, port) as listening, _Stopping() as stopping:
        from oprd.serving.host import Host, check_model

        path = check_model(model, revision, trust_remote_code)
        _say_where(listening)
        token = token or _show_new_token()
        held = Host.load(path, revision=revision, trust_remote_code=trust_remote_code, **loading)
        about = held.about
        logger.info(f"{model} in {about['dtype']} on {held.device}, fingerprint {about['fingerprint']}: ready.")
        _run(held, token, listening, stopping)
    logger.info("Stopped.")


def _say_where(listening: socket.socket) -> None:
    address, port = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    logger.info(f"Listening on http://{shown}:{port}; it answers once the weights are loaded.")
    if not ipaddress.ip_address(address).is_loopback:
        logger.warning(
            "Other machines can reach this, and nothing is encrypted: put a proxy with TLS or an SSH tunnel in front of it "
            "where the network is not yours."
        )


def _show_new_token() -> str:
    from oprd.serving.secret import VARIABLE

    token = new_token()
    print(f"{VARIABLE}={token}", flush=True)  # once, and to nobody's log
    return token


class _Stopping:
    """What a signal does while uvicorn does not listen for it: before, the process ends at once; afterwards, nothing, for
    uvicorn raises again what it was stopped by."""

    def __enter__(self) -> _Stopping:
        self.is_over = False
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, *_: object) -> None:
        if not self.is_over:
            raise SystemExit(0)


def uvicorn_config(app: Any, **settings: Any) -> Any:
    """How uvicorn serves the application: HTTP/1.1 only, and what is no HTTP gets no answer at all."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Silent(H11Protocol):
        def send_400_response(self, msg: str) -> None:  # comes before any token could be read
            self.transport.close()

    return uvicorn.Config(
        app,
        http=Silent,
        ws="none",
        lifespan="off",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        **{"log_level": "warning", **settings},
    )


def _run(held: Any, token: str, listening: socket.socket, stopping: _Stopping) -> None:
    import uvicorn

    from oprd.serving.app import Service

    service = Service(held)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            stopping.is_over = True
            service.stop()
            super().handle_exit(sig, frame)

    Server(uvicorn_config(service.app(token))).run(sockets=[listening])
