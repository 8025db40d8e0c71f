"""A gate in front of gradio's server: only the routes that the page needs, uploads by our own rules, requests of known
hosts, and a queue without visitors who have left.

gradio also serves files, proxies, streams, recordings and its own monitoring. A list of allowed routes is easier to
keep right than a list of forbidden ones.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hieratok.app.uploads import GONE, MAX_BYTES, Uploads

PASSED = (
    "/",
    "/config",
    "/theme.css",
    "/favicon.ico",
    "/robots.txt",
    "/manifest.json",
    "/assets/{path:path}",
    "/static/{path:path}",
    "/svelte/{path:path}",
    "/gradio_api/info",
    "/gradio_api/heartbeat/{session}",
)
HANDLERS = {"photo": ["photo"], "two_photos": ["photo", "photo"], "generate": ["number"] * 4}  # and their arguments
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
LOCAL = ("localhost", "127.0.0.1", "::1")
ENVELOPE = 2**16  # bytes of an upload besides the file
CALL_BYTES = 2**14  # of a call; the names of two photos take less than 1 kB
ARRIVING_BYTES = 400 * 2**20  # of all uploads in progress
UPLOAD_SECONDS = 180
CALL_SECONDS = 20
GRACE_SECONDS = 2.0  # browsers listen for the answer at once; after this time the visitor has left
STALLED_SECONDS = 30  # without reading from an answer
HANG_UP_SECONDS = 0.01
CLEANING_SECONDS = 30


class KnownHosts:
    """Refuses requests under foreign host names (DNS rebinding) and requests from pages of other sites.

    Args:
        app: gets the other requests.
        allowed: host names, without ports.
    """

    def __init__(self, app: ASGIApp, allowed: Iterable[str]):
        self.app = app
        self.allowed = {name.lower() for name in allowed}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self.problem(Headers(scope=scope))):
            await PlainTextResponse(problem, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def problem(self, headers: Headers) -> str | None:
        """What is wrong with a request's host or origin; None if nothing is."""
        hosts = [*headers.getlist("host"), *headers.getlist("x-forwarded-host")]
        if not headers.get("host") or any(host_name(part) not in self.allowed for h in hosts for part in h.split(",")):
            return "this host is not known here: start the app with --allowed_hosts"
        origin = headers.get("origin")
        if origin is not None and urlsplit_or_none(origin) != hosts[0].lower():
            return "requests from pages of other sites are refused"
        return None


def host_name(host: str) -> str | None:
    """`Example.org:80` -> `example.org`; None if it is not a host."""
    try:
        return urlsplit(f"//{host.strip()}").hostname
    except ValueError:
        return None


def urlsplit_or_none(origin: str) -> str | None:
    """`https://Example.org:80` -> `example.org:80`; None if it is not an address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


@dataclass
class Visit:
    """A visitor who has sent a request, or listens for the answer."""

    since: float
    listeners: int = 0


class Visits:
    """Visitors who wait for an answer, by gradio's session. Used by the threads of the server and of its handlers."""

    def __init__(self) -> None:
        self._visits: dict[str, Visit] = {}

    def asked(self, session: str) -> None:
        """A visitor has sent a request, and has a short time to listen for the answer."""
        visit = self._visits.setdefault(session, Visit(0.0))
        visit.since = time.monotonic()

    def knows(self, session: str) -> bool:
        """Whether a visitor has sent a request and has not left."""
        return session in self._visits

    @contextlib.contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """A visitor listens while the block runs. Afterwards they send another request, or have left."""
        visit = self._visits[session]
        visit.listeners += 1
        try:
            yield
        finally:
            visit.listeners -= 1
            visit.since = time.monotonic()

    def is_there(self, session: str) -> bool:
        """Whether a visitor listens, or may soon."""
        visit = self._visits.get(session)
        return visit is not None and (visit.listeners > 0 or time.monotonic() - visit.since < GRACE_SECONDS)

    def wait(self, session: str) -> bool:
        """Wait until a visitor listens; False if they do not. Blocks a thread for `GRACE_SECONDS` at most."""
        while self.is_there(session):
            if self._visits[session].listeners:
                return True
            time.sleep(0.01)
        return False

    def take_left(self) -> list[str]:
        """Remove and return visitors who have sent a request and do not listen."""
        left = [session for session in list(self._visits) if not self.is_there(session)]
        for session in left:
            self._visits.pop(session, None)
        return left


