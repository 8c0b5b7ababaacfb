"""Serve a model over HTTP with the interface of OpenAI's completions.

One request is computed at a time, by transformers' ``generate``; the others wait in a queue of bounded length.  A
request that finds the queue full is refused at once (429).  One that has waited too long is refused instead of being
computed (503).  One that is malformed or too long is refused before it waits (4xx).
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal

import fastapi
import pydantic
import torch
import uvicorn
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from uvicorn.supervisors import Multiprocess

from nashswarm.models import sources

POLL = 0.01  # seconds between checks whether the server has started

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server.

    ``queue``: requests that may wait, without the one being computed.  ``patience``: seconds that a request may wait.
    ``body``: bytes of a request.  ``tokens``: of a prompt with its completion, if fewer than the model can read.
    """

    queue: int = 16
    patience: float = 60.0
    body: int = 1 << 20
    tokens: int | None = None


class CompletionRequest(pydantic.BaseModel):
    """The body of a request to ``/v1/completions``; unknown fields are refused, not ignored."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | list[int] = pydantic.Field(min_length=1)
    max_tokens: int = pydantic.Field(16, ge=1)
    temperature: float = pydantic.Field(1.0, ge=0, le=2)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    seed: int | None = pydantic.Field(None, ge=0, lt=2**63)
    n: Literal[1] = 1
    stream: Literal[False] = False
    user: str | None = None


class RefusedError(Exception):
    """The refusal of a request, with its HTTP status and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def build_app(model: Any, tokenizer: Any, name: str, limits: Limits = Limits()) -> fastapi.FastAPI:
    """Build the application with ``POST /v1/completions``, ``GET /v1/models`` and ``GET /health``."""
    vocabulary, longest = model.config.vocab_size, sources.LoadedModel(model, tokenizer).window_length(None)
    longest = longest if limits.tokens is None else min(longest, limits.tokens)
    admitted = 0
    app = fastapi.FastAPI(title="nashswarm", openapi_url=None)
    # not as closures of the functions below: FastAPI keeps those as long as the process lives
    app.state.model, app.state.tokenizer = model, tokenizer
    app.state.worker = concurrent.futures.ThreadPoolExecutor(1, "generate")
    del model, tokenizer

    async def refuse(request: fastapi.Request, error: Exception) -> JSONResponse:
        status = int(error.status if isinstance(error, RefusedError) else getattr(error, "status_code", 500))
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        reason = getattr(error, "detail", None) or str(error)
        body = {"error": {"message": reason, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)

    app.add_exception_handler(RefusedError, refuse)
    app.add_exception_handler(HTTPException, refuse)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "admitted": admitted}

    @app.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "owned_by": "nashswarm"}]}

    @app.post("/v1/completions")
    async def complete(request: fastapi.Request) -> dict[str, Any]:
        nonlocal admitted
        state = request.app.state
        body = _parse(await _read_body(request.stream(), limits.body))
        if body.model not in (None, name):
            raise RefusedError(404, f"there is no model {body.model!r} here, only {name!r}")
        ids = _tokenize(body.prompt, state.tokenizer, vocabulary)
        if len(ids) + body.max_tokens > longest:
            source = "" if limits.tokens is None else ", which is what fits into the memory that the server may take"
            raise RefusedError(
                400, f"{len(ids)} tokens of prompt and max_tokens={body.max_tokens} exceed {longest}{source}"
            )
        if admitted > limits.queue:
            raise RefusedError(429, f"{limits.queue} requests are waiting already: try again")
        deadline = time.monotonic() + limits.patience

        def compute() -> list[int]:
            if time.monotonic() > deadline:
                raise RefusedError(503, f"the request has waited {limits.patience:g} seconds: try again")
            return generate(state.model, ids, body)

        admitted += 1
        try:
            new = await asyncio.get_running_loop().run_in_executor(state.worker, compute)
        except RefusedError:
            raise
        except Exception as error:  # the next request is served after any failure
            log.exception("a request failed")
            raise RefusedError(500, f"the request could not be computed: {type(error).__name__}") from error
        finally:
            admitted -= 1
        choice = {
            "index": 0,
            "text": state.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if new and new[-1] in _end_tokens(state.model) else "length",
            "logprobs": None,
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(new), "total_tokens": len(ids) + len(new)}
        return {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
            "choices": [choice],
            "usage": usage,
        }

    return app


@torch.no_grad()
def generate(model: Any, ids: list[int], request: CompletionRequest) -> list[int]:
    """Generate the tokens that follow the prompt ``ids``."""
    tokens = torch.tensor([ids], device=model.device)
    sampling: dict[str, Any] = {}
    if request.temperature:
        sampling = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
    ends = _end_tokens(model)
    with torch.random.fork_rng():
        torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        sequences = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=request.max_tokens,
            do_sample=bool(sampling),
            pad_token_id=ends[0] if ends else 0,
            **sampling,
        )
    return [int(token) for token in sequences[0, len(ids) :]]


@contextlib.contextmanager
def serve_in_thread(app: fastapi.FastAPI) -> Iterator[str]:
    """Serve on a free local port in a thread, and yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start; the log says why")
                time.sleep(POLL)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            app.state.worker.shutdown()


class Supervisor(Multiprocess):
    """A supervisor that replaces the serving process if it dies.

    It closes its copy of the process's end of the pipe between them.  So a health check fails as soon as the process
    dies, and does not wait as long as loading may take.
    """

    def init_processes(self) -> None:
        super().init_processes()
        self._close_child_pipes()

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        self._close_child_pipes()

    def _close_child_pipes(self) -> None:
        for process in self.processes:
            process.child_conn.close()


async def _read_body(parts: AsyncIterator[bytes], limit: int) -> bytes:
    """Read the body of a request.  Raises RefusedError as soon as it exceeds ``limit`` bytes."""
    body = bytearray()
    async for part in parts:
        body += part
        if len(body) > limit:
            raise RefusedError(413, f"the request is longer than {limit} bytes")
    return bytes(body)


def _parse(body: bytes) -> CompletionRequest:
    try:
        return CompletionRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the request"
        raise RefusedError(400, f"{field}: {first['msg']}") from error


def _tokenize(prompt: str | list[int], tokenizer: Any, vocabulary: int) -> list[int]:
    if isinstance(prompt, list):
        if unknown := [token for token in prompt if not 0 <= token < vocabulary]:
            raise RefusedError(400, f"prompt holds the token {unknown[0]}, the model's vocabulary has {vocabulary}")
        return prompt
    ids = [int(token) for token in tokenizer(prompt, verbose=False)["input_ids"]]
    if not ids:
        raise RefusedError(400, "the prompt has no tokens")
    return ids


def _end_tokens(model: Any) -> list[int]:
    """Return the tokens that end a text."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
