"""A checkpoint that is sent to the hub once it is trained: what is sent, and what is said before hours of training."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.utils import filter_repo_objects

from mtserve.loading import load
from tests.training.conftest import Run
from training import push as pushing
from training.__main__ import main


class Hub:
    """Stands for the hub: keeps in a folder what it was sent, filtered as the real client filters."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.private, self.fails, self.known = folder, None, False, True

    def __call__(self) -> Hub:
        return self

    def whoami(self) -> dict[str, str]:
        if not self.known:
            raise LocalTokenNotFoundError("Token is required, but no token found.\nMore.")
        return {"name": "ana"}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private = private

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: Sequence[str], commit_message: str
    ) -> Any:
        if self.fails:
            raise OSError("the connection was lost")
        names = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=list(allow_patterns)):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.folder / name)
        return SimpleNamespace(commit_url=f"https://the-hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(pushing, "HfApi", made)
    return made


def test_what_is_sent_answers_as_what_was_trained(
    run_file: Run, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file({"topic": "classification"})
    assert main([str(path), "--push", "ana/topics"]) == 0
    assert "pushed to https://the-hub/ana/topics/commit/1" in capsys.readouterr().err
    assert hub.private is True
    assert load(hub.folder).predict("topic", ["good"]) == load(tmp_path / "out").predict("topic", ["good"])
    assert (hub.folder / "README.md").exists()
    (tmp_path / "out/trunk/optimizer.bin").write_bytes(b"a pickle")
    assert pushing.push(tmp_path / "out", "ana/topics").endswith("/commit/1")
    assert not (hub.folder / "trunk/optimizer.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--push", "not a name"], "--push not a name: "),
        (["--push", "ana/topics", "--plan"], "--push is of one checkpoint"),
        (["--push", "ana/topics", "--seeds", "2"], "--push is of one checkpoint"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_trained(
    run_file: Run, hub: Hub, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_file({"topic": "classification"})), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_sentence(
    run_file: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the real client, which lets errors of its HTTP library through."""
    monkeypatch.setattr(pushing, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_" + "x" * 20))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # offline, it says so itself
    assert main([str(run_file({"topic": "classification"})), "--push", "ana/topics"]) == 2
    assert "error: --push ana/topics: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_who_is_not_logged_in_hears_it_first_and_a_lost_connection_loses_no_checkpoint(
    run_file: Run, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, hub.known = run_file({"topic": "classification"}), False
    assert main([str(path), "--push", "ana/topics"]) == 2
    assert "Token is required, but no token found. (`hf auth login`, or HF_TOKEN)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    hub.known, hub.fails = True, True
    assert main([str(path), "--push", "ana/topics"]) == 2
    assert "is not on the hub: the connection was lost; push it again with `hf upload`" in capsys.readouterr().err
    assert load(tmp_path / "out").predict("topic", ["good"])
