"""One HTML file that shows what was learned: curves, quality, routing, lengths, domains, cost. Pictures first, numbers beneath."""

import html
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeret import artifact
from moeret.config import require
from moeret.data.beir import read_domain, seen_queries
from moeret.errors import ConfigError
from moeret.evaluation.baselines import base_system
from moeret.evaluation.benchmark import cost, router_report, search_route, search_system
from moeret.evaluation.testsets import Result, TestSet, read_test_sets, score
from moeret.metrics import NDCG, RECALL
from moeret.models.model import KIND, WORK
from moeret.progress import progress_bar
from moeret.retrieval.search import Rankings, Retriever

_STYLE = """body{max-width:62rem;margin:2rem auto;padding:0 1rem;font:1rem/1.5 system-ui,sans-serif;color:#1c2126;background:#fff}
svg{max-width:100%;height:auto}table{border-collapse:collapse;font-size:.875rem;margin:.5rem 0 1.5rem}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #d9dde1}th:first-child,td:first-child{text-align:left}
h2{margin-top:2.5rem;border-bottom:1px solid #d9dde1}p{max-width:46rem}.quiet{color:#59636e}"""
_BINS = (0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0001)
_SAMPLED, _TIMED = 400, 200


def write_report(
    model: str | Path,
    index: str | Path,
    domains: Mapping[str, str | Path],
    out: str | Path,
    *,
    split: str = "test",
    show_progress_bar: bool = False,
) -> Path:
    """Scores an index on one split of each domain and writes what it and its model's training show as one self-contained file.

    Raises:
      ArtifactError: the model or the index is damaged, or the index is another model's.
      ConfigError: matplotlib is not installed, or `out` cannot be written.
      DataError: a domain that cannot be evaluated.
    """
    try:
        from moeret.evaluation import pictures
    except ImportError as error:
        raise ConfigError(f"a report needs matplotlib ({error})") from None
    out = Path(out)
    require(
        out.parent.is_dir() and not out.is_dir(), f"cannot write {out}: it must be a file in a directory that is there"
    )
    published = artifact.look(Path(model), KIND)
    retriever = Retriever.load(index)
    require(
        published.fingerprint == retriever.model.published.fingerprint,
        f"{index} was built with another model than {model}",
    )
    sets = read_test_sets(retriever, domains, split)
    queries = sum(len(test.judged.queries) for test in sets)
    with progress_bar("Evaluating", 2 * queries, shown=show_progress_bar, unit="queries") as bar:
        routed = {test.name: search_route(retriever, test, "auto", bar) for test in sets}
        base = base_system(retriever)
        scores = {
            "routed": score(sets, {name: own.ranked for name, own in routed.items()}),
            "base": score(sets, {test.name: search_system(base, test, bar) for test in sets}),
        }
    parts = [
        _head(retriever, published),
        _quality(pictures, scores, _seen(sets, domains)),
        _routing(pictures, retriever, sets, routed),
        _map(pictures, retriever),
        _training(pictures, Path(model), retriever, sets),
        _cost(retriever, sets, routed),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>moeret report</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    artifact.write_atomically(out, page.encode())
    return out


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cells(tag: str, own: Sequence[Any]) -> str:
        return "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in own)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', columns)}</tr>{body}</table>"


def _percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:.1f}"


def _head(retriever: Retriever, published: artifact.Artifact) -> str:
    meta = published.meta
    documents = sum(retriever.sizes.values())
    return (
        f"<h1>moeret report</h1><p>{len(meta['experts'])} experts on {html.escape(meta['base']['name'])}, {documents:,} documents; "
        f"model {published.fingerprint[:12]}, snapshot {retriever.index.snapshot} of the index.</p>"
    )


def _seen(sets: Sequence[TestSet], domains: Mapping[str, str | Path]) -> dict[str, np.ndarray]:
    """Which queries have a relevant document that was a training positive; none where there is no train split."""
    found = {}
    for test in sets:
        train = read_domain(test.name, Path(domains[test.name]), (), ("train",)).splits.get("train")
        found[test.name] = seen_queries(test.judged, train) if train else np.zeros(len(test.judged.queries), bool)
    return found


