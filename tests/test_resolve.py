"""Where a model is: folders, and hub ids answered from a local hub cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtserve.errors import ConfigError, ResolveError
from mtserve.resolve import resolve
from mtserve.settings import read_settings


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == Path("owner/name")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("location", ["./nothing", "/no/such/folder", "~/no-such-folder", "a/b/c", "what is this", ""])
def test_what_is_neither_is_refused(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if location == "":
        assert resolve(location) == Path()  # the empty path is the current folder, as everywhere
        return
    with pytest.raises(ResolveError, match="does not exist; a model is a folder or a hub id"):
        resolve(location)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResolveError, match="is a file; a model is a folder"):
        resolve(tmp_path / "file")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one snapshot of owner/name, which is both its branch main and its tag v1."""
    home = tmp_path / "hub" / "models--owner--name"
    snapshot = home / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (home / "refs").mkdir()
    for ref in ("main", "v1"):
        (home / "refs" / ref).write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_hub_ids_with_and_without_revision(hub_cache: Path) -> None:
    assert resolve("owner/name") == hub_cache
    assert resolve("owner/name@v1") == hub_cache
    assert resolve("owner/name@" + "a" * 40) == hub_cache


def test_an_unknown_hub_id_says_so_in_one_line(hub_cache: Path) -> None:
    with pytest.raises(ResolveError, match="owner/other@v2 is neither a folder here nor a model on the hub") as caught:
        resolve("owner/other@v2")
    assert "\n" not in str(caught.value)


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTSERVE_MODEL", "runs/a, owner/b@v1")
    monkeypatch.setenv("MTSERVE_TIMEOUT_S", "2.5")
    found = read_settings()
    assert found.model == ("runs/a", "owner/b@v1")
    assert found.timeout_s == 2.5
    monkeypatch.setenv("MTSERVE_MODEL", '["a,b"]')
    assert read_settings().model == ("a,b",)
    monkeypatch.setenv("MTSERVE_MAX_BATCH_TOKENS", "none")
    with pytest.raises(ConfigError, match=r"MTSERVE_MAX_BATCH_TOKENS: .*valid integer.*; found 'none'"):
        read_settings()