class Gate:
    """The open routes.

    Args:
        page: gradio's server.
        uploads: the folder of photos.
        visits: of this server.
        functions: names of handlers, by gradio's numbers.
    """

    def __init__(self, page: ASGIApp, uploads: Uploads, visits: Visits, functions: dict[int, str]):
        self.page = page
        self.functions = functions
        self.uploads = uploads
        self.visits = visits
        self.arriving = 0  # bytes of uploads in progress
        self.turn = asyncio.Lock()
        transport = httpx.ASGITransport(page, raise_app_exceptions=False)
        self.inside = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None)

    @property
    def routes(self) -> list[Route]:
        """Other routes are answered with 404, other methods with 405."""
        return [
            Route("/gradio_api/upload", self.upload, methods=["POST"]),
            Route("/gradio_api/upload_progress", self.progress),
            Route("/gradio_api/file={path:path}", self.file),
            Route("/gradio_api/queue/join", self.ask, methods=["POST"]),
            Route("/gradio_api/queue/data", Listening(self), methods=["GET"]),
            *(Route(f"/gradio_api/call/{name}", self.ask, methods=["POST"]) for name in HANDLERS),
            *(Route(f"/gradio_api/call/{name}/{{session}}", Listening(self), methods=["GET"]) for name in HANDLERS),
            *(Route(path, self.page, methods=["GET"]) for path in PASSED),
        ]

    async def upload(self, request: Request) -> Response:
        """Store the photos of a form's field `files`; the answer has their paths, as that of gradio's own route."""
        client = request.client.host if request.client else ""
        paths = []
        with self.limited(request, MAX_BYTES + ENVELOPE) as limited:
            async with within(UPLOAD_SECONDS), limited.form(max_files=4, max_fields=4) as form:
                for photo in form.getlist("files"):
                    if not isinstance(photo, UploadFile):
                        raise HTTPException(400, "a file is needed")
                    if (photo.size or 0) > MAX_BYTES:
                        raise HTTPException(413, f"the limit is {MAX_BYTES // 2**20} MB")
                    try:
                        path = await run_in_threadpool(self.uploads.keep, photo.file, client)
                    except OSError as error:
                        raise HTTPException(507, "there is no room for the photo") from error
                    paths.append(str(path))
        if not paths:
            raise HTTPException(400, "a file is needed")
        return JSONResponse(paths)

    async def progress(self, _: Request) -> Response:
        """The page's request for an upload's progress; gradio's own route would keep records of every part."""
        return Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")

    @contextlib.contextmanager
    def limited(self, request: Request, size: int) -> Iterator[Request]:
        """The request, with an error if its body, or all uploads in progress together, become too large."""
        received = 0

        async def receive() -> Message:
            nonlocal received
            message = await request.receive()
            received += len(message.get("body", b""))
            self.arriving += len(message.get("body", b""))
            if received > size:
                raise HTTPException(413, f"the limit is {MAX_BYTES // 2**20} MB")
            if self.arriving > ARRIVING_BYTES:
                raise HTTPException(503, "too many uploads at once: try again")
            return message

        try:
            yield Request(request.scope, receive)
        except ClientDisconnect:
            raise HTTPException(400, "the request ends too early") from None
        finally:
            self.arriving -= received

    async def file(self, request: Request) -> Response:
        """An uploaded photo, for the page's preview."""
        path = self.uploads.find(request.path_params["path"])
        if path is None:
            return PlainTextResponse(GONE, 404)
        # Uploads must not run as pages or scripts of this site; an <img> shows them in any case.
        headers = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment", "Cache-Control": "private"}
        return FileResponse(path, media_type="application/octet-stream", headers=headers)

    async def ask(self, request: Request) -> Response:
        """Put a call into gradio's queue, after removing those of visitors who have left."""
        with self.limited(request, CALL_BYTES) as limited:
            async with within(CALL_SECONDS):
                body = await limited.body()
        _, _, name = request.url.path.partition("/call/")
        call = self.checked(body, name)
        if name:
            call["session_hash"] = None  # gradio then uses the event's id
        elif call["session_hash"] is None:
            raise HTTPException(400, "session_hash is missing")
        await self.clear_queue()
        async with self.turn:
            if call["session_hash"] is not None:
                self.visits.asked(call["session_hash"])
            answer = await self.inside.post(request.url.path, json=call)
            if answer.status_code == 200 and call["session_hash"] is None:
                self.visits.asked(answer.json()["event_id"])
        return Response(answer.content, answer.status_code, media_type="application/json")

    async def clear_queue(self) -> None:
        """Remove calls of visitors who have left from gradio's queue and memory."""
        async with self.turn:  # so that no new call comes meanwhile
            await asyncio.gather(*map(self.hang_up, self.visits.take_left()))

    def checked(self, body: bytes, name: str) -> dict[str, Any]:
        """A call with only the arguments that its handler needs: numbers, or uploaded photos.

        Args:
            body: JSON.
            name: of the handler; empty if the body names it by gradio's number.

        Raises:
            HTTPException: not such a call.
        """
        try:
            call = json.loads(body)
            session, function, trigger = (call.get(key) for key in ("session_hash", "fn_index", "trigger_id"))
            kinds = HANDLERS[name or self.functions[function]]
            data = [self.value(value, kind) for value, kind in zip(call["data"], kinds, strict=True)]
            if session is not None and not SESSION.fullmatch(session):
                raise ValueError
            if trigger is not None and type(trigger) is not int:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise HTTPException(400, "not a call of this page") from None
        return {"data": data, "session_hash": session, "fn_index": None if name else function, "trigger_id": trigger}

    def value(self, value: Any, kind: str) -> Any:
        """One argument of a call. Photos are named in the handlers' own way: gradio would copy, fetch or open files
        that are named in its way.

        Raises:
            HTTPException: a photo that is not stored here.
            ValueError: another value that the handler does not take.
        """
        if value is None:
            return None
        if kind == "number":
            if isinstance(value, int | float) and abs(value) < 2**53:
                return value
            raise ValueError
        if not isinstance(value, dict):
            raise ValueError
        path = self.uploads.find(value.get("path"))
        if path is None:
            raise HTTPException(400, GONE)
        name = str(value.get("orig_name") or "")[-200:]
        return {"path": str(path), "orig_name": name.encode(errors="replace").decode()}

    async def hang_up(self, session: str) -> None:
        """Listen and leave, as a browser does: gradio then drops this session."""

        async def leave() -> Message:
            await asyncio.sleep(HANG_UP_SECONDS)
            return {"type": "http.disconnect"}

        async def ignore(_: Message) -> None:
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/gradio_api/queue/data",
            "raw_path": b"/gradio_api/queue/data",
            "query_string": f"session_hash={session}".encode(),
            "root_path": "",
            "headers": [(b"host", b"localhost")],
        }
        with contextlib.suppress(Exception):  # gradio has dropped it already
            await self.page(scope, leave, ignore)


