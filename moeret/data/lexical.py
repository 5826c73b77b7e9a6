"""BM25: what a query's words say of documents. The only importer of bm25s.

Robertson et al. 1994 with k1 1.2 and b 0.75, in Lucene's form, over English stop words and Snowball stems. Texts of other
languages work too, with nothing stopped and hardly anything stemmed. How often a word stands in a document never changes and is
kept on disk; how much it weighs depends on all documents that are searched together, and is worked out when these are known.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bm25s
import numpy as np
import Stemmer
from jaxtyping import Bool, Float, Int

logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG when imported
_K1, _B = 1.2, 0.75


def stems(texts: Sequence[str]) -> list[list[str]]:
    """Each text's words, lower-cased, stopped and stemmed, in their order."""
    stemmer = Stemmer.Stemmer("english")  # of its own: a stemmer must not be shared between threads
    return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def stem_words(words: Sequence[str]) -> list[str]:
    """The stem of each of these lower-cased words."""
    return Stemmer.Stemmer("english").stemWords(list(words))


def _joined(terms: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\n".join(terms).encode(), np.uint8)


def _split(terms: np.ndarray) -> list[str]:
    return terms.tobytes().decode().split()


@dataclass(frozen=True, slots=True)
class Counts:
    """How often which word stands in which document of an ordered list.

    Term t stands counts[indptr[t]:indptr[t + 1]] times in the documents indices[indptr[t]:indptr[t + 1]], which ascend.
    """

    terms: tuple[str, ...]
    indptr: Int[np.ndarray, "V+1"]
    indices: Int[np.ndarray, "_"]
    counts: Int[np.ndarray, "_"]
    lengths: Int[np.ndarray, "N"]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Counts":
        """Counts the words of documents; the same texts give the same counts in every process."""
        documents = stems(texts)
        counted = [Counter(own) for own in documents]
        terms = sorted({term for own in counted for term in own})
        numbers = {term: number for number, term in enumerate(terms)}
        held = np.fromiter((numbers[term] for own in counted for term in own), np.int32)
        rows = np.repeat(np.arange(len(texts), dtype=np.int32), [len(own) for own in counted])
        counts = np.fromiter((count for own in counted for count in own.values()), np.int32)
        return cls._sorted(tuple(terms), held, rows, counts, np.array([len(own) for own in documents], np.int32))

    @classmethod
    def _sorted(
        cls, terms: tuple[str, ...], held: np.ndarray, rows: np.ndarray, counts: np.ndarray, lengths: np.ndarray
    ) -> "Counts":
        """From each posting's term, document and count, in the documents' order."""
        order = np.argsort(held, kind="stable")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(held, minlength=len(terms)))]).astype(np.int64)
        return cls(terms, indptr, rows[order], counts[order], lengths)

    @classmethod
    def joined(cls, parts: Sequence["Counts"], kept: Sequence[Bool[np.ndarray, "_"]]) -> "Counts":
        """The documents of several that are kept, one part behind another."""
        chosen = [part.only(own) for part, own in zip(parts, kept, strict=True)]
        terms = tuple(sorted({term for part in chosen for term in part.terms}))
        numbers = {term: number for number, term in enumerate(terms)}
        starts = np.cumsum([0, *(len(part.lengths) for part in chosen)])
        held = [
            np.repeat(np.array([numbers[term] for term in part.terms], np.int32), np.diff(part.indptr))
            for part in chosen
        ]
        rows = [part.indices + np.int32(start) for part, start in zip(chosen, starts, strict=False)]
        counts, lengths = [part.counts for part in chosen], [part.lengths for part in chosen]
        return cls._sorted(terms, *(np.concatenate(own) for own in (held, rows, counts, lengths)))

    def only(self, kept: Bool[np.ndarray, "N"]) -> "Counts":
        """The documents that are kept, and their terms."""
        if kept.all():
            return self
        held = np.repeat(np.arange(len(self.terms), dtype=np.int32), np.diff(self.indptr))
        mine = kept[self.indices]
        used = np.unique(held[mine])
        renumbered = (np.cumsum(kept) - 1).astype(np.int32)
        return Counts._sorted(
            tuple(self.terms[term] for term in used),
            np.searchsorted(used, held[mine]).astype(np.int32),
            renumbered[self.indices[mine]],
            self.counts[mine],
            self.lengths[kept],
        )

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """All of it, for a file."""
        terms = _joined(self.terms)
        arrays = {name: getattr(self, name) for name in ("indptr", "indices", "counts", "lengths")}
        return {"terms": terms, **arrays}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "Counts":
        """What the `tensors` of another say."""
        terms = tuple(_split(tensors["terms"]))
        return cls(terms, *(tensors[name] for name in ("indptr", "indices", "counts", "lengths")))


