import time

import pytest
import torch
from accelerate import Accelerator

from oprd.training.meters import Meters, Stopwatch


def pair(total, count):
    return torch.tensor(float(total)), torch.tensor(float(count))


def read(meters, accumulation=1):
    return meters.read(Accelerator(cpu=True), accumulation)


@pytest.mark.parametrize(
    "batches", [[[1.0], [2.0], [5.0], [6.0]], [[1.0], [0.5, 1.5], [2.0, 0.0, 3.0], [6.0]]], ids=str
)
def test_terms_add_up_within_a_step_and_average_over_steps(batches):
    """Two steps of two batches, each of one micro-batch or of several."""
    meters = Meters()
    for batch in batches:
        for term in batch:
            meters.add({"output": torch.tensor(term)}, {})
        meters.end_batch()
    assert read(meters, accumulation=2) == {"loss/output": pytest.approx(7.0)}


def test_averages_are_over_positions_not_over_micro_batches():
    meters = Meters()
    for _ in range(2):
        meters.add({}, {"cosine": pair(3.0, 3), "empty": pair(0, 0)})
        meters.add({}, {"cosine": pair(0.5, 1), "empty": pair(0, 0)})
        meters.end_batch()
    assert read(meters) == {"cosine": pytest.approx(3.5 / 4)}


def test_a_micro_batch_may_lack_what_another_has():
    meters = Meters()
    meters.add({"output": torch.tensor(1.0)}, {"cosine": pair(1.0, 2)})
    meters.add({"output": torch.tensor(2.0), "logit": torch.tensor(4.0)}, {"entropy/student": pair(3.0, 2)})
    meters.end_batch()
    assert read(meters) == {"loss/output": 3.0, "loss/logit": 4.0, "cosine": 0.5, "entropy/student": 1.5}


def test_reading_empties():
    meters = Meters()
    meters.add({"logit": torch.tensor(1.0)}, {"cosine": pair(1, 1)})
    meters.end_batch()
    assert read(meters) != {}
    assert read(meters) == {}


def test_stopwatch_starts_again_when_read():
    watch = Stopwatch(torch.device("cpu"))
    started = watch.now()
    time.sleep(0.01)
    watch.seconds["rollout"] += watch.now() - started
    assert watch.read()["rollout"] >= 0.01
    assert watch.read() == {}
