import json
import logging

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from oprd.commands.shared import show_events
from oprd.training.callbacks import MetricsFile, ProgressLine, read_metrics


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def log(args, *steps, start=0, main=True, seed="loss"):
    """A run from ``start`` that logs at ``steps``."""
    callback, control = MetricsFile(), TrainerControl()
    state = TrainerState(global_step=start, is_world_process_zero=main)
    callback.on_train_begin(args, state, control)
    for step in steps:
        state.global_step = step
        callback.on_log(args, state, control, logs={seed: step / 4})


def test_one_object_a_log_at_once(args, path):
    callback, state = MetricsFile(), TrainerState()
    callback.on_train_begin(args, state, TrainerControl())
    assert path.read_text() == ""
    state.global_step = 5
    callback.on_log(args, state, TrainerControl(), logs={"loss": 0.5, "cosine": 0.25})
    assert path.read_text() == '{"step": 5, "loss": 0.5, "cosine": 0.25}\n'
    callback.on_log(args, state, TrainerControl(), logs={})
    callback.on_log(args, state, TrainerControl(), logs=None)
    callback.on_log(args, state, TrainerControl(), logs={"accuracy": 1.0})
    assert read_metrics(path) == [{"step": 5, "loss": 0.5, "cosine": 0.25}, {"step": 5, "accuracy": 1.0}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_metrics(path)


def test_a_fresh_run_starts_the_file_again(args, path):
    log(args, 5, 10)
    log(args, 2, seed="other")
    assert read_metrics(path) == [{"step": 2, "other": 0.5}]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_fresh_run_does_not_read_what_was_there(args, path):
    log(args, 0, 5)  # an evaluation before the first step logs at step 0
    path.write_text(path.read_text() + "not JSON\n{}\n")
    log(args)
    assert path.read_text() == ""


def test_a_resumed_run_keeps_what_its_checkpoint_has_seen(args, path):
    log(args, 4, 8, 12, 16)
    log(args, 12, 16, start=8, seed="again")
    assert read_metrics(path) == [
        {"step": 4, "loss": 1.0},
        {"step": 8, "loss": 2.0},
        {"step": 12, "again": 3.0},
        {"step": 16, "again": 4.0},
    ]


def test_a_checkpoint_counts_the_lines_that_it_has_seen(args, path):
    """Two lines of one step, one before and one after the checkpoint; and what was logged after the last step."""
    first, state = MetricsFile(), TrainerState()
    first.on_train_begin(args, state, TrainerControl())
    for step, name in ((4, "loss"), (8, "loss"), (8, "eval_loss")):
        state.global_step = step
        first.on_log(args, state, TrainerControl(), logs={name: 1.0})
    counted = json.loads(json.dumps(first.state()))
    first.on_log(args, state, TrainerControl(), logs={"train_loss": 1.0})
    again = MetricsFile()
    resumed = TrainerState(global_step=8, stateful_callbacks={"MetricsFile": counted})
    again.on_train_begin(args, resumed, TrainerControl())
    again.on_log(args, resumed, TrainerControl(), logs={"train_loss": 1.0})
    assert [sorted(row)[-1 if "train_loss" in row else 0] for row in read_metrics(path)] == [
        "loss", "loss", "eval_loss", "train_loss"
    ]  # fmt: skip
    assert again.state()["attributes"]["lines"] == 4


def test_a_full_disk_is_told_with_the_file(args, path, monkeypatch):
    log(args, 4)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    callback = MetricsFile()
    callback.lines = 1
    with pytest.raises(OSError, match=r"metrics\.jsonl could not be written: No space left on device"):
        callback.on_log(args, TrainerState(global_step=8), TrainerControl(), logs={"loss": 1.0})
    monkeypatch.undo()
    assert read_metrics(path)[0] == {"step": 4, "loss": 1.0}


def test_a_resumed_run_without_a_file_starts_one(args, path):
    log(args, 12, start=8)
    assert read_metrics(path) == [{"step": 12, "loss": 3.0}]


def test_only_the_main_process_writes(args, path):
    log(args, 4, 8)
    log(args, 4, main=False)
    assert [row["step"] for row in read_metrics(path)] == [4, 8]


def test_a_last_line_half_written_is_passed_over(args, path):
    log(args, 4, 8)
    whole = path.read_text()
    for cut in range(1, len('{"step": 8, "loss": 2.0}')):
        path.write_text(whole[: -1 - cut])
        assert read_metrics(path) == [{"step": 4, "loss": 1.0}]
    log(args, 8, start=4, seed="again")
    assert read_metrics(path) == [{"step": 4, "loss": 1.0}, {"step": 8, "again": 2.0}]


def test_a_broken_line_before_the_last_is_an_error(args, path):
    log(args, 4, 8, 12)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        read_metrics(path)
    with pytest.raises(ValueError, match="line 2"):
        log(args, start=8)
    assert path.read_text().splitlines()[2] == lines[2]  # a refused run leaves the file alone


def test_no_file_no_lines(path):
    assert read_metrics(path) == []


def test_an_event_has_a_line_of_its_own(args, capsys):
    show_events()
    bar, state = ProgressLine("OPRD"), TrainerState(max_steps=4, is_world_process_zero=True)
    logging.getLogger("oprd.training").info("before")
    bar.on_train_begin(args, state, TrainerControl())
    bar.training_bar.update(1)
    logging.getLogger("oprd.training").info("beside")
    bar.on_train_end(args, state, TrainerControl())
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert [line for line in lines if "oprd:" in line] == ["oprd: before", "oprd: beside"]


def test_the_bar_of_a_resumed_run_counts_its_own_steps_only(args):
    bar, state = ProgressLine(), TrainerState(max_steps=40, global_step=30, is_world_process_zero=True)
    bar.on_train_begin(args, state, TrainerControl())
    state.global_step += 1
    bar.on_step_end(args, state, TrainerControl())
    shown = bar.training_bar.format_dict
    assert (shown["initial"], shown["n"], shown["total"]) == (30, 31, 40)
    bar.on_train_end(args, state, TrainerControl())


def test_the_bar_shows_the_latest_numbers(args, capsys):
    bar, state = ProgressLine("OPRD"), TrainerState(max_steps=4, is_world_process_zero=True)
    bar.on_train_begin(args, state, TrainerControl())
    bar.on_log(args, state, TrainerControl(), logs={"loss": 0.12345, "accuracy": 0.5, "learning_rate": 1e-5})
    assert bar.training_bar.desc == "OPRD: "
    assert bar.training_bar.postfix == "loss=0.123, acc=0.5"
    bar.on_log(args, state, TrainerControl(), logs={"learning_rate": 1e-5})  # nothing to show: stays
    assert bar.training_bar.postfix == "loss=0.123, acc=0.5"
    bar.on_train_end(args, state, TrainerControl())
    assert "OPRD" in capsys.readouterr().err
