"""The commands that ask an index."""

from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Annotated, Any

import tyro

from moeret.cli.arguments import Domains
from moeret.config import Precision, RouteMode, require
from moeret.data.beir import parse_domains
from moeret.errors import ConfigError
from moeret.terminal import OUT, print_json, shown_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Search an index: the router picks the experts; their indexes give one ranked list."""

    index: tyro.conf.Positional[Path]
    """Index directory."""
    query: tyro.conf.Positional[str]
    """What to look for."""
    more: tyro.conf.Positional[tuple[str, ...]] = ()
    """Its further words, where it is not in quotes."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many hits."""
    experts: str | None = None
    """At most this many experts, or `all` to search every index; unless given, as the router decides."""
    route: str = "auto"
    """auto: the router decides. all: so too, but every index is searched. base, shared or an expert's name: by that alone."""
    where: str | None = None
    """Only documents whose metadata fulfil this JSON, for example '{"lang": "en", "year": {"gte": 2020}}'."""
    hybrid: bool = True
    """Whether words (BM25) and memories count beside the cosine, as training chose for each expert."""
    json: bool = False
    """Print hits and route as JSON."""

    def run(self) -> None:
        from moeret.retrieval.search import Retriever

        require(
            self.experts is None or self.route in ("auto", "all"), f"--experts does not go with --route {self.route}"
        )
        route, experts = ("all", None) if self.experts == "all" else (self.route, _whole(self.experts))
        where = None if self.where is None else _filter(self.where)
        query, retriever = " ".join([self.query, *self.more]), Retriever.load(self.index, hybrid=self.hybrid)
        found = retriever.rank([query], self.k, route=route, experts=experts, where=where)
        [hits], [routed] = retriever.hits(found), found.routes or [None]
        if self.json:
            fields = ("rank", "id", "score", "expert", "domain", "title", "text", "metadata")
            print_json(
                {
                    "query": query,
                    "experts": routed and routed.experts,
                    "abstained": routed and routed.abstained,
                    "hits": [{name: getattr(hit, name) for name in fields} for hit in hits],
                }
            )
            return
        if routed:
            _print_route(routed)
        if not hits:
            OUT.print(
                "nothing found" + ("" if where is None else f": {_why_none(retriever, query, where)}"), markup=False
            )
        for hit in hits:
            title = f"{shown_line(hit.title, 100)}  " if hit.title else ""
            OUT.print(
                f"\n{hit.rank}. {hit.score:.3f}  {title}({hit.expert}/{shown_line(hit.id, 60)})",
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
    """What somebody would look for."""
    more: tyro.conf.Positional[tuple[str, ...]] = ()
    """Its further words, where it is not in quotes."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        from moeret.retrieval.search import Retriever

        query = " ".join([self.query, *self.more])
        route = Retriever.load(self.index).route([query])[0]
        if self.json:
            print_json(
                {
                    "query": query,
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
    hybrid: bool = True
    """Whether words (BM25) and memories count beside the cosine, as training chose for each expert."""
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
            Retriever.load(self.index, precision=self.precision, hybrid=self.hybrid),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Write one HTML file that shows what a model learned and how its index does: pictures first, numbers beneath."""

    model: tyro.conf.Positional[Path]
    """Model directory, with its folder training."""
    index: tyro.conf.Positional[Path]
    """Index that was built with it."""
    domain: Domains
    """NAME=BEIR_DIR of each domain to take queries from."""
    out: Path = Path("report.html")
    """File to write."""
    split: str = "test"
    """Which qrels to score on."""
    json: bool = False
    """Print where it is as JSON."""

    def run(self) -> None:
        from moeret.evaluation.report import write_report

        domains = parse_domains([item for group in self.domain for item in group])
        shown = not self.json
        out = write_report(self.model, self.index, domains, self.out, split=self.split, show_progress_bar=shown)
        if self.json:
            print_json({"report": str(out)})
        else:
            OUT.print(f"{out}", markup=False)


def _why_none(retriever: Any, query: str, where: dict[str, Any]) -> str:
    """Why no document fulfils a filter."""
    unknown = [field for field in where if not retriever.search(query, 1, where={field: {"exists": True}})]
    return f"no document has the field {', '.join(unknown)}" if unknown else "no document fulfils the filter"


def _whole(text: str | None) -> int | None:
    require(text is None or text.isdecimal(), f"--experts must be a whole number or all, got {text!r}")
    return None if text is None else int(text)


def _filter(text: str) -> dict[str, Any]:
    try:
        where = loads(text)
    except ValueError as error:
        raise ConfigError(f"--where must be JSON ({error}), got {text!r}") from None
    require(isinstance(where, dict), f"--where must be a JSON object, got {text!r}")
    return where


def _print_route(route: Any) -> None:
    used = ", ".join(f"{name} {weight:.0%}" for name, weight in route.experts.items())
    OUT.print(f"experts: {used or 'none; the router abstains to the base'}", markup=False)
