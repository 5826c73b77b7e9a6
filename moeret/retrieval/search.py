"""The Retriever: queries in, one ranked list each out."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors.numpy import load_file

from moeret import artifact
from moeret.artifact import Artifact
from moeret.config import IndexConfig, Precision, require
from moeret.data.lexical import stems
from moeret.errors import ArtifactError
from moeret.models.memory import Blend
from moeret.models.model import Model, check_texts
from moeret.models.router import Choice, Router
from moeret.retrieval.build import KIND
from moeret.retrieval.documents import DocumentStore
from moeret.retrieval.evidence import Evidence
from moeret.retrieval.expert_index import read_index
from moeret.retrieval.fusion import Fusion, Ranking, fuse
from moeret.types import BASE_EXPERT, SHARED_EXPERT, Document, Hit, Route

_LEAST_WEIGHT = 1e-6
"""Of an index that must be searched although the router's probability for it vanishes."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Each query's weight of each index (0: not searched), and the vectors that given queries search an index with.

    `shares` are the weights of each query's experts, or of the base or the shared delta: so much of each one's blend counts.
    """

    weights: Float[np.ndarray, "Q I"]
    vectors: Callable[[str, np.ndarray], Float[np.ndarray, "_ D"]]
    shares: list[dict[str, float]]
    routes: list[Route]

    def of(self, rows: Int[np.ndarray, "_"]) -> "_Plan":
        """The plan of some of the queries."""
        shares = [self.shares[row] for row in rows]
        return _Plan(self.weights[rows], lambda name, own: self.vectors(name, rows[own]), shares, [])

    def blend(self, row: int, name: str, blends: Mapping[str, Blend]) -> Blend:
        """What counts beside the cosine for a query in an index: its words everywhere alike, the memory of its expert there."""
        shares = self.shares[row]
        wanted = {expert: blends.get(expert, Blend()) for expert in (*shares, name)}
        return Blend(
            sum(wanted[expert].lexical * share for expert, share in shares.items()),
            wanted[name].memory * shares.get(name, 0.0),
        )


@dataclass(frozen=True, slots=True)
class Rankings:
    """What a batch of queries found, as each one's (rows, scores), best first; which indexes it searched, and its route."""

    ranked: list[tuple[np.ndarray, np.ndarray]]
    indexes: list[tuple[str, ...]]
    routes: list[Route]


