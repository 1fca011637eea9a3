"""Runs that are broken off anywhere, and what they refuse to go on with."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtserve.engine import Engine
from mtserve.errors import ConfigError
from mtserve.score import parts
from mtserve.score.cutting import Limits
from mtserve.score.parts import OutputError
from mtserve.score.run import Here
from tests.crashes import Crash
from tests.score.test_run import lines, make, run_once, scored, texts, write
from tests.tiny import tiny


@pytest.fixture(scope="module")
def encoder() -> Engine:
    return tiny("bert").engine


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "csv", "parquet"])
def test_a_run_that_crashes_anywhere_goes_on_to_the_same_bytes(
    encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    source = write(tmp_path / "in.jsonl", texts(13))
    run_once(encoder, source, tmp_path / f"whole.{ending}")
    wanted = (tmp_path / f"whole.{ending}").read_bytes()
    crash, after, done = Crash(monkeypatch), 0, False
    while not done:
        output = tmp_path / f"{after}" / f"out.{ending}"
        output.parent.mkdir()
        done = crash.run(lambda output=output: run_once(encoder, source, output), after=after)
        assert crash.run(lambda output=output: again(encoder, source, output), after=10_000)
        assert output.read_bytes() == wanted
        assert [path.name for path in output.parent.iterdir() if not path.name.endswith(".aside")] == [output.name]
        after += 1
    assert after > 8


def again(engine: Engine, source: Path, output: Path) -> None:
    """The same command once more, whose output may be there: a crash can come after it."""
    try:
        run_once(engine, source, output)
    except ConfigError as error:
        assert "is there already" in str(error)  # noqa: PT017


def test_what_was_committed_is_not_scored_again(
    encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(13)), tmp_path / "out.jsonl"
    assert not Crash(monkeypatch).run(lambda: run_once(encoder, source, output), after=1 + 2 + 1)
    monkeypatch.undo()
    before = encoder.counters.rows
    assert run_once(encoder, source, output).reused == 5
    assert encoder.counters.rows - before <= 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source: write(source, texts(12)), r"inputs\[0\].content: .*sha256"),
        (lambda source: {"keep": ("id",)}, r"settings.keep: null there, \[\"id\"\] now"),
        (lambda source: {"model": {"manifest": "other"}}, r"model.manifest: null there, \"other\" now"),
        (lambda source: {"limits": Limits(part_rows=7)}, r"cuts.part_rows: 5 there, 7 now"),
    ],
)
def test_a_run_of_something_else_is_refused(
    encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, said: str
) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(13)), tmp_path / "out.jsonl"
    assert not Crash(monkeypatch).run(lambda: run_once(encoder, source, output), after=5)
    monkeypatch.undo()
    more = change(source)
    more = more if isinstance(more, dict) else {}
    with pytest.raises(ConfigError, match=said):
        scored(encoder, source, output, "topic", "tags", **more)
    make(encoder, source, output, "topic", "tags", **more).score(Here(encoder), restart=True)
    assert len(lines(output)) in (12, 13)


def test_an_output_that_is_there_is_left_alone(encoder: Engine, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.jsonl"
    output.write_text("mine")
    with pytest.raises(ConfigError, match="is there already; --restart"):
        scored(encoder, source, output, "topic")
    assert output.read_text() == "mine"
    make(encoder, source, output, "topic").score(Here(encoder), restart=True)
    assert len(lines(output)) == 3


def test_a_damaged_part_is_found_and_made_anew(
    encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(13)), tmp_path / "out.jsonl"
    assert not Crash(monkeypatch).run(lambda: run_once(encoder, source, output), after=6)
    monkeypatch.undo()
    (tmp_path / "out.jsonl.parts" / "00000-000000.data").write_text("{}")
    with pytest.raises(Exception, match="is not as it was written; run the command again"):
        run_once(encoder, source, output)
    assert run_once(encoder, source, output).reused == 8
    assert [row["id"] for row in lines(output)] == list(range(13))


def test_two_runs_on_one_output_refuse_each_other(encoder: Engine, tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(3)), tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.parts").mkdir()
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    argv = [sys.executable, "-c", code, str(tmp_path / "out.jsonl.parts" / "lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ConfigError, match="another run writes"):
            scored(encoder, source, output, "topic")
        other.communicate("\n", timeout=30)
    scored(encoder, source, output, "topic")


def test_a_full_disk_is_said_and_costs_a_part(encoder: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write(tmp_path / "in.jsonl", texts(13)), tmp_path / "out.jsonl"
    put, left = parts.replace, iter(range(4))  # the key, a part with its receipt, a part

    def full(path: Path, content: bytes) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(path, content)

    monkeypatch.setattr(parts, "replace", full)
    with pytest.raises(OutputError, match=r"out.jsonl.parts cannot be written \(No space left on device\)"):
        run_once(encoder, source, output)
    monkeypatch.undo()
    assert run_once(encoder, source, output).reused == 5
    assert [row["id"] for row in lines(output)] == list(range(13))


def test_a_folder_that_may_not_be_written_is_said(encoder: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", texts(3))
    with pytest.raises(OutputError, match=r"in.jsonl/out.jsonl.parts cannot be written \(Not a directory\)"):
        run_once(encoder, source, source / "out.jsonl")