def _quality(pictures: Any, scores: Mapping[str, Result], seen: Mapping[str, np.ndarray]) -> str:
    series: dict[str, list[float]] = {}
    rows = []
    for name, own in seen.items():
        row = [name, len(own)]
        for part, chosen in (("seen", own), ("unseen", ~own)):
            for system, result in scores.items():
                values = np.array([*result.values[name][NDCG].values()])[chosen]
                mean = float(values.mean()) if len(values) else float("nan")
                series.setdefault(f"{system}, {part}", []).append(100 * mean)
                row.append(_percent(mean))
        whole = [_percent(result.table()[name][measure]) for measure in (NDCG, RECALL) for result in scores.values()]
        rows.append([*row, *whole])
    means = [_percent(result.mean()[measure]) for measure in (NDCG, RECALL) for result in scores.values()]
    rows.append(["mean", sum(map(len, seen.values())), "", "", "", "", *means])
    columns = ["domain", "queries", "routed, seen", "base, seen", "routed, unseen", "base, unseen"]
    return (
        f"<h2>Quality</h2>{pictures.bars([*seen], series, 'nDCG@10 x 100')}"
        '<p class="quiet"><em>Seen</em> queries have a relevant document that was a positive in training, <em>unseen</em> ones '
        "have none. The queries say nothing of their domain; the base searches all documents in one HNSW graph.</p>"
        + _table([*columns, "nDCG@10 routed", "base", "R@100 routed", "base"], rows)
    )


def _routing(pictures: Any, retriever: Retriever, sets: Sequence[TestSet], routed: Mapping[str, Rankings]) -> str:
    experts = [*retriever.model.experts]
    shares, sure, right = [], [], []
    for test in sets:
        best = [max(own.probabilities.items(), key=lambda item: item[1]) for own in routed[test.name].routes]
        shares.append([np.mean([name == expert for name, _ in best]) for expert in experts])
        if test.name in experts:
            sure += [probability for _, probability in best]
            right += [name == test.name for name, _ in best]
    report = router_report(retriever, sets, dict(routed))
    facts = []
    if report["accuracy"] is not None:
        facts.append(
            f"The most probable expert is that of the query's domain for {report['accuracy']:.1%} of the queries."
        )
    body = f"<h2>Routing</h2>{pictures.confusion([test.name for test in sets], experts, np.array(shares))}"
    rows = []
    if sure:
        where = np.digitize(sure, _BINS) - 1
        bins = [own for own in range(len(_BINS) - 1) if (where == own).any()]
        said, true = ([float(np.mean(np.array(own)[where == number])) for number in bins] for own in (sure, right))
        counts = [int((where == number).sum()) for number in bins]
        body += pictures.calibration(said, true, counts)
        error = float(np.sum(np.array(counts) * np.abs(np.array(said) - np.array(true))) / sum(counts))
        facts.append(f"Expected calibration error: {error:.3f}.")
        rows = [[f"{_BINS[own]:g} to {min(1, _BINS[own + 1]):g}", count, f"{said:.3f}", f"{true:.3f}"]
                for own, count, said, true in zip(bins, counts, said, true, strict=True)]  # fmt: skip
    facts.append(f"The router abstains for {report['abstained']:.1%} of the queries.")
    body += f"<p>{' '.join(facts)}</p>"
    return body + (_table(["probability", "queries", "mean probability", "right"], rows) if rows else "")


