"""The routes: what a client may ask, how it is answered, and what is refused.

    POST /v1/judge               pairs to judge, answers to score or to rank
    POST /v1/chat/completions    OpenAI's form, and /v1/completions for a prompt as it stands
    POST /v1/rerank              the form of Cohere and Jina
    GET  /v1/models  /healthz  /metrics  /openapi.json  /docs  /  (the page)

Errors have OpenAI's form. A client that leaves cancels what it has asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jlrm.config import RunError, UsageError
from jlrm.evaluation.games import Game
from jlrm.server import bodies, describe, pages, replies
from jlrm.server.bodies import ChatBody, JudgeBody, UnknownModel
from jlrm.server.chat import Choices, TextChoices
from jlrm.server.engine import Busy
from jlrm.server.metrics import Metrics
from jlrm.server.service import Piece, Service
from jlrm.serving.asked import Listed
from jlrm.serving.results import JudgedGame, JudgedList, JudgedPair, Ranking, ScoredAnswer

BODY_SECONDS = 30.0  # in which a body must have come
WATCH = 0.25  # seconds between two looks whether a client is still there


@dataclass(frozen=True)
class Limits:
    """What is taken of clients. keys: one of them must be shown; none: nobody is asked."""

    body_bytes: int = 2**20
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # of pages that may ask from a browser
    hosts: tuple[str, ...] = ("*",)  # names that the server answers to


class TooLarge(Exception):
    """A body over the limit."""


class Left(Exception):
    """The client has left."""


def make(service: Service, limits: Limits, metrics: Metrics) -> Starlette:
    """Return the application."""
    routes = Routes(service, limits, metrics)
    posts = {
        "/v1/judge": routes.judge,
        "/v1/chat/completions": routes.chat,
        "/v1/completions": routes.complete,
        "/v1/rerank": routes.rerank,
    }
    gets = {
        "/v1/models": routes.models,
        "/v1/models/{name:path}": routes.model,
        "/healthz": routes.health,
        "/metrics": routes.measured,
        "/openapi.json": routes.description,
        "/docs": routes.docs,
    }
    app = Starlette(
        routes=[
            *(Route(path, routes.answered(do), methods=["POST"]) for path, do in posts.items()),
            *(Route(path, routes.answered(do), methods=["GET"]) for path, do in gets.items()),
            *(
                Route(
                    "/" if name == "index.html" else f"/{name}", pages.asset(name), methods=["GET"]
                )
                for name in ("index.html", "page.js", "page.css")
            ),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(limits.hosts)),
            Middleware(
                CORSMiddleware,
                allow_origins=list(limits.origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            ),
            Middleware(Guard, keys=limits.keys),
        ],
        exception_handlers={
            404: lambda request, _: replies.error(404, f"No such route: {request.url.path}."),
            405: lambda request, _: replies.error(
                405, f"{request.method} is not what this route takes."
            ),
        },
    )
    app.router.redirect_slashes = False
    return app


class Guard:
    """Asks for the key, where there is one."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_open = not scope["path"].startswith(("/v1/", "/metrics"))
        if is_open or not self._keys or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refused = replies.error(
            401, "A key is wanted: Authorization: Bearer KEY.", "invalid_api_key"
        )
        refused.headers["WWW-Authenticate"] = "Bearer"
        await refused(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        shown = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = shown.partition(b" ")
        matches = [hmac.compare_digest(key.strip(), each) for each in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    """The handlers."""

    def __init__(self, service: Service, limits: Limits, metrics: Metrics) -> None:
        self._service, self._limits, self._metrics = service, limits, metrics
        about = {"object": "model", "owned_by": "jlrm", "created": int(time.time())}
        self._model = {"id": service.defaults.model, **about}

    def answered(self, handler: Handler) -> Handler:
        """Return a handler that turns what goes wrong into a reply, and is counted."""

        async def answer(request: Request) -> Response:
            with self._metrics.request(request.url.path) as outcome:
                try:
                    response = await handler(request)
                except UnknownModel as error:
                    response = replies.error(404, str(error), "model_not_found")
                except UsageError as error:
                    response = replies.error(400, str(error))
                except TooLarge:
                    most = self._limits.body_bytes
                    response = replies.closing(
                        replies.error(413, f"The body is larger than {most} bytes.")
                    )
                except TimeoutError:
                    late = f"The body did not come in {BODY_SECONDS:.0f} s."
                    response = replies.closing(replies.error(408, late))
                except Busy as busy:
                    response = replies.error(429, str(busy), "rate_limit_exceeded")
                    response.headers["Retry-After"] = str(busy.retry_after)
                except (Left, ClientDisconnect):
                    response = Response(status_code=499)  # which nobody reads
                except RunError as error:
                    response = replies.error(503, str(error))
                except Exception as error:  # a fault of ours: the client hears of it in its form
                    response = replies.Ascii(replies.failure(error), 500)
                outcome.status = response.status_code
            return response

        return answer

    async def judge(self, request: Request) -> Response:
        """Judge pairs, rank answers, or score one answer."""
        body = bodies.judge_body(await self._body(request), self._service.defaults)

        def reply(judged: Sequence[Any] | Ranking) -> dict[str, Any]:
            is_ranking = isinstance(judged, Ranking)
            usage = _usage(judged.games if is_ranking else judged)
            about = {"model": self._service.defaults.model, "usage": usage}
            if is_ranking:
                return judged.to_dict() | about
            if body.single or body.is_one_pair:
                return judged[0].to_dict() | about
            return {"results": [each.to_dict() for each in judged]} | about

        if not body.drawing.is_streamed:
            judging = self._judging(body)
            return replies.Ascii(reply(await _unless_left(request, judging)))
        events: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        told: dict[tuple[str, int], int] = {}

        def tell(game: Game, piece: Piece) -> None:
            key = game.id, piece.completion
            begin, told[key] = told.get(key, 0), len(piece.text)
            place = int(game.item.id.rpartition("#")[2])
            order = [game.first + 1, game.second + 1, *(each + 1 for each in game.rest)]
            if body.listed and game.is_single:  # one answer of the list: the one at this place
                place, order = 0, [place + 1] * 2
            new = {"pair": place, "order": order, "vote": piece.completion}
            events.put_nowait({**new, "text": piece.text[begin:], "ending": piece.ending})

        async def work() -> Sequence[Any] | Ranking:
            try:
                return await self._judging(body, tell)
            finally:
                events.put_nowait(None)

        task = asyncio.create_task(work())
        try:
            first = await _unless_left(request, events.get())
            if first is None:
                await task  # raises what is wrong, before a byte is sent
        except BaseException:
            task.cancel()
            raise

        async def stream() -> AsyncIterator[bytes]:
            try:
                event = first
                while event is not None:
                    yield replies.event(event)
                    event = await events.get()
                yield replies.event({"result": reply(await task)})
            except Exception as error:
                yield replies.event(replies.failure(error))
            finally:
                task.cancel()
            yield b"data: [DONE]\n\n"

        return replies.stream(stream())

    def _judging(
        self, body: JudgeBody, tell: Callable[[Game, Piece], None] = lambda game, piece: None
    ) -> Awaitable[Sequence[Any] | Ranking]:
        """Return the work that a body asks for: results of pairs or of one answer, or a ranking."""
        if body.single:
            return self._service.score([body.single], body.drawing, tell)
        if body.listed:
            return self._service.rank(body.listed, body.at_once, body.orders, body.drawing, tell)
        return self._service.judge(body.pairs, body.orders, body.drawing, tell)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        body = bodies.chat_body(await self._body(request), self._service.defaults)
        return await self._write(request, body, self._service.chat_prompt(body.messages), Choices)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        body = bodies.completion_body(await self._body(request), self._service.defaults)
        ((_, text),) = body.messages
        return await self._write(request, body, self._service.text_prompt(text), TextChoices)

    async def _write(
        self, request: Request, body: ChatBody, ids: list[int], kind: type[Choices]
    ) -> Response:
        """Answer in OpenAI's form, at once or in chunks."""
        number = int(uuid.uuid5(uuid.NAMESPACE_OID, repr(body.messages))) % 2**31
        is_growing = body.drawing.is_streamed or bool(body.stops)
        asked = ids, number, self._service.num_stops
        pieces = self._service.write([asked], body.drawing, is_growing)
        choices = kind(self._service, body, len(ids))
        if not body.drawing.is_streamed:

            async def work() -> dict[str, Any]:
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        choices.add(piece)
                        if choices.are_finished:
                            break
                return choices.whole()

            return replies.Ascii(await _unless_left(request, work()))
        # Raises what is wrong, before a byte is sent.
        first = await _unless_left(request, anext(pieces))

        async def stream() -> AsyncIterator[bytes]:
            async with contextlib.aclosing(pieces):
                try:
                    for chunk in (*choices.opening(), *choices.chunks(first)):
                        yield replies.event(chunk)
                    while not choices.are_finished:
                        for chunk in choices.chunks(await anext(pieces)):
                            yield replies.event(chunk)
                    if body.has_usage:
                        yield replies.event(choices.usage_chunk())
                except Exception as error:
                    yield replies.event(replies.failure(error))
            yield b"data: [DONE]\n\n"

        return replies.stream(stream())

    async def rerank(self, request: Request) -> Response:
        """Order documents by how well they answer a query."""
        body = bodies.rerank_body(await self._body(request), self._service.defaults)
        documents, found = body.documents, None
        if len(documents) > 1:
            asked = Listed(body.query, documents, None, self._service.defaults.rubric)
            work = self._service.rank(asked, body.at_once, "both", body.drawing)
            found = await _unless_left(request, work)
            if all(pair.winner is None for pair in found.pairs):
                why = next(
                    (each.error for each in found.games if each.error), found.games[0].status
                )
                raise UsageError(f"No two documents could be compared: {why.rstrip('.')}.")
        relevant = _by_relevance(found, len(documents), self._service.read.scale)
        results = []
        for i, score in relevant[: body.top_n]:
            result: dict[str, Any] = {"index": i, "relevance_score": score}
            if body.has_documents:
                result["document"] = {"text": documents[i]}
            results.append(result)
        return replies.Ascii(
            {
                "id": f"rerank-{uuid.uuid4().hex}",
                "model": self._service.defaults.model,
                "results": results,
                # Pairs of documents.
                "unjudged": sum(pair.winner is None for pair in found.pairs) if found else 0,
                "usage": _usage(found.games if found else ()),
            }
        )

    async def models(self, request: Request) -> Response:
        """Name the model that is served."""
        return replies.Ascii({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """Describe the model that is served."""
        if request.path_params["name"] != self._model["id"]:
            raise UnknownModel(f"Only {self._model['id']} is served here.")
        return replies.Ascii(self._model)

    async def health(self, request: Request) -> Response:
        """Say whether judgements can be had."""
        if failure := self._service.engine.failure:
            return replies.error(503, failure)
        return replies.Ascii({"status": "ok", "model": self._service.defaults.model})

    async def measured(self, request: Request) -> Response:
        """Give the metrics in the text form of Prometheus."""
        content, kind = self._metrics.text()
        return Response(content, media_type=kind)

    async def description(self, request: Request) -> Response:
        """Describe the routes as OpenAPI does."""
        return replies.Ascii(describe.openapi(self._service.defaults))

    async def docs(self, request: Request) -> Response:
        """Describe the routes for people."""
        address = str(request.base_url).rstrip("/")
        return pages.page(describe.page(self._service.defaults, address).encode(), "text/html")

    async def _body(self, request: Request) -> dict[str, Any]:
        """Read a body of JSON, as far as it may go.

        Raises:
          TooLarge, TimeoutError, UsageError: as they say.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of others can send unasked is not
            raise UsageError("Send the body as application/json.")
        content = b""
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                content += chunk
                if len(content) > self._limits.body_bytes:
                    raise TooLarge
        return bodies.parse(content)


async def _unless_left(request: Request, work: Awaitable[Any]) -> Any:
    """Return what work comes to, and cancel it if the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=WATCH))[0]:
            if await request.is_disconnected():
                raise Left
        return task.result()
    finally:
        task.cancel()


def _by_relevance(
    ranking: Ranking | None, num_answers: int, scale: tuple[float, float]
) -> list[tuple[int, float]]:
    """Return places of answers, from the best to the worst, and how relevant they are, 0 to 1.

    By strengths: the chance to beat an average one of these. By scores: the share of the scale, and
    0 for an answer without a score, which comes last.
    """
    if ranking is None:
        return [(0, 0.5)]
    places = [i - 1 for i in ranking.order]
    if ranking.scores is None:
        return [(i, 1 / (1 + math.exp(-ranking.strengths[i]))) for i in places]
    low, high = scale
    scores = [score for score in (ranking.scores[i] for i in places) if score is not None]
    scored = [(score - low) / (high - low) for score in scores]  # of all: others are in no order
    left_out = [(i, 0.0) for i in range(num_answers) if i not in places]
    return [*zip(places, scored, strict=True), *left_out]


def _usage(
    judged: Sequence[JudgedPair | ScoredAnswer | JudgedGame | JudgedList],
) -> dict[str, int]:
    return {"completion_tokens": sum(each.num_tokens or 0 for each in judged)}
