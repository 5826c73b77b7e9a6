"""Leave one expert out: what routed search does with queries and documents of a domain that it has no expert for.

Command:  python -m experiments.leave_one_out --data DATA [--pooled runs/pooled_domains] [--out runs/leave_one_out]
          DATA and --pooled as experiments.pooled_domains leaves them; the first seed's model is used.
Time:     about 15 minutes on 2 cores; finished domains are not repeated.
Expected: routed is at most 0.5 points of nDCG@10 below the base on each. The shared delta has still seen the domain; the
          foreign corpora of experiments.pooled_domains are those that nothing has seen. On dev several limits of
          strangeness are tried. Writes its section into BENCHMARKS.md.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

import moeret
from experiments.folders import made_from
from experiments.pooled_domains import TRAINED
from moeret import artifact
from moeret.data.beir import Judged, sample
from moeret.evaluation.benchmark import search_route
from moeret.evaluation.testsets import read_test_sets, score
from moeret.metrics import NDCG
from moeret.retrieval.evidence import STRANGE_QUERIES, Evidence
from moeret.retrieval.search import Rankings
from moeret.training.prepare import read_domains
from moeret.types import BASE_EXPERT
from scripts.benchmarks import markdown_table, write_section

LOSS = 0.005
SHARES = (0.05, 0.1, 0.15, 0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Removes each expert in turn."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its first seed."""
    out: Path = Path("runs/leave_one_out")
    """Where models and indexes go; each is deleted when it has been scored."""
    queries: int = 300
    """Queries of each split at most (a fixed pseudo-random choice)."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    place, found = made_from(arguments.out, arguments.pooled / "seed-0" / "model", arguments.queries), {}
    for name in TRAINED:
        file = place / f"{name}.json"
        if not file.is_file():
            artifact.write_atomically(file, json.dumps(_without(name, place / name, arguments)).encode())
        found[name] = json.loads(file.read_text())
    body = (
        f"{NDCG} x 100 of each domain's test queries (at most {arguments.queries}) when its expert is taken out of the model and "
        "its documents come in as a corpus without a domain; base: the base's vector alone, all documents:\n\n"
        f"{_test_table(found)}\n\nThe same on dev, mean of the domains, by the share of known domains' queries that may count as "
        f"strange (taken: {STRANGE_QUERIES:.0%}):\n\n{_dev_table(found)}"
    )
    print(body)
    write_section("leave-one-out", "Leave one expert out", body)


def _test_table(found: dict[str, dict[str, Any]]) -> str:
    columns = [
        "expert left out",
        "base",
        "routed",
        "difference",
        "abstained",
        "-0.5 at most",
    ]
    rows = []
    for name, own in found.items():
        base, routed = own["test"]["base"], own["test"]["routed"]
        rows.append(
            [
                name,
                f"{100 * base:.1f}",
                f"{100 * routed:.1f}",
                f"{100 * (routed - base):+.1f}",
                f"{own['abstained']:.0%}",
                "holds" if routed - base >= -LOSS else "**fails**",
            ]
        )
    return markdown_table(columns, rows)


def _dev_table(found: dict[str, dict[str, Any]]) -> str:
    rows = []
    for share in (f"{share:.0%}" for share in SHARES):
        losses = [own["dev"][share]["routed"] - own["dev"]["base"] for own in found.values()]
        indexes = np.mean([own["dev"][share]["indexes"] for own in found.values()])
        rows.append([share, f"{100 * np.mean(losses):+.2f}", f"{100 * min(losses):+.1f}", f"{indexes:.2f}"])
    return markdown_table(["strange", "difference to the base", "of the worst domain", "indexes a query"], rows)


def _without(name: str, place: Path, arguments: Arguments) -> dict[str, Any]:
    """Scores of one domain in a model without its expert."""
    own, model = arguments.data / name, place / "model"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(arguments.pooled / "seed-0" / "model", model, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    moeret.remove_expert(model, name)
    others = {other: arguments.data / other for other in TRAINED if other != name}
    exact = moeret.IndexConfig(exact_below=10**9)  # graphs would take longer to build than to save
    moeret.build_index(model, place / "index", others, [own / "corpus.jsonl"], config=exact, show_progress_bar=True)
    retriever = moeret.Retriever.load(place / "index")
    [test] = read_test_sets(retriever, {name: own}, "test")
    [domain] = read_domains({name: own})

    blends = retriever.blends

    def run(judged: Judged, route: str) -> tuple[float, Rankings]:
        asked = dataclasses.replace(test, judged=sample(judged, arguments.queries))
        retriever.blends = {} if route == BASE_EXPERT else blends
        found = search_route(retriever, asked, route, lambda count: None)
        return float(score([asked], {name: found.ranked}).mean()[NDCG]), found

    routed, found = run(test.judged, "auto")
    result = {
        "abstained": float(np.mean([route.abstained for route in found.routes])),
        "test": {"base": run(test.judged, "base")[0], "routed": routed},
        "dev": {"base": run(domain.splits["dev"], "base")[0]},
    }
    for share in SHARES:
        retriever.strange_limit = Evidence(retriever.model.experts, retriever.sketches).limit(retriever.model, share)
        routed, found = run(domain.splits["dev"], "auto")
        indexes = float(np.mean([len(names) for names in found.indexes]))
        result["dev"][f"{share:.0%}"] = {"routed": routed, "indexes": indexes}
    retriever.close()
    shutil.rmtree(place)
    return result


if __name__ == "__main__":
    main()
