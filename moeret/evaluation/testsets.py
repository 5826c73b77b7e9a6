"""Judged queries of many domains over one pool of rows, and what a ranking of rows scores on them.

Every document of an index has one name per test set, however many rows it has: its id if it belongs to the set's domain,
expert/id otherwise, so that ids of two domains that meet by accident stay two documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeret import metrics
from moeret.config import require
from moeret.data.beir import Judged, read_domain
from moeret.errors import DataError
from moeret.metrics import NDCG, RECALL
from moeret.retrieval.search import Retriever
from moeret.types import Document

DEPTH = 100
"""Hits of a query that are measured."""

Ranked = tuple[np.ndarray, np.ndarray]
"""One query's (rows, scores), best first."""


@dataclass(frozen=True, slots=True)
class TestSet:
    """One domain's judged queries, and what its rankings call every row of the index."""

    __test__ = False  # not a class of tests
    name: str
    judged: Judged
    documents: dict[str, Document]
    names: list[str]

    @classmethod
    def of(
        cls, name: str, judged: Judged, documents: dict[str, Document], held: Sequence[tuple[str, Document]]
    ) -> "TestSet":
        """A domain's test set over an index whose rows are `held`: each row's expert and document."""
        names: dict[Document, str] = {document: document.id for document in documents.values()}
        for expert, document in held:
            names.setdefault(document, _foreign(documents, expert, document))
        return cls(name, judged, documents, [names[document] for _, document in held])

    def run_of(self, query: str, ranked: Ranked, depth: int = DEPTH) -> dict[str, float]:
        """Name -> score of the first documents for a query.

        A query that is itself a document does not retrieve itself: BEIR's rule drops every hit with the query's id; here
        the text must be the same too, because ids like "7" meet by accident.
        """
        document = self.documents.get(query)
        itself = document is not None and _words(self.judged.queries[query]) in (
            _words(document.text),
            _words(document.contents),
        )
        run: dict[str, float] = {}
        for row, score in zip(ranked[0].tolist(), ranked[1].tolist(), strict=True):
            name = self.names[row]
            if not (itself and name == query) and name not in run:
                run[name] = score
            if len(run) == depth:
                break
        return run


@dataclass(frozen=True, slots=True)
class Result:
    """What one system scored: domain -> measure -> query id -> value, and the runs that gave it."""

    values: dict[str, dict[str, dict[str, float]]]
    runs: dict[str, dict[str, dict[str, float]]]

    def table(self) -> dict[str, dict[str, float]]:
        """Domain -> measure -> mean over its queries, and the number of queries."""
        return {
            name: {**{measure: metrics.mean(own) for measure, own in values.items()}, "queries": len(values[NDCG])}
            for name, values in self.values.items()
        }

    def mean(self) -> dict[str, float]:
        """Measure -> mean over domains."""
        table = self.table()
        return {measure: float(np.mean([row[measure] for row in table.values()])) for measure in (NDCG, RECALL)}


def read_test_sets(retriever: Retriever, domains: Mapping[str, str | Path], split: str) -> list[TestSet]:
    """Reads one split of each domain.

    Raises:
      DataError: a folder is malformed, or the index lacks a relevant document (every document of it is looked for).
    """
    require(bool(domains), "there is no domain to evaluate; give at least one NAME=BEIR_DIR")
    held = retriever.held()
    known = {document for _, document in held}
    sets = []
    for name, path in domains.items():
        domain = read_domain(name, Path(path), (split,))
        documents = {document.id: document for document in domain.corpus}
        missing = [document.id for document in domain.corpus if document not in known]
        if missing:
            raise DataError(
                f"the index lacks {len(missing)} of the {len(documents)} documents of {domain.path / 'corpus.jsonl'} "
                f"(first: {missing[0]!r}); build it with this domain"
            )
        sets.append(TestSet.of(name, domain.splits[split], documents, held))
    return sets


def score(sets: Sequence[TestSet], ranked: dict[str, Sequence[Ranked]]) -> Result:
    """What rankings of each test set's queries, in its order, score.

    Measured is the order of the documents, equal scores included, so that a run written to a file scores the same.
    """
    values, runs = {}, {}
    for test in sets:
        runs[test.name] = {
            query: test.run_of(query, own) for query, own in zip(test.judged.queries, ranked[test.name], strict=True)
        }
        ordered = {query: {id: -float(rank) for rank, id in enumerate(run)} for query, run in runs[test.name].items()}
        values[test.name] = metrics.per_query(test.judged.qrels, ordered)
    return Result(values, runs)


def one_run(sets: Sequence[TestSet], runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """All domains' runs as one; with several domains every id gets its domain in front, since ids may meet."""
    if len(sets) == 1:
        return runs[sets[0].name]
    return {
        f"{test.name}/{query}": {
            f"{test.name}/{id}" if id in test.documents else id: score for id, score in hits.items()
        }
        for test in sets
        for query, hits in runs[test.name].items()
    }


def _foreign(documents: dict[str, Document], expert: str, document: Document) -> str:
    """A name for another domain's document that none of the domain's own documents has."""
    name = f"{expert}/{document.id}"
    while name in documents:
        name = f"/{name}"
    return name


def _words(text: str) -> list[str]:
    return text.casefold().split()