class Retriever:
    """Searches an index. Searching changes nothing, so any number of threads may search at once.

    `fusion`, `blends` (what counts beside the cosine: by default what training chose, nothing if empty) and `strange_limit` (what
    makes a query strange, in spreads of the sketches; the lower, the more queries search the base's own index too) serve every
    search; set them before the first.
    """

    def __init__(self, published: Artifact, model: Model):
        meta = published.meta
        self.index, self.model = published, model
        config = IndexConfig(**meta["config"])
        self.sizes: dict[str, int] = {name: entry["documents"] for name, entry in meta["experts"].items()}
        self._names = list(self.sizes)
        self._starts = np.cumsum([0, *self.sizes.values()])[:-1]
        self._indexes = {
            name: read_index(published, entry, int(start), config)
            for (name, entry), start in zip(meta["experts"].items(), self._starts, strict=True)
        }
        self.blends: dict[str, Blend] = dict(model.blends)
        self._same = load_file(published.path(meta["documents"]["same"]))["same"]
        self._documents = DocumentStore(published.path(meta["documents"]["file"]))
        self._evidence = Evidence(model.experts, load_file(published.path(meta["sketches"])))
        self.strange_limit: float | None = meta["strange_limit"]
        self._calibration = {entry["name"]: entry["calibration"] for entry in model.published.meta["experts"]}
        self._calibration[BASE_EXPERT] = model.published.meta["base"]["calibration"]
        self.fusion: Fusion = "score" if model.tower == "query" else "calibrated"

    @classmethod
    def load(cls, index: str | Path, *, model: Model | None = None, precision: Precision | None = None) -> "Retriever":
        """Loads an index with the model that it holds, or with `model`, which must be the one it was built with.

        `precision` is of the products that embed queries, the model's own unless given (see Model.in_precision), whatever the
        documents were embedded in.

        Raises:
          ArtifactError: the index or its model is damaged, unfinished, or `model` is another one.
          ConfigError: there is no such precision.
        """
        return artifact.load(Path(index), KIND, lambda published: cls._from_artifact(published, model, precision))

    @classmethod
    def _from_artifact(cls, published: Artifact, model: Model | None, precision: Precision | None) -> "Retriever":
        built_with = published.meta["model"]["fingerprint"]
        model = model or Model.load(published.root / published.meta["model"]["folder"])
        if model.published is None or model.published.fingerprint != built_with:
            raise ArtifactError(
                f"{published.root} was built with another model ({built_with[:12]}); search it with its own, or build it anew"
            )
        return cls(published, model if precision is None else model.in_precision(precision))

    def close(self) -> None:
        """Gives the index's files back."""
        self._documents.close()

    def search(
        self, query: str, k: int = 10, *, route: str = "auto", experts: int | None = None, fusion: Fusion | None = None
    ) -> list[Hit]:
        """The best `k` documents for a query; fewer only if the searched indexes hold fewer. See search_batch."""
        return self.search_batch([query], k, route=route, experts=experts, fusion=fusion)[0]

    def search_batch(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        route: str = "auto",
        experts: int | None = None,
        fusion: Fusion | None = None,
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

        Raises:
          ConfigError: an argument that makes no sense; nothing has been searched then.
        """
        return self.hits(self.rank(queries, k, route=route, experts=experts, fusion=fusion))

    def rank(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        route: str = "auto",
        experts: int | None = None,
        fusion: Fusion | None = None,
    ) -> Rankings:
        """As search_batch, and says what was searched; documents are named by their rows, and `hits` fetches them."""
        self._check(queries, k, route, experts, fusion)
        if not queries:
            return Rankings([], [], [])
        texts, words, fusion = self.model.with_prompt(queries, "query"), stems(queries), fusion or self.fusion
        plan = self._plan(texts, route, experts)
        found = self._search(plan, words, k, fusion, self.blends)
        return self._second_look(found, plan, texts, words, k) if route == "auto" and fusion == "score" else found

    def _second_look(
        self, found: Rankings, plan: _Plan, texts: Sequence[str], words: Sequence[list[str]], k: int
    ) -> Rankings:
        """Searches with the base's vector where, memories aside, the best hit is in the base's own index.

        Such a query is of no expert's domain, although the router took it for one's. The base's index remembers nothing, so an
        expert's memory does not tell which of both a query is for.
        """
        asked = np.flatnonzero([BASE_EXPERT in names for names in found.indexes])
        words_alone = {name: Blend(own.lexical) for name, own in self.blends.items()}
        best = self._search(plan.of(asked), [words[row] for row in asked], 1, "score", words_alone)
        rows = asked[np.array([self._holders(hits) == [BASE_EXPERT] for hits, _ in best.ranked], bool)]
        if len(rows):
            nothing = np.zeros((len(rows), 1), np.int32)
            vectors = self.model.embedder.mixed([texts[row] for row in rows], nothing, nothing.astype(np.float32))
            as_base = _Plan(plan.weights[rows], _one_vector(vectors), [{BASE_EXPERT: 1.0}] * len(rows), [])
            again = self._search(as_base, [words[row] for row in rows], k, "score", self.blends)
            for row, ranked in zip(rows, again.ranked, strict=True):
                found.ranked[row] = ranked
                found.routes[row] = dataclasses.replace(found.routes[row], experts={}, abstained=True)
        return found

    def _search(
        self, plan: _Plan, words: Sequence[list[str]], k: int, fusion: Fusion, blends: Mapping[str, Blend]
    ) -> Rankings:
        """What queries, of which these are the stems, find by a plan."""
        rankings: list[list[Ranking]] = [[] for _ in words]
        for number, (name, index) in enumerate(self._indexes.items()):
            rows = np.flatnonzero(plan.weights[:, number] > 0)
            if len(rows):
                slope, intercept = self._calibration[name] or (1.0, 0.0)
                wanted = [plan.blend(row, name, blends) for row in rows]
                found = index.search(plan.vectors(name, rows), [words[row] for row in rows], wanted, k)
                for row, (hits, scores) in zip(rows, found, strict=True):
                    weight = float(plan.weights[row, number])
                    rankings[row].append(Ranking(hits, scores, weight, slope, intercept))
        fused = [fuse(own, fusion, k, self._same) for own in rankings]
        searched = [tuple(self._names[number] for number in np.flatnonzero(own > 0)) for own in plan.weights]
        return Rankings(fused, searched, plan.routes)

    def hits(self, found: Rankings) -> list[list[Hit]]:
        """What `rank` found, with its documents."""
        documents = self._documents.fetch(np.concatenate([rows for rows, _ in found.ranked])) if found.ranked else {}
        return [
            [
                _hit(rank, float(score), expert, documents[row])
                for rank, (row, score, expert) in enumerate(zip(rows, scores, self._holders(rows), strict=True), 1)
            ]
            for rows, scores in found.ranked
        ]

    def held(self) -> list[tuple[str, Document]]:
        """Every row's expert and document."""
        rows = np.arange(sum(self.sizes.values()))
        documents = self._documents.fetch(rows)
        return [(expert, documents[row]) for row, expert in enumerate(self._holders(rows))]

    def _holders(self, rows: Int[np.ndarray, "N"]) -> list[str]:
        """Whose index has each row."""
        return [self._names[number] for number in np.searchsorted(self._starts, rows, side="right") - 1]

    def distinct(self) -> Int[np.ndarray, "_"]:
        """The first row of every document: one that lies in two indexes has two."""
        return np.unique(self._same)

    def vectors(self) -> Float[np.ndarray, "N D"]:
        """Every document's vector, by row."""
        out = np.empty((sum(self.sizes.values()), self.model.embedder.width), np.float32)
        for segment in (index.segment for index in self._indexes.values()):
            out[segment.rows] = np.repeat(segment.vectors, np.diff(segment.offsets), axis=0)
        return out

    def _plan(self, texts: list[str], route: str, experts: int | None) -> "_Plan":
        """Decides for every query which indexes it searches, how much each weighs, and with which vector."""
        model, count = self.model, len(texts)
        everywhere = np.ones((count, len(self._names)), np.float32)
        if route not in ("auto", "all"):
            here = [route in (BASE_EXPERT, SHARED_EXPERT, name) for name in self._names]
            vectors = model.embedder.mixed(texts, *model.mixture(route, count))
            return _Plan(everywhere * np.array(here, np.float32), _one_vector(vectors), [{route: 1.0}] * count, [])
        router = dataclasses.replace(model.query_router, slots=experts) if experts else model.query_router
        if model.tower == "query":
            choice, merged, strange = self._routed(texts, router)
        else:
            choice, merged = model.embedder.routed(texts, router)
        routes = model.routes(choice)
        shares = [own.experts or {BASE_EXPERT: 1.0} for own in routes]
        chosen = np.array([[own.experts.get(name, 0.0) for name in self._names] for own in routes], np.float32)
        if model.tower == "query":
            weights = everywhere if route == "all" else self._reached(chosen, strange)
            return _Plan(weights, _one_vector(merged), shares, routes)
        weights = everywhere if route == "all" else self._in_own_spaces(chosen, routes)

        def own_vectors(name: str, rows: np.ndarray) -> Float[np.ndarray, "Q D"]:
            return model.embedder.mixed([texts[row] for row in rows], *model.mixture(name, len(rows)))

        return _Plan(weights, own_vectors, shares, routes)

    def _routed(
        self, texts: Sequence[str], router: Router
    ) -> tuple[Choice, Float[np.ndarray, "Q D"], Bool[np.ndarray, "Q"]]:
        """What the router chooses with the index's evidence, the vectors, and which queries are strange.

        A query is embedded as the router alone has it, and again where the evidence changes that much.
        """
        router = dataclasses.replace(router, familiarity=None)
        strangeness = np.empty(len(texts), np.float32)

        def revise(rows: slice, first: Choice, vectors: np.ndarray) -> Choice:
            probabilities, strangeness[rows] = self._evidence.weigh(vectors, first.probabilities)
            return router.pick(probabilities)

        choice, vectors = self.model.embedder.routed(texts, router, revise=revise)
        limit = np.inf if self.strange_limit is None else self.strange_limit
        return choice, vectors, strangeness > limit

    def _reached(self, chosen: Float[np.ndarray, "Q I"], strange: Bool[np.ndarray, "Q"]) -> Float[np.ndarray, "Q I"]:
        """The weights of the chosen indexes, and of the base's own for strange queries; of all where none is chosen."""
        weights = np.where(chosen.any(axis=1, keepdims=True), chosen, 1.0).astype(np.float32)
        if BASE_EXPERT in self.sizes:
            mean = weights.sum(axis=1) / (weights > 0).sum(axis=1)
            base = self._names.index(BASE_EXPERT)
            weights[:, base] = np.where(strange, mean, weights[:, base])
        return weights

    def _in_own_spaces(self, chosen: Float[np.ndarray, "Q I"], routes: Sequence[Route]) -> Float[np.ndarray, "Q I"]:
        """The weights where no promise can be compared: of the chosen indexes and the base's own, or of all by probability."""
        even = 1 / (1 + len(self.model.experts))
        by_chance = np.array(
            [[own.probabilities.get(name, even) for name in self._names] for own in routes], np.float32
        )
        is_base = np.array([name == BASE_EXPERT for name in self._names])
        mean = chosen.sum(axis=1, keepdims=True) / np.maximum((chosen > 0).sum(axis=1, keepdims=True), 1)
        return np.where(
            chosen.any(axis=1, keepdims=True), np.where(is_base, mean, chosen), np.maximum(by_chance, _LEAST_WEIGHT)
        )

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
                f"this index has no documents of expert {route}; it has {', '.join(self._names)}",
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


def _hit(rank: int, score: float, expert: str, document: Document) -> Hit:
    return Hit(document.id, score, rank, expert, document.title, document.text)


def _one_vector(vectors: Float[np.ndarray, "Q D"]) -> Callable[[str, np.ndarray], Float[np.ndarray, "_ D"]]:
    """Each query searches every index with the same vector."""
    return lambda name, rows: vectors[rows]
