"""The service: paths in, answers out. What answers is the Desk; what may pass is the Guard's to say."""

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline

from moeret.config import ServeConfig, require
from moeret.data.lexical import stems
from moeret.errors import ArtifactError, ConfigError, MoeretError
from moeret.retrieval import filters
from moeret.retrieval.batching import ClosedError, DeadlineError, OverloadError
from moeret.retrieval.search import Retriever
from moeret.serving import schema
from moeret.serving.desk import Answer, Desk, Options
from moeret.serving.guards import Guard, check_key
from moeret.serving.measures import Measures
from moeret.serving.snippets import excerpt, words_in
from moeret.types import BASE_EXPERT, SHARED_EXPERT, Hit, Route

PAGE = Path(__file__).parent / "static"
_STATUS = {
    OverloadError: 429,
    ClosedError: 503,
    DeadlineError: 504,
    ConfigError: 422,
    ArtifactError: 503,
    MoeretError: 500,
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schema.Problem, "description": about}
    for status, about in {
        401: "the key is missing or wrong",
        413: "the body is too large",
        422: "the request makes no sense",
        429: "too many queries wait; try again after the seconds of Retry-After",
        503: "the service is starting, is being shut down, or cannot read its index",
        504: "no answer in time",
    }.items()
}


def make_app(retriever: Retriever, config: ServeConfig | None = None, *, key: str | None = None) -> Guard:
    """An ASGI application that serves a retriever's index; only to who sends `key`, if there is one.

    Raises:
      ConfigError: the key cannot stand in a header.
    """
    check_key(key)
    config, measures = config or ServeConfig(), Measures()
    desk = Desk(retriever, config, measures)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk.open()
        yield
        await desk.close()

    secured = [Depends(HTTPBearer(auto_error=False))] if key else []  # for the OpenAPI page: the Guard checks
    app = FastAPIOffline(
        title="moeret",
        version=version("moeret"),
        description="Mixture-of-experts routed retrieval: a query in, one ranked list out.",
        lifespan=lifespan,
        redoc_url=None,
        responses=_PROBLEMS,
        dependencies=secured,
    )
    _add_answers(app, desk, config)
    _add_openai(app, desk, config)
    _add_operations(app, desk, measures)
    app.mount("/page", StaticFiles(directory=PAGE / "page"))
    app.add_exception_handler(MoeretError, _refuse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _fail)
    return Guard(app, key=key, most_bytes=config.most_bytes, observe=measures.request)


def _add_answers(app: FastAPI, desk: Desk, config: ServeConfig) -> None:
    @app.post("/search")
    async def search(request: schema.SearchRequest) -> schema.SearchAnswer:
        """Search the index."""
        _check_query(request.query, config)
        require(request.k <= config.most_hits, f"k may be at most {config.most_hits} here, got {request.k}")
        where = None if request.where is None else filters.to_json(request.where)
        most = config.most_characters
        require(where is None or len(where) <= most, f"a filter may have at most {most} characters here")
        options = Options(request.k, request.route, request.experts, request.fusion, where)
        found = await desk.search(request.query, options)
        if request.snippets:  # those of many hits take a while
            return await asyncio.to_thread(_search_answer, found, request)
        return _search_answer(found, request)

    @app.post("/route")
    async def route(request: schema.RouteRequest) -> schema.RouteAnswer:
        """Which experts a query would use."""
        _check_query(request.query, config)
        answer = await desk.search(request.query, Options(k=1))
        return _route_answer(answer.route)

    @app.post("/embed")
    async def embed(request: schema.EmbedRequest) -> schema.EmbedAnswer:
        """Embed queries or documents."""
        vectors = await _embedded(desk, config, request.texts, request.expert, request.input_type)
        return schema.EmbedAnswer(embeddings=vectors.tolist())

    @app.get("/experts")
    async def experts() -> schema.ExpertsAnswer:
        """The experts, and what the service searches."""
        retriever = desk.retriever
        model, sizes = retriever.model, retriever.sizes
        strengths = {entry["name"]: entry["strength"] for entry in model.published.meta["experts"]}
        return schema.ExpertsAnswer(
            experts=[
                schema.ExpertAnswer(name=name, documents=sizes.get(name, 0), strength=strengths.get(name))
                for name in (BASE_EXPERT, *model.experts)
            ],
            documents=len(await asyncio.to_thread(retriever.distinct)),
            base=model.base.name,
            shared=model.has_shared,
            width=model.base.config.width,
            tower=model.tower,
            snapshot=retriever.index.snapshot,
        )


