"""A model behind HTTP, in the words of OpenAI's completions.

One request is computed at a time, by transformers' ``generate``; the others wait in a queue of bounded length.  One
that finds it full is told at once to come again (429), one that has waited too long is told so instead of being
computed (503), and what is malformed or too long is refused (4xx) before it waits.
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

PATIENCE = 0.01  # seconds between looks at whether the server has started

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """``queue``: requests that may wait, beside the one that is computed; ``patience``: seconds that one may wait;
    ``body``: bytes of a request; ``tokens``: of a prompt and its answer, if fewer than the model reads."""

    queue: int = 16
    patience: float = 60.0
    body: int = 1 << 20
    tokens: int | None = None


class Asked(pydantic.BaseModel):
    """What ``/v1/completions`` takes; anything else in a request is refused, not ignored."""

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


class Refused(Exception):
    """A request that is not answered: the status and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def application(model: Any, tokenizer: Any, name: str, limits: Limits = Limits()) -> fastapi.FastAPI:
    """``POST /v1/completions``, ``GET /v1/models`` and ``GET /health``."""
    vocabulary, longest = model.config.vocab_size, sources.LoadedModel(model, tokenizer).window_length(None)
    longest = longest if limits.tokens is None else min(longest, limits.tokens)
    admitted = 0
    app = fastapi.FastAPI(title="nashswarm", openapi_url=None)
    # not in the functions below: FastAPI remembers those as long as the process lives
    app.state.model, app.state.tokenizer = model, tokenizer
    app.state.worker = concurrent.futures.ThreadPoolExecutor(1, "generate")
    del model, tokenizer

    async def refuse(request: fastapi.Request, error: Exception) -> JSONResponse:
        status = int(error.status if isinstance(error, Refused) else getattr(error, "status_code", 500))
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        reason = getattr(error, "detail", None) or str(error)
        body = {"error": {"message": reason, "type": kind, "param": None, "code": None}}
        return JSONResponse(body, status, {"Retry-After": "1"} if status in (429, 503) else None)

    app.add_exception_handler(Refused, refuse)
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
        asked = _asked(await _body(request.stream(), limits.body))
        if asked.model not in (None, name):
            raise Refused(404, f"there is no model {asked.model!r} here, only {name!r}")
        ids = _ids(asked.prompt, state.tokenizer, vocabulary)
        if len(ids) + asked.max_tokens > longest:
            whose = "" if limits.tokens is None else ", which is what fits into the memory that the server may take"
            raise Refused(400, f"{len(ids)} tokens of prompt and max_tokens={asked.max_tokens} exceed {longest}{whose}")
        if admitted > limits.queue:
            raise Refused(429, f"{limits.queue} requests are waiting already: try again")
        latest = time.monotonic() + limits.patience

        def compute() -> list[int]:
            if time.monotonic() > latest:
                raise Refused(503, f"the request has waited {limits.patience:g} seconds: try again")
            return generated(state.model, ids, asked)

        admitted += 1
        try:
            new = await asyncio.get_running_loop().run_in_executor(state.worker, compute)
        except Refused:
            raise
        except Exception as error:  # whatever went wrong, the next request is served
            log.exception("a request failed")
            raise Refused(500, f"the request could not be computed: {type(error).__name__}") from error
        finally:
            admitted -= 1
        choice = {
            "index": 0,
            "text": state.tokenizer.decode(new, skip_special_tokens=True),
            "finish_reason": "stop" if new and new[-1] in _ends(state.model) else "length",
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
def generated(model: Any, ids: list[int], asked: Asked) -> list[int]:
    """The tokens that follow."""
    tokens = torch.tensor([ids], device=model.device)
    drawn = {"temperature": asked.temperature, "top_p": asked.top_p, "top_k": 0} if asked.temperature else {}
    ends = _ends(model)
    with torch.random.fork_rng():
        torch.manual_seed(secrets.randbits(63) if asked.seed is None else asked.seed)
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=asked.max_tokens,
            do_sample=bool(drawn),
            pad_token_id=ends[0] if ends else 0,
            **drawn,
        )
    return [int(token) for token in found[0, len(ids) :]]


@contextlib.contextmanager
def running(app: fastapi.FastAPI) -> Iterator[str]:
    """Serve on a free port of this machine alone, in a thread: the address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start; the log says why")
                time.sleep(PATIENCE)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            app.state.worker.shutdown()


class Supervisor(Multiprocess):
    """Replaces the process that answers if it dies.  It keeps no copy of that one's end of the pipe between them: so
    the wait for an answer ends with the process, and not after as long as loading may take."""

    def init_processes(self) -> None:
        super().init_processes()
        self._let_go()

    def keep_subprocess_alive(self) -> None:
        super().keep_subprocess_alive()
        self._let_go()

    def _let_go(self) -> None:
        for process in self.processes:
            process.child_conn.close()


async def _body(parts: AsyncIterator[bytes], limit: int) -> bytes:
    """Raises Refused as soon as there is too much of it."""
    found = bytearray()
    async for part in parts:
        found += part
        if len(found) > limit:
            raise Refused(413, f"the request is longer than {limit} bytes")
    return bytes(found)


def _asked(body: bytes) -> Asked:
    try:
        return Asked.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise Refused(400, f"{where}: {first['msg']}") from error


def _ids(prompt: str | list[int], tokenizer: Any, vocabulary: int) -> list[int]:
    if isinstance(prompt, list):
        if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
            raise Refused(400, f"prompt holds the token {wrong[0]}, the model's vocabulary has {vocabulary}")
        return prompt
    ids = [int(token) for token in tokenizer(prompt, verbose=False)["input_ids"]]
    if not ids:
        raise Refused(400, "the prompt has no tokens")
    return ids


def _ends(model: Any) -> list[int]:
    """The tokens that end a text."""
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)
