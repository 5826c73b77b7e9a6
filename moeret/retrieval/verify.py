"""Is an index whole: every file, every count, and how well its graphs find."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from moeret import artifact
from moeret.artifact import Artifact
from moeret.models.model import Model, read_profile
from moeret.retrieval.hnsw import exact_search
from moeret.retrieval.segment import LiveSegment, identity
from moeret.retrieval.snapshot import KIND, all_segments, model_of, read_sketches, read_words, sketches_of, words_of
from moeret.types import Document

_QUERIES = 200
"""Dev queries of each domain that recall is measured with."""
_AT_ONCE = 1000


def verify_index(index: str | Path) -> dict[str, Any]:
    """Checks an index against its manifest and itself, and returns a report that is JSON.

    It has `problems`, sentences that each name a file, of which a whole index has none; `documents`, `snapshot`, `fingerprint`;
    and for each expert `documents`, `segments`, `deleted` and `recall@10`: what share of the ten nearest documents, by exact
    search, of its domain's dev queries as the base embeds them (the base's own index: of all domains') it finds.

    Raises:
      ArtifactError: there is no index, or it is so damaged that it cannot be loaded; the message names the file.
    """
    root = Path(index)
    published = artifact.read(root, KIND)
    model = model_of(published)
    problems, queries, experts = [], _queries(model), {}
    held = all_segments(published)
    problems += _check_summaries(published, held)
    for name, mine in held.items():
        entry = published.meta["experts"][name]
        for own, said in zip(mine, entry["segments"], strict=True):
            problems += _check(own, said, name)
        problems += _repeated(mine, root)
        experts[name] = {
            "documents": entry["documents"],
            "segments": len(mine),
            "deleted": sum(own["deleted"] for own in entry["segments"]),
            "recall@10": _recall(mine, queries.get(name, np.concatenate([*queries.values()]))),
        }
    for own in (own for mine in held.values() for own in mine):
        own.segment.store.close()
    return {
        "snapshot": published.snapshot,
        "fingerprint": published.fingerprint,
        "documents": published.meta["documents"]["count"],
        "experts": experts,
        "problems": problems,
    }


def _queries(model: Model) -> dict[str, Float[np.ndarray, "Q D"]]:
    """Each domain's dev queries as the base embeds them."""
    profiles = {
        entry["name"]: read_profile(model.published, entry["profile"]) for entry in model.published.meta["experts"]
    }
    return {name: own.dev_vectors[:_QUERIES].astype(np.float32) for name, own in profiles.items()}


def _check_summaries(published: Artifact, held: Mapping[str, list[LiveSegment]]) -> list[str]:
    """What is wrong with what an index says of all its segments."""
    problems, told, true = [], read_sketches(published), sketches_of(held)
    if read_words(published) != words_of(held):
        problems.append(f"{published.path(published.meta['words'])} counts other words than the documents have")
    if told.keys() != true.keys() or any(not np.array_equal(told[name], true[name]) for name in true):
        problems.append(f"{published.path(published.meta['sketches'])} is of other documents")
    return problems


def _check(own: LiveSegment, said: dict[str, Any], expert: str) -> list[str]:
    """What is wrong with one segment."""
    segment, folder, problems = own.segment, own.segment.published.root, []
    if segment.published.meta["expert"] != expert:
        problems.append(f"{folder} is a segment of {segment.published.meta['expert']}, not of {expert}")
    if (len(segment), int((~own.live).sum())) != (said["documents"], said["deleted"]):
        problems.append(f"{folder} has {len(segment)} documents, its manifest says {said['documents']}")
    if len(segment.vectors.rows) != len(segment) or not np.array_equal(
        np.sort(segment.vectors.rows), np.arange(len(segment))
    ):
        problems.append(f"{folder} has not one vector for each document")
    lengths = [
        np.linalg.norm(segment.vectors.vectors[start : start + _AT_ONCE], axis=1)
        for start in range(0, len(segment), _AT_ONCE)
    ]
    if not np.allclose(np.concatenate(lengths), 1.0, atol=1e-3):
        problems.append(f"{folder} has vectors that are not of length 1")
    every = segment.documents(np.ones(len(segment), bool))
    if not np.array_equal(np.fromiter(map(identity, every), np.uint64), segment.identities):
        problems.append(f"{folder} has other documents than were indexed")
    return problems


def _repeated(segments: list[LiveSegment], root: Path) -> list[str]:
    """Ids that an index has twice for one domain, by 64 bits of each."""
    ids = np.fromiter(
        (
            identity(Document(document.id, "loose" if loose else ""))
            for own in segments
            for document, loose in zip(own.segment.documents(own.live), own.segment.loose[own.live], strict=True)
        ),
        np.uint64,
    )
    twice = len(ids) - len(np.unique(ids))
    return [f"{root} has {twice} ids twice"] if twice else []


def _recall(segments: list[LiveSegment], queries: Float[np.ndarray, "Q D"]) -> float:
    """Share of the true ten nearest live documents of these segments that a search finds."""
    found, true = [], []
    for own in segments:
        allowed = None if own.live.all() else own.segment.vectors.allow(own.live)
        rows = np.flatnonzero(own.live)
        vectors = own.segment.vectors.vectors_of(rows)
        found.append([scores for _, scores in own.segment.vectors.search(queries, 10, allowed)])
        true.append(exact_search(queries, vectors, min(10, len(rows)))[1])
    best = [-np.sort(-np.concatenate(own))[:10] for own in zip(*true, strict=True)]
    got = [-np.sort(-np.concatenate(own))[:10] for own in zip(*found, strict=True)]
    # By score, so that equal vectors count alike; what a graph computes differs from the exact product in the last bits.
    return float(
        np.mean(
            [(mine[: len(whole)] >= whole[-1] - 1e-5).sum() / len(whole) for mine, whole in zip(got, best, strict=True)]
        )
    )
