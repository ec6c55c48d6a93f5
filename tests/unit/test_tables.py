from oprd.insight.tables import format_table, run_summary


def test_one_row_is_printed_as_lines():
    row = {"loss": 0.123456, "steps": 200, "final": "runs/x", "cosine": None}
    assert format_table([row]) == "loss    0.1235\nsteps   200\nfinal   runs/x\ncosine  "


def test_columns_line_up():
    rows = [
        {"model": "teacher", "Avg@16": 98.04999, "length": 30},
        {"model": "OPD top-16", "Avg@16": 7.5, "length": 1234567},
    ]
    assert format_table(rows).splitlines() == [
        "model       Avg@16  length",
        "----------  ------  -------",
        "teacher     98.05   30",
        "OPD top-16  7.5     1234567",
    ]


def test_rows_with_different_columns():
    rows = [{"a": 1, "b": None}, {"a": 22, "c": 1e-7}, {"c": 12345.678, "b": "x"}]
    assert format_table(rows).splitlines() == [
        "a   b  c",
        "--  -  ---------",
        "1",
        "22     1e-07",
        "    x  1.235e+04",
    ]


def test_summary_takes_the_last_value_of_each():
    metrics = [
        {"step": 5, "loss": 0.5, "cosine": 0.7, "accuracy": 0.1, "tokens_per_second": 90.0},
        {"step": 10, "loss": 0.25, "cosine": 0.8, "completions/mean_length": 31.0, "completions/clipped_ratio": 0.0},
        {"step": 10, "train_runtime": 12.5, "loss": None},
    ]
    assert run_summary(metrics) == {
        "steps": 10,
        "loss": 0.25,
        "cosine": 0.8,
        "accuracy": 0.1,
        "mean length": 31.0,
        "cut off": 0.0,
        "tokens/s": 90.0,
        "seconds": 12.5,
    }


def test_summary_leaves_out_what_was_never_logged():
    assert run_summary([{"step": 3, "loss": 0.5, "learning_rate": 1e-5}]) == {"steps": 3, "loss": 0.5}
    assert run_summary([]) == {"steps": 0}
