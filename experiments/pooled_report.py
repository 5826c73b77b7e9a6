"""The tables, the checks and the picture of experiments.pooled_domains, out of the scores of its seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moeret.evaluation.significance import paired_randomisation
from moeret.metrics import NDCG, RECALL
from scripts.benchmarks import markdown_table

ORDER = (
    "BM25", "base", "base + BM25", "RouterRetriever's pilots", "shared delta alone", "multi-task", "multi-task, blended",
    "routed, cosine alone", "routed", "known-domain oracle", "best-expert-per-query oracle",
)  # fmt: skip
LEAST_QUERIES = 10
"""Seen or unseen queries of a domain that there must be for their mean to be counted."""

Values = dict[str, np.ndarray]
"""Domain -> each query's value, the mean over the seeds."""


def report(
    scores: Sequence[dict[str, Any]], names: Sequence[str], foreign: Sequence[str], config: Mapping[str, Any]
) -> str:
    """What was compared with what, the table, the spread over the seeds, the checks, and quality against cost."""
    table, recall, seen = _table(scores, NDCG), _table(scores, RECALL), _seen(scores)
    most = max(len(own) for own in seen.values())
    parts = [
        _setup(scores, names, foreign, config),
        f"{NDCG} x 100 on the test queries (at most {most} a domain), which say nothing of their domain, over one pool of "
        f"{scores[0]['documents']:,} documents; means over {_seeds(scores)} where nothing else is said:\n\n"
        + _by_domain(table, recall, names, foreign, seen),
        _spread(scores, table, names),
        _checks(scores, table, names, foreign, seen),
        _curve(scores, names),
    ]
    return "\n\n".join(parts)


def _table(scores: Sequence[dict[str, Any]], measure: str) -> dict[str, Values]:
    return {label: _values(scores, label, measure) for label in ORDER if label in scores[0]["systems"]}


