"""The BentoML service: process, health, metrics and two native APIs around the routes. All else knows no BentoML.

`bentoml serve mtserve.serve.service:service` with MTSERVE_MODEL set, or `bentoml serve` beside `bentofile.yaml`.
Importing loads nothing: the parent process, which only watches its worker, and `bentoml build` import this module too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import bentoml
from bentoml._internal import server as bentoml_server
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.resource import system_resources
from bentoml._internal.utils.analytics import usage_stats
from bentoml.images import Image
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mtserve.errors import CapacityError, ConfigError, MtserveError, SetupError
from mtserve.serve import replies
from mtserve.serve.access import Lines, access
from mtserve.serve.answering import answer_tasks
from mtserve.serve.app import PREDICT_FIELDS, make_app
from mtserve.serve.body import check_object
from mtserve.serve.exchange import Exchange
from mtserve.serve.front import Front
from mtserve.serve.keeping import MODEL_SOCKET, keep_model, make_home, use_home
from mtserve.serve.loading import check_settings, load
from mtserve.serve.metrics import metrics
from mtserve.serve.process import follow
from mtserve.serve.remote import wait_for_facts
from mtserve.serve.supervision import give_up, refuse, supervise
from mtserve.serve.table import Root, TaskTable
from mtserve.serve.ui.mounted import Playground
from mtserve.settings import Settings, read_settings
from mtserve.share import wait_briefly

MARGIN_S = 30.0
"""By how much BentoML's own timeout is longer than ours, so that ours answers first."""


def _settings() -> Settings:
    """For what BentoML wants to know when this is imported. A wrong setting is reported when the server starts."""
    try:
        return read_settings()
    except ConfigError:
        return Settings.model_construct()


def do_not_track() -> None:
    """BentoML tells its makers how it is used, unless `BENTOML_DO_NOT_TRACK` says not to; it has read that already when
    this is imported, and keeps what it found. Here it is off unless the operator has turned it on."""
    os.environ.setdefault(usage_stats.BENTOML_DO_NOT_TRACK, "True")
    usage_stats.do_not_track.cache_clear()


def _speak() -> None:
    """Say what this package logs where BentoML says what it does."""
    ours, theirs = logging.getLogger("mtserve"), logging.getLogger("bentoml")
    if theirs.handlers and not ours.handlers:
        ours.handlers = [*theirs.handlers]
        ours.propagate = False
        ours.setLevel(theirs.level)
    if not access.handlers:  # its lines are JSON, with nothing before them
        access.addHandler(Lines(sys.stdout))
        access.propagate = False


def _workers(service: str) -> int:
    """How many workers of a service share this machine, whoever set their number."""
    found = BentoMLContainer.config.services.get().get(service, {}).get("workers") or 1
    return int(system_resources()["cpu"]) or 1 if found == "cpu_count" else int(found)


def _prepare(service: str) -> None:
    """In the parent, before any worker starts. Ends the process where the settings or checkpoints are at fault."""
    try:
        check_settings(read_settings())
    except SetupError as error:
        refuse(error)
    if supervise():
        wait_briefly()
        make_home()
        if _workers(service) > 1:
            keep_model()


def _table(root: Root, settings: Settings, service: str) -> TaskTable:
    """Loaded in this process; or, where several workers share one that has the model, of that one. The root is told
    what changes it."""
    use_home()
    if MODEL_SOCKET in os.environ:
        path = os.environ[MODEL_SOCKET]
        return follow(root, settings, path, wait_for_facts(path))
    living = load(settings, workers=_workers(service), observer=metrics().observer)
    living.serve(root)
    metrics().publish(living.table)
    return living.table


def make_service(*, image: Image | None = None) -> Any:
    """A BentoML service with a root of its own; its weights are loaded when a worker makes the instance. `image` says
    in Python what a bento installs, in place of a bentofile."""
    root, settings = Root(), _settings()

    class Mtserve:
        """One encoder, every task. Routes, schemas and examples are at /docs."""

        def __init__(self) -> None:
            _speak()
            try:
                found = read_settings()
                table = _table(root, found, made.name)
            except SetupError as error:
                give_up(error)
                raise
            _open(playground)
            access.setLevel(logging.INFO if found.access_log else logging.WARNING)
            root.swap(table)
            root.drain.hold_back_sigterm(found.grace_s)

        @bentoml.on_deployment  # type: ignore[untyped-decorator]
        @staticmethod
        def check() -> None:
            """Before any worker starts: end with one sentence if it could not serve."""
            _prepare(made.name)

        @bentoml.on_shutdown  # type: ignore[untyped-decorator]
        async def close(self) -> None:
            table = root.swap(None)
            if table is not None:
                await asyncio.to_thread(table.model.close)

        async def __is_ready__(self) -> bool:
            try:
                await root.check()
            except CapacityError as error:
                raise HTTPException(status_code=error.status, detail=str(error)) from error
            return True

        @bentoml.api(route="/native/predict")  # type: ignore[untyped-decorator]
        async def predict(self, inputs: Any, tasks: Any, parameters: Any = None) -> Any:
            """As POST /predict, for BentoML's clients."""
            given = {"inputs": inputs, "tasks": tasks, "parameters": {} if parameters is None else parameters}
            try:
                table = root.table()
                check_object(given, table.settings, fields=PREDICT_FIELDS)
                outputs, usage = await answer_tasks(table, inputs=inputs, tasks=tasks, parameters=given["parameters"])
            except MtserveError as error:
                return replies.failure(error)
            return {"outputs": outputs, "usage": usage.as_dict()}

        @bentoml.api(route="/native/tasks")  # type: ignore[untyped-decorator]
        async def tasks(self) -> dict[str, Any]:
            """As GET /tasks, for BentoML's clients."""
            return root.table().listing()

    playground = Playground(root) if settings.ui else None
    assets = Path(bentoml_server.__file__).parent / "static_content"
    routes = make_app(root, assets=assets, playground=playground)
    made = bentoml.service(
        name="mtserve",
        image=image,
        workers=settings.workers,
        traffic={"timeout": settings.timeout_s + MARGIN_S},
        logging={"access": {"enabled": False}},
        metrics={"enabled": False},  # they have a label for each path that anybody thinks of
        service_class=_fronted(root, routes),
    )(Mtserve)
    made.mount_asgi_app(routes, path="/")
    return made


def _open(playground: Playground | None) -> None:
    """Several workers share a visitor's requests, so no answer can be read along there."""
    if playground is not None:
        playground.open(streams=MODEL_SOCKET not in os.environ)


def _fronted(root: Root, routes: ASGIApp) -> type[Any]:
    """The class of a service behind our front. Requests of tasks do not pass BentoML's middleware, which takes longer
    than all of ours; but where it is to trace them, they do."""

    class Fronted(bentoml.Service):  # type: ignore[misc]
        def to_asgi(self, *given: Any, **named: Any) -> ASGIApp:
            app = super().to_asgi(*given, **named)  # from here on, the container knows this service's settings
            straight = None if BentoMLContainer.tracing.sample_rate.get() else routes
            return Front(app, root=root, ended=_ended, routes=straight)

    return Fronted


def _ended(exchange: Exchange, **how: Any) -> None:
    metrics().ended(exchange, **how)  # they are made with the first table


do_not_track()
service = make_service()