class Listening:
    """gradio's stream of answers; it ends if the visitor stops reading.

    Args:
        gate: the gate with this route.
    """

    def __init__(self, gate: Gate):
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        session = request.path_params.get("session") or request.query_params.get("session_hash", "")
        if not self.gate.visits.knows(session):
            await PlainTextResponse("no such session", 404)(scope, receive, send)
            return

        with self.gate.visits.listening(session), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None) as patience:

                async def send_unless_stalled(message: Message) -> None:
                    patience.reschedule(asyncio.get_running_loop().time() + STALLED_SECONDS)
                    await send(message)
                    patience.reschedule(None)

                await self.gate.page(scope, receive, send_unless_stalled)


@contextlib.asynccontextmanager
async def within(seconds: float) -> AsyncIterator[None]:
    """Answer 408 if a request's body does not arrive in time."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise HTTPException(408, f"this did not arrive within {seconds:g} s") from None


def gated(
    page: ASGIApp,
    uploads: Uploads,
    visits: Visits,
    functions: dict[int, str],
    allowed_hosts: Iterable[str],
    lifespan: Callable[[Any], contextlib.AbstractAsyncContextManager[Any]],
) -> Starlette:
    """The app's server: gradio's, behind the gate.

    Args:
        page: gradio's server.
        uploads: the folder of photos.
        visits: of this server.
        functions: names of handlers, by gradio's numbers.
        allowed_hosts: host names of the app, besides localhost.
        lifespan: gradio's.
    """

    gate = Gate(page, uploads, visits, functions)

    async def keep_cleaning() -> None:
        while True:
            await asyncio.sleep(CLEANING_SECONDS)
            await run_in_threadpool(uploads.remove_old)
            await gate.clear_queue()

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        cleaning = asyncio.create_task(keep_cleaning())
        async with lifespan(app):
            yield
        cleaning.cancel()

    async def refuse(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    return Starlette(
        routes=gate.routes,
        middleware=[Middleware(KnownHosts, allowed=(*LOCAL, *allowed_hosts))],
        exception_handlers={HTTPException: refuse},
        lifespan=life,
    )
