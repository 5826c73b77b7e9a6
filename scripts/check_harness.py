"""The same numbers from BEIR's EvaluateRetrieval, from mteb and from moeret.

Command:  python -m scripts.check_harness --data DATA [--index runs/pooled_domains/seed-0/index] [--domains conala,scifact]
          Needs `pip install beir mteb`. Everything is read from DATA; nothing is downloaded.
Time:     about 6 minutes on 2 cores.
Expected: the measures of the three agree to 5 decimals. Writes its section into BENCHMARKS.md.
"""

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro

import moeret
from moeret.data.beir import read_domain
from moeret.evaluation.adapters import HarnessSearch
from moeret.evaluation.testsets import read_test_sets, score
from moeret.metrics import NDCG, RECALL
from scripts.benchmarks import markdown_table, write_section

HITS = 1000
"""That every harness asks for, because mteb does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """Compares three harnesses."""

    data: Path
    """Folder of the BEIR folders."""
    index: Path = Path("runs/pooled_domains/seed-0/index")
    """An index of them."""
    domains: str = "conala,scifact,nl2bash"
    """Whose test queries."""


def by_moeret(retriever: moeret.Retriever, name: str, folder: Path) -> dict[str, float]:
    """As moeret.evaluate does, but for as many hits as mteb asks for: more candidates then have a whole score."""
    [test] = read_test_sets(retriever, {name: folder}, "test")
    found = retriever.rank([*test.judged.queries.values()], HITS + 1)
    return score([test], {name: found.ranked}).table()[name]


def by_beir(retriever: moeret.Retriever, folder: Path) -> dict[str, float]:
    """BEIR reads the folder and evaluates."""
    from beir.datasets.data_loader import GenericDataLoader
    from beir.retrieval.evaluation import EvaluateRetrieval

    corpus, queries, qrels = GenericDataLoader(str(folder)).load(split="test")
    evaluation = EvaluateRetrieval(HarnessSearch(retriever), k_values=[10, 100, HITS])
    found = evaluation.retrieve(corpus, queries)
    ndcg, _, recall, _ = evaluation.evaluate(qrels, found, evaluation.k_values)
    return {NDCG: ndcg["NDCG@10"], RECALL: recall["Recall@100"]}


def by_mteb(retriever: moeret.Retriever, name: str, folder: Path) -> dict[str, float]:
    """A task of mteb that reads the folder."""
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    domain = read_domain(name, folder, ("test",))
    judged = domain.splits["test"]

    class Folder(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="".join(part.title() for part in name.split("-")),
            description="A BEIR folder.",
            dataset={"path": f"local/{name}", "revision": "1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            modalities=["text"],
        )

        def load_data(self, *_, **__) -> None:
            corpus = [{"id": own.id, "title": own.title, "text": own.text} for own in domain.corpus]
            queries = [{"id": id, "text": text} for id, text in judged.queries.items()]
            split = RetrievalSplitData(
                corpus=Dataset.from_list(corpus),
                queries=Dataset.from_list(queries),
                relevant_docs={id: dict(own) for id, own in judged.qrels.items()},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    results = mteb.evaluate(HarnessSearch(retriever), Folder(), cache=None, show_progress_bar=False)
    scores = results.task_results[0].scores["test"][0]
    return {NDCG: scores["ndcg_at_10"], RECALL: scores["recall_at_100"]}


def main() -> None:
    """Compares, and writes the section."""
    arguments = tyro.cli(Arguments)
    retriever = moeret.Retriever.load(arguments.index)
    rows, worst = [], 0.0
    for name in arguments.domains.split(","):
        folder = arguments.data / name
        own = by_moeret(retriever, name, folder)
        others = (by_beir(retriever, folder), by_mteb(retriever, name, folder))
        for measure in (NDCG, RECALL):
            values = [own[measure], *(found[measure] for found in others)]
            worst = max(worst, max(values) - min(values))
            rows.append([name, measure, *(f"{value:.5f}" for value in values)])
    body = (
        f"Routed search by one retriever over one index, {HITS:,} hits a query, as each harness scores it (BEIR and mteb round to "
        "5 decimals):\n\n"
        + markdown_table(["domain", "measure", "moeret", "BEIR", "mteb"], rows)
        + f"\n\nLargest difference: {worst:.1e} ({'holds' if worst <= 1e-5 else '**fails**'}: at most 1e-5)."
    )
    print(body)
    write_section(
        "harness", "The harnesses that people trust", body, {name: version(name) for name in ("beir", "mteb")}
    )
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
