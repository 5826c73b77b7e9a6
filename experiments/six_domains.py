"""Six domains in one pool: train experts and router, index, evaluate; the base alone, BM25 and the oracle beside it.

Command:  python -m experiments.six_domains --data DATA [--out runs/six_domains] [--steps 300]
          DATA holds the BEIR folders scifact, nfcorpus, obliqa, attack-cti, esco-jobs and nl2bash.
Time:     about 30 minutes on 2 cores; cut off, the same command goes on.
Expected: routed beats the base in one index by more than 10 points of nDCG@10 on the mean, is on no domain more than 0.5
          below it, and loses at most 2.0 to the known-domain oracle. Writes its table into BENCHMARKS.md.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import moeret
from moeret.metrics import NDCG, RECALL
from scripts.benchmarks import FILE, markdown_table, write_block, write_section

DOMAINS = ("scifact", "nfcorpus", "obliqa", "attack-cti", "esco-jobs", "nl2bash")
GAIN, LOSS, REGRET = 0.10, 0.005, 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The pooled benchmark on six domains."""

    data: Path
    """Folder of the BEIR folders."""
    out: Path = Path("runs/six_domains")
    """Where model and index go."""
    steps: int = 300
    """Training steps at most."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    domains = {name: arguments.data / name for name in DOMAINS}
    started = time.monotonic()
    model = moeret.train(
        domains, arguments.out / "model", config=moeret.TrainConfig(steps=arguments.steps), show_progress_bar=True
    )
    trained = time.monotonic()
    index = moeret.build_index(arguments.out / "model", arguments.out / "index", domains, show_progress_bar=True)
    indexed = time.monotonic()
    report = moeret.evaluate(
        moeret.Retriever.load(arguments.out / "index"), domains, baselines=True, show_progress_bar=True
    )
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1))
    seconds = {"train": trained - started, "index": indexed - trained, "evaluate": time.monotonic() - indexed}
    write_section("six-domains", "Six domains in one pool", _body(report, model, index, seconds))
    write_block(FILE.with_name("README.md"), "results", _summary(report, index))


def _body(report: dict, model, index, seconds: dict[str, float]) -> str:
    systems = report["systems"]
    parts = []
    for measure in (NDCG, RECALL):
        columns = ["domain", *(system["label"] for system in systems.values()), "queries"]
        rows = [
            [
                name,
                *(f"{100 * system['domains'][name][measure]:.1f}" for system in systems.values()),
                str(own["queries"]),
            ]
            for name, own in report["domains"].items()
        ]
        rows.append(["**mean**", *(f"**{100 * system['mean'][measure]:.1f}**" for system in systems.values()), ""])
        parts.append(
            f"{measure} x 100 on the test queries, all {index.meta['documents']['count']:,} documents in one pool:\n\n"
            + markdown_table(columns, rows)
        )
    experts = [
        [
            entry["name"],
            f"{100 * entry['base_dev_ndcg']['all']:.1f}",
            f"{100 * entry['dev_ndcg']['all']:.1f}",
            str(entry["step"]),
        ]
        for entry in model.meta["experts"]
    ]
    parts.append(
        "Dev nDCG@10 x 100 of each expert over the whole pool, and the step it was taken from:\n\n"
        + markdown_table(["expert", "base", "expert", "step"], experts)
    )
    routers = model.meta["router"]["report"]
    rows = [[kind, *(f"{routers[kind][key]:.4f}" for key in routers[kind])] for kind in ("centroids", "learned")]
    parts.append(
        f"Routers on dev ({routers['decided_by']} decides: {routers['chosen']}):\n\n"
        + markdown_table(["router", *routers["learned"]], rows)
    )
    parts.append(_checks(report, model, seconds))
    return "\n\n".join(parts)


def _summary(report: dict, index) -> str:
    systems, cost = report["systems"], report["cost"]
    columns = ["", *(system["label"] for system in systems.values())]
    rows = [
        [f"{measure} x 100", *(f"{100 * system['mean'][measure]:.1f}" for system in systems.values())]
        for measure in (NDCG, RECALL)
    ]
    return (
        f"Unlabelled test queries of {', '.join(DOMAINS)} over one pool of {index.meta['documents']['count']:,} documents, "
        f"mean over the domains; a routed query searches {cost['indexes']:.2f} of {cost['indexes_total']} indexes:\n\n"
        + markdown_table(columns, rows)
    )


def _checks(report: dict, model, seconds: dict[str, float]) -> str:
    routed, base, oracle = (report["systems"][name] for name in ("auto", "base_one_index", "oracle"))
    gain = routed["mean"][NDCG] - base["mean"][NDCG]
    worst = min((routed["domains"][name][NDCG] - base["domains"][name][NDCG], name) for name in report["domains"])
    regret = oracle["mean"][NDCG] - routed["mean"][NDCG]
    router, cost = report["router"], report["cost"]
    lines = [
        f"- routed minus base in one index, mean: {100 * gain:+.1f} points ({_verdict(gain >= GAIN)}: at least {100 * GAIN:.0f})",
        f"- the worst domain, {worst[1]}: {100 * worst[0]:+.1f} ({_verdict(worst[0] >= -LOSS)}: no less than {-100 * LOSS})",
        f"- known-domain oracle minus routed, mean: {100 * regret:.1f} ({_verdict(regret <= REGRET)}: at most {100 * REGRET:.0f})",
        f"- router: right for {router['accuracy']:.1%} of queries, abstained for {router['abstained']:.1%}; "
        f"kind {model.meta['router']['query']['kind']}, used experts with a probability of at least "
        f"{model.meta['router']['query']['minimum']}, abstains below {model.meta['router']['query']['threshold']}",
        f"- a query searched {cost['indexes']:.2f} of {cost['indexes_total']} indexes with {cost['documents_share']:.1%} of the "
        "documents in them",
        f"- seconds in this call (finished parts are not repeated): {', '.join(f'{k} {v:.0f}' for k, v in seconds.items())}",
    ]
    return "\n".join(lines)


def _verdict(holds: bool) -> str:
    return "holds" if holds else "**fails**"


if __name__ == "__main__":
    main()
