"""A service of a tiny teacher in a thread of this process, and a client of it: real sockets, no start-up time."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from oprd.serving.app import Service
from oprd.serving.client import Client
from oprd.serving.files import read_files
from oprd.serving.host import Host
from oprd.serving.remote import RemoteTeacher
from oprd.serving.server import bind, uvicorn_config
from tiny import tiny_model, tiny_tokenizer

TOKEN = "a-token-for-tests-only"


def host_of(folder, model=None, tokenizer=None, **limits):
    """A host of a tiny teacher whose files are written to ``folder``."""
    model = tiny_model(seed=1) if model is None else model
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Host(model, read_files(str(folder), None), **limits)


@contextmanager
def service_of(host, port=0, **limits):
    """The host's service on loopback; yields its address. Another host may take the port afterwards."""
    listening = bind("127.0.0.1", port)
    host.service = Service(host, **limits)
    server = uvicorn.Server(uvicorn_config(host.service.app(TOKEN), log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def remote_of(folder, model=None, tokenizer=None, **limits):
    """The stand-in of a teacher that is served."""
    with service_of(host_of(folder, model, tokenizer, **limits)) as url:
        client = Client(url, TOKEN, patience=5.0)
        try:
            yield RemoteTeacher(client)
        finally:
            client.close()
