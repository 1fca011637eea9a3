"""Models in an object store and in BentoML's: fetched whole, kept, fetched anew when they change."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import mtserve
from mtserve import elsewhere
from mtserve.checkpoint import Checkpoint
from mtserve.errors import MissingExtraError, ResolveError
from mtserve.resolve import resolve
from tests.tiny import tiny, write_checkpoint

URL = "memory://bucket/models/tiny"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    """A store that holds a tiny checkpoint, and what a model has not."""
    write_checkpoint(tmp_path / "tiny", tiny("bert", only=("topic",)))
    system = fsspec.filesystem("memory")
    system.put(str(tmp_path / "tiny"), "/bucket/models/tiny", recursive=True)
    system.pipe_file("/bucket/models/tiny/pytorch_model.bin", b"a pickle")
    system.pipe_file("/bucket/models/other/mtserve.json", b"{}")
    yield system
    system.rm("/bucket", recursive=True)


def test_a_model_in_a_store_answers(store: Any, tmp_path: Path) -> None:
    here = mtserve.load(str(tmp_path / "tiny")).predict("topic", ["good"])
    assert mtserve.load(URL).predict("topic", ["good"]) == here
    assert mtserve.load(URL + "/").predict("topic", ["good"]) == here
    assert mtserve.load(f"file://{tmp_path}/tiny").predict("topic", ["good"]) == here


def test_it_is_fetched_once_and_never_a_pickle(store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(URL)
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert "mtserve.json" in names
    assert "pytorch_model.bin" not in names
    Checkpoint.open(folder).verify()
    monkeypatch.setattr(type(store), "get_file", None)
    assert resolve(URL) == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_what_is_changed_there_is_fetched_anew(store: Any) -> None:
    first = resolve(URL)
    store.pipe_file("/bucket/models/tiny/README.md", b"another card")
    second = resolve(URL)
    assert second != first
    assert (second / "README.md").read_text() == "another card"
    assert (first / "README.md").read_text() != "another card"


def test_what_breaks_off_leaves_nothing(store: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, left = type(store).get_file, iter(range(2))

    def broken(self: Any, *given: Any, **named: Any) -> None:
        if next(left, None) is None:
            raise OSError("the network is gone")
        fetch(self, *given, **named)

    monkeypatch.setattr(type(store), "get_file", broken)
    with pytest.raises(ResolveError, match=r"memory://bucket/models/tiny cannot be read: the network is gone"):
        resolve(URL)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()


def test_names_that_leave_the_folder_are_left_out(store: Any) -> None:
    class Odd:
        def find(self, path: str) -> list[str]:
            return [f"{path}/a.json", f"{path}/../b.json"]

    assert elsewhere._files(Odd(), "bucket") == {"a.json": "bucket/a.json"}


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("memory://bucket/nothing", ResolveError, "holds no model: no file of"),
        ("nothing://bucket/model", ResolveError, "nothing://bucket/model: Protocol not known"),
        ("s3://bucket/model", MissingExtraError, r"a model at s3:// needs packages .*mtserve\[s3\]"),
        ("bentoml:nothing:1", ResolveError, "BentoML's model store has no 'nothing:1'"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of BentoML's imports
def test_what_is_not_there(url: str, kind: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if url.startswith("s3"):
        monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(kind, match=said):
        resolve(url)


ROUND_TRIP = """
import shutil, sys, bentoml, mtserve
with bentoml.models.create("tiny") as made:
    shutil.copytree(sys.argv[1], made.path, dirs_exist_ok=True)
for tag in ("tiny", "tiny:latest", str(made.tag)):
    print(mtserve.load("bentoml:" + tag).predict("topic", ["good"])[0][0]["label"])
"""


def test_a_model_goes_through_bentomls_store(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny", tiny("bert", only=("topic",)))
    env = {**os.environ, "BENTOML_HOME": str(tmp_path / "bentoml"), "BENTOML_DO_NOT_TRACK": "True"}
    argv = [sys.executable, "-W", "ignore", "-c", ROUND_TRIP, str(tmp_path / "tiny")]
    said = subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout
    wanted = mtserve.load(str(tmp_path / "tiny")).predict("topic", ["good"])[0][0]["label"]
    assert said.split() == [wanted] * 3
