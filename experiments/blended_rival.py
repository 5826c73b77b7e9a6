"""One model for all domains with all that our experts have beside their weights: BM25, and a memory of every train query.

What is left to a mixture then is that each of its experts weighs them as its domain wants: this rival has one blend.
"""

from collections.abc import Callable, Sequence

import numpy as np

from moeret.config import IndexConfig
from moeret.data.beir import Domain
from moeret.data.lexical import Lexical, stems
from moeret.evaluation.baselines import System
from moeret.evaluation.testsets import Ranked, TestSet, score
from moeret.metrics import NDCG
from moeret.models.memory import Blend
from moeret.retrieval.expert_index import ExpertIndex, Part
from moeret.retrieval.hnsw import build_vector_index
from moeret.retrieval.search import Retriever
from moeret.retrieval.segment import Answers
from moeret.training.blend import LEXICAL, MEMORY, remember


def blended_system(
    retriever: Retriever,
    domains: Sequence[Domain],
    dev: Sequence[TestSet],
    encode: Callable[[Sequence[str]], np.ndarray],
) -> tuple[System, Blend]:
    """The rival that embeds queries by `encode`, and the blend with the best mean dev nDCG@10 over domains, which it uses."""
    held, rows, exact = retriever.held(), retriever.distinct(), IndexConfig(exact_below=10**9)
    documents = [held[row][1] for row in rows]
    contents, memory = [document.contents for document in documents], remember(domains, encode)
    part = Part(
        0,
        build_vector_index(retriever.vectors()[rows], exact),
        Lexical.of(contents),
        Answers(*memory.answers(contents)),
    )
    index = ExpertIndex((part,), build_vector_index(memory.queries.astype(np.float32), exact))

    def ranked(vectors: np.ndarray, words: Sequence[list[str]], blend: Blend, k: int) -> list[Ranked]:
        found = index.search(vectors, words, [blend] * len(words), k)
        return [(rows[places], scores) for places, scores in found]

    def system(blend: Blend) -> System:
        return lambda texts, k: ranked(encode(texts), stems(texts), blend, k)

    asked = [(encode(texts), stems(texts)) for texts in ([*test.judged.queries.values()] for test in dev)]

    def mean(blend: Blend) -> float:
        found = {
            test.name: ranked(vectors, words, blend, 11) for test, (vectors, words) in zip(dev, asked, strict=True)
        }
        return score(dev, found).mean()[NDCG]

    best = max((Blend(lexical, memory) for lexical in LEXICAL for memory in MEMORY), key=mean)
    return system(best), best