def _add_openai(app: FastAPI, desk: Desk, config: ServeConfig) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(request: schema.EmbeddingsRequest) -> schema.EmbeddingsAnswer:
        """Embed as OpenAI's API does; `model` is auto, base, shared or an expert's name."""
        texts = [request.input] if isinstance(request.input, str) else request.input
        width = desk.retriever.model.base.config.width
        require(
            request.dimensions in (None, width), f"dimensions must be {width} or left out, got {request.dimensions}"
        )
        vectors = await _embedded(desk, config, texts, request.model, request.input_type)
        data = [
            schema.Embedding(
                index=number,
                embedding=own.tolist()
                if request.encoding_format == "float"
                else base64.b64encode(own.astype("<f4").tobytes()).decode(),
            )
            for number, own in enumerate(vectors)
        ]
        tokens = await asyncio.to_thread(desk.tokens, texts)
        usage = schema.Usage(prompt_tokens=tokens, total_tokens=tokens)
        return schema.EmbeddingsAnswer(data=data, model=request.model, usage=usage)

    @app.get("/v1/models")
    async def models() -> schema.ModelsAnswer:
        """What `model` may name."""
        model = desk.retriever.model
        names = ["auto", BASE_EXPERT, *([SHARED_EXPERT] if model.has_shared else []), *model.experts]
        return schema.ModelsAnswer(data=[schema.ModelEntry(id=name) for name in names])


def _add_operations(app: FastAPI, desk: Desk, measures: Measures) -> None:
    @app.get("/health")
    async def health() -> schema.State:
        """Whether the service lives."""
        return schema.State(status="alive")

    @app.get("/ready")
    async def ready(response: Response) -> schema.State:
        """Whether it can answer."""
        response.status_code = 200 if desk.ready else 503
        return schema.State(status="ready" if desk.ready else "not ready")

    for path, answer in (("/health", health), ("/ready", ready)):
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        """The page."""
        return FileResponse(PAGE / "index.html")

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return Response(measures.text(), media_type="text/plain; version=0.0.4")


def _check_query(query: str, config: ServeConfig) -> None:
    most = config.most_characters
    require(len(query) <= most, f"a query may have at most {most} characters here, this one has {len(query)}")


async def _embedded(desk: Desk, config: ServeConfig, texts: Sequence[str], expert: str, side: str) -> np.ndarray:
    most = config.most_texts
    require(len(texts) <= most, f"a request may have at most {most} texts here, this one has {len(texts)}")
    return await desk.embed(texts, expert, side)


def _route_answer(route: Route) -> schema.RouteAnswer:
    return schema.RouteAnswer(probabilities=route.probabilities, experts=route.experts, abstained=route.abstained)


def _search_answer(answer: Answer, request: schema.SearchRequest) -> schema.SearchAnswer:
    wanted = frozenset(stems([request.query])[0]) if request.snippets else None
    return schema.SearchAnswer(
        hits=[_hit(hit, wanted, texts=request.texts) for hit in answer.hits],
        route=answer.route and _route_answer(answer.route),
        indexes=list(answer.indexes),
        milliseconds={stage: round(1000 * own, 3) for stage, own in answer.seconds.items()},
        snapshot=answer.snapshot,
    )


def _hit(hit: Hit, wanted: frozenset[str] | None, *, texts: bool) -> schema.SearchHit:
    snippet = None
    if wanted is not None:
        text, start, words = excerpt(hit.text, wanted)
        snippet = schema.Snippet(
            text=text,
            before=start > 0,
            after=start + len(text) < len(hit.text),
            words=words,
            title_words=[place for place, _ in words_in(hit.title, wanted)],
        )
    return schema.SearchHit(
        rank=hit.rank,
        id=hit.id,
        score=hit.score,
        expert=hit.expert,
        domain=hit.domain,
        title=hit.title,
        text=hit.text if texts else None,
        metadata=hit.metadata,
        snippet=snippet,
    )


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    detail = "the index cannot be read at the moment" if isinstance(error, ArtifactError) else str(error)
    return JSONResponse({"detail": detail}, status, headers={"retry-after": "1"} if status in (429, 503) else None)


async def _fail(request: Request, error: Exception) -> JSONResponse:
    """Its trace goes to the log, not to who asked."""
    return JSONResponse({"detail": "an error inside the service; its log says which"}, 500)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """Says where a request is wrong, without repeating what may be large or no JSON."""

    def place(parts: tuple[str | int, ...]) -> str:
        # Where one of several types is wanted, parts name the types of our code too.
        return ".".join(str(part) for part in parts if isinstance(part, int) or part.isidentifier())

    problems = [f"{place(own['loc'])}: {own['msg'].removeprefix('Value error, ')}" for own in error.errors()[:10]]
    if "json" not in request.headers.get("content-type", "") and any(own["loc"][0] == "body" for own in error.errors()):
        problems.append("the body must be JSON, sent with the header Content-Type: application/json")
    return JSONResponse({"detail": "; ".join(problems)}, 422)
