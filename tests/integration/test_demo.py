import json

from oprd.cli import main
from oprd.miniature import demo
from oprd.miniature.task import held_out


def test_demo_compares_on_one_budget(tmp_path, monkeypatch, capsys):
    """The whole command, two updates a method and a few problems."""
    monkeypatch.setattr(demo, "SAMPLES", 2)
    monkeypatch.setattr(demo, "held_out", lambda: held_out()[:8])
    assert main(["demo", "--out", str(tmp_path), "--steps", "2", "--json"]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["model"] for row in rows] == ["teacher", "student", "OPRD", "OPD top-16"]
    assert rows[0]["Avg@2"] > 80 > rows[1]["Avg@2"]
    for row in rows:
        low, high = map(float, row["95 % interval"].split(" to "))
        assert low <= row["Avg@2"] <= high
        assert row["Best@2"] >= row["Avg@2"]
        assert row["mean length"] > 10
    assert all(row["seconds"] >= 0 for row in rows[2:])
    assert {path.stem for path in (tmp_path / "plots").iterdir()} >= {"accuracy", "cosine", "length"}
    assert f"Plots: {tmp_path}/plots" in captured.err
