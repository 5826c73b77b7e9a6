"""The same picture on other domains: the pooled benchmark's comparison on data that moeret was not made with.

Command:  git clone https://github.com/deepset-ai/COVID-QA && git clone https://github.com/pubmedqa/pubmedqa
          git clone https://github.com/tdiggelm/climate-fever-dataset
          python -m experiments.other_domains --sources . [--out runs/other_domains]
          Trains on these three and on the documentation of four Python libraries of this machine; two more libraries are
          foreign. All are small: a few hundred training queries each.
Time:     about half an hour on 2 cores with bfloat16 products. Cut off, the same command goes on.
Expected: as for experiments.pooled_domains. Writes its section into BENCHMARKS.md.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro

import moeret
from experiments.folders import named_apart
from experiments.pooled_domains import RIVALS, run_seed
from experiments.pooled_report import report
from moeret.config import TrainConfig
from moeret.data.beir import Domain, Judged, read_domain, write_domain
from moeret.data.docstrings import installed_libraries, write_domains
from moeret.types import Document
from scripts.benchmarks import fast_precision, write_section

LIBRARIES = ("python", "numpy", "flax", "huggingface_hub")
FOREIGN = ("jax", "rich")
PER_LIBRARY = 1500
SPLITS = {"train": 0.6, "dev": 0.75, "test": 1.0}
"""Up to which share of the queries, in the order of their ids' hashes, a split goes."""
LEAST_WORDS = 30
"""A shorter paragraph of an article is read with the next one."""

Source = tuple[list[Document], list[tuple[str, list[str]]]]
"""Documents, and (query, ids of its relevant documents) pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The pooled comparison on other domains."""

    sources: Path
    """Folder of the three clones."""
    out: Path = Path("runs/other_domains")
    """Where data, models, indexes and scores go."""
    precision: moeret.config.Precision = field(default_factory=fast_precision)
    """Of all trainings' products."""


def main() -> None:
    """Runs the experiment and writes its section; what is finished is not repeated."""
    arguments = tyro.cli(Arguments)
    data = arguments.out / "data"
    trained = {
        name: write_domain(split(name, data / name, *read(arguments.sources)))
        for name, read in (("covid-qa", covid_qa), ("pubmedqa", pubmedqa), ("climate-fever", climate_fever))
    }
    libraries = write_domains(data, per_library=PER_LIBRARY, libraries=len(installed_libraries()))
    trained |= {name: libraries[name] for name in LIBRARIES}
    foreign = {
        name: write_domain(named_apart(all_as_test(name, libraries[name]), data / "foreign" / name)) for name in FOREIGN
    }
    ours = TrainConfig(precision=arguments.precision)
    scores, _ = run_seed(arguments.out, trained, foreign, ours, RIVALS[:1], queries=None, first=True)
    body = report([scores], list(trained), FOREIGN, dataclasses.asdict(ours))
    print(body)
    write_section("other-domains", "Domains that moeret was not made with", body)


def covid_qa(sources: Path) -> Source:
    """Questions about articles on coronaviruses; a document is a paragraph, relevant where the answer stands in it."""
    articles = json.loads((sources / "COVID-QA/data/question-answering/200423_covidQA.json").read_text())["data"]
    documents, judged = [], []
    for [article] in (entry["paragraphs"] for entry in articles):
        title = article["context"].split("\n", 1)[0]
        starts = {}
        for start, text in paragraphs(article["context"]):
            id = f"{article['document_id']}-{start}"
            starts[start] = id
            if text:
                documents.append(Document(id, text, title))
        for question in article["qas"]:
            answers = [answer["answer_start"] for answer in question["answers"]]
            relevant = {starts[max(start for start in starts if start <= answer)] for answer in answers}
            judged.append((question["question"], sorted(relevant)))
    return documents, judged


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(start, paragraph) of a text, short ones joined to the next."""
    begin = end = 0
    for part in text.split("\n\n"):
        end += len(part) + 2
        if len(text[begin:end].split()) >= LEAST_WORDS or end >= len(text):
            yield begin, text[begin:end].strip()
            begin = end


def pubmedqa(sources: Path) -> Source:
    """Titles of medical papers that are questions, and the abstracts without their conclusions."""
    papers = json.loads((sources / "pubmedqa/data/ori_pqal.json").read_text())
    documents = [Document(id, " ".join(paper["CONTEXTS"])) for id, paper in papers.items()]
    return documents, [(paper["QUESTION"], [id]) for id, paper in papers.items()]


def climate_fever(sources: Path) -> Source:
    """Claims about the climate, and the Wikipedia sentences that support or refute them."""
    lines = (sources / "climate-fever-dataset/dataset/climate-fever.jsonl").read_text().splitlines()
    documents, judged = {}, []
    for claim in map(json.loads, lines):
        relevant = []
        for evidence in claim["evidences"]:
            id = evidence["evidence_id"]
            documents[id] = Document(id, evidence["evidence"], evidence["article"])
            if evidence["evidence_label"] != "NOT_ENOUGH_INFO":
                relevant.append(id)
        if relevant:
            judged.append((claim["claim"], sorted(set(relevant))))
    return [*documents.values()], judged


def split(name: str, path: Path, documents: list[Document], judged: list[tuple[str, list[str]]]) -> Domain:
    """A domain whose splits follow the hashes of the queries; a query asked twice is asked once, of all that it names."""
    queries: dict[str, set[str]] = {}
    for query, relevant in judged:
        queries.setdefault(" ".join(query.split()), set()).update(relevant)
    ids = {query: hashlib.sha256(query.encode()).hexdigest()[:12] for query in queries}
    ordered, splits, first = sorted(queries, key=lambda query: ids[query]), {}, 0
    for part, share in SPLITS.items():
        last = round(share * len(ordered))
        own = ordered[first:last]
        qrels = {ids[query]: dict.fromkeys(sorted(queries[query]), 1) for query in own}
        splits[part], first = Judged({ids[query]: query for query in own}, qrels), last
    return Domain(name, path, documents, splits)


def all_as_test(name: str, path: Path) -> Domain:
    """The domain with all its queries in the test split: a foreign domain is not trained on."""
    domain = read_domain(name, path, (*SPLITS,))
    parts = domain.splits.values()
    queries = {id: text for own in parts for id, text in own.queries.items()}
    qrels = {id: documents for own in parts for id, documents in own.qrels.items()}
    return dataclasses.replace(domain, splits={"test": Judged(queries, qrels)})


if __name__ == "__main__":
    main()
