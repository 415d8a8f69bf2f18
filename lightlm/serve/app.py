"""The HTTP interface: its routes, and how an answer travels from the decoding thread to a client.

GET  /                     the page
GET  /health, /metrics
GET  /v1/models
POST /v1/completions, /v1/chat/completions
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lightlm.checkpoint import LoadedModel
from lightlm.generate.text_batch import Piece
from lightlm.serve.access import Access
from lightlm.serve.answers import Chats, Choice, Completions
from lightlm.serve.errors import RequestError
from lightlm.serve.fields import Body, ChatBody, CompletionBody, read
from lightlm.serve.guard import LocalHostOnly, Observe, RequireKey, error_response, page_policy
from lightlm.serve.loop import DecodeLoop, Limits
from lightlm.serve.metrics import CONTENT_TYPE, Metrics
from lightlm.serve.questions import Reader, TextRequest

MAX_BODY = 1 << 20  # bytes
BODY_SECONDS = 20.0  # to receive a body
_LOG = logging.getLogger("lightlm")


class Service:
    """A loaded model behind its HTTP interface; `app` is the ASGI application.

    Args:
        reference: what the user called the model. Requests may call it so, too.
    """

    def __init__(self, loaded: LoadedModel, limits: Limits, access: Access, reference: str | None = None) -> None:
        self.metrics = Metrics()
        self.loop = DecodeLoop(loaded.model, loaded.tokenizer, limits, self.metrics)
        self.reader = Reader(loaded, limits.choices, reference)
        self._token_bytes = loaded.tokenizer.bytes_of
        self._created = int(time.time())
        self._page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        self._policy = page_policy(self._page)
        self.app = self._build(access)

    def _build(self, access: Access) -> Starlette:
        routes = [
            Route("/", self._show_page),
            Route("/health", self._health),
            Route("/metrics", self._show_metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        paths = frozenset(route.path for route in routes)
        guards = [Middleware(Observe, self.metrics, paths, bool(access.origins))]
        if access.key is None:
            guards.append(Middleware(LocalHostOnly))
        if access.origins:  # before the key, which a browser's preflight request does not bring
            # With any header: OpenAI's client for browsers adds several of its own.
            guards.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=access.origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                    # Chrome asks this where the page is public and the server is on the user's machine or network.
                    allow_private_network=True,
                )
            )
        if access.key is not None:
            guards.append(Middleware(RequireKey, access.key))
        handlers = {
            RequestError: _answer_error,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
        }
        # Starlette has one outside of all guards, whose answers would lack CORS headers and not be counted.
        guards.append(Middleware(ServerErrorMiddleware, handler=_answer_failure))
        return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)

    async def _show_page(self, request: Request) -> Response:
        headers = {"content-security-policy": self._policy, "cache-control": "no-cache"}
        return Response(self._page, media_type="text/html", headers=headers)

    async def _health(self, request: Request) -> Response:
        ready = self.loop.ready
        return JSONResponse({"status": "ok" if ready else "stopping"}, 200 if ready else 503)

    async def _show_metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.write(), headers={"content-type": CONTENT_TYPE})

    def _describe(self) -> dict[str, Any]:
        """Return OpenAI's fields of a model, and two that the page needs; `max_model_len` is vLLM's name."""
        reader = self.reader
        model = {"id": reader.name, "object": "model", "created": self._created, "owned_by": "lightlm"}
        return model | {"max_model_len": reader.context, "chat": reader.chats}

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def _model(self, request: Request) -> Response:
        self.reader.check_model(request.path_params["name"])
        return JSONResponse(self._describe())

    async def _complete(self, request: Request) -> Response:
        body = read(CompletionBody, await _read_json(request))
        asked = await asyncio.to_thread(self.reader.completion, body)
        return await self._answer(request, body, asked, Completions(self.reader.name, self._token_bytes, body.logprobs))

    async def _chat(self, request: Request) -> Response:
        body = read(ChatBody, await _read_json(request))
        asked = await asyncio.to_thread(self.reader.chat, body)
        logprobs = body.top_logprobs if body.logprobs else None
        return await self._answer(request, body, asked, Chats(self.reader.name, self._token_bytes, logprobs))

    async def _answer(self, request: Request, body: Body, asked: TextRequest, shape: Completions) -> Response:
        parts = _Parts(self.loop, asked)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(parts, asked, shape, usage=usage)
            return _EventStream(events, parts.close)
        collected = asyncio.create_task(_collect(parts, asked))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return await _answer_nobody(request)
            return JSONResponse(shape.answer(collected.result(), asked.prompt_tokens))
        finally:
            collected.cancel()
            gone.cancel()
            parts.close()


class _EventStream(StreamingResponse):
    """Server-sent events; `close` is called at their end, also if the client goes before the first one."""

    def __init__(self, events: AsyncIterator[str], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class _Parts:
    """The parts of a request's choices as they come from the decoding thread."""

    def __init__(self, loop: DecodeLoop, asked: TextRequest) -> None:
        self._queue: asyncio.Queue[tuple[int, Piece | RequestError]] = asyncio.Queue()
        self._loop, self._open = loop, len(asked.questions)
        put, here = self._queue.put_nowait, asyncio.get_running_loop()

        def deliver(index: int, part: Piece | RequestError) -> None:
            try:
                here.call_soon_threadsafe(put, (index, part))
            except RuntimeError:  # the server has stopped
                _LOG.debug("a part of an answer came after the end")

        self._job = loop.submit(asked.questions, deliver)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (index of the choice, part) until all choices have ended.

        Raises:
            RequestError: a choice failed.
        """
        while self._open:
            index, part = await self._queue.get()
            if isinstance(part, RequestError):
                raise part
            self._open -= part.answer is not None
            yield index, part

    def close(self) -> None:
        """Free the rows of choices that have not ended."""
        self._loop.cancel(self._job)


async def _collect(parts: _Parts, asked: TextRequest) -> list[Choice]:
    choices = [Choice() for _ in asked.questions]
    async for index, piece in parts:
        choices[index].add(piece)
    for choice, echo in zip(choices, asked.echoes, strict=False):
        choice.text = echo + choice.text
    return choices


async def _events(parts: _Parts, asked: TextRequest, shape: Completions, *, usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events. https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    more = {"usage": None} if usage else {}  # OpenAI's API has the field in each event, then
    taken = 0
    try:
        for index in range(len(asked.questions)):
            if (opening := shape.opening(index)) is not None:
                yield _event(opening | more)
        for index, echo in enumerate(asked.echoes):
            yield _event(shape.chunk(index, Piece(index, echo)) | more)
        async for index, piece in parts:
            if piece.answer is not None:
                taken += len(piece.answer.ids)
            yield _event(shape.chunk(index, piece) | more)
        if usage:
            yield _event(shape.usage_chunk(asked.prompt_tokens, taken))
    except RequestError as error:  # the status is sent already
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_json(request: Request) -> Any:
    """Return the parsed body of a request.

    Raises:
        RequestError: it is too long, slow, or not JSON.
    """
    # A page of another site can send text/plain without asking this server first (CORS), but not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("send the header Content-Type: application/json", 415)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await _read_body(request)
    except TimeoutError:
        raise RequestError(f"the body took more than {BODY_SECONDS:g} s", 408) from None
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises RequestError if a name is there twice, of which one would be ignored."""
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise RequestError(f"{name[:40]!r} is given twice", param=name[:80])
        document[name] = value
    return document


async def _read_body(request: Request) -> bytes:
    too_long = RequestError(f"the body has more than {MAX_BODY:,} bytes", 413)
    length = request.headers.get("content-length", "0")
    if length.isdigit() and (len(length) > 18 or int(length) > MAX_BODY):
        raise too_long
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise too_long
    return bytes(raw)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return error_response(RequestError(message, error.status_code, **(error.headers or {})))


async def _answer_nobody(request: Request, error: Exception | None = None) -> Response:
    return Response(status_code=499)  # nginx' status for a client that has gone; nobody reads it


async def _answer_failure(request: Request, error: Exception) -> Response:
    return error_response(RequestError("internal error; the server's log tells more", 500))
