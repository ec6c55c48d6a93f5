import contextlib
import errno
import os
import re

import pytest

from oprd.durability import folders
from oprd.durability.checkpoint_files import Whole, checkpoints_of, newest_whole, rotate, whole
from oprd.durability.folders import CHECKSUMS, clean, damage, staged, staging_of, writing


def checkpoint(run, step, text="weights"):
    with staged(run / f"checkpoint-{step}", with_checksums=True) as staging:
        (staging / "model.safetensors").write_text(f"{text} {step}")
        (staging / "deep").mkdir()
        (staging / "deep" / "state.json").write_text("{}")
    return run / f"checkpoint-{step}"


def names(run):
    return sorted(path.name for path in run.iterdir())


def test_a_folder_appears_with_checksums_of_all_that_is_in_it(tmp_path):
    path = checkpoint(tmp_path, 2)
    assert damage(path) is None
    assert names(tmp_path) == ["checkpoint-2"]
    assert names(path) == [CHECKSUMS, "deep", "model.safetensors"]
    (path / "README.md").write_text("added later")
    assert damage(path) is None


def test_it_is_not_there_before_it_is_whole(tmp_path, monkeypatch):
    seen = []
    honest = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append((names(tmp_path), damage(a))), honest(a, b)))
    checkpoint(tmp_path, 2)
    assert seen == [([".saving-checkpoint-2"], None)]


def tear_missing(path):
    (path / "model.safetensors").unlink()


def tear_short(path):
    (path / "model.safetensors").write_text("w")


def tear_bits(path):
    text = (path / "model.safetensors").read_text()
    (path / "model.safetensors").write_text("x" + text[1:])


def tear_deep(path):
    (path / "deep" / "state.json").write_text("[]")


def tear_list(path):
    (path / CHECKSUMS).unlink()


def tear_half_list(path):
    (path / CHECKSUMS).write_text('{"files": {')


TORN = {
    tear_missing: r"model\.safetensors is missing",
    tear_short: r"model\.safetensors has 1 bytes, not 10",
    tear_bits: r"model\.safetensors has another content",
    tear_deep: r"deep/state\.json has another content",
    tear_list: r"checksums\.json is missing",
    tear_half_list: r"checksums\.json is broken",
}


@pytest.mark.parametrize("tear", TORN, ids=lambda f: f.__name__)
def test_a_torn_checkpoint_is_told_and_the_one_before_is_used(tmp_path, caplog, tear):
    before, path = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest_whole(tmp_path) == str(path)
    tear(path)
    with pytest.raises(ValueError, match=f"checkpoint-10 is damaged: {TORN[tear]}"):
        whole(path)
    with caplog.at_level("WARNING"):
        found = newest_whole(tmp_path)
    assert found == str(before) and isinstance(found, Whole)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(rf"checkpoint-10 \({TORN[tear]}.*checkpoint-9", line)


def test_none_whole_is_an_error_and_none_at_all_is_not(tmp_path):
    assert newest_whole(tmp_path) is None
    tear_short(checkpoint(tmp_path, 2))
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole: checkpoint-2"):
        newest_whole(tmp_path)
    with pytest.raises(ValueError, match="There is no checkpoint"):
        whole(tmp_path / "checkpoint-7")


def test_pickles_of_an_older_version_are_refused_not_read(tmp_path):
    checkpoint(tmp_path, 2)
    old = tmp_path / "checkpoint-4"
    old.mkdir()
    (old / "optimizer.pt").write_bytes(b"\x80\x04cposix\nsystem\n")
    for look in (lambda: newest_whole(tmp_path), lambda: whole(old)):
        with pytest.raises(ValueError, match=r"optimizer\.pt is a pickle.*model_name_or_path"):
            look()


def test_an_error_leaves_what_was_and_names_the_place(tmp_path):
    path = checkpoint(tmp_path, 2)
    told = "checkpoint-2 could not be written: No space left on device"
    with pytest.raises(OSError, match=told) as caught, staged(path, with_checksums=True) as staging:
        (staging / "half").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "the same command continues" in str(caught.value)
    assert names(tmp_path) == ["checkpoint-2"] and damage(path) is None
    with pytest.raises(KeyError), staged(path):
        raise KeyError("not about files")
    assert names(tmp_path) == ["checkpoint-2"]


def test_what_safetensors_says_of_a_full_disk_is_an_oserror(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(OSError, match="could not be written"), writing(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    with pytest.raises(ValueError, match="plain"), writing(tmp_path / "x"):
        raise ValueError("plain")


def test_replacing_keeps_one_of_the_two_at_every_moment(tmp_path, monkeypatch):
    """Stopped at each rename: after clearing away there is the old one or the new one, whole."""

    class Killed(BaseException):
        pass

    for moment in (1, 2, 3):
        run = tmp_path / str(moment)
        run.mkdir()
        checkpoint(run, 2, "old")
        calls = []
        honest = os.rename

        def rename(a, b, calls=calls, moment=moment, honest=honest):
            calls.append(1)
            if len(calls) == moment:
                raise Killed
            honest(a, b)

        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(folders.shutil, "rmtree", lambda *_, **__: None)  # a kill removes nothing
        with contextlib.suppress(Killed):
            checkpoint(run, 2, "new")
        monkeypatch.undo()
        clean(run)
        assert names(run) == ["checkpoint-2"] and damage(run / "checkpoint-2") is None
        expected = "old 2" if moment < 3 else "new 2"
        assert (run / "checkpoint-2" / "model.safetensors").read_text() == expected


def test_what_a_kill_left_is_cleared_and_told(tmp_path):
    assert clean(tmp_path) == []
    staging_of(tmp_path / "final").mkdir()
    assert clean(tmp_path) == [".saving-final"]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("there", "step", "best", "limit", "kept"),
    [
        ([2, 4, 6], 6, None, 2, [4, 6]),
        ([2, 4, 6], 6, 2, 2, [2, 6]),
        ([2, 4, 6], 6, 2, 1, [2, 6]),  # the newest, to go on from, and the best
        ([2, 4, 6], 6, None, None, [2, 4, 6]),
        ([2, 4, 6], 6, 6, 1, [6]),
        ([2, 6, 7, 12], 7, None, 2, [6, 7]),  # 12 is of a future that was given up
        ([98, 100], 100, None, 1, [100]),
    ],
)
def test_older_ones_go(tmp_path, there, step, best, limit, kept):
    for number in there:
        checkpoint(tmp_path, number)
    (tmp_path / "checkpoint-best").mkdir()
    rotate(tmp_path, step, best, limit)
    assert sorted(number for number, _ in checkpoints_of(tmp_path)) == kept
    assert (tmp_path / "checkpoint-best").exists()
