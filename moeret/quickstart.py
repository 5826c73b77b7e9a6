"""`moeret quickstart`: the whole way from documents to ranked hits, on documentation that every machine has.

What it prints is the tutorial: each step says what it does in the words that the rest of moeret uses.
"""

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moeret import artifact
from moeret.config import TrainConfig
from moeret.data.beir import read_queries
from moeret.data.docstrings import write_domains
from moeret.evaluation.benchmark import evaluate
from moeret.evaluation.tables import report_tables
from moeret.retrieval.build import build_index
from moeret.retrieval.search import Retriever
from moeret.training.run import train

CONFIG = TrainConfig(steps=20, shared_steps=20, evaluate_every=10)
LIBRARIES, DOCUMENTS = 6, 400
_QUESTIONS = 3


def quickstart(out: Path, console: Console, *, show_progress_bar: bool) -> None:
    """Makes `out`/data, `out`/model and `out`/index, prints the report and answers three questions.

    Run again, it goes on where it was cut off, and answers from what is there once it is finished.
    """
    model, index = out / "model", out / "index"
    console.rule("1. Corpora: one domain per library")
    data = out / "data.json"
    if not data.is_file():
        folders = write_domains(out / "data", per_library=DOCUMENTS, libraries=LIBRARIES)
        relative = {name: str(folder.relative_to(out)) for name, folder in folders.items()}
        artifact.write_atomically(data, json.dumps(relative).encode())
    domains = {name: out / folder for name, folder in json.loads(data.read_text()).items()}
    console.print(
        f"Documents are docstrings of {', '.join(domains)}, each without its summary line; that line is the query that asks "
        f"for it. They lie as BEIR folders under {out / 'data'}.",
        highlight=False,
    )

    console.rule("2. Experts and router: moeret train")
    console.print(
        "The base is a frozen text encoder. A shared delta learns from all domains to move queries towards the documents that "
        "answer them, a small expert from each domain, and both are merged; a router learns from the lower layers' reading of "
        "a query which experts to use, or to abstain.",
    )
    trained = train(domains, model, config=CONFIG, show_progress_bar=show_progress_bar)
    for entry in trained.meta["experts"]:
        base, own = entry["base_dev_ndcg"]["all"], entry["dev_ndcg"]["all"]
        console.print(
            f"  {entry['name']:<18} dev nDCG@10 {base:.3f} -> {own:.3f} (step {entry['step']})", highlight=False
        )
    router = trained.meta["router"]
    console.print(f"  router: {router['query']['kind']}, decided by {router['report']['decided_by']}", highlight=False)

    console.rule("3. Index: moeret index")
    console.print("Every document is embedded once and goes into the index of its domain's expert.")
    build_index(model, index, domains, show_progress_bar=show_progress_bar)

    console.rule("4. Report: moeret evaluate")
    console.print(
        "Test queries of all domains, unlabelled, against one pool of all documents. No document was asked for in training."
    )
    retriever = Retriever.load(index)
    report = evaluate(retriever, domains, baselines=True, show_progress_bar=show_progress_bar)
    for table in report_tables(report):
        console.print(table)

    console.rule("5. Three questions: moeret search")
    for question in _sample_questions(domains):
        route = retriever.route([question])[0]
        used = (
            ", ".join(f"{name} {weight:.0%}" for name, weight in route.experts.items()) or "none: the router abstained"
        )
        console.print(f"\n[bold]{escape(question)}[/bold]\n  experts: {used}", highlight=False)
        for hit in retriever.search(question, k=3):
            console.print(f"  {hit.rank}. {hit.score:.3f}  {hit.title}  ({hit.expert})", highlight=False, markup=False)
    console.print(
        f'\nNow ask your own:  moeret search {index} "how to compute the inverse of a matrix"', highlight=False
    )


def _sample_questions(domains: dict[str, Path]) -> list[str]:
    """The first test query of three domains."""
    questions = []
    for path in list(domains.values())[:_QUESTIONS]:
        query = (path / "qrels" / "test.tsv").read_text().splitlines()[1].split("\t")[0]
        questions.append(read_queries(path / "queries.jsonl")[query])
    return questions
