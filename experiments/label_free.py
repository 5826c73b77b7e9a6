"""A domain without any judged query is added from its corpus alone: what it gains, and what it costs the others.

Command:  python -m experiments.label_free --data DATA [--pooled runs/pooled_domains] [--out runs/label_free]
          DATA and --pooled as experiments.pooled_domains leaves them; cranfield, cisi and cacm are added to its first seed's
          model, which never saw them.
Time:     about 20 minutes on 2 cores.
Expected: no other expert's file changes by a byte, and the other domains' nDCG@10 falls by at most 0.3 points. How strong such
          an expert should be is read off other domains' real dev queries. Writes its tables into BENCHMARKS.md.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import moeret
from experiments.add_domain import changes, digests
from experiments.folders import made_from
from experiments.pooled_domains import FOREIGN, TRAINED
from moeret import artifact
from moeret.config import TrainConfig
from moeret.data.lexical import Lexical, stems
from moeret.evaluation.benchmark import search_route
from moeret.evaluation.testsets import read_test_sets, score
from moeret.metrics import NDCG
from moeret.models import experts
from moeret.models.embed import Embedder
from moeret.models.model import VECTORS, read_profile
from moeret.training.learn import fit_experts
from moeret.training.prepare import prepare, read_domains
from moeret.training.routing import ndcg_of
from moeret.training.strength import LABEL_FREE
from moeret.training.towers import QueryTower
from scripts.benchmarks import fast_precision, markdown_table, write_section

STRENGTHS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
COMPARED = ("scifact", "nfcorpus", "obliqa")
"""Domains with judged dev queries, whose experts learn from their corpora alone here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Adds experts without judged queries."""

    data: Path
    """Folder of the BEIR folders."""
    pooled: Path = Path("runs/pooled_domains")
    """Where experiments.pooled_domains left its first seed."""
    out: Path = Path("runs/label_free")
    """Where the new model and the index go."""
    steps: int = 120
    """Training steps at most of the experts whose strengths are compared."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    source = arguments.pooled / "seed-0" / "model"
    out = made_from(arguments.out, source)
    model = out / "model"
    if not model.is_dir():
        shutil.copytree(source, model, ignore=shutil.ignore_patterns("checkpoints"))
    home = {name: arguments.data / name for name in TRAINED}
    # The renamed copies, as the first seed's index has them.
    new = {name: arguments.pooled / "foreign" / name for name in FOREIGN}
    started = time.monotonic()
    for name in FOREIGN:
        config = TrainConfig(precision=fast_precision())
        added = moeret.add_expert(model, name, new[name], config=config, label_free=True, show_progress_bar=True)
    seconds = time.monotonic() - started
    before = digests(source)
    changed = [name for name, digest in before.items() if digests(model).get(name) != digest]

    moeret.build_index(model, out / "index", {**home, **new}, show_progress_bar=True)
    found = {}
    for when, index in (("before", arguments.pooled / "seed-0" / "index"), ("after", out / "index")):
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
    entries = [
        [
            own["name"],
            str(own["train_queries"]),
            str(own["step"]),
            f"{own['strength']:g}",
        ]
        for own in added.meta["experts"]
        if own["name"] in new
    ]
    body = "\n\n".join(
        [
            "Routed nDCG@10 x 100 on test, before (documents of the last three come in as corpora without a domain) and after:",
            markdown_table(["domain", "before", "after", "change", "base, all documents"], rows),
            markdown_table(["added", "queries made", "step", "strength"], entries),
            f"{changes(*({name: found[when, 'routed'][name][NDCG] for name in TRAINED} for when in ('before', 'after')))}\n"
            f"- other experts' files and profiles changed: {len(changed)} of {len(before)}\n"
            f"- seconds to add the three in this call: {seconds:.0f}",
            "How strong such an expert should be: dev nDCG@10 x 100 of domains that have judged queries, by experts that learnt "
            f"from the corpus alone in at most {arguments.steps} steps, in their own index, cosine and words as the base weighs "
            f"them; and of made-up queries, by cosine in the pool (taken: {LABEL_FREE[0]:g}).",
            _strengths_table(arguments, source, out),
        ]
    )
    print(body)
    write_section("label-free", "Adding domains without judged queries", body)


def _strengths_table(arguments: Arguments, source: Path, out: Path) -> str:
    rows = []
    for name in COMPARED:
        work = out / f"{name}-{arguments.steps}-steps"
        file = work / "result.json"
        if not file.is_file():
            artifact.write_atomically(file, json.dumps(_by_strength(name, arguments, source, work)).encode())
        for label, values in json.loads(file.read_text()).items():
            rows.append([name, label, *(f"{100 * value:.1f}" for value in values)])
    return markdown_table(["domain", "queries", *(f"{strength:g}" for strength in STRENGTHS)], rows)


def _by_strength(name: str, arguments: Arguments, source: Path, work: Path) -> dict[str, list[float]]:
    """Dev nDCG@10 of real and of made-up queries by the strength of an expert that learnt from the domain's corpus alone."""
    model, path = moeret.Model.load(source), arguments.data / name
    work.mkdir(parents=True, exist_ok=True)
    config = TrainConfig(precision=fast_precision(), steps=arguments.steps)
    others = [
        read_profile(model.published, entry["profile"]).documents
        for entry in model.published.meta["experts"]
        if entry["name"] != name
    ]
    base = Embedder(model.base, experts.base_alone(model.base.config, config.expert))
    made = prepare(
        read_domains({name: path}, label_free=True), base, config, work / VECTORS, others, show_progress_bar=True
    )
    tower = QueryTower(made, base)
    bank = fit_experts(made, base, tower, config, work, show_progress_bar=True).bank
    real = prepare(read_domains({name: path}), base, config, work / VECTORS, show_progress_bar=True)
    own, documents = real.dev[0], [document.contents for document in real.domains[0].corpus]
    lexical, words = Lexical.of(documents), stems([*own.judged.queries.values()])
    weight = model.published.meta["base"]["blend"]["lexical"]

    def served(vectors: np.ndarray) -> float:
        scores = np.stack([real.pool @ v + weight * lexical.scores(w) for v, w in zip(vectors, words, strict=True)])
        top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        return float(ndcg_of(own, top, np.take_along_axis(scores, top, axis=1)).mean())

    found: dict[str, list[float]] = {"real": [], "made up": []}
    for strength in STRENGTHS:
        scaled = experts.scaled(bank, np.full(1, strength, np.float32))
        found["real"].append(served(base.with_bank(experts.with_base(scaled)).alone(1).base(own.texts)))
        found["made up"].append(float(tower.values_of_one(scaled)[0].mean()))
    return found


if __name__ == "__main__":
    main()
