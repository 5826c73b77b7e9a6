"""Answers of an index to many askers: queries that arrive together are searched together."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from moeret.config import ServeConfig, require
from moeret.models.model import check_texts
from moeret.retrieval.batching import Batcher
from moeret.retrieval.search import Retriever
from moeret.serving.measures import Measures
from moeret.types import BASE_EXPERT, Hit, Route

_LOG = logging.getLogger("moeret.serve")
_WARM = (
    *(["a " * words] for words in (4, 8, 12, 20, 28, 44, 60, 90)),
    *(["a " * 100] * texts for texts in (1, 2, 3, 4)),
    *(["a " * words] * texts for words, texts in ((150, 1), (150, 2), (400, 1))),
)
"""Queries of the lengths and numbers for which there are programs, so that clients hardly ever wait for one to be compiled."""
_LONGEST = 512
"""Tokens that are read of a text at most."""

Side = Literal["query", "document"]


class Options(NamedTuple):
    """How queries are searched; those with the same options are searched together. `where` is JSON."""

    k: int = 10
    route: str = "auto"
    experts: int | None = None
    fusion: str | None = None
    where: str | None = None


class Answer(NamedTuple):
    """What a search found for one query. `route` is None where none was asked for; `seconds` are the batch's, by stage."""

    hits: list[Hit]
    route: Route | None
    indexes: tuple[str, ...]
    seconds: dict[str, float]
    snapshot: int


class Desk:
    """Takes queries and texts for one Retriever, from one event loop."""

    def __init__(self, retriever: Retriever, config: ServeConfig, measures: Measures):
        self.retriever, self._config, self._measures = retriever, config, measures
        limits = {"budget": config.batch_tokens, "wait": config.wait, "most_waiting": config.most_waiting}
        self._searches: Batcher[str, Answer] = Batcher(self._search, cost=_tokens, observe=measures.batch, **limits)
        self._texts: Batcher[list[str], np.ndarray] = Batcher(
            self._embed, cost=lambda texts: sum(map(_tokens, texts)), **limits
        )
        self.ready, self._closing = False, False
        self._tasks: list[asyncio.Task[None]] = []
        measures.waiting.set_function(lambda: len(self._searches) + len(self._texts))
        self._count()

    def open(self) -> None:
        """Begins to warm up, and to look for new snapshots."""
        self._tasks.append(asyncio.create_task(self._get_ready()))
        if self._config.reload_every:
            self._tasks.append(asyncio.create_task(self._watch()))

    async def close(self) -> None:
        """Takes nothing new, and returns when everything taken is answered."""
        self.ready, self._closing = False, True
        for task in self._tasks[1:]:
            task.cancel()
        await self._searches.close()
        await self._texts.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def search(self, query: str, options: Options) -> Answer:
        """What Retriever.search finds, and how.

        Raises:
          ConfigError: an option that makes no sense.
          OverloadError: too many queries wait.
          DeadlineError: it took too long.
        """
        began = time.monotonic()
        answer = await self._searches.submit(options, query, self._config.deadline)
        waited = time.monotonic() - began - sum(answer.seconds.values())
        return answer._replace(seconds={"wait": max(0.0, waited), **answer.seconds})

    async def embed(self, texts: Sequence[str], expert: str, side: Side) -> Float[np.ndarray, "N D"]:
        """Unit vectors of queries or documents, as an expert (or `auto`, the base, `shared`) embeds them. Raises as `search`.

        Documents are embedded by `auto` as the model's own are, by the base, where they are all in its space. What costs more
        than a batch may goes in pieces, so that others come between and nothing is begun that nobody waits for.
        """
        check_texts(texts, "texts")
        if side == "document" and expert == "auto":
            require(
                self.retriever.model.tower == "query",
                "documents of this model are embedded by an expert: name one, not auto",
            )
            expert = BASE_EXPERT
        ends, parts = time.monotonic() + self._config.deadline, []
        for piece in _pieces(texts, self._config.batch_tokens):
            left = max(0.0, ends - time.monotonic())
            parts.append(await self._texts.submit((expert, side), piece, left))
        return np.concatenate(parts)

    def tokens(self, texts: Sequence[str]) -> int:
        """How many tokens the base reads of these."""
        return sum(map(len, self.retriever.model.base.tokenizer(list(texts))))

    async def _get_ready(self) -> None:
        try:
            await asyncio.to_thread(self._warm_up)
            self.ready = not self._closing
        except Exception:
            _LOG.exception("the service cannot search its index, and will not be ready")

    def _warm_up(self) -> None:
        model = self.retriever.model
        mixes = ({BASE_EXPERT: 1.0}, dict.fromkeys(model.experts[:2], 0.5))
        for texts in _WARM:
            for experts in mixes:
                if self._closing:
                    return
                model.encode_query(texts, expert=experts)
        for name in model.experts:  # merges each with the base
            if name in self.retriever.sizes and not self._closing:
                self.retriever.search("a", route=name)
        self.retriever.search("a")

    def _search(self, options: Options, queries: list[str]) -> list[Answer]:
        wanted = {**options._asdict(), "where": None if options.where is None else json.loads(options.where)}
        found = self.retriever.rank(queries, **wanted)
        began = time.perf_counter()
        hits = self.retriever.hits(found)
        seconds = {**found.seconds, "fetch": time.perf_counter() - began}
        self._measures.stages(seconds, len(queries))
        routes = found.routes or [None] * len(queries)
        for route in routes:
            if route is not None:
                self._measures.routed(route.experts, route.abstained)
        number = found.snapshot.published.snapshot
        return [Answer(*own, seconds, number) for own in zip(hits, routes, found.indexes, strict=True)]

    def _embed(self, how: tuple[str, Side], requests: list[list[str]]) -> list[np.ndarray]:
        expert, side = how
        model = self.retriever.model
        encode = model.encode_query if side == "query" else model.encode_document
        vectors = encode([text for texts in requests for text in texts], expert=expert, normalize_embeddings=True)
        return np.split(vectors, np.cumsum([len(texts) for texts in requests])[:-1])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.reload_every)
            try:
                if await asyncio.to_thread(self.retriever.reload):
                    self._count()
                    _LOG.info("searches go to snapshot %d from now on", self.retriever.index.snapshot)
            except Exception:
                _LOG.exception("the index cannot be reloaded, the snapshot before is searched")

    def _count(self) -> None:
        self._measures.snapshot(self.retriever.index.snapshot, self.retriever.sizes)


def _tokens(text: str) -> int:
    """About how many tokens of a text are read."""
    return min(2 + len(text) // 4, _LONGEST)


def _pieces(texts: Sequence[str], budget: int) -> Iterator[list[str]]:
    """Neighbours together, as long as they cost no more than the budget."""
    piece: list[str] = []
    left = budget
    for text in texts:
        if piece and _tokens(text) > left:
            yield piece
            piece, left = [], budget
        piece.append(text)
        left -= _tokens(text)
    yield piece
