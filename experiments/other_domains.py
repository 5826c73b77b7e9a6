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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

import moeret
from experiments.pooled_domains import RIVALS, named_apart, run_seed
from experiments.pooled_report import report
from moeret.config import TrainConfig
from moeret.data.docstrings import installed_libraries, write_domains
from scripts.benchmarks import write_section

LIBRARIES = ("python", "numpy", "flax", "huggingface_hub")
FOREIGN = ("jax", "rich")
PER_LIBRARY = 1500
SPLITS = {"train": 0.6, "dev": 0.75, "test": 1.0}
"""Up to which share of the queries, in the order of their ids' hashes, a split goes."""
LEAST_WORDS = 30
"""A shorter paragraph of an article is read with the next one."""

Documents = dict[str, tuple[str, str]]
"""Document id -> (title, text)."""
Judged = list[tuple[str, list[str]]]
"""(query, ids of its relevant documents) pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The pooled comparison on other domains."""

    sources: Path
    """Folder of the three clones."""
    out: Path = Path("runs/other_domains")
    """Where data, models, indexes and scores go."""
    precision: moeret.config.Precision = "bfloat16"
    """Of all trainings' products."""


def main() -> None:
    """Runs the experiment and writes its section; what is finished is not repeated."""
    arguments = tyro.cli(Arguments)
    data = arguments.out / "data"
    trained = {
        name: write_beir(data / name, *read(arguments.sources))
        for name, read in (("covid-qa", covid_qa), ("pubmedqa", pubmedqa), ("climate-fever", climate_fever))
    }
    libraries = write_domains(data, per_library=PER_LIBRARY, libraries=len(installed_libraries()))
    trained |= {name: libraries[name] for name in LIBRARIES}
    foreign = {name: named_apart(name, all_as_test(libraries[name]), data / "foreign" / name) for name in FOREIGN}
    ours = TrainConfig(precision=arguments.precision)
    scores, _ = run_seed(arguments.out, trained, foreign, ours, RIVALS[:1], queries=None, first=True)
    body = report([scores], list(trained), FOREIGN, dataclasses.asdict(ours))
    print(body)
    write_section("other-domains", "Domains that moeret was not made with", body)


def covid_qa(sources: Path) -> tuple[Documents, Judged]:
    """Questions about articles on coronaviruses; a document is a paragraph, relevant where the answer stands in it."""
    articles = json.loads((sources / "COVID-QA/data/question-answering/200423_covidQA.json").read_text())["data"]
    documents, judged = {}, []
    for [article] in (entry["paragraphs"] for entry in articles):
        title = article["context"].split("\n", 1)[0]
        starts = {}
        for start, text in paragraphs(article["context"]):
            id = f"{article['document_id']}-{start}"
            starts[start] = id
            if text:
                documents[id] = (title, text)
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


def pubmedqa(sources: Path) -> tuple[Documents, Judged]:
    """Titles of medical papers that are questions, and the abstracts without their conclusions."""
    papers = json.loads((sources / "pubmedqa/data/ori_pqal.json").read_text())
    documents = {id: ("", " ".join(paper["CONTEXTS"])) for id, paper in papers.items()}
    return documents, [(paper["QUESTION"], [id]) for id, paper in papers.items()]


def climate_fever(sources: Path) -> tuple[Documents, Judged]:
    """Claims about the climate, and the Wikipedia sentences that support or refute them."""
    lines = (sources / "climate-fever-dataset/dataset/climate-fever.jsonl").read_text().splitlines()
    documents, judged = {}, []
    for claim in map(json.loads, lines):
        relevant = []
        for evidence in claim["evidences"]:
            documents[evidence["evidence_id"]] = (evidence["article"], evidence["evidence"])
            if evidence["evidence_label"] != "NOT_ENOUGH_INFO":
                relevant.append(evidence["evidence_id"])
        if relevant:
            judged.append((claim["claim"], sorted(set(relevant))))
    return documents, judged


def write_beir(folder: Path, documents: Documents, judged: Judged) -> Path:
    """Writes a BEIR folder whose splits follow the hashes of the queries; a query asked twice is asked once, of all it names."""
    queries: dict[str, set[str]] = {}
    for query, relevant in judged:
        queries.setdefault(" ".join(query.split()), set()).update(relevant)
    ids = {query: hashlib.sha256(query.encode()).hexdigest()[:12] for query in queries}
    ordered = sorted(queries, key=lambda query: ids[query])
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = ({"_id": id, "title": title, "text": text} for id, (title, text) in documents.items())
    _write_lines(folder / "corpus.jsonl", map(json.dumps, corpus))
    _write_lines(folder / "queries.jsonl", (json.dumps({"_id": ids[query], "text": query}) for query in ordered))
    first = 0
    for split, share in SPLITS.items():
        last = round(share * len(ordered))
        rows = (f"{ids[query]}\t{id}\t1" for query in ordered[first:last] for id in sorted(queries[query]))
        _write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])
        first = last
    return folder


def all_as_test(folder: Path) -> Path:
    """The folder with all its judgments in the test split: a foreign domain is not trained on."""
    judged = [line for split in SPLITS for line in (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]]
    _write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *dict.fromkeys(judged)])
    return folder


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
