"""The update-step benchmark: its workload, its methods against plain computations, and its command line end to end."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks are scripts of the repository, not part of the package

from benchmarks.update_step import counting, measure, workload  # noqa: E402
from benchmarks.update_step.given_states import given_states  # noqa: E402
from benchmarks.update_step.tables import tables  # noqa: E402

SHAPE = workload.SHAPES["tiny"]
LIGER = importlib.util.find_spec("liger_kernel") is not None
METHODS = measure.methods(SHAPE)
# What each method's loss is: reverse KL, on the student's top 16 or in full, or the sampled token's log-ratio.
SAME = {
    "full": ["TRL", "TRL, trimmed", "ours: full KL", "ours: full KL, padded", *(["Liger, trimmed"] if LIGER else [])],
    "top_16": ["naive top-16", "naive top-16, trimmed", "ours: top-16"],
    "sampled": ["naive top-1"],
}


@pytest.fixture(scope="module")
def rollouts():
    return workload.make_rollouts(SHAPE, 8)


@pytest.fixture(scope="module")
def models():
    models = workload.make_models(SHAPE, torch.float32)
    for model in (models.student, models.teacher):
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # so that the two differ
    return models


def plain(models, rollouts):
    """Each loss and its gradient at the student's head, one unpadded row at a time, every logit there."""
    total = sum(len(r["response"]) for r in rollouts)
    found = {}
    for kind in SAME:
        models.student.zero_grad()
        value = 0.0
        for rollout in rollouts:
            ids = torch.tensor([rollout["prompt"] + rollout["response"]])
            first = len(rollout["prompt"]) - 1
            log_p, log_q = (
                m(input_ids=ids, use_cache=False).logits[0, first:-1].log_softmax(-1)
                for m in (models.student, models.teacher)
            )
            log_q = log_q.detach()
            if kind == "sampled":
                tokens = torch.tensor(rollout["response"]).unsqueeze(-1)
                ratio = (log_p - log_q).gather(-1, tokens)
                loss = ratio.detach() * log_p.gather(-1, tokens)
                value += ratio.sum().item() / total
            else:
                cost = log_p.exp() * (log_p - log_q)
                if kind == "top_16":
                    cost = cost.gather(-1, log_p.topk(16, -1).indices)
                loss = cost
                value += cost.sum().item() / total
            (loss.sum() / total).backward()
        found[kind] = value, models.student.lm_head.weight.grad.clone()
    return found


