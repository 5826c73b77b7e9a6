"""Query tower against both towers: whether experts should encode their documents too.

Command:  python -m experiments.towers --data DATA [--out runs/towers]
          DATA as experiments.pooled_domains leaves it, or any BEIR folders of these names.
Time:     about an hour on 2 cores, on the excerpts that experiments.pooled_domains makes with --small; what is finished is
          not repeated.
Expected: both towers are ahead by cosine alone, and level with the query tower, the default, where words and memory, which only
          it has, speak too. Writes its section into BENCHMARKS.md.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

import moeret
from experiments.folders import made_from
from experiments.recipe import DOMAINS
from moeret import artifact
from moeret.config import TrainConfig
from moeret.metrics import NDCG
from moeret.training.prepare import read_domains
from scripts.benchmarks import fast_precision, markdown_table, write_section


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Trains both kinds of experts on the same queries."""

    data: Path
    """Folder of the BEIR folders."""
    out: Path = Path("runs/towers")
    """Where models, indexes and results go."""
    both_steps: int = 60
    """Steps of an expert that encodes its documents too: one is as much work as dozens of a query tower's."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    domains = {name: arguments.data / name for name in DOMAINS}
    documents = sum(len(domain.corpus) for domain in read_domains(domains))
    configs = {
        "query tower": TrainConfig(tower="query", precision=fast_precision()),
        "both towers": TrainConfig(tower="both", precision=fast_precision(), steps=arguments.both_steps),
    }
    found = {label: _scores(config, domains, arguments.out / config.tower) for label, config in configs.items()}
    rows = [["base, one HNSW", *_row(found["query tower"]["base_one_index"]), "", ""]]
    for label, own in found.items():
        seconds = [f"{own['seconds'][what]:.0f}" for what in ("train", "index")]
        for name, route in (("routed", "auto"), ("known-domain oracle", "oracle")):
            rows.append([f"{label}, {name}", *_row(own[route]), *(seconds if route == "auto" else ["", ""])])
        if label == "query tower":
            rows.append([f"{label}, routed, cosine alone", *_row(own["cosine"]), "", ""])
    columns = ["system", "mean", *DOMAINS, "seconds to train", "seconds to index"]
    body = (
        f"nDCG@10 x 100 on test, {documents:,} documents of {len(domains)} domains in one index, by `moeret train` and "
        f"`moeret index` with their defaults in {fast_precision()}, but for the tower and its steps: the query tower's experts "
        f"train {configs['query tower'].steps} at most, after a shared delta, both towers' {arguments.both_steps}, without one. "
        "With both towers each expert encodes its documents, scores of experts are fused by their calibrated chances, and there "
        "are no words and memory. Seconds are those of the last call, which does not repeat what is finished:\n\n"
        + markdown_table(columns, rows)
    )
    print(body)
    write_section("towers", "Query tower against both towers", body)


def _scores(config: TrainConfig, domains: dict[str, Path], out: Path) -> dict[str, Any]:
    """Test nDCG@10 of each system by domain, and the seconds that training and indexing took."""
    started = time.monotonic()
    moeret.train(domains, out / "model", config=config, show_progress_bar=True)
    trained = time.monotonic()
    moeret.build_index(out / "model", out / "index", domains, show_progress_bar=True)
    seconds = {"train": trained - started, "index": time.monotonic() - trained}
    file = made_from(out, out / "model") / "result.json"
    if file.is_file():
        return json.loads(file.read_text())
    retriever = moeret.Retriever.load(out / "index")
    report = moeret.evaluate(retriever, domains, baselines=True, show_progress_bar=True)
    result = {name: own["domains"] for name, own in report["systems"].items()} | {"seconds": seconds}
    if config.tower == "query":
        retriever.blends = {}
        result["cosine"] = moeret.evaluate(retriever, domains)["domains"]
    retriever.close()
    artifact.write_atomically(file, json.dumps(result).encode())
    return result


def _row(domains: dict[str, dict[str, float]]) -> list[str]:
    values = [domains[name][NDCG] for name in DOMAINS]
    return [f"{100 * value:.1f}" for value in (sum(values) / len(values), *values)]


if __name__ == "__main__":
    main()
