import hashlib
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd.lineage import hashing
from oprd.lineage.hashing import (
    combined_hash,
    copy_folder,
    differences,
    file_hash,
    files_below,
    folder_hashes,
)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def write(folder, **files):
    """Files named with ``__`` for ``/`` and ``_dot_`` for a leading dot, which keywords cannot hold."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_a_file_is_hashed_by_content(tmp_path):
    content = os.urandom(1_000_003)  # several chunks and a rest
    (tmp_path / "weights").write_bytes(content)
    assert file_hash(tmp_path / "weights") == sha256(content)
    with pytest.raises(ValueError, match="There is no file"):
        file_hash(tmp_path / "gone")
    with pytest.raises(ValueError, match="There is no file"):
        file_hash(tmp_path)


def test_what_makes_a_model_is_hashed_and_nothing_beside_it(tmp_path):
    write(tmp_path, b=b"1", a=b"2", sub__c=b"3", sub__sub__d=b"4")
    write(tmp_path, _dot_hidden=b"5", sub___dot_git__e=b"6")
    for beside in (*hashing.SKIP, "sub/README.md"):
        (tmp_path / beside).write_bytes(b"7")
    found = folder_hashes(tmp_path)
    assert found == {"a": sha256(b"2"), "b": sha256(b"1"), "sub/c": sha256(b"3"), "sub/sub/d": sha256(b"4")}
    assert list(found) == sorted(found)
    assert folder_hashes(str(tmp_path), skip=[*hashing.SKIP, "a", "d"]).keys() == {"b", "sub/c"}
    assert "README.md" in folder_hashes(tmp_path, skip=())


def test_links_are_followed(tmp_path):
    write(tmp_path / "elsewhere", model=b"weights", more__config=b"{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model").symlink_to(tmp_path / "elsewhere" / "model")
    (folder / "more").symlink_to("../elsewhere/more")
    assert folder_hashes(folder) == {"model": sha256(b"weights"), "more/config": sha256(b"{}")}


def test_a_hub_cache_names_the_hash_of_large_files(tmp_path):
    large, small = sha256(b"what was downloaded"), hashlib.sha1(b"small").hexdigest()
    write(tmp_path / "blobs", **{large: b"not read", small: b"small"})
    write(tmp_path / "other", **{large: b"read"})
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{large}")
    (snapshot / "config.json").symlink_to(f"../../blobs/{small}")
    (snapshot / "elsewhere").symlink_to(f"../../other/{large}")
    assert folder_hashes(snapshot) == {
        "model.safetensors": large,
        "config.json": sha256(b"small"),
        "elsewhere": sha256(b"read"),
    }
    # The name is the Hub's word for a link; the blob itself is hashed like any file.
    assert folder_hashes(tmp_path / "blobs")[large] == sha256(b"not read")


def test_links_that_lead_nowhere_are_refused(tmp_path):
    write(tmp_path, a=b"1")
    (tmp_path / ".hidden").symlink_to("nothing")  # not looked at
    assert list(folder_hashes(tmp_path)) == ["a"]
    (tmp_path / "b").symlink_to("nothing")
    with pytest.raises(ValueError, match="/b is a link to nothing"):
        folder_hashes(tmp_path)
    (tmp_path / "b").unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to("..")
    with pytest.raises(ValueError, match="sub/up is a link to a folder that it lies in"):
        folder_hashes(tmp_path)


def test_folders_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        folder_hashes(tmp_path / "gone")
    write(tmp_path, README=b"")
    (tmp_path / "README").rename(tmp_path / "README.md")
    with pytest.raises(ValueError, match="holds no file of a model"):
        folder_hashes(tmp_path)
    with pytest.raises(ValueError, match="no hashes to combine"):
        combined_hash({})


texts = st.text(alphabet='ab",: []\\0é', max_size=4)


@given(st.dictionaries(texts, texts, min_size=1, max_size=3), st.dictionaries(texts, texts, min_size=1, max_size=3))
def test_combined_hashes_agree_where_the_pairs_do(one, other):
    assert (combined_hash(one) == combined_hash(other)) == (one == other)
    assert combined_hash(dict(reversed(one.items()))) == combined_hash(one)


def test_pairs_cannot_be_shifted_into_one_another():
    assert combined_hash({"a": "bc"}) != combined_hash({"ab": "c"})
    assert combined_hash({"a": "b", "c": "d"}) != combined_hash({"a": "d", "c": "b"})


def test_differences_are_named():
    assert differences({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "0", "d": "4"}) == [
        "b changed",
        "c is missing",
        "d was added",
    ]


def test_copies_hold_what_links_lead_to(tmp_path):
    source = write(tmp_path / "source", a=b"1", sub__b=b"2", _dot_hidden=b"3")
    (tmp_path / "outside").write_bytes(b"4")
    (source / "c").symlink_to("../outside")
    copy_folder(source, tmp_path / "target")
    copied = {name: (tmp_path / "target" / name).read_bytes() for name in files_below(tmp_path / "target", hidden=True)}
    assert copied == {"a": b"1", "sub/b": b"2", ".hidden": b"3", "c": b"4"}
    assert not any(path.is_symlink() for path in (tmp_path / "target").rglob("*"))


def test_needs_the_standard_library_alone():
    code = "import sys, oprd.lineage.hashing; print(any(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
