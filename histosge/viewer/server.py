"""The page's server. It listens on this machine only, it writes nothing, and it opens nothing by a name in an address.

It is bound to 127.0.0.1, answers only requests that were addressed to this machine (so that no web site can reach it
through a name of its own that points here), and takes whole numbers alone from an address. Outlines of regions come in
the body of a request, as JSON.
"""

import json
import socket
import threading
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore.errors import FeatureStoreError
from histosge.errors import ViewError
from histosge.viewer.assets import assets
from histosge.viewer.collection import Collection
from histosge.viewer.region_means import parse_region

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

HOST = "127.0.0.1"
HOST_NAMES = frozenset({"127.0.0.1", "localhost"})
"""Host names that a request may carry."""
HEADERS = [
    (
        b"content-security-policy",
        # OpenSeadragon styles its elements one by one.
        b"default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
RAW = "application/octet-stream"
MAX_REQUEST_BYTES = 8_000_000
"""Of a region's outline: 200,000 corners as text."""


def require_packages() -> None:
    """Refuse, naming the extra, where the server's packages are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ViewError(
            f"the viewer needs {error.name}; install it with: pip install 'histosge[view]'"
        ) from error


def make_app(collection: Collection) -> "ASGIApp":
    """Return the ASGI application of a page."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    def refused(_: "Request", error: Exception) -> "Response":
        status = 404 if isinstance(error, LookupError) else 400 if isinstance(error, ViewError) else 500
        return JSONResponse({"error": str(error.args[0] if error.args else error)}, status)

    async def regions(request: "Request") -> "Response":
        asked = await _read_json(request)
        number = asked.get("layer", 0)
        if not isinstance(number, int):
            raise ViewError("a layer is a whole number")
        slide = collection.slide(request.path_params["slide"])
        one = parse_region(asked.get("region"))
        other = parse_region(asked["other"]) if asked.get("other") is not None else None
        # In a thread: reading blocks must not stop the answers to other requests.
        return JSONResponse(await run_in_threadpool(slide.compare_region, number, one, other))

    routes = [Route(path, endpoint) for path, endpoint in _endpoints(collection).items()]
    routes.append(Route("/data/{slide:int}/regions", regions, methods=["POST"]))
    app: Starlette = Starlette(
        routes=routes, exception_handlers={LookupError: refused, FeatureStoreError: refused}
    )
    return LocalOnly(app)


class LocalOnly:
    """Passes on requests that were addressed to this machine, and adds the headers that keep the page to itself."""

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""
        from starlette.responses import PlainTextResponse

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = any(name == b"cache-control" for name, _ in message["headers"])
                # The same address may be another store's tomorrow.
                fresh = [] if kept else [(b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], *HEADERS, *fresh]
            await send(message)

        if scope["type"] == "http" and not _is_this_machine(dict(scope["headers"]).get(b"host", b"")):
            answer = PlainTextResponse(
                "this page is for this machine only: open it as 127.0.0.1 or localhost", 400
            )
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, with_headers)


async def _read_json(request: "Request") -> dict[str, Any]:
    """Return the object in a request's body.

    Raises
    ------
    ViewError
        If it is none, or larger than `MAX_REQUEST_BYTES`.
    """
    # A page of another site can send text to this port without asking first, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ViewError("a request for regions needs the content type application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_REQUEST_BYTES:
            raise ViewError(
                f"the request is larger than {MAX_REQUEST_BYTES} bytes; simplify the region's outline"
            )
    try:
        found = json.loads(bytes(body))
    # Deep nesting ends json's recursion.
    except (ValueError, RecursionError) as error:
        raise ViewError("the request is no JSON") from error
    if not isinstance(found, dict):
        raise ViewError("the request is no JSON object")
    return found


def _is_this_machine(host: bytes) -> bool:
    name, colon, port = host.decode("latin-1").partition(":")
    return name.lower() in HOST_NAMES and (port.isdecimal() if colon else True)


def _endpoints(collection: Collection) -> "dict[str, Callable[[Request], Response]]":
    from starlette.responses import JSONResponse, Response

    def asset(name: str) -> "Callable[[Request], Response]":
        found = assets()[name]
        return lambda _: Response(found.content, media_type=found.media_type)

    def raw(values: "np.ndarray[Any, Any]", kind: str) -> Response:
        return Response(np.ascontiguousarray(values, dtype=kind).tobytes(), media_type=RAW)

    def tile(request: "Request") -> Response:
        numbers = (request.path_params[name] for name in ("slide", "level", "col", "row"))
        content = collection.tile(*numbers)
        # The address holds the slide's fingerprint: what it names never changes.
        kept = {"cache-control": "private, max-age=86400, immutable"}
        return Response(content, media_type="image/jpeg", headers=kept)

    def slide(request: "Request") -> Any:
        return collection.slide(request.path_params["slide"])

    def labels(request: "Request") -> Response:
        found = slide(request).labels(request.path_params["layer"])
        if found is None:
            raise LookupError("no domains are known here")  # becomes a 404
        return raw(found, "<i2")

    def spot_values(request: "Request") -> Response:
        measured = slide(request).measured
        if measured is None:
            raise LookupError("no spots are named for this slide")
        return raw(measured.values(request.path_params["gene"]), "<f2")

    one, layer = "/data/{slide:int}", "/data/{slide:int}/layers/{layer:int}"
    return {
        "/": asset("index.html"),
        **{f"/{name}": asset(name) for name in assets()},
        "/data/index.json": lambda _: JSONResponse({**collection.describe(), "live": True}),
        "/data/gene-sets.json": lambda _: JSONResponse(collection.describe_gene_sets()),
        f"{one}/slide.json": lambda r: JSONResponse(slide(r).describe()),
        f"{one}/picture.json": lambda r: JSONResponse(slide(r).picture.describe()),
        f"{one}/thumbnail.png": lambda r: Response(slide(r).thumbnail(), media_type="image/png"),
        f"{one}/tiles/{{level:int}}/{{col:int}}_{{row:int}}.jpg": tile,
        f"{layer}/layer.json": lambda r: JSONResponse(slide(r).describe_layer(r.path_params["layer"])),
        f"{layer}/domains.i16": labels,
        f"{layer}/tissue.u8": lambda r: raw(slide(r).tissue(r.path_params["layer"]), "u1"),
        f"{layer}/quality.u8": lambda r: raw(slide(r).quality(r.path_params["layer"]), "u1"),
        f"{layer}/components.u8": lambda r: raw(slide(r).pictures(r.path_params["layer"]).rgba, "u1"),
        f"{layer}/clusters.i16": lambda r: raw(slide(r).pictures(r.path_params["layer"]).clusters, "<i2"),
        f"{layer}/agreement/{{gene:int}}.json": lambda r: JSONResponse(
            slide(r).agreement(r.path_params["layer"], r.path_params["gene"])
        ),
        f"{layer}/strata.i16": lambda r: raw(slide(r).strata(r.path_params["layer"]), "<i2"),
        f"{layer}/genes/{{gene:int}}.f16": lambda r: raw(
            slide(r).gene_values(r.path_params["layer"], r.path_params["gene"]), "<f2"
        ),
        f"{one}/spots.json": lambda r: JSONResponse(slide(r).describe_spots()),
        f"{one}/spots/{{gene:int}}.f16": spot_values,
    }


def listen(port: int) -> socket.socket:
    """Take a port of this machine.

    Parameters
    ----------
    port
        0 means any free one.

    Raises
    ------
    ViewError
        If it is taken.
    """
    taken = socket.socket()
    # Without it, a port that was just closed stays taken for a minute.
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
        taken.listen()  # only now is a second server refused, and an early browser kept waiting instead
    except (OSError, OverflowError) as error:
        taken.close()
        reason = getattr(error, "strerror", None) or "a port is 0 to 65535"
        raise ViewError(
            f"cannot listen on port {port}: {reason}; give another with --port, or --port 0"
        ) from error
    return taken


def serve(collection: Collection, taken: socket.socket, *, open_browser: bool) -> None:
    """Serve a page until interrupted."""
    import uvicorn

    address = f"http://{HOST}:{taken.getsockname()[1]}/"
    server = uvicorn.Server(
        uvicorn.Config(make_app(collection), log_level="warning", timeout_graceful_shutdown=1)
    )
    # Only when the server answers: a browser that comes too early shows an error page.
    if open_browser:
        threading.Thread(target=_open_when_ready, args=(server, address), daemon=True).start()
    with suppress(KeyboardInterrupt):  # Ctrl-C is how a page ends
        server.run(sockets=[taken])


def _open_when_ready(server: Any, address: str) -> None:
    while not server.started:
        time.sleep(0.05)
    webbrowser.open(address)
