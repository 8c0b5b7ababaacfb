"""Serve a model over HTTP with the interface of OpenAI's completions and chat.

Answers are computed together, by the engine; others wait in a queue of bounded length.  A request that finds the queue
full is refused at once (429).  One that has waited too long is refused instead of being computed (503).  One that is
malformed or too long is refused before it waits (4xx).  One whose client has gone is computed no further.
"""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import fastapi
import pydantic
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nashswarm.runtime.serving import protocol, replies
from nashswarm.runtime.serving.answer import Piece, Prompt
from nashswarm.runtime.serving.engine import Engine, FailedError, FullError, LateError, Limits
from nashswarm.runtime.serving.protocol import ChatRequest, CompletionRequest
from nashswarm.runtime.serving.steps import ModuleStepper, Stepper
from nashswarm.runtime.serving.text import end_tokens, longest_text

BODY = 1 << 20  # bytes of a request
STATUSES = {
    400: "malformed",
    404: "not here",
    413: "too large",
    415: "not JSON",
    429: "full",
    500: "failed",
    503: "late",
}
DEFAULT = Limits()
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}

Pieces = AsyncIterator[tuple[int, Piece]]


def build_app(
    model: Any, tokenizer: Any, name: str, limits: Limits = DEFAULT, body: int = BODY, stepper: Stepper | None = None,
    origins: Sequence[str] = (),
) -> fastapi.FastAPI:  # fmt: skip
    """Build the application: completions, chat, models, and ``GET /health``.

    ``body``: the largest request in bytes.  ``stepper``: computes the steps; default: the modules of the model.
    ``origins``: those whose pages may ask from a browser, ``*`` for all; default: none, since the server asks for no
    key and a local one is in reach of every page that its user opens.
    """
    longest = longest_text(model)
    app = fastapi.FastAPI(title="nashswarm", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limit=body)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    # not as closures of the functions below: FastAPI keeps those as long as the process lives
    app.state.tokenizer, app.state.name = tokenizer, name
    app.state.engine = Engine(stepper or ModuleStepper(model), tokenizer, end_tokens(model, tokenizer), limits)
    app.state.sizes = (model.config.get_text_config().vocab_size, min(longest, limits.tokens or longest))
    app.state.bounded = limits.tokens is not None and limits.tokens < longest
    del model, tokenizer, stepper
    for error in (HTTPException, RequestValidationError, FailedError, FullError, LateError):
        app.add_exception_handler(error, _refuse)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": replies.Refusal, "description": reason} for status, reason in STATUSES.items()
    }

    @app.get("/health")
    async def health(request: fastapi.Request) -> dict[str, str | int]:
        return {"status": "ok", "admitted": request.app.state.engine.admitted}

    @app.get("/v1/models")
    async def list_models(request: fastapi.Request) -> replies.Models:
        return replies.Models(data=[replies.Model(id=request.app.state.name)])

    @app.get("/v1/models/{model_id:path}", responses={404: refused[404]})
    async def show_model(request: fastapi.Request, model_id: str) -> replies.Model:
        _check_name(request, model_id)
        return replies.Model(id=model_id)

    @app.post("/v1/completions", responses=refused | {200: {"model": replies.Completion, "content": EVENTS}})
    async def complete(request: fastapi.Request, body: CompletionRequest) -> fastapi.Response:
        prompts = await _read_prompts(request, body, protocol.completion_prompts)
        tokenizer = request.app.state.tokenizer
        pairs = enumerate(zip(prompts, protocol.echoes(body, tokenizer), strict=True))
        writers = [replies.Writer(number, prompt, tokenizer, echo).completion for number, (prompt, echo) in pairs]
        form = Form(replies.Completion, writers)
        return await _reply(request, body, prompts, "cmpl", form, form)

    @app.post("/v1/chat/completions", responses=refused | {200: {"model": replies.Chat, "content": EVENTS}})
    async def chat(request: fastapi.Request, body: ChatRequest) -> fastapi.Response:
        prompts = await _read_prompts(request, body, protocol.chat_prompts)
        writers = [replies.Writer(number, prompt, request.app.state.tokenizer) for number, prompt in enumerate(prompts)]
        whole = Form(replies.Chat, [writer.chat for writer in writers])
        parts = Form(replies.ChatChunk, [writer.chat_chunk for writer in writers])
        return await _reply(request, body, prompts, "chatcmpl", whole, parts)

    return app


@dataclasses.dataclass(frozen=True)
class Form:
    """How answers become a reply: the body, and what writes the choice of each."""

    body: Callable[..., pydantic.BaseModel]
    writers: Sequence[Callable[[Piece], pydantic.BaseModel]]


