"""The command line: a thin shell over the library. Flags are the fields of these classes and of moeret.config's."""

import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro
from safetensors import SafetensorError

from moeret.config import DEFAULT_BASE, IndexConfig, Precision, RouteMode, TrainConfig, require
from moeret.data.beir import parse_domains
from moeret.errors import MoeretError
from moeret.terminal import OUT, complain, fail, print_json, shown_line

Domains = tyro.conf.UseAppendAction[list[tuple[str, ...]]]
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quickstart:
    """Train, index, evaluate and search the documentation of the Python libraries on this machine: the tutorial.

    Needs nothing but the base encoder, and a few minutes. Run again, it goes on where it was cut off.
    """

    out: Path = Path("quickstart")
    """Directory for corpora, model and index."""

    def run(self) -> None:
        from moeret.quickstart import quickstart

        quickstart(self.out, OUT, show_progress_bar=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Train one expert per domain and a router, and publish them as a model directory.

    Interrupted, it loses at most the steps since the last checkpoint: the same command goes on. Only the train and dev
    splits are read; without a dev split a tenth of train is set aside.

    Example: moeret train --domain law=data/law --domain jobs=data/jobs --out model
    """

    domain: Domains
    """NAME=BEIR_DIR of each domain."""
    out: Path
    """Model directory to make; checkpoints and metrics.jsonl lie in its folder training."""
    base: str = DEFAULT_BASE
    """Base encoder: a local folder or a hub id."""
    distributed: str | None = None
    """One of several processes that train together: auto (TPU pods, Slurm, Open MPI), or HOST:PORT,PROCESS/PROCESSES."""
    model_devices: int = 1
    """Devices that hold the base together, where it does not fit one."""
    config: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.processes import is_first, join
        from moeret.training.run import train

        domains = parse_domains([item for group in self.domain for item in group])
        join(self.distributed)
        shown = is_first() and not self.json
        how = {"config": self.config, "model_devices": self.model_devices, "show_progress_bar": shown}
        published = train(domains, self.out, base=self.base, **how)
        if is_first():
            _print_experts(published.meta, self.json)
        if shown:
            OUT.print(f"Model: {self.out}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsList:
    """Show the experts of a model: how they did on dev, and on how much data."""

    model: tyro.conf.Positional[Path]
    """Model directory."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        from moeret import artifact

        _print_experts(artifact.read(self.model, "model").meta, self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsAdd:
    """Train experts for new domains and add them to a model. The other experts' files do not change by a byte.

    Indexes know the model they were built with: build the index anew afterwards.
    """

    model: tyro.conf.Positional[Path]
    """Model directory."""
    domain: Domains
    """NAME=BEIR_DIR of each new domain."""
    label_free: bool = False
    """Nobody has judged queries: make them from the titles and texts of corpus.jsonl, which then is all that is read."""
    config: Annotated[tyro.conf.OmitSubcommandPrefixes[TrainConfig], Flat] = field(default_factory=TrainConfig)
    json: bool = False
    """Print the model's experts as JSON."""

    def run(self) -> None:
        from moeret.training.prepare import read_domains
        from moeret.training.run import add_expert

        domains = parse_domains([item for group in self.domain for item in group])
        require(bool(domains), "there is no domain to add; give at least one --domain NAME=BEIR_DIR")
        read_domains(domains, label_free=self.label_free)  # all are fit before the first is trained
        for name, path in domains.items():
            options = {"label_free": self.label_free, "show_progress_bar": not self.json}
            published = add_expert(self.model, name, path, config=self.config, **options)
        _print_experts(published.meta, self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsRemove:
    """Take an expert out of a model. The other experts' files do not change by a byte."""

    model: tyro.conf.Positional[Path]
    """Model directory."""
    name: tyro.conf.Positional[str]
    """The expert's name."""
    json: bool = False
    """Print the remaining experts as JSON."""

    def run(self) -> None:
        from moeret.training.run import remove_expert

        _print_experts(remove_expert(self.model, self.name).meta, self.json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """List, add or remove the experts of a model."""

    command: (
        Annotated[ExpertsList, tyro.conf.subcommand("list")]
        | Annotated[ExpertsAdd, tyro.conf.subcommand("add")]
        | Annotated[ExpertsRemove, tyro.conf.subcommand("remove")]
    )

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Build an index: every domain's documents for its expert, other documents for the base and for the experts they suit.

    A job that was cut off goes on when the same command is given again.

    Example: moeret index model --domain law=data/law --domain jobs=data/jobs --corpus more.jsonl --out index
    """

    model: tyro.conf.Positional[Path]
    """Model directory."""
    out: Path
    """Index directory to make."""
    domain: Domains = field(default_factory=list)
    """NAME=BEIR_DIR of each domain; NAME is an expert of the model."""
    corpus: tyro.conf.UseAppendAction[list[tuple[Path, ...]]] = field(default_factory=list)
    """JSONL files of documents without a domain; they go to the base's own index, those like a domain's to its expert's too."""
    overwrite: bool = False
    """Replace an index at --out that was made from other things; readers see the old one until the new one is whole."""
    config: Annotated[IndexConfig, Flat] = field(default_factory=IndexConfig)
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        from moeret.evaluation.tables import index_table
        from moeret.retrieval.build import build_index

        domains = parse_domains([item for group in self.domain for item in group])
        corpora = [path for group in self.corpus for path in group]
        meta = build_index(
            self.model,
            self.out,
            domains,
            corpora,
            config=self.config,
            overwrite=self.overwrite,
            show_progress_bar=not self.json,
        ).meta
        if self.json:
            print_json({"documents": meta["documents"]["count"], "experts": meta["experts"]})
            return
        OUT.print(index_table(meta))
        OUT.print(f"Index: {self.out}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Search an index: the router picks the experts; their indexes give one ranked list."""

    index: tyro.conf.Positional[Path]
    """Index directory."""
    query: tyro.conf.Positional[str]
    """What to look for."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many hits."""
    experts: str | None = None
    """At most this many experts, or `all` to search every index; unless given, as the router decides."""
    json: bool = False
    """Print hits and route as JSON."""

    def run(self) -> None:
        from moeret.retrieval.search import Retriever

        route, experts = ("all", None) if self.experts == "all" else ("auto", _whole(self.experts))
        found = (retriever := Retriever.load(self.index)).rank([self.query], self.k, route=route, experts=experts)
        [hits], [routed] = retriever.hits(found), found.routes
        if self.json:
            fields = ("rank", "id", "score", "expert", "title", "text")
            print_json(
                {
                    "query": self.query,
                    "experts": routed.experts,
                    "abstained": routed.abstained,
                    "hits": [{name: getattr(hit, name) for name in fields} for hit in hits],
                }
            )
            return
        _print_route(routed)
        for hit in hits:
            OUT.print(
                f"\n{hit.rank}. {hit.score:.3f}  {shown_line(hit.title or hit.id, 100)}  ({hit.expert}/{shown_line(hit.id, 60)})",
                markup=False,
                style="bold",
            )
            OUT.print(f"   {shown_line(hit.text, 240)}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Show which experts a query would use, and how probable each is."""

    index: tyro.conf.Positional[Path]
    """Index directory."""
    query: tyro.conf.Positional[str]
    """The query."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        from moeret.retrieval.search import Retriever

        route = Retriever.load(self.index).route([self.query])[0]
        if self.json:
            print_json(
                {
                    "query": self.query,
                    "probabilities": route.probabilities,
                    "experts": route.experts,
                    "abstained": route.abstained,
                }
            )
            return
        _print_route(route)
        for name, probability in sorted(route.probabilities.items(), key=lambda item: -item[1]):
            OUT.print(f"  {name:<24} {probability:7.2%}  {'█' * round(30 * probability)}", markup=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """Score an index on the pooled benchmark: unlabelled queries of all domains against all documents.

    Prints nDCG@10 and R@100 by domain, how often the router was right, and how much of the index a query touched.
    """

    index: tyro.conf.Positional[Path]
    """Index directory."""
    domain: Domains
    """NAME=BEIR_DIR of each domain to take queries from."""
    split: str = "test"
    """Which qrels to score on."""
    route: RouteMode = "auto"
    """auto: the router decides. oracle: each query's own domain is known. base: without experts, everywhere. all: the
    router's experts, everywhere."""
    baselines: bool = False
    """Also score BM25 over the pool, the base in one HNSW over the pool, and the oracle."""
    precision: Precision = "float32"
    """Of the products that embed queries; bfloat16 is faster where the processor multiplies it."""
    run_file: Annotated[Path | None, tyro.conf.arg(name="run", metavar="FILE.trec")] = None
    """Write the route's hits as a TREC run."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> None:
        from moeret.evaluation.benchmark import evaluate
        from moeret.evaluation.tables import report_tables
        from moeret.retrieval.search import Retriever

        domains = parse_domains([item for group in self.domain for item in group])
        report = evaluate(
            Retriever.load(self.index, precision=self.precision),
            domains,
            split=self.split,
            route=self.route,
            baselines=self.baselines,
            run_file=self.run_file,
            show_progress_bar=not self.json,
        )
        if self.json:
            print_json(report)
        else:
            for table in report_tables(report):
                OUT.print(table)


Command = (
    Annotated[Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Experts, tyro.conf.subcommand("experts")]
    | Annotated[Index, tyro.conf.subcommand("index")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Route, tyro.conf.subcommand("route")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
)


def main() -> None:
    """Runs one command. Exit code 0 only on success; 1 for errors, 2 for wrong usage, 130 for an interrupt."""
    if sys.argv[1:] == ["--version"]:
        OUT.print(f"moeret {version('moeret')}")
        return
    command = None
    try:
        command = tyro.cli(
            Command,
            prog="moeret",
            description="Mixture-of-experts routed retrieval.",
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        command.run()
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MoeretError as error:
        fail(str(error))
    except SafetensorError as error:  # the safetensors library's own word for a disk that is full
        fail(f"{error}; what was published is whole")
    except OSError as error:
        place = error.filename2 or error.filename
        fail(f"{error.strerror or error}{f': {place}' if place else ''}; what was published is whole")
    except KeyboardInterrupt:
        resumable = isinstance(getattr(command, "command", command), Quickstart | Train | Index | ExpertsAdd)
        complain("interrupted" + ("; the same command goes on from where it was saved last" if resumable else ""))
        sys.exit(130)


def _whole(text: str | None) -> int | None:
    require(text is None or text.isdecimal(), f"--experts must be a whole number or all, got {text!r}")
    return None if text is None else int(text)


def _print_route(route: Any) -> None:
    used = ", ".join(f"{name} {weight:.0%}" for name, weight in route.experts.items())
    OUT.print(f"experts: {used or 'none; the router abstains to the base'}", markup=False)


def _print_experts(meta: dict[str, Any], as_json: bool) -> None:
    keys = (
        "name", "documents", "train_queries", "base_dev_ndcg", "dev_ndcg", "step", "strength", "shared_strength", "blend",
        "own_index_dev_ndcg",
    )  # fmt: skip
    rows = [{key: entry[key] for key in keys} for entry in meta["experts"]]
    router = meta["router"]
    if as_json:
        print_json(
            {
                "base": meta["base"]["name"],
                "tower": meta["tower"],
                "shared": meta["shared"],
                "experts": rows,
                "router": {key: router[key] for key in ("query", "document", "report")},
            }
        )
        return
    from moeret.evaluation.tables import model_tables

    for part in model_tables(meta):
        OUT.print(part, markup=False)


if __name__ == "__main__":
    main()