def _map(pictures: Any, retriever: Retriever) -> str:
    """The documents' vectors on their first two principal components."""
    vectors, start, sampled = retriever.vectors(), 0, {}
    random = np.random.default_rng(0)
    for name, count in retriever.sizes.items():
        rows = start + random.permutation(count)[:_SAMPLED]
        sampled[name], start = vectors[rows], start + count
    every = np.concatenate([*sampled.values()])
    centre = every.mean(axis=0)
    _, spread, axes = np.linalg.svd(every - centre, full_matrices=False)
    share = float((spread[:2] ** 2).sum() / (spread**2).sum())
    points = {name: (own - centre) @ axes[:2].T for name, own in sampled.items()}
    return (
        f"<h2>Domains</h2>{pictures.plane(points)}"
        f'<p class="quiet">At most {_SAMPLED} documents of each expert; the two components have {share:.0%} of the variance.</p>'
    )


def _training(pictures: Any, model: Path, retriever: Retriever, sets: Sequence[TestSet]) -> str:
    lines = [
        json.loads(line)
        for file in (model / WORK / "shared" / "metrics.jsonl", model / WORK / "metrics.jsonl")
        if file.is_file()
        for line in file.read_text().splitlines()
    ]
    if not lines:
        return "<h2>Training</h2><p>The model's folder <code>training</code> is gone, and with it the curves.</p>"
    found: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}, "dev": {}}
    edges: set[int] = set()
    batches = []
    for line in lines:
        for kind, own in found.items():
            for name, value in line.get(kind, {}).items():
                if value is not None:
                    own.setdefault(name, []).append((line["step"], value))
        if "batches" in line:
            edges |= {int(edge) for edge in line["batches"]["domains"]}
            batches.append(line["batches"])
    tokenizer = retriever.model.base.tokenizer
    texts = {
        "queries": [query for test in sets for query in test.judged.queries.values()],
        "documents": [own.contents for test in sets for own in [*test.documents.values()][:_SAMPLED]],
    }
    tokens = {name: [len(own) for own in tokenizer(every)] for name, every in texts.items()}
    best = {name: max(value for _, value in points) for name, points in found["dev"].items()}
    rows = [
        [name, points[-1][0], f"{points[-1][1]:.3f}", _percent(best.get(name, np.nan))]
        for name, points in found["loss"].items()
    ]
    padding = ", ".join(f"{own['padding']:.0%} in {own['shapes']} shapes" for own in batches)
    return (
        f"<h2>Training</h2>{pictures.curves(found['loss'], found['dev'])}"
        + _table(["expert", "steps", "last loss", "best nDCG@10 on dev"], rows)
        + f"<h2>Lengths</h2>{pictures.lengths(tokens, sorted(edges))}"
        f'<p class="quiet">Dotted: the lengths that training padded to. Padding: {padding}.</p>'
    )


def _cost(retriever: Retriever, sets: Sequence[TestSet], routed: Mapping[str, Rankings]) -> str:
    found = cost(retriever, dict(routed))
    asked = [query for test in sets for query in test.judged.queries.values()]
    asked = [*map(str, np.random.default_rng(0).permutation(asked)[:_TIMED])]
    milliseconds: dict[str, list[float]] = {}
    for query in asked:  # what is compiled at its first use is compiled
        retriever.rank([query])
    for query in asked:
        own = retriever.rank([query])
        began = time.perf_counter()
        retriever.hits(own)
        for stage, seconds in (*own.seconds.items(), ("fetch", time.perf_counter() - began)):
            milliseconds.setdefault(stage, []).append(1000 * seconds)
    index = retriever.index
    size = sum(entry.bytes for entry in index.files.values())
    rows = [[name, f"{count:,}"] for name, count in retriever.sizes.items()]
    stages = [[stage, f"{np.median(own):.2f}", f"{np.percentile(own, 99):.2f}"] for stage, own in milliseconds.items()]
    return (
        f"<h2>Cost</h2><p>A query searches {found['indexes']:.2f} of {found['indexes_total']} indexes with "
        f"{found['documents_share']:.1%} of the documents. The index has {size / 1e6:,.1f} MB, the model included.</p>"
        + _table(["milliseconds, one query at a time", "median", "99 %"], stages)
        + _table(["expert", "documents"], rows)
    )
