"""An indexing job of many short documents: time against what --dry-run said and against encoding alone, memory, recall, disk.

  python -m scripts.bench_index --data DATA --model MODEL [--documents 1000000]

DATA is a folder of BEIR folders, whose documents are cut and recombined into documents of about 20 tokens, all of one domain.
MODEL is a model with a query tower; its first expert gets them. What is measured a document is then carried on to a billion
(docs/scale.md). Two hours a million on two slow cores. Writes a section of BENCHMARKS.md.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import moeret
from moeret import artifact
from moeret.data.beir import read_corpus
from scripts.benchmarks import markdown_table, write_section

WORDS = 7
"""Words of each of the two halves of a document: about 20 tokens together."""
ALONE = 0.05
"""Share of the documents in each of the two measurements of encoding alone, before and after the job."""
SEARCHES = 200
BOUNDS = {"memory": 4.0, "time": 0.25, "recall": 0.98, "throughput": 0.10}
_MAXRSS = 1 if sys.platform == "darwin" else 1024


def write_corpus(data: Path, folder: Path, count: int) -> None:
    """So many documents of two halves each, taken from anywhere, with some metadata."""
    halves: list[str] = []
    for path in sorted(data.glob("*/corpus.jsonl")):
        for document in read_corpus(path):
            words = document.contents.split()
            halves += [" ".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for number, (one, other) in enumerate(random.integers(0, len(halves), (count, 2)).tolist()):
            row = {"_id": f"d{number}", "text": f"{halves[one]} {halves[other]}", "metadata": {"part": number % 100}}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Runs the benchmark and writes its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of BEIR folders")
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--segment-documents", type=int, default=2**18, help="documents of a segment at most")
    parser.add_argument("--scratch", type=Path, help="where to work; a temporary folder unless given")
    arguments = parser.parse_args()
    scratch = arguments.scratch or Path(tempfile.mkdtemp())
    shutil.rmtree(scratch / "index", ignore_errors=True)
    if not (scratch / "corpus").is_dir():
        write_corpus(arguments.data, scratch / "corpus", arguments.documents)
    model = moeret.Model.load(arguments.model)
    expert = model.experts[0]
    named = ["--domain", f"{expert}={scratch / 'corpus'}", "--segment-documents", arguments.segment_documents]
    count = int(ALONE * arguments.documents)
    texts = [own.contents for own in read_corpus(scratch / "corpus" / "corpus.jsonl")[: 2 * count]]
    model.embedder.base(texts[:2000])  # compiles

    def alone(part: int) -> float:
        started = time.perf_counter()
        model.embedder.base(texts[part * count : (part + 1) * count])
        return (time.perf_counter() - started) / count

    before = alone(0)
    told = json.loads(_run("index", arguments.model, "--out", scratch / "index", *named, "--dry-run", "--json"))
    started = time.perf_counter()
    _run("index", arguments.model, "--out", scratch / "index", *named, "--json")
    seconds = time.perf_counter() - started
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _MAXRSS / 2**30
    encoding = statistics.mean([before, alone(1)]) * arguments.documents
    report = json.loads(_run("verify", scratch / "index", "--json"))
    recall = report["experts"][expert]["recall@10"]
    files = artifact.read(scratch / "index", "index").files
    size = sum(entry.bytes for name, entry in files.items() if name.startswith("segments/"))
    resident, started = _resident(), time.perf_counter()
    retriever = moeret.Retriever.load(scratch / "index", model=model)
    loading, resident = time.perf_counter() - started, _resident() - resident
    graph = _graph_seconds(retriever, texts)
    filters = {"no filter": None, "1 of 100": {"part": 7}, "half": {"part": {"lt": 50}}}
    times = {name: _search(retriever, texts, where) for name, where in filters.items()}
    rows = [
        ["time of the job, s", f"{seconds:.0f}", "", ""],
        [
            "as --dry-run said, s",
            f"{told['seconds']:.0f}",
            f"off by at most {BOUNDS['time']:.0%}",
            _holds(abs(told["seconds"] / seconds - 1), BOUNDS["time"]),
        ],
        ["... of it embedding, s", f"{told['encode_seconds']:.0f}", "", ""],
        ["... of it linking, s", f"{told['link_seconds']:.0f}", "", ""],
        [
            "encoding alone, s",
            f"{encoding:.0f}",
            f"the job at most {BOUNDS['throughput']:.0%} more",
            _holds(seconds / encoding - 1, BOUNDS["throughput"]),
        ],
        [
            "most memory of the job, GiB",
            f"{memory:.2f}",
            f"under {BOUNDS['memory']:.0f}",
            _holds(memory, BOUNDS["memory"]),
        ],
        [
            "recall@10 against exact",
            f"{recall:.4f}",
            f"at least {BOUNDS['recall']}",
            _holds(-recall, -BOUNDS["recall"]),
        ],
        ["segments", str(report["experts"][expert]["segments"]), "", ""],
        ["segments on disk, GB (as --dry-run said)", f"{size / 1e9:.2f} ({told['bytes'] / 1e9:.2f})", "", ""],
        ["bytes a document", f"{size / arguments.documents:.0f}", "", ""],
        ["loading the index, s", f"{loading:.1f}", "", ""],
        *[[f"one search, ms, median: {name}", f"{1e3 * own:.1f}", "", ""] for name, own in times.items()],
    ]
    body = (
        f"{arguments.documents:,} documents of {told['tokens'] / arguments.documents:.1f} tokens, made by recombining "
        f"real ones, as one domain, on {len(os.sched_getaffinity(0))} cores; a filter's first search, which finds its rows, "
        "does not count:\n\n" + markdown_table(["", "measured", "wanted", ""], rows)
    )
    seconds_each = {"embed": encoding / arguments.documents, "link": told["link_seconds"] / arguments.documents}
    body += "\n\n" + _carried_on(arguments, seconds_each, size, resident, graph)
    print(body)
    write_section("index", "Indexing many short documents", body)
    if not arguments.scratch:
        shutil.rmtree(scratch)


def _carried_on(
    arguments: argparse.Namespace, seconds: dict[str, float], size: int, resident: int, graph: float
) -> str:
    """What more documents of one expert would take, if each takes what one took here."""
    cores = len(os.sched_getaffinity(0))
    rows = []
    for count in (10**6, 10**7, 10**8, 10**9):
        segments = -(-count // 2**18)
        rows.append(
            [
                f"{count:,}",
                f"{count * seconds['embed'] * cores / 3600:,.0f}",
                f"{count * seconds['link'] * cores / 3600:,.1f}",
                f"{count * size / arguments.documents / 1e9:,.0f}",
                f"{count * resident / arguments.documents / 1e9:,.0f}",
                f"{segments:,}",
                f"{1e3 * segments * graph:,.0f}",
            ]
        )
    columns = [
        "documents",
        "core hours to embed",
        "to link",
        "GB on disk",
        "GB in memory",
        "segments",
        "ms in graphs a query",
    ]
    return (
        f"Carried on from {size / arguments.documents:.0f} bytes on disk and {resident / arguments.documents:.0f} "
        f"in memory a document, {1e3 * graph:.2f} ms a query in the graph of a segment of {arguments.segment_documents:,}, "
        "in segments of 262,144:\n\n" + markdown_table(columns, rows)
    )


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _graph_seconds(retriever: moeret.Retriever, texts: list[str]) -> float:
    """What a query takes in one segment's graph, median."""
    vectors = retriever.model.encode_query(texts[:SEARCHES], expert="base")
    [holder, *_] = retriever.rank(texts[:1]).snapshot.holders.values()
    taken = []
    for vector in vectors:
        started = time.perf_counter()
        holder.segments[0].segment.vectors.search(vector[None], 100)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _run(*words: object) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "moeret.cli", *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def _search(retriever: moeret.Retriever, texts: list[str], where: dict | None) -> float:
    taken = []
    for text in texts[: SEARCHES + 1]:
        started = time.perf_counter()
        assert len(retriever.search(text, where=where)) == 10
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _holds(value: float, bound: float) -> str:
    return "holds" if value <= bound else "**fails**"


if __name__ == "__main__":
    main()
