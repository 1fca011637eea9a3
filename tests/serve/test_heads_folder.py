"""The folder of heads: committed at once, never torn, shared without loss."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.errors import ConfigError
from mtserve.serve.heads_folder import INDEX, HeadsFolder
from tests.crashes import Crash


def sent(folder: Path, content: str) -> Path:
    file = folder / "sent"
    file.write_text(content)
    return file


def held(folder: HeadsFolder) -> dict[str, str | None]:
    return {name: None if file is None else file.read_text() for name, file in folder.read().items()}


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors"))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["one", "two", None]), st.booleans()), max_size=8))
def test_it_holds_what_was_last_said_of_each_task_and_no_other_file(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, str | None, bool]]
) -> None:
    home = tmp_path_factory.mktemp("heads")
    folder, wanted = HeadsFolder(home / "heads"), dict[str, str | None]()
    for name, content, of_checkpoint in changes:
        wanted.pop(name, None)
        if content is not None:
            folder.put(name, sent(home, content))
            wanted[name] = content
        else:
            folder.remove(name, of_checkpoint=of_checkpoint)
            wanted |= {name: None} if of_checkpoint else {}
        assert held(HeadsFolder(home / "heads")) == wanted
    assert len(files(home / "heads")) == len([content for content in wanted.values() if content is not None])


def test_a_crash_at_any_moment_leaves_what_was_or_what_is_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash, seen = Crash(monkeypatch), set()
    for after in range(20):
        crash.run(lambda: None, after=1000)
        folder = HeadsFolder(tmp_path / str(after))
        folder.put("a", sent(tmp_path, "before"))
        ended = crash.run(lambda made=folder: made.put("a", sent(tmp_path, "after")), after=after)
        crash.run(lambda: None, after=1000)
        found = held(HeadsFolder(folder.path))
        assert found in ({"a": "before"}, {"a": "after"})
        seen.add(found["a"])
        folder.put("b", sent(tmp_path, "later"))  # and what the crash left is cleared away
        assert len(files(folder.path)) == 2
        if ended:
            break
    else:
        raise AssertionError("it never came to its end")
    assert seen == {"before", "after"}
    assert after >= 3


def test_several_that_share_a_folder_lose_nothing(tmp_path: Path) -> None:
    def change(who: int) -> None:
        folder = HeadsFolder(tmp_path / "heads")
        for number in range(10):
            file = tmp_path / f"sent-{who}-{number}"
            file.write_text(f"{who} {number}")
            folder.put(f"task{who}.{number}", file)

    threads = [threading.Thread(target=change, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held(HeadsFolder(tmp_path / "heads"))) == 40


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "list"),
        ("{", "Expecting"),
        (json.dumps({"format": 2, "heads": {}}), "format 2; this version reads format 1"),
        (json.dumps({"format": 1, "heads": {"a": "../b"}}), "is no file of the folder"),
        (json.dumps({"format": 1, "heads": {"A b": None}}), "is no task name"),
    ],
)
def test_another_index_is_one_sentence(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        HeadsFolder(tmp_path)
    assert str(caught.value).startswith("MTSERVE_HEADS: ")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        HeadsFolder(tmp_path / "file" / "heads")
