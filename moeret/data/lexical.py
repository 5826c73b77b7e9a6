"""BM25: what a query's words say of documents. The only importer of bm25s.

Robertson et al. 1994 with k1 1.2 and b 0.75, in Lucene's form, over English stop words and Snowball stems. Texts of other
languages work too, with nothing stopped and hardly anything stemmed.
"""

import logging
from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer
from bm25s.tokenization import Tokenized
from jaxtyping import Float, Int

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when imported
_K1, _B = 1.2, 0.75


def stems(texts: Sequence[str]) -> list[list[str]]:
    """Each text's words, lower-cased, stopped and stemmed, in their order."""
    stemmer = Stemmer.Stemmer("english")  # of its own: a stemmer must not be shared between threads
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


class Lexical:
    """The words of an ordered list of documents. Never changes, so any number of threads may read it.

    What BM25 gives a term in a document depends on both alone, so it is counted once (bm25s, arXiv 2407.03618): term t adds
    data[indptr[t]:indptr[t + 1]] to the documents indices[indptr[t]:indptr[t + 1]].
    """

    def __init__(self, tensors: dict[str, np.ndarray]):
        """From the `tensors` of another."""
        self.tensors = tensors
        self._data, self._indices, self._indptr = (tensors[name] for name in ("data", "indices", "indptr"))
        terms = tensors["vocabulary"].tobytes().decode().split()
        self._numbers = {term: number for number, term in enumerate(terms)}

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Lexical":
        """Counts the words of documents; the same texts give the same tensors in every process."""
        documents = stems(texts)
        terms = sorted({term for own in documents for term in own})
        numbers = {term: number for number, term in enumerate(terms)}
        counted = {"data": np.empty(0, np.float32), "indices": np.empty(0, np.int32), "indptr": np.zeros(1, np.int64)}
        if terms:
            bm25 = bm25s.BM25(k1=_K1, b=_B)
            bm25.index(Tokenized([[numbers[term] for term in own] for own in documents], numbers), show_progress=False)
            counted = {name: np.ascontiguousarray(bm25.scores[name]) for name in counted}
        vocabulary = np.frombuffer("\n".join(terms).encode(), np.uint8)
        return cls({**counted, "vocabulary": vocabulary, "documents": np.array([len(documents)])})

    def part(self, start: int, end: int) -> "Lexical":
        """The documents from `start` to before `end`, with the scores that they have among all."""
        kept = (self._indices >= start) & (self._indices < end)
        before = np.concatenate([[0], np.cumsum(kept)])
        counts = np.diff(before[self._indptr])
        terms = np.array([*self._numbers], object)[counts > 0]
        return Lexical(
            {
                "data": self._data[kept],
                "indices": self._indices[kept] - np.int32(start),
                "indptr": np.concatenate([[0], np.cumsum(counts[counts > 0])]),
                "vocabulary": np.frombuffer("\n".join(terms).encode(), np.uint8),
                "documents": np.array([end - start]),
            }
        )

    def scores(self, query: Sequence[str]) -> Float[np.ndarray, "N"]:
        """Every document's BM25 score for a query's stems; 0 where no word is shared, never less."""
        out = np.zeros(int(self.tensors["documents"][0]), np.float32)
        for number in [self._numbers[term] for term in query if term in self._numbers]:
            own = slice(self._indptr[number], self._indptr[number + 1])
            out[self._indices[own]] += self._data[own]
        return out


def best(scores: Float[np.ndarray, "N"], count: int) -> Int[np.ndarray, "K"]:
    """At most `count` documents with the highest scores above 0, in no order."""
    hits = np.flatnonzero(scores)
    return hits if len(hits) <= count else hits[np.argpartition(-scores[hits], count - 1)[:count]]
