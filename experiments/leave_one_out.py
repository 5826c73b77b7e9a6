"""Leave one expert out: what routed search does with queries and documents of a domain that it has no expert for.

Command:  python -m experiments.leave_one_out --data DATA [--pooled runs/pooled_domains] [--out runs/leave_one_out]
          DATA and --pooled as experiments.pooled_domains leaves them; the first seed's model is used.
Time:     about 15 minutes on 2 cores; finished domains are not repeated.
Expected: routed is at most 0.5 points of nDCG@10 below the base on each. The shared delta has still seen the domain; the
          foreign corpora of experiments.pooled_domains are those that nothing has seen. Writes its section into BENCHMARKS.md.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import moeret
from experiments.pooled_domains import TRAINED
from moeret.evaluation.benchmark import search_route
from moeret.evaluation.testsets import read_test_sets, score
from moeret.metrics import NDCG
from scripts.benchmarks import markdown_table, write_section

LOSS = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Removes each expert in turn."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its first seed."""
    out: Path = Path("runs/leave_one_out")
    """Where models and indexes go; each is deleted when it has been scored."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    rows = []
    for name in TRAINED:
        file = arguments.out / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(_without(name, arguments)))
        found = json.loads(file.read_text())
        loss = found["routed"] - found["base"]
        verdict = "holds" if loss >= -LOSS else "**fails**"
        rows.append(
            [
                name,
                f"{100 * found['base']:.1f}",
                f"{100 * found['routed']:.1f}",
                f"{100 * loss:+.1f}",
                f"{found['abstained']:.0%}",
                f"{found['at_home']:.0%}",
                verdict,
            ]
        )
    columns = [
        "expert left out",
        "base",
        "routed",
        "difference",
        "abstained",
        "documents in the base's index",
        "-0.5 at most",
    ]
    body = (
        f"{NDCG} x 100 of each domain's test queries when its expert is taken out of the model and its documents come in as a "
        "corpus without a domain; base: the base's vector, all documents:\n\n" + markdown_table(columns, rows)
    )
    print(body)
    write_section("leave-one-out", "Leave one expert out", body)


def _without(name: str, arguments: Arguments) -> dict[str, float]:
    """Scores of one domain in a model without its expert."""
    place = arguments.out / name
    model = place / "model"
    shutil.rmtree(place, ignore_errors=True)
    source = arguments.pooled / "seed-0" / "model"
    shutil.copytree(source, model, copy_function=os.link, ignore=shutil.ignore_patterns("checkpoints", "manifest.json"))
    shutil.copy(source / "manifest.json", model)  # the one file that is replaced
    moeret.remove_expert(model, name)
    others = {other: arguments.data / other for other in TRAINED if other != name}
    corpus = arguments.data / name / "corpus.jsonl"
    exact = moeret.IndexConfig(exact_below=10**9)  # graphs would take longer to build than to save
    moeret.build_index(model, place / "index", others, [corpus], config=exact, show_progress_bar=True)
    retriever = moeret.Retriever.load(place / "index")
    tests = read_test_sets(retriever, {name: arguments.data / name}, "test")
    found = {route: search_route(retriever, tests[0], route, lambda count: None) for route in ("auto", "base")}
    scored = {route: score(tests, {name: own.ranked}).mean()[NDCG] for route, own in found.items()}
    retriever.close()
    shutil.rmtree(place)
    return {
        "base": scored["base"],
        "routed": scored["auto"],
        "abstained": float(np.mean([route.abstained for route in found["auto"].routes])),
        "at_home": retriever.sizes.get("base", 0) / len(tests[0].documents),
    }


if __name__ == "__main__":
    main()
