"""The model process: what it answers over its socket is what a model in the same process answers."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtserve.errors import (
    CapacityError,
    DeadlineError,
    InputError,
    MtserveError,
    NotFiniteError,
    OverloadedError,
    Problem,
    SetupError,
    TooLargeError,
    as_frame,
    of_frame,
)
from mtserve.serve import keeping, wire
from mtserve.serve.host import Host
from mtserve.serve.keeping import Keeper
from mtserve.serve.living import Living
from mtserve.serve.model import LocalModel
from mtserve.serve.process import facts_of, follow, hosted
from mtserve.serve.remote import RemoteModel, wait_for_facts
from mtserve.serve.table import Root

TEXT = "ana silva moved from porto to oslo"


@asynccontextmanager
async def between(living: Living, model: Any = None) -> AsyncIterator[tuple[RemoteModel, Path, asyncio.Event]]:
    """A model that asks, over a socket, the model of a table (or another), and what stops that."""
    with tempfile.TemporaryDirectory() as folder:
        path, stopped = Path(folder) / "socket", asyncio.Event()
        host = hosted(living) if model is None else Host(model, facts_of(living.base, living.live))
        answering = asyncio.create_task(host.serve(path, stopped=stopped))
        while not path.exists():
            await asyncio.sleep(0.01)
        try:
            yield RemoteModel(str(path), facts_of(living.base, living.live)), path, stopped
        finally:
            stopped.set()
            await answering


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def test_answers_are_those_of_the_model_in_process(living: Living) -> None:
    async def main() -> None:
        async with between(living) as (remote, _, _):
            await remote.check()
            for name, task in living.table.tasks.items():
                items, _ = task.task.kind.split(task.example()["inputs"])
                wanted, _ = await living.model.predict({name: None}, items, timeout_s=30)
                found, usage = await remote.predict({name: None}, items, timeout_s=30)
                assert found == wanted, name
                assert (usage.inputs, usage.tokens > 0) == (len(items), True)
            both = {"topic": {"top_k": 1}, "names": {}}
            found, usage = await remote.predict(both, [TEXT, "good"], timeout_s=30)
            assert found == (await living.model.predict(both, [TEXT, "good"], timeout_s=30))[0]
            assert usage.trunk_passes == 1

    run(main())


def test_streams_are_those_of_the_model_in_process(living: Living) -> None:
    async def read(model: Any) -> list[Any]:
        asked = {"forth": {"max_new_tokens": 5, "min_new_tokens": 5}}
        return [event async for event in model.stream(asked, ["good"], timeout_s=30)]

    async def main() -> None:
        async with between(living) as (remote, _, _):
            found = await read(remote)
            assert len(found) > 1
            assert found == await read(living.model)

    run(main())


def test_errors_are_those_of_the_model_in_process(living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failure(model: Any, asked: Any, items: Any, timeout_s: float = 30) -> tuple[Any, ...]:
        with pytest.raises(MtserveError) as caught:
            await model.predict(asked, items, timeout_s=timeout_s)
        error = caught.value
        return type(error), str(error), error.details(), getattr(error, "retry_after_s", None)

    async def main() -> None:
        async with between(living) as (remote, _, _):
            for asked, items in (
                ({"topic": None}, [3, TEXT, ""]),
                ({"topic": {"top_k": "x"}, "names": None}, [TEXT, {}]),
                ({"topic": None}, ["good " * 60] * 400),
            ):
                assert await failure(remote, asked, items) == await failure(living.model, asked, items)
            assert (await failure(remote, {"topic": None}, [TEXT], 0.0))[0] is DeadlineError
            monkeypatch.setattr(living.model.queues["topic"].scheduler, "max_queue_tokens", 0)
            kind, _, _, retry_after_s = await failure(remote, {"topic": None}, [TEXT])
            assert (kind, retry_after_s) == (OverloadedError, 1)
            found = await remote.predict({"forth": {"max_new_tokens": 1}}, ["good"], timeout_s=30)
            assert found[1].inputs == 1  # the others go on

    run(main())


class Held:
    """A model that answers when it is let, and knows what was given up."""

    def __init__(self) -> None:
        self.begun, self.given_up = 0, 0
        self.free = asyncio.Event()

    async def predict(self, asked: Any, items: Any, *, timeout_s: float, private: bool = False) -> Any:
        self.begun += 1
        try:
            if items != ["quick"]:
                await self.free.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if items == ["bug"]:
            raise ZeroDivisionError("a secret")
        return {"topic": [float("nan")] if items == ["no JSON"] else items}, (
            await LocalModel({}).predict({}, [], timeout_s=1)
        )[1]

    async def stream(self, asked: Any, items: Any, *, timeout_s: float) -> AsyncIterator[Any]:
        for number in range(1000):
            self.begun += 1
            try:
                yield number
                await asyncio.sleep(0.001)
            except (asyncio.CancelledError, GeneratorExit):
                self.given_up += 1
                raise


async def until(met: Any) -> None:
    while not met():
        await asyncio.sleep(0.005)


def test_questions_do_not_wait_for_each_other_and_those_nobody_waits_for_are_given_up(living: Living) -> None:
    async def main() -> None:
        held = Held()
        async with between(living, held) as (remote, _, _):
            slow = [asyncio.create_task(remote.predict({"topic": None}, [n], timeout_s=30)) for n in range(20)]
            await until(lambda: held.begun == 20)
            assert (await remote.predict({"topic": None}, ["quick"], timeout_s=30))[0] == {"topic": ["quick"]}
            for task in slow[::2]:
                task.cancel()
            await until(lambda: held.given_up == 10)
            async with aclosing(remote.stream({"topic": None}, [0], timeout_s=30)) as events:
                assert [await anext(events) for _ in range(3)] == [0, 1, 2]
            await until(lambda: held.given_up == 11)
            held.free.set()
            answers = await asyncio.gather(*slow, return_exceptions=True)
            assert [a[0]["topic"] for a in answers[1::2]] == [[n] for n in range(1, 20, 2)]  # each its own
            with pytest.raises(MtserveError, match="log has the reason") as caught:
                await remote.predict({"topic": None}, ["bug"], timeout_s=30)
            assert "secret" not in str(caught.value)
            with pytest.raises(MtserveError, match="log has the reason"):  # what is no JSON ends its question too
                await remote.predict({"topic": None}, ["no JSON"], timeout_s=30)
            assert not remote._connection._waiting  # type: ignore[union-attr]

    run(main())


def test_what_is_asked_on_a_connection_ends_with_it(living: Living) -> None:
    async def main() -> None:
        held = Held()
        async with between(living, held) as (remote, path, stopped):
            asked = [asyncio.create_task(remote.predict({"topic": None}, [n], timeout_s=30)) for n in range(3)]
            await until(lambda: held.begun == 3)
            remote._connection._writer.close()  # type: ignore[union-attr]
            await until(lambda: held.given_up == 3)
            for task in asked:
                with pytest.raises(CapacityError, match="model process ended"):
                    await task
            await remote.check()  # by a new connection
            another = RemoteModel(str(path), {"other": "facts", "live": {"number": 0}})
            with pytest.raises(CapacityError, match="replaced"):
                await another.check()
            stopped.set()
            await until(lambda: remote._connection.ended)  # type: ignore[union-attr]
            with pytest.raises(CapacityError, match="is being started"):
                await remote.predict({"topic": None}, ["quick"], timeout_s=30)

    run(main())


def test_a_process_that_hangs_is_not_waited_for(living: Living, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr("mtserve.serve.remote.MARGIN_S", 0.05)
        held = Held()
        async with between(living, held) as (remote, _, _):
            with pytest.raises(DeadlineError):
                await remote.predict({"topic": None}, [1], timeout_s=0.05)
            await until(lambda: held.given_up == 1)

    run(main())


problems = st.builds(
    Problem,
    st.text(st.characters(codec="utf-8")),
    st.none() | st.integers(0, 2**40),
    st.none() | st.text(st.characters(codec="utf-8")),
)
messages = st.text(st.characters(codec="utf-8"))
errors = (
    st.builds(InputError, st.lists(problems, min_size=1))
    | st.builds(OverloadedError, messages, retry_after_s=st.integers(1, 60))
    | st.builds(NotFiniteError, messages)
    | st.sampled_from([TooLargeError, CapacityError, DeadlineError, MtserveError]).flatmap(
        lambda kind: st.builds(kind, messages)
    )
)


@given(errors)
def test_errors_arrive_as_they_were(error: MtserveError) -> None:
    packed = wire.packed({"error": as_frame(error)})

    async def read() -> Any:
        reader = asyncio.StreamReader()
        reader.feed_data(packed)
        reader.feed_eof()
        return await wire.receive(reader)

    found = of_frame(asyncio.run(read())["error"])
    assert type(found) is type(error)
    assert (str(found), found.details(), found.status) == (str(error), error.details(), error.status)
    assert getattr(found, "retry_after_s", None) == getattr(error, "retry_after_s", None)


def test_frames_have_bounds() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        wire.length((wire.LARGEST + 1).to_bytes(wire.HEAD, "big"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        wire.packed({"x": float("nan")})


def test_a_workers_table_says_what_that_of_the_process_says(living: Living) -> None:
    facts = facts_of(living.base, living.live)
    made = follow(Root(), living.base.settings, "nowhere", facts)
    assert made.listing() == living.table.listing()
    facts["trunks"][0]["fingerprint"] = "other"  # type: ignore[index]
    with pytest.raises(SetupError, match="other checkpoints"):
        follow(Root(), living.base.settings, "nowhere", facts)


def test_facts_are_waited_for_until_the_parent_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parents = iter([1, 1, 1, 2])
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    with pytest.raises(SetupError, match="the server ended"):
        wait_for_facts(str(tmp_path / "nothing"))


def test_a_process_that_ends_is_started_again_until_the_keeper_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeping, "_PAUSE_S", 0.01)
    monkeypatch.setattr(keeping, "_LONGEST_PAUSE_S", 0.02)
    code = f"import sys, pathlib; pathlib.Path({str(tmp_path / 'log')!r}).open('a').write('x'); sys.stdin.read()"
    keeper = Keeper([sys.executable, "-c", code])

    def starts(count: int) -> subprocess.Popen[bytes]:
        end = time.monotonic() + 20
        while not ((tmp_path / "log").exists() and len((tmp_path / "log").read_text()) == count):
            assert time.monotonic() < end
            time.sleep(0.01)
        return keeper.process

    for count in (1, 2, 3):
        starts(count).kill()
    last = starts(4)
    keeper.end()
    assert last.returncode == 0
    assert caplog.text.count("is started again") == 3
    time.sleep(0.1)
    assert (tmp_path / "log").read_text() == "xxxx"
