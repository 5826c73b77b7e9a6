"""The commands that make, change and check indexes."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from moeret.cli.arguments import Domains, Flat
from moeret.config import EngineName, IndexConfig, OnError, require
from moeret.data.beir import parse_deletions, parse_domains
from moeret.terminal import OUT, complain, print_json

IndexFolder = tyro.conf.Positional[Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Build an index: every domain's documents for its expert, other documents for the base and for the experts they suit.

    Files are JSONL, gzip of it (.gz) or Parquet (.parquet). A job that was cut off goes on when the same command is given
    again. With --update it changes an index instead, which may be searched all the while.

    Example: moeret index model --domain law=data/law --domain jobs=data/jobs --corpus more.jsonl --out index
    """

    model: tyro.conf.Positional[Path]
    """Model directory."""
    out: Path
    """Index directory to make, or to change."""
    domain: Domains = field(default_factory=list)
    """NAME=BEIR_DIR of each domain; NAME is an expert of the model."""
    corpus: tyro.conf.UseAppendAction[list[tuple[Path, ...]]] = field(default_factory=list)
    """Files of documents without a domain; they go to the base's own index, those like a domain's to its expert's too."""
    update: bool = False
    """Add these documents to the index at --out, or replace those of the same ids; what is as before is not embedded again."""
    delete: tyro.conf.UseAppendAction[list[tuple[str, ...]]] = field(default_factory=list)
    """With --update: NAME=FILE.jsonl of {"_id": ...} lines, a domain's documents to delete; FILE.jsonl: those without a domain."""
    on_error: OnError = "stop"
    """What a document that cannot be used does: stop everything before it begins, or be skipped and listed in skipped.jsonl."""
    engine: EngineName = "local"
    """local: this process. ray: the cluster that RAY_ADDRESS names, or one started here, an actor for each GPU or core."""
    dry_run: bool = False
    """Only say what it would cost, told from a sample."""
    overwrite: bool = False
    """Replace an index at --out that was made from other things; readers see the old one until the new one is whole."""
    config: Annotated[IndexConfig, Flat] = field(default_factory=IndexConfig)
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        domains = parse_domains([item for group in self.domain for item in group])
        corpora = [path for group in self.corpus for path in group]
        deletions = [item for group in self.delete for item in group]
        require(self.update or not deletions, "--delete needs --update: a new index has nothing to delete")
        require(
            not (self.update and (self.overwrite or self.dry_run)),
            "--update goes with neither --overwrite nor --dry-run",
        )
        if self.dry_run:
            self._estimate(domains, corpora)
        elif self.update:
            self._update(domains, corpora, parse_deletions(deletions))
        else:
            self._build(domains, corpora)

    def _estimate(self, domains: dict[str, Path], corpora: list[Path]) -> None:
        from moeret.retrieval.estimate import estimate_index

        cost = estimate_index(self.model, domains, corpora, config=self.config, on_error=self.on_error)
        if self.json:
            print_json(cost)
            return
        OUT.print(
            f"{cost['documents']:,} documents ({cost['skipped']:,} skipped) of {cost['tokens']:,} tokens, in {cost['shards']:,} "
            f"shards\nabout {_duration(cost['seconds'])}: {_duration(cost['encode_seconds'])} to embed, "
            f"{_duration(cost['link_seconds'])} to link\nabout {_size(cost['bytes'])} on disk, twice that while it runs"
        )

    def _update(self, domains: dict[str, Path], corpora: list[Path], deletions: dict[str, list[str]]) -> None:
        from moeret.evaluation.tables import index_table
        from moeret.retrieval.update import update_index

        require(
            self.config == IndexConfig(),
            "an update keeps the index's settings; leave them out, or build the index anew",
        )
        how = {
            "model": self.model,
            "on_error": self.on_error,
            "engine": self.engine,
            "show_progress_bar": not self.json,
        }
        done = update_index(self.out, domains, corpora, deletions, **how)
        counts = {key: getattr(done, key) for key in ("added", "replaced", "deleted", "unchanged", "unknown")}
        if self.json:
            print_json({**counts, **_about(done.published)})
            return
        OUT.print(index_table(done.published.meta))
        if done.unknown:
            hint = "; those of an expert are deleted by --delete NAME=FILE" if "" in deletions else ""
            complain(f"{done.unknown} of the documents to delete are not in the index{hint}")
        OUT.print(", ".join(f"{count} {key}" for key, count in counts.items() if key != "unknown"))
        OUT.print(f"Index: {self.out}, snapshot {done.published.snapshot}", markup=False)

    def _build(self, domains: dict[str, Path], corpora: list[Path]) -> None:
        from moeret.retrieval.build import build_index

        how = {"config": self.config, "on_error": self.on_error, "engine": self.engine, "overwrite": self.overwrite}
        _print_index(
            build_index(self.model, self.out, domains, corpora, show_progress_bar=not self.json, **how), self.json
        )
        skipped = self.out / "skipped.jsonl"
        if skipped.is_file():
            with skipped.open("rb") as lines:
                complain(f"{sum(1 for _ in lines)} documents were skipped; {skipped} says which and why")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compact:
    """Join an index's segments, and forget the documents that were deleted. It may be searched all the while."""

    index: IndexFolder
    """Index directory."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.retrieval.update import compact_index

        _print_index(compact_index(self.index, show_progress_bar=not self.json), self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollback:
    """Publish an earlier snapshot of an index again; the present one stays among the earlier ones."""

    index: IndexFolder
    """Index directory."""
    to: int | None = None
    """Number of the snapshot; unless given, the last one before the present."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.retrieval.update import rollback_index

        _print_index(rollback_index(self.index, self.to), self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Check every file and count of an index, and measure how well its graphs find. Exit code 1 if something is wrong."""

    index: IndexFolder
    """Index directory."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> None:
        from moeret.evaluation.tables import verify_table
        from moeret.retrieval.verify import verify_index

        report = verify_index(self.index)
        if self.json:
            print_json(report)
        else:
            OUT.print(verify_table(report))
            OUT.print(
                f"{self.index}, snapshot {report['snapshot']}: {'damaged' if report['problems'] else 'whole'}",
                markup=False,
            )
        for problem in report["problems"]:
            complain(problem)
        if report["problems"]:
            sys.exit(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Write an index for those who search, or an expert for those who embed, with something else."""

    source: tyro.conf.Positional[Path]
    """Index directory; for the formats of an expert a model's."""
    out: Path
    """Folder to make."""
    to: Annotated[
        Literal["parquet", "hnswlib", "sentence-transformers", "peft"], tyro.conf.arg(aliases=["--format"])
    ] = "parquet"
    """Of an index, parquet: vectors, ids and metadata, a file for each expert; hnswlib: a graph for each expert and the documents
    of its labels. Of an expert, sentence-transformers: merged with the base; peft: a LoRA adapter."""
    expert: str | None = None
    """The expert, or `shared`."""
    json: bool = False
    """Print what routing.json says, or where the expert is."""

    def run(self) -> None:
        if self.to in ("sentence-transformers", "peft"):
            self._export_expert()
            return
        from moeret.retrieval.export import export_index

        require(self.expert is None, f"--expert goes with --to sentence-transformers or peft, not with {self.to}")
        table = export_index(self.source, self.out, self.to)
        if self.json:
            print_json(table)
            return
        for own in table["experts"]:
            OUT.print(f"{self.out / own['file']}  {own['documents']:,} documents", markup=False)
        OUT.print(f"{self.out / 'routing.json'}", markup=False)

    def _export_expert(self) -> None:
        from moeret.models.portable import export_expert

        require(self.expert is not None, f"--to {self.to} wants --expert NAME")
        out = export_expert(self.source, self.expert, self.out, self.to)
        if self.json:
            print_json({"expert": self.expert, "format": self.to, "out": str(out)})
        else:
            OUT.print(f"{out}", markup=False)


def _print_index(published: Any, as_json: bool) -> None:
    from moeret.evaluation.tables import index_table

    if as_json:
        print_json(_about(published))
        return
    OUT.print(index_table(published.meta))
    OUT.print(f"Index: {published.root}, snapshot {published.snapshot}", markup=False)


def _about(published: Any) -> dict[str, Any]:
    meta = published.meta
    return {"snapshot": published.snapshot, "documents": meta["documents"]["count"], "experts": meta["experts"]}


def _duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _size(count: float) -> str:
    """Bytes in the unit that people would use."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e6:.1f} MB"
