"""Retrieval measures and TREC runs: the only importer of `ir_measures`."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote

import ir_measures
import numpy as np

from moeret.errors import DataError

Run = Mapping[str, Mapping[str, float]]
"""query id -> document id -> score."""

NDCG, RECALL = "nDCG@10", "R@100"


def per_query(
    qrels: Mapping[str, Mapping[str, int]], run: Run, measures: tuple[str, ...] = (NDCG, RECALL)
) -> dict[str, dict[str, float]]:
    """Measure -> query id -> value, for every judged query; one that the run lacks scores 0."""
    parsed = [ir_measures.parse_measure(measure) for measure in measures]
    values = {measure: dict.fromkeys(qrels, 0.0) for measure in measures}
    known = {query: dict(run[query]) for query in qrels if run.get(query)}
    for value in ir_measures.iter_calc(parsed, {q: dict(d) for q, d in qrels.items()}, known):
        values[str(value.measure)][value.query_id] = value.value
    return values


def mean(values: Mapping[str, float]) -> float:
    """The mean over queries."""
    return float(np.mean(list(values.values())))


def write_run(path: Path, run: Run, tag: str = "moeret") -> None:
    """Writes a TREC run: ranks from 1, scores strictly falling in rank order, ids percent-encoded where they have spaces or `%`."""
    with path.open("w", encoding="utf-8") as file:
        for query, hits in run.items():
            for rank, (document, score) in enumerate(falling(hits).items(), start=1):
                file.write(f"{_encode(query)} Q0 {_encode(document)} {rank} {score:.9g} {tag}\n")


def falling(hits: Mapping[str, float]) -> dict[str, float]:
    """Hits best first, with scores that fall strictly in float32: trec_eval orders equal scores by id."""
    last, out = np.inf, {}
    for document, score in sorted(hits.items(), key=lambda hit: -hit[1]):
        last = out[document] = min(float(score), float(np.nextafter(np.float32(last), np.float32(-np.inf))))
    return out


def read_run(path: Path) -> dict[str, dict[str, float]]:
    """Reads a TREC run, each query's hits best first.

    Raises:
      DataError: the file is not there or a line is not `query Q0 document rank score tag`.
    """
    run: dict[str, dict[str, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"cannot read {path}: it is not a text in UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            query, _, document, _, score, _ = line.split()
            run.setdefault(unquote(query), {})[unquote(document)] = float(score)
        except ValueError:
            raise DataError(
                f"{path} line {number}: expected `query Q0 document rank score tag`, got {line[:80]!r}"
            ) from None
    return {query: dict(sorted(hits.items(), key=lambda hit: -hit[1])) for query, hits in run.items()}


def _encode(id: str) -> str:
    return re.sub(r"[\s%]", lambda found: quote(found[0], safe=""), id)
