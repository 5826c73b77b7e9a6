"""Reports as tables for people."""

from typing import Any

from rich.table import Table

from moeret.metrics import NDCG, RECALL


def report_tables(report: dict[str, Any]) -> list[Table]:
    """What `evaluate` returned, as tables: quality by domain, then routing and cost."""
    systems = report.get("systems") or {
        report["route"]: {"label": f"route {report['route']}", "domains": report["domains"], "mean": report["mean"]}
    }
    tables = []
    for measure in (NDCG, RECALL):
        table = Table(title=f"{measure} on {report['split']}, all domains in one pool")
        table.add_column("domain")
        for system in systems.values():
            table.add_column(system["label"], justify="right")
        table.add_column("queries", justify="right")
        for name, row in report["domains"].items():
            values = [f"{system['domains'][name][measure]:.3f}" for system in systems.values()]
            table.add_row(name, *values, str(row["queries"]))
        table.add_section()
        table.add_row("mean", *(f"{system['mean'][measure]:.3f}" for system in systems.values()), "", style="bold")
        tables.append(table)
    return [*tables, _routing_table(report)]


def index_table(meta: dict[str, Any]) -> Table:
    """What each expert's index holds, and how it is searched."""
    table = Table("expert", "documents", "segments", "deleted", "search", "recall@10")
    for name, expert in meta["experts"].items():
        segments = expert["segments"]
        graphs = [own["recall@10"] for own in segments if "recall@10" in own]
        search = "HNSW" if len(graphs) == len(segments) else "HNSW and exact" if graphs else "exact"
        deleted, recall = sum(own["deleted"] for own in segments), f"{min(graphs):.3f}" if graphs else "1"
        table.add_row(name, f"{expert['documents']:,}", str(len(segments)), f"{deleted:,}", search, recall)
    return table


def verify_table(report: dict[str, Any]) -> Table:
    """What was found in each expert's index."""
    table = Table("expert", "documents", "segments", "deleted", "recall@10")
    for name, own in report["experts"].items():
        counts = [f"{own[key]:,}" for key in ("documents", "segments", "deleted")]
        table.add_row(name, *counts, f"{own['recall@10']:.3f}")
    return table


def model_tables(meta: dict[str, Any]) -> list[Table | str]:
    """What a published model's experts, its shared delta and its routers did on dev."""
    parts: list[Table | str] = [expert_table(meta["experts"]), use_table(meta["experts"])]
    if shared := meta["shared"]:
        gain = f"{100 * shared['base_dev_ndcg']:.1f} → {100 * shared['dev_ndcg']:.1f}"
        parts.append(f"shared delta alone: {gain} (step {shared['step']}, strength {shared['strength']:g})")
    report = meta["router"]["report"]
    details = "; ".join(
        f"{kind} {' '.join(f'{key} {value:.3f}' for key, value in report[kind].items())}"
        for kind in ("centroids", "learned")
    ).replace("_", " ")
    parts.append(
        f"router: {report['chosen']}, decided by {report['decided_by']} ({details}; a lower log loss is better)"
    )
    return parts


def expert_table(experts: list[dict[str, Any]]) -> Table:
    """What each expert of a model gained on dev, over all, seen and unseen queries."""
    table = Table(
        "expert", "documents", "queries", "dev", "seen", "unseen",
        caption="nDCG@10 x 100 on dev, all domains in one pool: base → expert, by cosine",
    )  # fmt: skip
    for entry in experts:
        before, after = entry["base_dev_ndcg"], entry["dev_ndcg"]
        gains = [
            "too few queries" if after[group] is None else f"{100 * before[group]:.1f} → {100 * after[group]:.1f}"
            for group in after
        ]
        table.add_row(entry["name"], str(entry["documents"]), str(entry["train_queries"]), *gains)
    return table


def use_table(experts: list[dict[str, Any]]) -> Table:
    """How much each expert of a model uses of what it has, and what words and memory gained on dev."""
    table = Table(
        "expert", "step", "own delta", "shared delta", "words", "memory", "gain",
        caption="strengths of the deltas; what words and memory count beside the cosine, and gain in the expert's own index "
        "(nDCG@10 x 100 on dev)",
    )  # fmt: skip
    for entry in experts:
        own, blend = entry["own_index_dev_ndcg"], entry["blend"]
        used = (entry["strength"], entry["shared_strength"], blend["lexical"], blend["memory"])
        gain = f"{100 * own['cosine']:.1f} → {100 * own['blend']:.1f}" if own else ""
        table.add_row(entry["name"], str(entry["step"]), *(f"{value:g}" for value in used), gain)
    return table


def _routing_table(report: dict[str, Any]) -> Table:
    router, cost = report["router"], report["cost"]
    table = Table(title="Routing", show_header=False)
    if router["accuracy"] is not None:
        table.add_row("most probable expert is the domain's", f"{router['accuracy']:.1%}")
    table.add_row("abstained to the base", f"{router['abstained']:.1%}")
    table.add_row("indexes searched per query", f"{cost['indexes']:.2f} of {cost['indexes_total']}")
    table.add_row("documents in them", f"{cost['documents']:,.0f} ({cost['documents_share']:.1%})")
    if "regret" in report:
        regret = report["regret"]
        table.add_row("nDCG@10 lost to the known-domain oracle", f"{sum(regret.values()) / len(regret):.4f}")
    return table
