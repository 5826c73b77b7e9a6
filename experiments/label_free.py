"""A domain without any judged query is added from its corpus alone: what it gains, and what it costs the others.

Command:  python -m experiments.label_free --data DATA [--pooled runs/pooled_domains] [--out runs/label_free]
          DATA and --pooled as experiments.pooled_domains leaves them; cranfield, cisi and cacm are added to its first seed's
          model, which never saw them.
Time:     about 10 minutes on 2 cores.
Expected: no other expert's file changes by a byte, and the other domains' nDCG@10 changes by at most 0.3 points. Writes its
          table into BENCHMARKS.md.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

import moeret
from experiments.add_domain import digests
from experiments.pooled_domains import FOREIGN, TRAINED
from moeret.evaluation.benchmark import search_route
from moeret.evaluation.testsets import read_test_sets, score
from moeret.metrics import NDCG
from scripts.benchmarks import fast_precision, markdown_table, write_section


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Adds experts without judged queries."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its first seed."""
    out: Path = Path("runs/label_free")
    """Where the new model and the index go."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    source, model = arguments.pooled / "seed-0" / "model", arguments.out / "model"
    if not model.is_dir():
        shutil.copytree(source, model, ignore=shutil.ignore_patterns("checkpoints"))
    home = {name: arguments.data / name for name in TRAINED}
    # The renamed copies, as the first seed's index has them.
    new = {name: arguments.pooled / "foreign" / name for name in FOREIGN}
    started = time.monotonic()
    for name in FOREIGN:
        config = moeret.TrainConfig(precision=fast_precision())
        added = moeret.add_expert(model, name, new[name], config=config, label_free=True, show_progress_bar=True)
    seconds = time.monotonic() - started
    before = digests(source)
    changed = [name for name, digest in before.items() if digests(model).get(name) != digest]

    moeret.build_index(model, arguments.out / "index", {**home, **new}, show_progress_bar=True)
    found = {}
    for when, index in (("before", arguments.pooled / "seed-0" / "index"), ("after", arguments.out / "index")):
        retriever = moeret.Retriever.load(index)
        tests = read_test_sets(retriever, {**home, **new}, "test")
        routes = {"routed": tests, "base": [test for test in tests if test.name in new]}
        for label, sets in routes.items():
            route = {"routed": "auto", "base": "base"}[label]
            retriever.blends = {} if route == "base" else retriever.model.blends
            ranked = {test.name: search_route(retriever, test, route, lambda count: None).ranked for test in sets}
            found[when, label] = score(sets, ranked).table()
        retriever.close()
    rows = []
    for name in (*TRAINED, *FOREIGN):
        values = [found[when, "routed"][name][NDCG] for when in ("before", "after")]
        base = f"{100 * found['after', 'base'][name][NDCG]:.1f}" if name in new else ""
        rows.append([name, *(f"{100 * v:.1f}" for v in values), f"{100 * (values[1] - values[0]):+.2f}", base])
    experts = [
        [
            own["name"],
            str(own["train_queries"]),
            str(own["step"]),
            f"{own['strength']:g}",
            f"{own['shared_strength']:g}",
        ]
        for own in added.meta["experts"]
        if own["name"] in new
    ]
    body = "\n\n".join(
        [
            "Routed nDCG@10 x 100 on test, before (documents of the last three come in as corpora without a domain) and after:",
            markdown_table(["domain", "before", "after", "change", "base, all documents"], rows),
            markdown_table(["added", "queries made", "step", "own strength", "shared strength"], experts),
            f"- other experts' files and profiles changed: {len(changed)} of {len(before)}\n"
            f"- seconds to add the three in this call: {seconds:.0f}",
        ]
    )
    print(body)
    write_section("label-free", "Adding domains without judged queries", body)


if __name__ == "__main__":
    main()
