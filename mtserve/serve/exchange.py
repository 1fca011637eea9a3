"""One HTTP request on its way: its id, and what becomes known of it for headers, log, metrics and spans. Knows no HTTP.

The front opens an exchange and closes it; routes between the two write down what they learn.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

_VALID_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass
class Exchange:
    """What is known of a request.

    request_id   the client's own where that is a plain one, else made up
    route        the template of its path, "" where no route took it
    tasks        names of the tasks that it asked for, those that there are
    usage        what it cost, once it is answered
    code         the error's, "" without one
    plain        whether an error is told as a text alone, as the Open Inference Protocol has it
    private      whether nothing of it may be kept for other requests
    inputs       as sent; only where texts are logged
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    route: str = ""
    tasks: tuple[str, ...] = ()
    usage: dict[str, int | float] = field(default_factory=dict)
    code: str = ""
    plain: bool = False
    private: bool = False
    inputs: Any = None


_current: ContextVar[Exchange | None] = ContextVar("mtserve_exchange", default=None)


def opened(request_id: str) -> Exchange:
    """A new exchange, the current one of this context from now on."""
    made = Exchange(request_id) if _VALID_ID.fullmatch(request_id) else Exchange()
    _current.set(made)
    return made


def exchange() -> Exchange:
    """The current exchange; one of its own where there is no front."""
    return _current.get() or opened("")
