"""RouterRetriever's routing (arXiv 2409.02685), as a rival: pilot embeddings, no training.

Every training query votes for the expert that serves it best. For each domain and each expert voted for in it, the mean
base embedding of the voters is a pilot of that expert. A query goes to the expert whose pilots are, on the mean, most
similar to it, and searches all documents with that expert's vector.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from moeret.evaluation.baselines import System, exact_system
from moeret.evaluation.testsets import TestSet, score
from moeret.metrics import NDCG
from moeret.retrieval.search import Retriever

Pilots = Mapping[int, Sequence[Float[np.ndarray, "D"]]]
"""Expert (0 is the base) -> its pilots."""


def pilot_system(retriever: Retriever, votes: Sequence[TestSet]) -> System:
    """The rival over a retriever's experts; `votes` are training queries of every domain."""
    model, pilots = retriever.model, pilots_of(retriever, votes)
    names = ("base", *model.experts)

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "Q D"]:
        chosen, _ = similarities(_encode(model, texts, None), pilots)
        return _encode(model, texts, [names[number] for number in chosen])

    return exact_system(retriever, encode)


def pilots_of(retriever: Retriever, votes: Sequence[TestSet]) -> Pilots:
    """Every domain's pilots, by the votes of its training queries."""
    model = retriever.model
    names = (None, *model.experts)
    values = []
    for name in names:
        system = exact_system(retriever, lambda texts, name=name: _encode(model, texts, name))
        values.append(score(votes, {own.name: system([*own.judged.queries.values()], 11) for own in votes}).values)
    pilots: dict[int, list[np.ndarray]] = {}
    for own in votes:
        table = np.stack([[*scored[own.name][NDCG].values()] for scored in values])
        table[names.index(own.name)] += 1e-6  # the domain's own expert wins a tie
        best = table.argmax(axis=0)
        vectors = _encode(model, [*own.judged.queries.values()], None)
        for expert in np.unique(best):
            pilots.setdefault(int(expert), []).append(vectors[best == expert].mean(axis=0))
    return pilots


def similarities(
    vectors: Float[np.ndarray, "Q D"], pilots: Pilots
) -> tuple[Int[np.ndarray, "Q"], Float[np.ndarray, "E Q"]]:
    """(the expert whose pilots have the largest mean cosine to each query, these means of every expert)."""
    numbers, means = [*pilots], []
    for number in numbers:
        own = np.stack(pilots[number])
        means.append((vectors @ (own / np.linalg.norm(own, axis=1, keepdims=True)).T).mean(axis=1))
    return np.array(numbers)[np.argmax(means, axis=0)], np.stack(means)


def _encode(model, texts: Sequence[str], expert) -> Float[np.ndarray, "Q D"]:
    return model.encode_query(list(texts), expert=expert, normalize_embeddings=True)
