"""A server's tasks from Python: one class over HTTP. Knows no kind of task, and needs neither torch nor a server here.

What the server says went wrong arrives as the exception that the engine itself raises (`mtserve.errors`). A server that
is overloaded says when to ask again, and is asked again then.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from mtserve.errors import CapacityError, MtserveError, OverloadedError, of_frame

Parameters = Mapping[str, Any]


class Client:
    """A server at an address.

        with Client("http://localhost:3000") as client:
            client.predict("intent", "My parcel never came.")
            client.predict_tasks(["My parcel never came."], ["intent", "sentiment"])

    api_key    of a server that wants one
    timeout_s  for an answer, waiting for a server that is overloaded not included
    retries    how often a server that is overloaded (429) is asked again, after as many seconds as it says
    transport  of httpx, in place of the network

    All methods raise what the server says (InputError with every problem, UnknownTaskError, OverloadedError after the
    last retry, …), and CapacityError where nothing answers. An instance may be used by several threads.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url, self.retries = url.rstrip("/"), retries
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, transport=transport)

    def tasks(self) -> dict[str, dict[str, Any]]:
        """Kind, labels, options, metrics, an example and more of every task, by its name."""
        return {task["name"]: task for task in self._json("GET", "/tasks")["tasks"]}

    def is_ready(self) -> bool:
        """Whether the server would take a request now."""
        try:
            return self._http.get("/readyz").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def chains(self) -> dict[str, dict[str, Any]]:
        """What the server says of its chains, by name; `predict_tasks` asks them as it does tasks."""
        return {chain["name"]: chain for chain in self._json("GET", "/tasks")["chains"]}

    def predict(self, task: str, inputs: Any, parameters: Parameters | None = None) -> Any:
        """The answer of a task to an input, or of a list to each of its inputs, as `POST /tasks/TASK` gives it."""
        return self._json("POST", f"/tasks/{task}", {"inputs": inputs, "parameters": dict(parameters or {})})

    def predict_tasks(
        self, inputs: Any, tasks: Sequence[str], parameters: Mapping[str, Parameters] | None = None
    ) -> dict[str, list[Any]]:
        """By task, its predictions of an input, or of each of a list, which are encoded once. `parameters` are by
        task."""
        body = {"inputs": inputs, "tasks": tasks, "parameters": dict(parameters or {})}
        outputs: dict[str, list[Any]] = self._json("POST", "/predict", body)["outputs"]
        return outputs

    def stream(self, task: str, inputs: Any, parameters: Parameters | None = None) -> Iterator[dict[str, Any]]:
        """Events of one answer as it grows; the last has all of it. Closing the iterator gives the answer up."""
        body = {"inputs": inputs, "parameters": dict(parameters or {}), "stream": True}
        begun = False
        for left in range(self.retries, -1, -1):
            try:
                with self._http.stream("POST", f"/tasks/{task}", json=body) as answer:
                    if answer.is_error:
                        answer.read()
                        raise _error(answer)
                    for event in _events(answer):
                        begun = True
                        yield event
                    return
            except OverloadedError as error:
                _wait(error, 0 if begun else left)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error

    def push_head(self, task: str, file: Path, *, replace: bool = False, untuned: bool = False) -> dict[str, Any]:
        """Bring a head (`mtserve.head_file`) to the running server under this name, in the place of a task of that name
        if it is to `replace` it; what `tasks` says of it then. `api_key` is one of the operator's here.

        untuned   take a head that its checkpoint did not measure in the profile in which the server computes

        Raises HeadError where it does not fit; nothing has changed then.
        """
        flags = {"replace": str(replace).lower(), "untuned": str(untuned).lower()}
        found: dict[str, Any] = self._json("PUT", f"/admin/heads/{task}", content=file.read_bytes(), params=flags)
        return found

    def remove_head(self, task: str) -> list[str]:
        """Let a task leave the running server; the names of those that are left. `api_key` is one of the operator's."""
        left: list[str] = self._json("DELETE", f"/admin/heads/{task}")["tasks"]
        return left

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _json(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        for left in range(self.retries, -1, -1):
            try:
                answer = self._http.request(method, path, json=body, content=content, params=params)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            if not answer.is_error:
                return answer.json()
            told = _error(answer)
            if not isinstance(told, OverloadedError):
                raise told
            _wait(told, left)
        raise AssertionError("the last try raises")

    def _unreachable(self, error: httpx.HTTPError) -> CapacityError:
        return CapacityError(f"{self.url} does not answer: {error or type(error).__name__}")


def _wait(error: OverloadedError, left: int) -> None:
    """Until the server may be asked again. Raises the error where no try is left."""
    if not left:
        raise error
    time.sleep(error.retry_after_s)


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data:"):
            event = json.loads(line.removeprefix("data:"))
            if "error" in event:
                raise of_frame(event["error"])
            yield event


def _error(answer: httpx.Response) -> MtserveError:
    """What an answer that is none says went wrong; also where something else than an mtserve server says it."""
    try:
        told = answer.json()["error"]
        wait = {"retry_after_s": int(answer.headers.get("retry-after", 1))}
        return of_frame({**told, **wait})
    except (ValueError, KeyError, TypeError):
        found = f"HTTP {answer.status_code}: {answer.text[:200]}"
        return CapacityError(found) if answer.status_code in (502, 503, 504) else MtserveError(found)
