import struct

import pytest

from oprd.insight.plots import CURVES, plot_runs

ROWS = [{"step": 5, "loss": 0.5, "accuracy": 0.2}, {"step": 10, "loss": 0.25}, {"step": 15, "accuracy": 0.4}]


def png(path):
    """The bytes of a whole picture of a sensible size."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (912, 432)
    assert len(content) > 5000
    return content


def names(paths):
    return [path.name for path in paths]


def test_exactly_the_pictures_with_data(tmp_path):
    directory = tmp_path / "deep" / "plots"
    written = plot_runs({"one": ROWS, "two": [{"step": 5, "entropy/student": 1.5}]}, directory)
    assert names(written) == ["accuracy.png", "loss.png", "entropy.png"]
    assert sorted(directory.iterdir()) == sorted(written)
    assert len({png(path) for path in written}) == 3


def test_every_quantity(tmp_path):
    keys = ("accuracy", "cosine/layer_04", "completions/mean_length", "loss", "entropy/student", "overlap/top16")
    row = {"step": 1} | dict.fromkeys(keys, 0.5)
    assert names(plot_runs({"one": [row]}, tmp_path)) == [f"{name}.png" for name in CURVES]


@pytest.mark.parametrize("runs", [{}, {"one": []}, {"one": [{"step": 1, "learning_rate": 1e-5, "loss": None}]}])
def test_nothing_to_draw(tmp_path, runs):
    assert plot_runs(runs, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def picture(tmp_path):
    """The bytes of the picture that one run gives."""

    def draw(rows, **settings):
        (path,) = plot_runs({"run": rows}, tmp_path, **settings)
        return png(path)

    return draw


def test_the_cosine_is_that_of_the_highest_layer(picture):
    """Not the mean over layers, which a run without the state loss does not know; and layer 10 is above layer 2."""
    plain = [{"step": 1, "cosine/layer_10": 0.5}, {"step": 2, "cosine/layer_10": 0.75}]
    more = [row | {"cosine/layer_02": 0.1, "cosine": 0.3} for row in plain]
    assert picture(more) == picture(plain)
    assert picture([{"step": row["step"], "cosine/layer_10": 0.1} for row in plain]) != picture(plain)


def test_rows_without_the_value_leave_no_gap(picture):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "cosine/other": 1.0}, {"step": 3, "loss": 0.25}]
    assert picture(rows) == picture([rows[0], rows[2]])


def test_references_are_drawn_with_the_accuracy_only(picture):
    accuracy = [{"step": 1, "accuracy": 0.5}, {"step": 2, "accuracy": 0.6}]
    assert picture(accuracy, references={"teacher": 0.9}) != picture(accuracy)
    loss = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
    assert picture(loss, references={"teacher": 0.9}) == picture(loss)
