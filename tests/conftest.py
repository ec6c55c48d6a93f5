"""Quiet, offline, one thread: what every test relies on."""

import atexit
import logging
import os
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="oprd-tests-")  # not among the curves of whoever runs the tests

import hypothesis
import pytest
import torch

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

# The same examples every time where a failure would stop others; fresh ones on people's machines.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """The command line takes over the project's logger; the next test gets it back."""
    events = logging.getLogger("oprd")
    before = events.handlers, events.propagate, events.level
    yield
    events.handlers, events.propagate = before[:2]
    events.setLevel(before[2])


@pytest.fixture
def mask_BT():
    """Four rows of eight: full, holes, short, nothing supervised."""
    return torch.tensor(
        [
            [1, 1, 1, 1, 1, 1, 1, 1],
            [0, 1, 1, 0, 0, 1, 0, 1],
            [0, 0, 0, 0, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ],
        dtype=torch.bool,
    )
