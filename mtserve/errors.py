"""The exception tree: one class a cause, with its code and HTTP status. Knows nothing about HTTP or the terminal.

    MtserveError                      500 internal
    ├── RequestError                  400 bad_request        what a caller sent cannot be answered
    │   ├── InputError                422 invalid_input      an example or parameter is wrong; names each bad index
    │   ├── UnauthorizedError         401 unauthorized       no API key, or none that is known
    │   ├── UnknownTaskError          404 unknown_task
    │   ├── UnknownRouteError         404 not_found
    │   ├── MethodError               405 method_not_allowed
    │   ├── HeadError                 409 head_refused       a head that cannot come to, or leave, this server
    │   └── TooLargeError             413 too_large
    ├── NotFiniteError                500 not_finite         the model gave no numbers for this input
    ├── CapacityError                 503 unavailable        right request, wrong moment
    │   ├── OverloadedError           429 overloaded         the queue is full
    │   └── DeadlineError             504 deadline_exceeded
    └── SetupError                    500 setup              the command, its files or its installation; exit code 2
        ├── ConfigError               500 bad_config
        ├── CheckpointError           500 bad_checkpoint
        ├── ResolveError              500 model_not_found
        ├── ExportError               500 export_failed
        └── MissingExtraError         500 missing_extra

This table is the only place that knows statuses: the server reads `status` and `code` from the class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar


class MtserveError(Exception):
    """Base of all errors that this package raises on purpose; its text is meant to be read by a user."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500

    def details(self) -> dict[str, Any]:
        """JSON-ready fields that go beside `code` and `message` in an error body."""
        return {}


class RequestError(MtserveError):
    """The request cannot be answered as it was sent."""

    code = "bad_request"
    status = 400


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a request: where (`index` of the input, `field` inside it) and what."""

    message: str
    index: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        where = "" if self.index is None else f"input {self.index}: "
        return where + (f"{self.field}: " if self.field else "") + self.message


class InputError(RequestError):
    """Examples or parameters are wrong by schema or by domain; `problems` names every one that was found."""

    code = "invalid_input"
    status = 422

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))

    def at(self, index: int) -> InputError:
        """The same error, said of input number `index`."""
        return InputError(Problem(p.message, index, p.field) for p in self.problems)

    def details(self) -> dict[str, Any]:
        return {"problems": [{k: v for k, v in asdict(p).items() if v is not None} for p in self.problems]}


class UnauthorizedError(RequestError):
    """The request has no API key, or one that the server does not know."""

    code = "unauthorized"
    status = 401


class UnknownTaskError(RequestError):
    """No task has the name asked for; it may be that of one of the `chains`, which are asked elsewhere."""

    code = "unknown_task"
    status = 404

    def __init__(self, name: str, known: Iterable[str], *, chains: Iterable[str] = ()) -> None:
        self.known, of_chains = sorted(known), sorted(chains)
        if name in of_chains:
            asked = "among the tasks of POST /predict, of Engine.predict and of `mtserve score`"
            super().__init__(f"{name!r} is a chain of tasks, which is asked {asked}")
            return
        more = f"; chains: {', '.join(of_chains)}" if of_chains else ""
        super().__init__(f"unknown task {name!r}; this model has {', '.join(self.known) or 'no tasks'}{more}")

    def details(self) -> dict[str, Any]:
        return {"tasks": self.known}


class UnknownRouteError(RequestError):
    """No route has the path asked for."""

    code = "not_found"
    status = 404


class MethodError(RequestError):
    """The route exists, but not for this HTTP method."""

    code = "method_not_allowed"
    status = 405


class HeadError(RequestError):
    """A head cannot come to this server or leave it: it does not fit its trunk, its answers, or what is served."""

    code = "head_refused"
    status = 409


class TooLargeError(RequestError):
    """The request is larger than the server's limits allow."""

    code = "too_large"
    status = 413


class NotFiniteError(MtserveError):
    """The model's output for one input holds infinities or what is no number."""

    code = "not_finite"

    def __init__(self, task: str) -> None:
        super().__init__(f"task {task!r}: the model's output for this input holds numbers that are not finite")


class CapacityError(MtserveError):
    """The request is right, but the server cannot answer it now."""

    code = "unavailable"
    status = 503


class OverloadedError(CapacityError):
    """The queue of the trunk is full; nothing of the request was accepted. `retry_after_s`: when to try again."""

    code = "overloaded"
    status = 429

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineError(CapacityError):
    """The request waited or ran longer than its time limit."""

    code = "deadline_exceeded"
    status = 504


class SetupError(MtserveError):
    """A command, its files or the installation cannot do what was asked (exit code 2)."""

    code = "setup"


class ConfigError(SetupError):
    """A run configuration or an environment variable is wrong."""

    code = "bad_config"


class CheckpointError(SetupError):
    """A checkpoint is incomplete, damaged, of another format, or does not fit its trunk."""

    code = "bad_checkpoint"


class ResolveError(SetupError):
    """A model's location names nothing that can be loaded."""

    code = "model_not_found"


class ExportError(SetupError):
    """A checkpoint cannot become a bundle, or one that answers as it does."""

    code = "export_failed"


class MissingExtraError(SetupError):
    """A feature needs packages that an extra installs."""

    code = "missing_extra"

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs packages that are not installed: pip install 'mtserve[{extra}]'")


def as_frame(error: MtserveError) -> dict[str, Any]:
    """An error as JSON, of which `of_frame` makes it again."""
    frame: dict[str, Any] = {"code": error.code, "message": str(error), **error.details()}
    if isinstance(error, OverloadedError):
        frame["retry_after_s"] = error.retry_after_s
    return frame


def of_frame(frame: Mapping[str, Any]) -> MtserveError:
    """The error that a frame, or the `error` of an answer over HTTP, tells of."""
    message, kind = str(frame.get("message", "")), _classes().get(str(frame.get("code")), MtserveError)
    if issubclass(kind, InputError):
        return kind([Problem(**problem) for problem in frame.get("problems", ())] or message)
    if issubclass(kind, OverloadedError):
        return kind(message, retry_after_s=frame.get("retry_after_s", 1))
    error = kind.__new__(kind)  # their own arguments were for the message, which is made
    Exception.__init__(error, message)
    if isinstance(error, UnknownTaskError):
        error.known = list(frame.get("tasks", ()))
    return error


@cache
def _classes() -> dict[str, type[MtserveError]]:
    """Every class of error by its code."""
    found, left = {}, [MtserveError]
    while left:
        kind = left.pop()
        found[kind.code] = kind
        left += kind.__subclasses__()
    return found
