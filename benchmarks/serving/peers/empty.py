"""What HTTP itself costs: an empty `@bentoml.api` handler, and a Starlette route with nothing around it."""

from __future__ import annotations

import sys
from typing import Any


def starlette(port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def empty(request: Request) -> JSONResponse:
        await request.json()
        return JSONResponse({})

    app = Starlette(routes=[Route("/empty", empty, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    starlette(int(sys.argv[1]))
else:
    import bentoml

    @bentoml.service(name="empty", workers=1, logging={"access": {"enabled": False}})
    class Empty:
        @bentoml.api(route="/empty")
        async def empty(self, inputs: Any) -> dict[str, Any]:
            return {}
