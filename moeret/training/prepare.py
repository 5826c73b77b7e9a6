"""From BEIR folders to what training reads: texts checked, tokenised, embedded by the base, split."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from moeret import artifact
from moeret.config import TrainConfig
from moeret.data.beir import Domain, carve_dev, read_domain, sample, seen_queries
from moeret.data.pairs import label_free_pairs
from moeret.errors import DataError
from moeret.models.embed import Embedder
from moeret.models.model import Profile
from moeret.models.router import part
from moeret.models.vector_cache import cached_vectors
from moeret.progress import progress_bar
from moeret.training.batches import TrainingSet
from moeret.training.routing import DevSet
from moeret.types import Document

PROFILE_QUERIES, PROFILE_DOCUMENTS = 2048, 4096
"""Vectors that a profile keeps at most."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All domains, made ready: `pool` holds every document's unit base vector, and behind them other negatives."""

    domains: list[Domain]
    sets: list[TrainingSet]
    dev: list[DevSet]
    profiles: list[Profile]
    pool: Float[np.ndarray, "N D"]


def read_domains(domains: dict[str, Path], *, label_free: bool = False) -> list[Domain]:
    """Reads the train and, where there is one, the dev split of each folder; a missing dev is carved out of train.

    With `label_free` only the corpora are read, and train is made from their documents, which lack what was made a query then.
    """
    judged, optional = ((), ()) if label_free else (("train",), ("dev",))
    read = [read_domain(name, path, judged, optional) for name, path in domains.items()]
    if label_free:
        made = [label_free_pairs(domain.corpus) for domain in read]
        read = [
            replace(own, corpus=rest, splits={"train": train}) for own, (train, rest) in zip(read, made, strict=True)
        ]
    for domain in read:
        if "dev" not in domain.splits:
            try:
                domain.splits["train"], domain.splits["dev"] = carve_dev(domain.splits["train"])
            except DataError as error:
                raise DataError(f"{domain.path / 'qrels' / 'train.tsv'}: {error}") from None
    return read


def source_digests(path: Path, *, label_free: bool = False) -> dict[str, str]:
    """SHA-256 of every file that training reads of a BEIR folder."""
    names = ("corpus.jsonl", *(() if label_free else ("queries.jsonl", "qrels/train.tsv", "qrels/dev.tsv")))
    return {name: artifact.sha256_of(path / name) for name in names if (path / name).is_file()}


def prepare(
    domains: list[Domain],
    embedder: Embedder,
    config: TrainConfig,
    cache: Path,
    others: Sequence[Float[np.ndarray, "_ D"]] = (),
    *,
    show_progress_bar: bool,
) -> Prepared:
    """Embeds everything with the base (cached under `cache`) and lays all documents into one pool.

    `others` are further document vectors to be negatives: those of domains whose experts are trained already.
    """
    base = embedder.base_encoder
    dev_judged = [sample(domain.splits["dev"], config.dev_queries) for domain in domains]
    train_texts = [[*domain.splits["train"].queries.values()] for domain in domains]
    sampled = [_some(len(texts), PROFILE_QUERIES) for texts in train_texts]
    if config.tower == "both":  # mining needs them all
        sampled = [np.arange(len(texts)) for texts in train_texts]
    total = sum(len(domain.corpus) + len(dev.queries) for domain, dev in zip(domains, dev_judged, strict=True))
    total += sum(map(len, sampled))
    with progress_bar("Embedding", total, shown=show_progress_bar, unit="texts") as advance:

        def embed(corpus: Sequence[Document]) -> Float[np.ndarray, "N D"]:
            texts = [base.prompts["document"] + document.contents for document in corpus]

            def run(chunk: Sequence[str]) -> np.ndarray:
                return embedder.base(chunk, advance=advance)

            return cached_vectors(run, texts, embedder.width, [cache], base.fingerprint, advance)

        def read(queries: Sequence[str]) -> Float[np.ndarray, "Q 3*D"]:
            texts = [base.prompts["query"] + query for query in queries]

            def run(chunk: Sequence[str]) -> np.ndarray:
                return embedder.readings(chunk, advance=advance)

            key = f"{base.fingerprint} readings after {embedder.trunk_layers} layers"
            return cached_vectors(run, texts, 3 * embedder.width, [cache], key, advance)

        documents = [embed(domain.corpus) for domain in domains]
        train = [read([texts[row] for row in rows]) for texts, rows in zip(train_texts, sampled, strict=True)]
        dev = [read([*judged.queries.values()]) for judged in dev_judged]

    starts = np.cumsum([0, *(len(own) for own in documents)])
    rows = [np.arange(start, start + len(own)) for start, own in zip(starts, documents, strict=False)]
    sets, dev_sets, profiles = [], [], []
    for number, domain in enumerate(domains):
        split = domain.splits["train"]
        place = {document.id: row for document, row in zip(domain.corpus, rows[number], strict=True)}
        texts = [base.prompts["query"] + text for text in train_texts[number]]
        positives = [
            np.array([place[id] for id, score in split.qrels[query].items() if score > 0]) for query in split.queries
        ]
        vectors = part(train[number], "base")
        sets.append(TrainingSet(domain.name, base.tokenizer(texts), vectors, positives, rows[number]))
        dev_texts = [base.prompts["query"] + text for text in dev_judged[number].queries.values()]
        ids = [document.id for document in domain.corpus]
        seen = seen_queries(dev_judged[number], split)
        dev_sets.append(DevSet(dev_judged[number], dev_texts, dev[number], rows[number], ids, seen))
        kept = documents[number][_some(len(documents[number]), PROFILE_DOCUMENTS)]
        queries = train[number][_some(len(train[number]), PROFILE_QUERIES)]
        profiles.append(Profile(queries, dev[number], kept, part(dev[number], "base")))
    return Prepared(domains, sets, dev_sets, profiles, np.concatenate([*documents, *others]))


def _some(count: int, most: int) -> Int[np.ndarray, "_"]:
    """At most `most` of `count` rows, always the same ones."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))
