"""Folders of an experiment: domains with ids of their own, or small; and what belongs to one model and its settings."""

import dataclasses
from pathlib import Path
from typing import Any

from moeret import artifact
from moeret.data.beir import Domain, Judged, sample, sample_ids


def named_apart(domain: Domain, path: Path) -> Domain:
    """The domain at another place, its name in its documents' ids: corpora without a domain share one index."""
    corpus = [dataclasses.replace(document, id=f"{domain.name}-{document.id}") for document in domain.corpus]
    splits = {
        split: Judged(
            own.queries,
            {
                query: {f"{domain.name}-{id}": score for id, score in documents.items()}
                for query, documents in own.qrels.items()
            },
        )
        for split, own in domain.splits.items()
    }
    return Domain(domain.name, path, corpus, splits)


def excerpt(domain: Domain, path: Path, queries: dict[str, int], documents: int) -> Domain:
    """The domain at another place: so many queries of each split, what is relevant to them, and so many other documents."""
    splits = {split: sample(own, queries[split]) for split, own in domain.splits.items()}
    relevant = {id for own in splits.values() for judged in own.qrels.values() for id in judged}
    others = sample_ids((document.id for document in domain.corpus if document.id not in relevant), documents)
    kept = relevant.union(others)
    return Domain(domain.name, path, [document for document in domain.corpus if document.id in kept], splits)


def made_from(out: Path, model: Path, *settings: Any) -> Path:
    """A folder of `out` for what one version of a model and these settings gave: other ones never find it."""
    place = out / artifact.fingerprint([artifact.read(model, "model").fingerprint, *settings])[:12]
    place.mkdir(parents=True, exist_ok=True)
    return place
