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


def pilot_system(retriever: Retriever, votes: Sequence[TestSet]) -> System:
    """The rival over a retriever's experts; `votes` are training queries of every domain."""
    model = retriever.model
    names = (None, *model.experts)
    values = []
    for name in names:
        system = exact_system(retriever, lambda texts, name=name: _encode(model, texts, name))
        ranked = {own.name: system([*own.judged.queries.values()], 11) for own in votes}
        values.append(score(votes, ranked).values)
    pilots: dict[int, list[np.ndarray]] = {}
    for own in votes:
        table = np.stack([[*scored[own.name][NDCG].values()] for scored in values])
        mine = names.index(own.name) if own.name in names else 0
        table[mine] += 1e-6  # the domain's own expert wins a tie
        best = table.argmax(axis=0)
        vectors = _encode(model, [*own.judged.queries.values()], None)
        for expert in np.unique(best):
            pilots.setdefault(int(expert), []).append(vectors[best == expert].mean(axis=0))

    def encode(texts: Sequence[str]) -> Float[np.ndarray, "Q D"]:
        chosen = choose(_encode(model, texts, None), pilots)
        return _encode(model, texts, [names[number] or "base" for number in chosen])

    return exact_system(retriever, encode)


def choose(
    vectors: Float[np.ndarray, "Q D"], pilots: Mapping[int, Sequence[Float[np.ndarray, "D"]]]
) -> Int[np.ndarray, "Q"]:
    """The expert whose pilots have the largest mean cosine to each query."""
    numbers = [*pilots]
    similar = []
    for number in numbers:
        own = np.stack(pilots[number])
        similar.append((vectors @ (own / np.linalg.norm(own, axis=1, keepdims=True)).T).mean(axis=1))
    return np.array(numbers)[np.argmax(similar, axis=0)]


def _encode(model, texts: Sequence[str], expert) -> Float[np.ndarray, "Q D"]:
    return model.encode_query(list(texts), expert=expert, normalize_embeddings=True)
