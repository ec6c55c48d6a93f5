import time

import pytest
import torch
from accelerate import Accelerator

from oprd.training.meters import Meters, Stopwatch


def pair(total, count):
    return torch.tensor(float(total)), torch.tensor(float(count))


def test_terms_add_up_within_a_step_and_average_over_steps():
    meters = Meters()
    for term in (1.0, 2.0, 5.0, 6.0):  # two steps of two micro-batches
        meters.add({"output": torch.tensor(term)}, {})
    assert meters.read(Accelerator(cpu=True), accumulation=2) == {"loss/output": pytest.approx(7.0)}


def test_averages_are_over_positions_not_over_micro_batches():
    meters = Meters()
    meters.add({}, {"cosine": pair(3.0, 3), "empty": pair(0, 0)})
    meters.add({}, {"cosine": pair(0.5, 1), "empty": pair(0, 0)})
    assert meters.read(Accelerator(cpu=True), accumulation=1) == {"cosine": pytest.approx(3.5 / 4)}


def test_reading_empties():
    meters = Meters()
    meters.add({"logit": torch.tensor(1.0)}, {"cosine": pair(1, 1)})
    meters.read(Accelerator(cpu=True), 1)
    assert meters.read(Accelerator(cpu=True), 1) == {}


def test_stopwatch_starts_again_when_read():
    watch = Stopwatch(torch.device("cpu"))
    started = watch.now()
    time.sleep(0.01)
    watch.seconds["rollout"] += watch.now() - started
    assert watch.read()["rollout"] >= 0.01
    assert watch.read() == {}
