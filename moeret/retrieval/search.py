"""The Retriever: queries in, one ranked list each out."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Float, Int

from moeret import artifact
from moeret.artifact import Artifact
from moeret.config import Precision, require
from moeret.data.lexical import stems
from moeret.errors import ArtifactError
from moeret.models.memory import Blend
from moeret.models.model import Model, check_texts
from moeret.retrieval import filters
from moeret.retrieval.dispatch import LEAST_WEIGHT, Plan, make_plan, one_vector
from moeret.retrieval.filters import Where
from moeret.retrieval.fusion import Fusion, Ranking, fuse
from moeret.retrieval.rerank import CANDIDATES, Rerank, reranked
from moeret.retrieval.snapshot import Here, Places, Snapshot, model_of
from moeret.types import BASE_EXPERT, SHARED_EXPERT, Document, Hit, Route


@dataclass(frozen=True, slots=True)
class Rankings:
    """What a batch of queries found, as each one's (rows, scores), best first; which indexes it searched, and its route.

    Rows are of the `snapshot` that was searched. `seconds` are those of the whole batch: `embed` (which routes too), `search`.
    """

    snapshot: Snapshot
    ranked: list[tuple[np.ndarray, np.ndarray]]
    indexes: list[tuple[str, ...]]
    routes: list[Route]
    seconds: dict[str, float] = field(default_factory=dict)


class Retriever:
    """Searches an index. Any number of threads may search at once, also while `reload` moves on to the index's next snapshot.

    `fusion`, `blends` (what counts beside the cosine: by default what training chose, nothing if empty) and `strange_limit` (what
    makes a query strange, in spreads of the sketches; the lower, the more queries search the base's own index too; by default
    each snapshot's own) serve every search; set them before the first.
    """

    def __init__(self, published: Artifact, model: Model, places: Places):
        """A retriever of an index that `places` has read; `load` makes one."""
        self.model, self._places, self._snapshot = model, places, places.open(published, model.experts)
        self.blends: dict[str, Blend] = dict(model.blends)
        self.strange_limit: float | None = published.meta["strange_limit"]
        self._calibration = {entry["name"]: entry["calibration"] for entry in model.published.meta["experts"]}
        self._calibration[BASE_EXPERT] = model.published.meta["base"]["calibration"]
        self.fusion: Fusion = "score" if model.tower == "query" else "calibrated"

    @classmethod
    def load(
        cls,
        index: str | Path,
        *,
        model: Model | None = None,
        precision: Precision | None = None,
        hybrid: bool = True,
    ) -> "Retriever":
        """Loads an index with the model that it holds, or with `model`, which must be the one it was built with.

        `precision` is of the products that embed queries, the model's own unless given (see Model.in_precision), whatever the
        documents were embedded in. Without `hybrid` documents are ranked by cosine alone: no `blends`.

        Raises:
          ArtifactError: the index or its model is damaged, unfinished, or `model` is another one.
          ConfigError: there is no such precision.
        """
        retriever = cls.of(Here(), index, model=model, precision=precision)
        if not hybrid:
            retriever.blends = {}
        return retriever

    @classmethod
    def of(
        cls, places: Places, index: str | Path, *, model: Model | None = None, precision: Precision | None = None
    ) -> "Retriever":
        """As `load`, with the experts' indexes wherever `places` has them."""

        def make(root: Path) -> "Retriever":
            published, own = places.read(root), model
            built_with = published.meta["model"]["fingerprint"]
            if own is None:
                own = model_of(published)
            elif own.published is None or own.published.fingerprint != built_with:
                raise ArtifactError(
                    f"{root} was built with another model ({built_with[:12]}); search it with its own, or build it anew"
                )
            return cls(published, own if precision is None else own.in_precision(precision), places)

        return artifact.retry(Path(index), make)

    def reload(self) -> bool:
        """Moves on to the snapshot that is published now; whether it is another one. Searches that have begun finish on theirs.

        What both have in common is neither read nor checked again.

        Raises:
          ArtifactError: the index is damaged, or was built anew with another model; this retriever stays where it was.
        """
        before = self._snapshot

        def move(root: Path) -> Snapshot | None:
            published = self._places.read(root, before.published)
            if published.meta["model"]["fingerprint"] != before.published.meta["model"]["fingerprint"]:
                raise ArtifactError(f"{root} was built anew with another model; load it with Retriever.load")
            same = (published.snapshot, published.fingerprint) == (
                before.published.snapshot,
                before.published.fingerprint,
            )
            return None if same else self._places.open(published, self.model.experts, before)

        after = artifact.retry(before.published.root, move)
        if after is None:
            return False
        if self.strange_limit == before.published.meta["strange_limit"]:
            self.strange_limit = after.published.meta["strange_limit"]
        self._snapshot = after
        return True

    def close(self) -> None:
        """Gives the index's files back; leaving a `with` does it too."""
        self._snapshot.close()

    def __enter__(self) -> "Retriever":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def index(self) -> Artifact:
        """What is searched, as it was published."""
        return self._snapshot.published

    @property
    def sizes(self) -> dict[str, int]:
        """How many documents each expert's index has."""
        return self._snapshot.sizes

    @property
    def sketches(self) -> dict[str, Float[np.ndarray, "C D"]]:
        """What stands for each index's documents."""
        return self._snapshot.sketches

    def held(self) -> list[tuple[str, Document]]:
        """Every row's expert and document."""
        return self._snapshot.held()

    def distinct(self) -> Int[np.ndarray, "_"]:
        """The first row of every document: one that lies in two indexes has two."""
        return self._snapshot.distinct()

    def vectors(self) -> Float[np.ndarray, "N D"]:
        """Every document's vector, by row."""
        return self._snapshot.vectors()

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        route: str = "auto",
        experts: int | None = None,
        fusion: Fusion | None = None,
        where: Where | None = None,
        rerank: Rerank | None = None,
    ) -> list[Hit]:
        """The best `k` documents for a query; fewer only if the searched indexes hold fewer. See search_batch."""
        return self.search_batch([query], k, route=route, experts=experts, fusion=fusion, where=where, rerank=rerank)[0]

    def search_batch(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        route: str = "auto",
        experts: int | None = None,
        fusion: Fusion | None = None,
        where: Where | None = None,
        rerank: Rerank | None = None,
    ) -> list[list[Hit]]:
        """The best `k` documents for each query.

        Args:
          queries: non-empty strings.
          k: how many hits, at least 1. Beyond 100 more candidates get a whole score, which may change the first hits too.
          route: `auto` lets the router choose; with documents in the base's space a strange query searches the base's own index
            too, where all documents without a domain are, and with fusion by score it searches again with the base's vector
            where its best hit, memories aside, is one of them. `all` uses the router's experts but searches every index; `base`
            searches every index as the base would, `shared` with the shared delta alone; an expert's name searches its index
            with it. Words and memory count as `blends` says of what is used.
          experts: at most this many experts are merged per query (auto and all); the model's router decides unless given.
          fusion: how several indexes' lists become one. `score` for models whose documents are in the base's space (the
            default there); `calibrated` (the default elsewhere) or `rrf`.
          where: only documents whose metadata fulfil this (see moeret.retrieval.filters), for example
            {"lang": "en", "year": {"gte": 2020}}. With the routes auto and all there are `k` hits, or all documents that fulfil
            it: a query whose own indexes have too few of them searches the others too.
          rerank: scores the best hits (50, or `k`) anew, such as CrossEncoder(...).predict of sentence-transformers.

        Raises:
          ConfigError: an argument that makes no sense; nothing has been searched then.
        """
        _require_count(k, "k")
        wanted = k if rerank is None else max(k, CANDIDATES)
        found = self.hits(self.rank(queries, wanted, route=route, experts=experts, fusion=fusion, where=where))
        return found if rerank is None else reranked(queries, found, rerank, k)

    def rank(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        route: str = "auto",
        experts: int | None = None,
        fusion: Fusion | None = None,
        where: Where | None = None,
    ) -> Rankings:
        """As search_batch, and says what was searched; documents are named by their rows, and `hits` fetches them."""
        self._check(queries, k, route, experts, fusion)
        if where is not None:
            filters.check(where)
        snapshot = self._snapshot
        if not queries or not snapshot.count:
            nothing = np.empty(0, np.int64), np.empty(0, np.float32)
            return Rankings(snapshot, [nothing] * len(queries), [()] * len(queries), self._routes_alone(queries))
        texts, words, fusion = self.model.with_prompt(queries, "query"), stems(queries), fusion or self.fusion
        settings = {"experts": experts, "strange_limit": self.strange_limit, "where": where}
        started = time.perf_counter()
        plan = make_plan(self.model, snapshot, texts, route, **settings)
        embedded = time.perf_counter()
        found = self._search(plan, words, k, fusion, self.blends)
        if route == "auto" and fusion == "score":
            found = self._second_look(found, plan, texts, words, k)
        if where is not None and route in ("auto", "all"):
            self._widen(found, plan, words, k, fusion)
        found.seconds.update(embed=embedded - started, search=time.perf_counter() - embedded)
        return found

    def _routes_alone(self, queries: Sequence[str]) -> list[Route]:
        """What the router says where there is no document to ask."""
        if not queries:
            return []
        choice, _ = self.model.embedder.routed(self.model.with_prompt(queries, "query"), self.model.query_router)
        return self.model.routes(choice)

    def _widen(self, found: Rankings, plan: Plan, words: Sequence[list[str]], k: int, fusion: Fusion) -> None:
        """Searches every index for the queries that found fewer than they asked for."""
        few = [len(rows) < k for rows, _ in found.ranked]
        rows = np.flatnonzero(np.array(few) & (plan.weights <= 0).any(axis=1))
        if len(rows):
            everywhere = np.maximum(plan.weights, LEAST_WEIGHT)
            wide = dataclasses.replace(plan, weights=everywhere).of(rows)
            again = self._search(wide, [words[row] for row in rows], k, fusion, self.blends)
            for row, ranked, indexes in zip(rows, again.ranked, again.indexes, strict=True):
                found.ranked[row], found.indexes[row] = ranked, indexes

    def _second_look(
        self, found: Rankings, plan: Plan, texts: Sequence[str], words: Sequence[list[str]], k: int
    ) -> Rankings:
        """Searches with the base's vector where, memories aside, the best hit is in the base's own index.

        Such a query is of no expert's domain, although the router took it for one's. The base's index remembers nothing, so an
        expert's memory does not tell which of both a query is for.
        """
        asked = np.flatnonzero([BASE_EXPERT in names for names in found.indexes])
        words_alone = {name: Blend(own.lexical) for name, own in self.blends.items()}
        best = self._search(plan.of(asked), [words[row] for row in asked], 1, "score", words_alone)
        rows = asked[np.array([plan.snapshot.experts_of(hits) == [BASE_EXPERT] for hits, _ in best.ranked], bool)]
        if len(rows):
            nothing = np.zeros((len(rows), 1), np.int32)
            vectors = self.model.embedder.mixed([texts[row] for row in rows], nothing, nothing.astype(np.float32))
            shares = [{BASE_EXPERT: 1.0}] * len(rows)
            as_base = dataclasses.replace(plan.of(rows), vectors=one_vector(vectors), shares=shares)
            again = self._search(as_base, [words[row] for row in rows], k, "score", self.blends)
            for row, ranked in zip(rows, again.ranked, strict=True):
                found.ranked[row] = ranked
                found.routes[row] = dataclasses.replace(found.routes[row], experts={}, abstained=True)
        return found

    def _search(
        self, plan: Plan, words: Sequence[list[str]], k: int, fusion: Fusion, blends: Mapping[str, Blend]
    ) -> Rankings:
        """What queries, of which these are the stems, find by a plan."""
        rankings: list[list[Ranking]] = [[] for _ in words]
        snapshot, asked, calls = plan.snapshot, [], []
        for number, name in enumerate(snapshot.names):
            rows = np.flatnonzero(plan.weights[:, number] > 0)
            if len(rows):
                wanted = [plan.blend(row, name, blends) for row in rows]
                own = plan.vectors(name, rows), [words[row] for row in rows], wanted, k, plan.where
                asked.append((number, name, rows))
                calls.append(partial(snapshot.holders[name].search, *own))
        for (number, name, rows), found in zip(asked, snapshot.ask(calls), strict=True):
            start, (slope, intercept) = snapshot.start(name), self._calibration[name] or (1.0, 0.0)
            for row, (hits, scores, identities) in zip(rows, found, strict=True):
                weight = float(plan.weights[row, number])
                rankings[row].append(Ranking(start + hits, scores, identities, weight, slope, intercept))
        fused = [fuse(own, fusion, k) for own in rankings]
        searched = [tuple(snapshot.names[number] for number in np.flatnonzero(own > 0)) for own in plan.weights]
        return Rankings(snapshot, fused, searched, plan.routes)

    def hits(self, found: Rankings) -> list[list[Hit]]:
        """What `rank` found, with its documents."""
        snapshot, every = found.snapshot, [rows for rows, _ in found.ranked]
        rows = np.concatenate(every) if every else np.empty(0, np.int64)
        documents, about = snapshot.fetch(rows), {}
        for row, expert in zip(rows.tolist(), snapshot.experts_of(rows), strict=True):
            document, loose = documents[row]
            about[row] = document, expert, "" if loose else expert
        return [
            [
                _hit(rank, float(score), *about[int(row)])
                for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
            ]
            for rows, scores in found.ranked
        ]

    def route(self, queries: Sequence[str]) -> list[Route]:
        """Which experts each query uses; whether it abstains, its best hit tells. Raises ConfigError for an empty query."""
        return self.rank(queries, 1).routes

    def _check(self, queries: Sequence[str], k: int, route: str, experts: int | None, fusion: Fusion | None) -> None:
        check_texts(queries, "queries")
        for position, query in enumerate(queries):
            require(bool(query.strip()), f"query {position + 1} of {len(queries)} is empty; a query needs some text")
        _require_count(k, "k")
        if experts is not None:
            _require_count(experts, "experts")
        shared = [SHARED_EXPERT] if self.model.has_shared else []
        known = ("auto", "all", BASE_EXPERT, *shared, *self.model.experts)
        require(route in known, f"there is no route {route!r}; choose one of {', '.join(known)}")
        if route in self.model.experts:
            require(
                route in self.sizes,
                f"this index has no documents of expert {route}; it has {', '.join(self.sizes)}",
            )
        fusions = get_args(Fusion)
        require(
            fusion is None or fusion in fusions, f"there is no fusion {fusion!r}; choose one of {', '.join(fusions)}"
        )
        if self.model.tower == "query":
            require(
                fusion != "calibrated",
                "one document space needs no calibration; use score or rrf",
            )
        else:
            require(
                route != BASE_EXPERT, "the base cannot search this index: its documents are in their experts' spaces"
            )
            require(fusion != "score", "scores of different document spaces cannot be compared; use calibrated or rrf")


def _require_count(value: int, name: str) -> None:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(whole and value >= 1, f"{name} must be a whole number of at least 1, got {value!r}")


def _hit(rank: int, score: float, document: Document, expert: str, domain: str) -> Hit:
    metadata = json.loads(document.metadata) if document.metadata else {}
    return Hit(document.id, score, rank, expert, document.title, document.text, domain, metadata)