@dataclass(frozen=True, slots=True)
class Statistics:
    """What BM25 must know of all documents that are searched together; `holding` is in how many each term stands."""

    documents: int
    words: int
    holding: dict[str, int]

    @classmethod
    def of(cls, parts: Iterable[tuple[Counts, Bool[np.ndarray, "_"]]]) -> "Statistics":
        """Of the documents of each part that are live."""
        chosen = [counts.only(live) for counts, live in parts]
        return cls.total(
            cls(
                len(own.lengths),
                int(own.lengths.sum()),
                dict(zip(own.terms, np.diff(own.indptr).tolist(), strict=True)),
            )
            for own in chosen
        )

    @classmethod
    def total(cls, parts: Iterable["Statistics"]) -> "Statistics":
        """Of all documents of several."""
        documents, words, holding = 0, 0, dict[str, int]()
        for own in parts:
            documents, words = documents + own.documents, words + own.words
            for term, count in own.holding.items():
                holding[term] = holding.get(term, 0) + count
        return cls(documents, words, holding)

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """All of it, for a file."""
        held = sorted(self.holding.items())
        return {
            "counts": np.array([self.documents, self.words], np.int64),
            "terms": _joined([term for term, _ in held]),
            "holding": np.array([count for _, count in held], np.int64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> "Statistics":
        """What the `tensors` of another say."""
        holding = dict(zip(_split(tensors["terms"]), tensors["holding"].tolist(), strict=True))
        return cls(*tensors["counts"].tolist(), holding)

    def rarity(self, terms: Sequence[str]) -> Float[np.ndarray, "V"]:
        """Each term's inverse document frequency."""
        holding = np.array([self.holding.get(term, 0) for term in terms], np.float64)
        return np.log1p((self.documents - holding + 0.5) / (holding + 0.5))


class Lexical:
    """Documents' words, weighed. Never changes, so any number of threads may read it.

    What BM25 gives a term in a document depends on both alone, so it is worked out once (bm25s, arXiv 2407.03618).
    """

    def __init__(self, counts: Counts, statistics: Statistics):
        self._indices, self._indptr, self._documents = counts.indices, counts.indptr, len(counts.lengths)
        self._numbers = {term: number for number, term in enumerate(counts.terms)}
        mean = max(statistics.words / max(statistics.documents, 1), 1e-9)
        damped = _K1 * (1 - _B + _B * counts.lengths / mean)
        rarity = np.repeat(statistics.rarity(counts.terms), np.diff(counts.indptr))
        self._weights = (rarity * counts.counts / (counts.counts + damped[counts.indices])).astype(np.float32)

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Lexical":
        """Of documents that are searched by themselves."""
        counts = Counts.of(texts)
        return cls(counts, Statistics.of([(counts, np.ones(len(texts), bool))]))

    def scores(self, query: Sequence[str]) -> Float[np.ndarray, "N"]:
        """Every document's BM25 score for a query's stems; 0 where no word is shared, never less."""
        out = np.zeros(self._documents, np.float32)
        for number in [self._numbers[term] for term in query if term in self._numbers]:
            own = slice(self._indptr[number], self._indptr[number + 1])
            out[self._indices[own]] += self._weights[own]
        return out


def best(scores: Float[np.ndarray, "N"], count: int) -> Int[np.ndarray, "K"]:
    """At most `count` documents with the highest scores above 0, in no order."""
    hits = np.flatnonzero(scores)
    return hits if len(hits) <= count else hits[np.argpartition(-scores[hits], count - 1)[:count]]