async def _reply(
    request: fastapi.Request, body: protocol.Request, prompts: Sequence[Prompt], prefix: str, whole: Form, parts: Form
) -> fastapi.Response:
    """Compute the answers and reply, whole or as a stream of parts."""
    state = request.app.state
    about = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": state.name}
    read = sum(len(prompt.tokens) for prompt in prompts) // body.n
    source = _listen(request, state.engine, prompts)
    try:
        if not body.stream:
            return JSONResponse(await _whole(source, whole, about, read))
        first = await anext(source)  # what fails before a word is told has a status of its own
    except ClientDisconnect:
        return fastapi.Response(status_code=499)  # nobody reads it
    events = _events(first, source, parts, about, read if body.stream_options.include_usage else None)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def _whole(source: Pieces, form: Form, about: dict[str, Any], read: int) -> dict[str, Any]:
    """Return the body of a reply once all answers are there."""
    pieces: list[list[Piece]] = [[] for _ in form.writers]
    async for number, piece in source:
        pieces[number].append(piece)
    merged = [replies.merge(some) for some in pieces]
    choices = [write(piece) for write, piece in zip(form.writers, merged, strict=True)]
    usage = replies.count(read, sum(piece.tokens for piece in merged))
    return form.body(**about, usage=usage, choices=choices).model_dump()


async def _events(
    first: tuple[int, Piece], source: Pieces, form: Form, about: dict[str, Any], read: int | None
) -> AsyncIterator[str]:
    """Yield the events of a stream; ``read``: tokens of the prompts, if the last event is to count tokens."""
    made, told = 0, first
    try:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                number, piece = told
                made += piece.tokens
                if piece.text or piece.scores or piece.finish is not None:
                    yield _event(form.body(**about, choices=[form.writers[number](piece)]))
                told = await anext(source)
        if read is not None:
            yield _event(form.body(**about, usage=replies.count(read, made), choices=[]))
        yield "data: [DONE]\n\n"
    except FailedError as error:  # the status has been sent already
        yield _event(replies.refusal(500, str(error)))
    except ClientDisconnect:
        return


async def _listen(request: fastapi.Request, engine: Engine, prompts: Sequence[Prompt]) -> Pieces:
    """Yield the number of a prompt and a piece of its answer, as they come.

    Raises what ended an answer, or ClientDisconnect if the client goes.  Answers that nobody listens to are cancelled.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | Exception]]()

    def deliver(number: int, piece: Piece | Exception) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

    answers = engine.submit(prompts, deliver)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        engine.cancel(answers)
        queue.put_nowait((0, ClientDisconnect()))

    watching = asyncio.create_task(watch())
    try:
        unfinished = len(answers)
        while unfinished:
            number, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= piece.finish is not None
            yield number, piece
    finally:
        watching.cancel()
        engine.cancel(answers)


async def _read_prompts(request: fastapi.Request, body: Any, read: Callable[..., list[Prompt]]) -> list[Prompt]:
    """Return the prompts of a body, or raise HTTPException for what cannot be computed."""
    state = request.app.state
    if body.model is not None:
        _check_name(request, body.model)
    try:
        prompts = await asyncio.to_thread(read, body, state.tokenizer, *state.sizes)  # a long text takes its time
        state.engine.check_room(len(prompts))
    except protocol.TooLongError as error:
        source = ", which is what fits into the memory that the server may take" if state.bounded else ""
        raise HTTPException(400, f"{error}{source}") from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error
    return prompts


def _check_name(request: fastapi.Request, name: str) -> None:
    if name != request.app.state.name:
        raise HTTPException(404, f"there is no model {name!r} here, only {request.app.state.name!r}")


def _event(content: pydantic.BaseModel) -> str:
    return f"data: {content.model_dump_json()}\n\n"


def _refuse(request: fastapi.Request, error: Exception) -> JSONResponse:
    status, reason = getattr(error, "status_code", 500), _reason(request, error)
    if isinstance(error, FullError | LateError):
        status = 429 if isinstance(error, FullError) else 503
    elif isinstance(error, RequestValidationError):
        status = 400
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            status, reason = 415, "send JSON, and the header Content-Type: application/json"
    retry = {"Retry-After": "1"} if status in (429, 503) else {}
    headers = {**(getattr(error, "headers", None) or {}), **retry}
    return JSONResponse(replies.refusal(status, reason).model_dump(), status, headers)


def _reason(request: fastapi.Request, error: Exception) -> str:
    """Return the sentence that tells a client what happened."""
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return f"the request is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
        return protocol.explain(first["loc"][1:], first["type"], first["msg"])
    reason = str(getattr(error, "detail", error))
    if reason not in ("Not Found", "Method Not Allowed"):  # of the router, which knows no more
        return reason
    if request.method == "OPTIONS":
        return "pages of other origins may not ask this server: --cors-origins names those that may"
    routes = [route for route in request.app.routes if isinstance(route, APIRoute)]
    served = [f"{method} {route.path_format}" for route in routes for method in route.methods or ()]
    return f"{request.method} {request.url.path!a} is not served here, only {', '.join(served)}"


class Gate:
    """Middleware that drops the last slash of a path, and refuses bodies as soon as they exceed ``limit`` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.limit:
                raise HTTPException(413, f"the request is longer than {self.limit} bytes")
            return message

        if scope["type"] == "http":
            scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        await self.app(scope, counted, send)