def _seen(scores: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {name: np.array(own) for name, own in scores[0]["seen"].items()}


def _seeds(scores: Sequence[Any]) -> str:
    return "one seed" if len(scores) == 1 else f"{len(scores)} seeds"


def _values(scores: Sequence[dict[str, Any]], label: str, measure: str) -> Values:
    found = [own["systems"][label]["values"] for own in scores if label in own["systems"]]
    return {name: np.mean([own[name][measure] for own in found], axis=0) for name in found[0]}


def mean_over(values: Values, names: Sequence[str], mask: Mapping[str, np.ndarray] | None = None) -> float:
    """The mean over domains, of the queries under a mask where there are enough of them."""
    kept = [values[name] if mask is None else values[name][mask[name]] for name in names]
    return float(np.mean([own.mean() for own in kept if mask is None or len(own) >= LEAST_QUERIES]))


def _setup(scores, names, foreign, config) -> str:
    first = scores[0]
    shared = config["expert"]["shared_rank"]
    rank = config["expert"]["rank"]
    if "multi-task" not in first:
        rival = "- multi-task: left out of this run; the shared delta alone has fewer steps and parameters than all of ours\n"
    else:
        own = first["multi-task"]
        tried = ", ".join(f"{key} {100 * value:.1f}" for key, value in own["dev"].items())
        rival = (
            f"- multi-task: one delta, {own['steps']} steps a domain, as many as we take in all, at its own best strength, "
            f"compared exactly with the whole pool; rank {shared + len(names) * rank} has as many parameters as all of ours. "
            + (
                f"Best on dev of {tried} (rank, learning rate): {own['taken']}\n"
                if len(own["dev"]) > 1
                else f"One setting was tried, {tried} on dev (rank, learning rate), with as many looks at dev as our shared delta\n"
            )
            + f"- multi-task, blended: the same with BM25 and a memory of all train queries beside its cosine; one blend for all "
            f"domains, the best on dev (BM25 x {own['blend']['lexical']:g}, memory x {own['blend']['memory']:g})\n"
        )
    return (
        f"Trained: {', '.join(names)}. Foreign, without any training data: {', '.join(foreign)}.\n\n"
        f"- ours: a shared delta of rank {shared}, at most {config['shared_steps']} steps a domain, then an expert of rank {rank} "
        f"a domain, at most {config['steps']} steps, both at most {config['epochs']:g} epochs; {config['batch_size']} queries "
        f"a step, learning rates {config['shared_learning_rate']:g} and {config['learning_rate']:g}, in {config['precision']}\n"
        f"{rival}"
        f"- our blends (BM25, memory), chosen on dev, first seed: {_blends(first['experts'])}\n"
        "- shared delta alone, base, base + BM25 (reciprocal rank fusion) and RouterRetriever's pilots (over our experts, by the "
        f"votes of {first['votes']} train queries a domain, first seed) search the whole pool exactly, by cosine; routed and the "
        "known-domain oracle search HNSW indexes and words and memories\n"
        "- best-expert-per-query oracle (first seed): the best for each query of the known-domain oracle, the base, and every "
        "expert's vector compared exactly with the whole pool\n"
        f"- commits at which the seeds' trainings began: {', '.join(own['trained_at'] for own in scores)}; at which they were "
        f"scored: {', '.join(own['commit'] for own in scores)}"
    )


def _blends(experts: Sequence[Mapping[str, Any]]) -> str:
    wanted = ((own["name"], own["blend"]) for own in experts)
    return ", ".join(f"{name} {blend['lexical']:g} and {blend['memory']:g}" for name, blend in wanted)


def _by_domain(table, recall, names, foreign, seen) -> str:
    rows = []
    for name in (*names, *foreign):
        rows.append([name, *(f"{100 * own[name].mean():.1f}" if name in own else "" for own in table.values())])
    unseen = {name: ~mask for name, mask in seen.items()}
    for title, mask in ((f"mean of {len(names)}", None), ("seen", seen), ("unseen", unseen)):
        rows.append([f"**{title}**", *(f"**{100 * mean_over(own, names, mask):.1f}**" for own in table.values())])
    rows.append([f"**{RECALL}, mean**", *(f"**{100 * mean_over(own, names):.1f}**" for own in recall.values())])
    return markdown_table(["domain", *table], rows) + (
        "\n\n*Seen* queries have a relevant document that was a training positive, *unseen* have none (a domain counts with at "
        f"least {LEAST_QUERIES})."
    )


def _spread(scores, table, names) -> str:
    rows = []
    for label in table:
        own = [
            100 * np.mean([np.mean(one["systems"][label]["values"][name][NDCG]) for name in names])
            for one in scores
            if label in one["systems"]
        ]
        if len(own) > 1:
            rows.append([label, *(f"{value:.2f}" for value in own), f"{np.std(own, ddof=1):.2f}"])
    if not rows:
        return "One seed: no spread."
    columns = ["mean nDCG@10 x 100", *(f"seed {n}" for n in range(len(scores))), "standard deviation"]
    return markdown_table(columns, rows)


def _checks(scores, table, names, foreign, seen) -> str:
    ours, base = table["routed"], table["base"]
    rivals = {label: table[label] for label in ("base", "multi-task", "multi-task, blended") if label in table}
    unseen = {name: ~mask for name, mask in seen.items()}

    def gain(over: Values, mask=None) -> float:
        return 100 * (mean_over(ours, names, mask) - mean_over(over, names, mask))

    def line(text: str, value: float, least: float) -> str:
        return f"- {text}: {value:+.2f} ({'holds' if value >= least else '**fails**'}: at least {least:+g})"

    home = {name: ours[name] for name in names}
    p = {label: paired_randomisation(home, {name: own[name] for name in names})[1] for label, own in rivals.items()}
    worst = min((100 * (ours[name].mean() - base[name].mean()), name) for name in names)
    routing = {key: np.mean([own["router"][key] for own in scores]) for key in ("accuracy", "abstained")}
    cost = {
        key: np.mean([own["systems"]["routed"]["cost"][key] for own in scores])
        for key in ("indexes", "documents_share")
    }
    lines = [
        *(line(f"routed minus {label}", gain(own), 12 if label == "base" else 1) for label, own in rivals.items()),
        line("routed minus known-domain oracle", gain(table["known-domain oracle"]), -0.7),
        *(
            line(f"unseen documents: routed minus {label}", gain(own, unseen), 6 if label == "base" else 1)
            for label, own in rivals.items()
        ),
        *_cosine_alone(scores, table, names),
        line(f"the worst domain ({worst[1]}) against the base", worst[0], -0.3),
        *(
            line(f"foreign corpus {name} against the base", 100 * (ours[name].mean() - base[name].mean()), -0.5)
            for name in foreign
        ),
        "- paired randomisation over queries (each its mean over the seeds), domains weighing the same: "
        + ", ".join(f"p = {value:.4f} against {label}" for label, value in p.items())
        + " (10,000 rounds, so at least 0.0001)",
        f"- a query searches {cost['indexes']:.2f} indexes with {cost['documents_share']:.1%} of the documents "
        f"({'holds' if cost['indexes'] <= 1.3 and cost['documents_share'] <= 0.3 else '**fails**'}: at most 1.3 and 30%)",
        f"- the router is right for {routing['accuracy']:.1%} of the queries of known domains, abstains for "
        f"{routing['abstained']:.1%} of them, "
        + ", ".join(f"for {np.mean([own['abstained'][name] for own in scores]):.0%} of {name}" for name in foreign),
        "- seconds, first seed, of the call that scored it (finished parts are not repeated): "
        + ", ".join(f"{name} {value}" for name, value in scores[0]["seconds"].items()),
    ]
    return "\n".join(lines)


def _cosine_alone(scores, table, names) -> list[str]:
    """What routing loses, and gains on multi-task, where words and memory count for neither."""
    routed, oracle = (
        mean_over(_values(scores, f"{label}, cosine alone", NDCG), names) for label in ("routed", "oracle")
    )
    against = (
        f", to multi-task {100 * (routed - mean_over(table['multi-task'], names)):+.2f}"
        if "multi-task" in table
        else ""
    )
    return [
        f"- by cosine alone, without a bound: routed to the known-domain oracle {100 * (routed - oracle):+.2f}{against}"
    ]


def curve(scores: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, float, float, float]]:
    """(label, indexes, share of the documents within reach, nDCG@10) of the routed system's settings, first seed."""
    points = []
    for label, own in scores[0]["systems"].items():
        if label.startswith(("minimum", "limit")) or label in ("one expert", "routed", "routed, all indexes"):
            score = float(np.mean([np.mean(own["values"][name][NDCG]) for name in names]))
            points.append((label, own["cost"]["indexes"], own["cost"]["documents_share"], score))
    return sorted(points, key=lambda point: point[1])


