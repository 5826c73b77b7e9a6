"""What the service counts and times, for Prometheus."""

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STAGES = ("wait", "embed", "search", "fetch")
"""What a search's time goes to: waiting for the batch before it, embedding and routing, the indexes, reading the hits' texts."""
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Measures:
    """The counters of one service."""

    def __init__(self):
        self._registry = CollectorRegistry()
        own = {"registry": self._registry, "namespace": "moeret"}
        self._requests = Counter("requests", "Requests by path and status.", ("path", "status"), **own)
        self._seconds = Histogram("request_seconds", "Of a request, whole.", ("path",), buckets=_SECONDS, **own)
        self._stages = Histogram("stage_seconds", "Of a query in each stage.", ("stage",), buckets=_SECONDS, **own)
        self._batches = Histogram(
            "batch_queries", "Queries that were searched together.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256), **own
        )
        self._routed = Counter("routed", "Queries that used an expert.", ("expert",), **own)
        self._abstentions = Counter("abstentions", "Queries for which the router abstained.", **own)
        self.waiting = Gauge("waiting", "Queries that wait now.", **own)
        self._documents = Gauge("documents", "Documents of each expert's index.", ("expert",), **own)
        self._snapshot = Gauge("snapshot", "Number of the snapshot that is searched.", **own)
        for stage in STAGES:
            self._stages.labels(stage)

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def batch(self, waited: Iterable[float]) -> None:
        """Queries are taken up together, which have waited so long."""
        waited = [*waited]
        self._batches.observe(len(waited))
        for seconds in waited:
            self._stages.labels("wait").observe(seconds)

    def stages(self, seconds: Mapping[str, float], queries: int) -> None:
        """So many queries went through these stages together."""
        for stage, own in seconds.items():
            for _ in range(queries):
                self._stages.labels(stage).observe(own)

    def routed(self, experts: Iterable[str], abstained: bool) -> None:
        """The router chose these for a query."""
        for name in experts:
            self._routed.labels(name).inc()
        if abstained:
            self._abstentions.inc()

    def snapshot(self, number: int, documents: Mapping[str, int]) -> None:
        """A snapshot is searched from now on."""
        self._snapshot.set(number)
        self._documents.clear()
        for name, count in documents.items():
            self._documents.labels(name).set(count)

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