@pytest.mark.parametrize("size", [1, 4])
def test_methods_agree_with_plain_computations(models, rollouts, size):
    expected = plain(models, rollouts)
    for kind, names in SAME.items():
        value, gradient = expected[kind]
        for name in names:
            method = METHODS[name]
            method.set_up(models)
            models.student.zero_grad()
            total = 0.0
            batches = workload.microbatches(rollouts, size, padded_to=method.padded_to)
            for batch in workload.packed_microbatches(rollouts, size) if method.packed else batches:
                loss = method.loss(models, method.prepare(batch))
                loss.backward()
                total += loss.item()
            assert total == pytest.approx(value, rel=1e-4), name
            torch.testing.assert_close(models.student.lm_head.weight.grad, gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_lengths_have_the_mean_and_the_maximum():
    for count in (32, 64, 1000):
        lengths = workload.response_lengths(count)
        assert sum(lengths) / count == pytest.approx(5_700, rel=0.02)
        assert max(lengths) <= 16_384
    assert max(workload.response_lengths(1000)) == 16_384


def test_rollouts_are_the_same_file_for_everybody(tmp_path, rollouts):
    workload.write_rollouts(tmp_path / "r.json", rollouts, seed=0)
    assert workload.read_rollouts(tmp_path / "r.json") == rollouts == workload.make_rollouts(SHAPE, 8)
    assert workload.make_rollouts(SHAPE, 8, seed=1) != rollouts


def test_padding_is_to_the_batch_or_to_the_microbatch(rollouts):
    longest = max(len(r["response"]) for r in rollouts)
    whole, trimmed = (list(workload.microbatches(rollouts, 1, padded_to=to)) for to in ("batch", "microbatch"))
    assert {b.completion_ids_BC.shape[1] for b in whole} == {longest}
    assert [b.completion_ids_BC.shape[1] for b in trimmed] == [len(r["response"]) for r in rollouts]
    assert all(b.mask_BS.sum() == t.mask_BS.sum() for b, t in zip(whole, trimmed, strict=True))
    with pytest.raises(ValueError, match="do not split"):
        list(workload.microbatches(rollouts, 3, padded_to="batch"))


def test_packed_microbatches_hold_every_rollout_once_within_the_budget(rollouts):
    longest = max(len(r["prompt"]) + len(r["response"]) for r in rollouts)
    batches = list(workload.packed_microbatches(rollouts, 1))
    assert len(batches) < len(rollouts)
    assert all(int(b.mask_BS.sum()) <= longest for b in batches)
    lengths = sorted(int(row.sum()) for b in batches for row in b.completion_mask_BC)
    assert lengths == sorted(len(r["response"]) for r in rollouts)


@pytest.mark.parametrize("name", METHODS)
def test_given_states_run_every_method(rollouts, name):
    method = METHODS[name]
    if reason := method.unavailable():
        pytest.skip(reason)
    batches = list(workload.microbatches(rollouts, 4, padded_to=method.padded_to))
    models = given_states(SHAPE, *measure.reading_size(batches, method.packed), torch.float32, "cpu")
    method.set_up(models)
    for batch in batches:
        method.loss(models, method.prepare(batch)).backward()
    assert (models.student.lm_head.weight.grad is not None) == method.head_trains


@pytest.mark.parametrize("name", METHODS)
def test_every_method_counts_on_fake_tensors(name):
    setting = measure.Setting(name, "tiny", dtype="bfloat16")
    row = counting.count(setting, columns=64, supervised=16)
    if "unavailable" in row:
        pytest.skip(row["unavailable"])
    assert row["peak_bytes"] > 0 and row["at_peak"]


def test_count_is_the_measured_peak():
    """Without padding, with float32 and eager folds left out, fake and real differ in nothing."""
    shape, columns, supervised = SHAPE, 64, 16
    setting = measure.Setting("ours: OPRD, padded", "tiny")
    counted = counting.count(setting, columns=columns, supervised=supervised)["peak_bytes"]
    models = workload.make_models(shape, torch.float32)
    measure.have_gradients(models.student)
    method = METHODS["ours: OPRD, padded"]
    method.set_up(models)
    prepared = method.prepare(counting.one_sequence(columns, supervised))
    with measure.LiveBytes() as memory:
        method.loss(models, prepared).backward()
    assert counted == pytest.approx(memory.peak, rel=0.02)  # the mask is looked at for real


def test_command_line_end_to_end(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.update_step",
        "--shape",
        "tiny",
        "--num-rollouts",
        "4",
        "--repeats",
        "1",
    ]
    command += ["--only", "TRL", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (row,) = (json.loads(line) for line in out.read_text().splitlines())
    assert row["seconds_min"] > 0 and row["peak_bytes"] > 0 and row["versions"]["trl"] and row["command"]
    assert "| TRL |" in done.stdout and tables([row]) in done.stdout


def test_end_to_end_samples_every_rollout_again(tmp_path, rollouts):
    path = tmp_path / "rollouts.json"
    workload.write_rollouts(path, rollouts)
    setting = measure.Setting("ours: OPRD", "tiny", phase="end to end", repeats=1, rollouts=str(path), time_only=True)
    row = measure.run(setting)
    assert row["generation_seconds"] > 0
    text = tables([row])
    assert "End to end" in text and f"{row['generation_seconds'] + row['seconds_median']:.2f}" in text


def test_reduced_tiles_are_taken_back():
    from trl.kernels import chunked_divergence

    counting.count(measure.Setting("TRL", "tiny"), columns=64, supervised=16)
    assert (chunked_divergence.TOKEN_CHUNK_SIZE, chunked_divergence.VOCAB_CHUNK_SIZE) == (4096, 32_768)
    assert chunked_divergence._stats_tile.__name__ == "_stats_tile"


def test_tables_tell_what_is_missing():
    about = {"shape": "tiny", "phase": "update", "device": "cpu", "microbatch": 1, "rollouts": "r.json"}
    text = tables(
        [
            {"method": "Liger, trimmed", "unavailable": "No module named 'liger_kernel'", **about},
            {"method": "naive top-1", "failed": "OutOfMemoryError", **about},
        ]
    )
    assert "not available: No module named 'liger_kernel'" in text and "failed: OutOfMemoryError" in text