def _curve(scores, names) -> str:
    rows = [
        [label, f"{i:.2f}", f"{share:.1%}", f"{100 * score:.1f}"] for label, i, share, score in curve(scores, names)
    ]
    return (
        "Quality against cost, first seed (minimum: the least probability of an expert to be merged and searched; limit: how "
        "much more or less strangeness than by dev makes a query search the base's own index too; `routed` is what dev chose):\n\n"
        + markdown_table(["setting", "indexes a query", "documents within reach", NDCG], rows)
    )


def summary(scores: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The README's table."""
    table, recall, seen = _table(scores, NDCG), _table(scores, RECALL), _seen(scores)
    labels = [
        label
        for label in (
            "BM25",
            "base",
            "base + BM25",
            "shared delta alone",
            "multi-task",
            "multi-task, blended",
            "routed",
            "known-domain oracle",
        )
        if label in table
    ]
    unseen = {name: ~mask for name, mask in seen.items()}
    rows = [
        ["nDCG@10 x 100", *(f"{100 * mean_over(table[label], names):.1f}" for label in labels)],
        ["on unseen documents", *(f"{100 * mean_over(table[label], names, unseen):.1f}" for label in labels)],
        ["R@100 x 100", *(f"{100 * mean_over(recall[label], names):.1f}" for label in labels)],
    ]
    indexes = np.mean([own["systems"]["routed"]["cost"]["indexes"] for own in scores])
    total = scores[0]["systems"]["routed"]["cost"]["indexes_total"]
    return (
        f"Unlabelled test queries of {len(names)} domains (at most {max(map(len, seen.values()))} each) over one pool of "
        f"{scores[0]['documents']:,} documents, mean over the domains and {_seeds(scores)}; a routed query searches "
        f"{indexes:.2f} of {total} indexes:\n\n"
        + markdown_table(["", *labels], rows)
        + "\n\n![Bars: nDCG@10 of each system. Curve: nDCG@10 against the documents within reach.](docs/pooled-domains.svg)"
    )


def draw(file: Path, scores: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Systems as bars, with the unseen queries' mean as a mark; and the routed system's quality against its cost."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "moeret", "font.size": 11})
    import matplotlib.pyplot as plt

    table = _table(scores, NDCG)
    unseen = {name: ~mask for name, mask in _seen(scores).items()}
    labels = list(table)
    figure, (bars, cost) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained")
    values = [100 * mean_over(table[label], names) for label in labels]
    colours = ["#c98a1b" if label == "routed" else "#d5d5d5" if "oracle" in label else "#8fb0d3" for label in labels]
    bars.barh(labels, values, color=colours)
    marks = [100 * mean_over(table[label], names, unseen) for label in labels]
    bars.plot(marks, labels, "k|", ms=14, mew=2)
    bars.annotate("on unseen documents", (marks[0], 0), xytext=(6, 0), textcoords="offset points", va="center")
    for place, value in enumerate(values):
        bars.text(value - 0.4, place, f"{value:.1f}", va="center", ha="right")
    bars.set_xlim(40, None)
    bars.set_xlabel("nDCG@10 x 100 (axis starts at 40)")
    bars.spines[["top", "right"]].set_visible(False)
    points = curve(scores, names)
    cost.plot([100 * p[2] for p in points], [100 * p[3] for p in points], "o-", color="#8fb0d3")
    for label, _, share, score in points:
        if label == "routed":
            cost.plot(100 * share, 100 * score, "o", color="#c98a1b", ms=10)
            cost.annotate("routed", (100 * share, 100 * score), xytext=(0, 10), textcoords="offset points", ha="center")
    whole = {
        label: 100 * mean_over(_values(scores[:1], label, NDCG), names)
        for label in ("base", "BM25", "multi-task, blended")
        if label in table
    }
    for label, value in whole.items():
        cost.plot(100, value, "s", color="#555")
        cost.annotate(label, (100, value), xytext=(-8, -12), textcoords="offset points", ha="right")
    cost.set_xlim(0, 105)
    cost.margins(y=0.12)
    cost.set_xlabel("documents within a query's reach, %")
    cost.set_ylabel("nDCG@10 x 100")
    cost.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
