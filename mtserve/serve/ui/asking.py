"""What a filled-in form asks, and its answer by the same path as over HTTP. Knows no Gradio."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from mtserve.errors import CapacityError, MtserveError, NotFiniteError, RequestError, UnknownTaskError
from mtserve.serve.answering import answer_items, answer_tasks, note_inputs, stream_task
from mtserve.serve.body import check_object
from mtserve.serve.exchange import exchange
from mtserve.serve.model import Usage
from mtserve.serve.table import Root, ServedTask, TaskTable
from mtserve.tasks.base import AnyKind

Body = Mapping[str, Any]
logger = logging.getLogger(__name__)


def body(kind: AnyKind, example: Mapping[str, Any], parameters: Mapping[str, Any], *, stream: bool = False) -> Body:
    """The body of a request for one example: a bare text where that is all there is of it."""
    bare = kind.takes_text and set(example) == {"text"}
    made: dict[str, Any] = {"inputs": example["text"] if bare else dict(example)}
    if parameters:
        made["parameters"] = dict(parameters)
    return {**made, "stream": True} if stream else made


@dataclass(frozen=True)
class Answer:
    """The prediction for one example, what the route makes of it, what it cost, and the task that gave it."""

    prediction: Any
    joined: Any
    usage: Usage
    served: ServedTask


async def ask(root: Root, name: str, asked: Body) -> Answer:
    """As POST /tasks/{name}. Raises what that answers with."""
    table, served = _checked(root, name, asked)
    kind = served.task.kind
    items, shape = kind.split(asked["inputs"])
    predictions, usage = await answer_items(table, served, items, asked.get("parameters", {}))
    return Answer(predictions[0], kind.join(predictions, shape), usage, served)


async def read_along(root: Root, name: str, asked: Body) -> AsyncGenerator[Any, None]:
    """As POST /tasks/{name} with `stream`. Closing the iterator gives the answer up."""
    table, served = _checked(root, name, asked)
    async with aclosing(stream_task(table, served, asked["inputs"], asked.get("parameters", {}))) as events:
        async for event in events:
            yield event


async def ask_several(root: Root, asked: Body) -> tuple[dict[str, list[Any]], Usage, Mapping[str, ServedTask]]:
    """As POST /predict; also the tasks of the table that answered."""
    table = root.table()
    check_object(asked, table.settings, fields=("inputs", "tasks"))
    note_inputs(table, asked)
    outputs, usage = await answer_tasks(table, inputs=asked["inputs"], tasks=asked["tasks"], parameters={})
    return outputs, usage, table.tasks


def _checked(root: Root, name: str, asked: Body) -> tuple[TaskTable, ServedTask]:
    table = root.table()
    served = table.task(name)
    exchange().tasks = (served.name,)
    table.model.refuse(served.key)
    check_object(asked, table.settings, fields=("inputs", "parameters", "stream"))
    note_inputs(table, asked)
    return table, served


def told(error: Exception) -> tuple[str, str]:
    """(code, sentence) of what went wrong; of what nobody expected, the log has the rest."""
    exchange().code = error.code if isinstance(error, MtserveError) else MtserveError.code
    if isinstance(error, UnknownTaskError):
        return error.code, f"{error}. Tasks of this server have changed: reload the page."
    if isinstance(error, (RequestError, CapacityError, NotFiniteError)):
        return error.code, str(error)
    number = exchange().request_id
    logger.error("request %s of the playground failed", number, exc_info=error)
    return MtserveError.code, f"internal error; the server's log has the reason under {number}"
