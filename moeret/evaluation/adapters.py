"""The harnesses that people trust: BEIR's EvaluateRetrieval and mteb accept a moeret retriever.

Neither is imported until it asks for something of its own; install them yourself (`pip install beir mteb`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from moeret.data.beir import Judged
from moeret.errors import DataError
from moeret.evaluation.testsets import TestSet
from moeret.metrics import falling
from moeret.retrieval.search import Retriever
from moeret.types import Document

_QUERIES_AT_ONCE = 512


class HarnessSearch:
    """A retriever as BEIR and mteb call one: `EvaluateRetrieval(HarnessSearch(retriever))`, `mteb.evaluate(HarnessSearch(...))`.

    The harness brings one task's corpus, which the index must hold; the queries are searched in the whole index, by
    `route`, and documents of other corpora count as not relevant, as in `moeret.evaluate`.
    """

    def __init__(self, retriever: Retriever, *, route: str = "auto"):
        self._retriever, self._route = retriever, route
        self._documents: dict[str, Document] = {}

    def search(
        self,
        corpus: Mapping[str, Mapping[str, str]] | None = None,
        queries: Any = None,
        top_k: int = 100,
        *_: Any,
        **__: Any,
    ) -> dict[str, dict[str, float]]:
        """Query id -> document id -> score of the best `top_k`.

        BEIR calls it with (corpus, queries by id, top_k, score_function, ...); mteb after `index`, with queries as rows of id
        and text, and everything by name.

        Raises:
          DataError: the index lacks a document of the corpus.
        """
        if corpus is None:
            return self._search({row["id"]: row["text"] for row in queries}, top_k)
        self._hold((id, row.get("title", ""), row["text"]) for id, row in corpus.items())
        return self._search(queries, top_k)

    def index(self, corpus: Iterable[Mapping[str, Any]], **_: Any) -> None:
        """mteb: the corpus of the task that is searched next. Nothing is indexed: the retriever's index holds it already."""
        self._hold((row["id"], row.get("title") or "", row["text"]) for row in corpus)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb: what is known of the model."""
        from mteb.models import ModelMeta

        return ModelMeta.create_empty({"name": f"moeret/{self._retriever.model.published.fingerprint[:12]}"})

    def _hold(self, corpus: Iterable[tuple[str, str, str]]) -> None:
        self._documents = {id: Document(id, text, title) for id, title, text in corpus}
        held = {document for _, document in self._retriever.held()}
        missing = [id for id, document in self._documents.items() if document not in held]
        if missing:
            raise DataError(
                f"the index lacks {len(missing)} of the {len(self._documents)} documents of this corpus (first: "
                f"{missing[0]!r}); build it with them"
            )

    def _search(self, queries: Mapping[str, str], top_k: int) -> dict[str, dict[str, float]]:
        test = TestSet.of("harness", Judged(dict(queries), {}), self._documents, self._retriever.held())
        texts, runs = [*queries.values()], {}
        for start in range(0, len(texts), _QUERIES_AT_ONCE):
            ids = [*queries][start : start + _QUERIES_AT_ONCE]
            found = self._retriever.rank(texts[start : start + _QUERIES_AT_ONCE], top_k + 1, route=self._route)
            runs |= {id: falling(test.run_of(id, own, top_k)) for id, own in zip(ids, found.ranked, strict=True)}
        return runs
