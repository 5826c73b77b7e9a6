"""The base alone on its own corpora: it should reproduce the published nDCG@10 of all-MiniLM-L6-v2.

Command:  python -m experiments.base_quality --data DATA [--work runs/base_quality]
          DATA holds the BEIR folders scifact and nfcorpus.
Time:     about 6 minutes on 2 cores; vectors are kept in --work.
Expected: SciFact 64.5, NFCorpus 31.6, each within 0.2. Writes its table into BENCHMARKS.md.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

import moeret
from moeret import metrics
from moeret.config import DEFAULT_BASE
from moeret.data.beir import read_domain
from moeret.models.vector_cache import cached_vectors
from moeret.progress import progress_bar
from moeret.retrieval.hnsw import exact_search
from scripts.benchmarks import markdown_table, write_section

PUBLISHED = {"scifact": 64.5, "nfcorpus": 31.6}
TOLERANCE = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The base alone against published figures."""

    data: Path
    """Folder of the BEIR folders."""
    work: Path = Path("runs/base_quality")
    """Where document vectors are kept."""


def main() -> None:
    """Runs the experiment and writes its section."""
    arguments = tyro.cli(Arguments)
    model = moeret.Model.load(DEFAULT_BASE)
    rows = []
    for name, published in PUBLISHED.items():
        domain = read_domain(name, arguments.data / name, ("test",))
        judged = domain.splits["test"]
        texts = [document.contents for document in domain.corpus]
        with progress_bar(name, len(texts), shown=True, unit="documents") as advance:
            documents = cached_vectors(
                lambda chunk, advance=advance: model.embedder.base(chunk, advance=advance),
                texts,
                model.embedder.width,
                [arguments.work],
                model.base.fingerprint,
                advance,
            )
        found, scores = exact_search(model.encode_query([*judged.queries.values()]), documents, 11)
        run = {
            query: {
                domain.corpus[row].id: float(s)
                for row, s in zip(own, score, strict=True)
                if domain.corpus[row].id != query
            }
            for query, own, score in zip(judged.queries, found, scores, strict=True)
        }
        ours = 100 * metrics.mean(metrics.per_query(judged.qrels, run)[metrics.NDCG])
        verdict = "holds" if abs(ours - published) <= TOLERANCE else "**fails**"
        rows.append([name, f"{published:.1f}", f"{ours:.2f}", f"{ours - published:+.2f}", verdict])
    columns = ["test set", "published nDCG@10 x 100", "ours", "difference", f"within {TOLERANCE}"]
    write_section("base-quality", "The base alone, own corpus, exact search", markdown_table(columns, rows))


if __name__ == "__main__":
    main()
