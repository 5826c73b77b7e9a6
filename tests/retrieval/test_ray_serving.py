"""Served on Ray, an index answers as it does in one process, whoever dies and whatever is published. Needs the extra `ray`."""

import contextlib
import os
import signal
import threading

import pytest
from conftest import QUERIES, write_jsonl

import moeret
from moeret.config import IndexConfig
from moeret.retrieval.build import build_index
from moeret.retrieval.update import update_index

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
serve = pytest.importorskip("ray.serve")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module")
def index(tmp_path_factory, model_folder, two_domains):
    """An index in several segments, with documents without a domain and metadata."""
    root = tmp_path_factory.mktemp("served")
    rows = [{"_id": f"l{n}", "text": f"the rhine {n} and apple", "metadata": {"part": n % 4}} for n in range(30)]
    write_jsonl(root / "loose.jsonl", rows)
    config = IndexConfig(shard_documents=4, segment_documents=8, exact_below=6)
    build_index(model_folder, root / "index", two_domains, [root / "loose.jsonl"], config=config)
    update_index(root / "index", delete={"": ["l3"], "fruit": ["d1"]})
    return root / "index"


@pytest.fixture(scope="module")
def served(index):
    from moeret.retrieval.ray_serving import serve_index

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield serve_index(index, routers=1, replicas={"fruit": 2}, router_cpus=0.5, reload_seconds=0)
    serve.shutdown()
    ray.shutdown()


def assert_same(served, index, queries, k=7, **options):
    """The served hits are those of a Retriever here."""
    here = moeret.Retriever.load(index)
    expected = here.search_batch(queries, k, **options)
    found = served.search_batch.remote(queries, k, **options).result()
    here.close()
    for mine, theirs in zip(found, expected, strict=True):
        assert [hit.id for hit in mine] == [hit.id for hit in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-5)
            assert (one.text, one.expert, one.domain, one.metadata) == (
                other.text, other.expert, other.domain, other.metadata,
            )  # fmt: skip


@pytest.mark.parametrize("options", [
    {}, {"route": "all"}, {"route": "base"}, {"route": "fruit"}, {"fusion": "rrf"}, {"where": {"part": {"gte": 2}}},
])  # fmt: skip
def test_hits_are_those_of_one_process(served, index, options):
    assert_same(served, index, QUERIES, **options)


def test_one_query_gives_the_same_hits(served, index):
    hits = served.search.remote(QUERIES[0], 3).result()
    assert [hit.id for hit in hits] == [hit.id for hit in moeret.Retriever.load(index).search(QUERIES[0], 3)]
    with pytest.raises(moeret.ConfigError, match="k must be"):
        served.search.remote(QUERIES[0], 0).result()


def test_queries_that_arrive_together_get_their_own_hits(served, index):
    here = moeret.Retriever.load(index)
    wheres = [None, {"part": {"gte": 2}}, {"part": 1}]
    asked = [(query, where, served.search.remote(query, 5, where=where)) for query in QUERIES * 3 for where in wheres]
    for query, where, found in asked:
        assert [hit.id for hit in found.result()] == [hit.id for hit in here.search(query, 5, where=where)]
    here.close()
    with pytest.raises(moeret.ConfigError, match="above"):
        served.search.remote(QUERIES[0], where={"part": {"above": 1}}).result()


def test_a_query_asks_its_experts_alone(index):
    from moeret.retrieval.ray_serving import OnServe, Replica

    asked = []

    class Handle:
        """What Serve's handles are to a router, in this process."""

        def __init__(self, name):
            self._replica, self._name, self.ask = Replica(str(index), name), name, self

        def remote(self, *arguments):
            asked.append(self._name)
            self._found = self._replica._ask(arguments[0], arguments[1], arguments[2:])
            return self

        def result(self):
            return self._found

    here = moeret.Retriever.load(index)
    router = moeret.Retriever.of(OnServe({name: Handle(name) for name in ("base", "fruit", "metal")}), index)
    for query in QUERIES:
        asked.clear()
        found = router.rank([query])
        assert {*asked} == {*found.indexes[0]} == {*here.rank([query]).indexes[0]}
    assert len(found.indexes[0]) < 3
    assert (router.vectors() == here.vectors()).all() and router.held() == here.held()
    here.close()


def test_replicas_and_routers_that_die_are_replaced(served, index):
    assert_same(served, index, QUERIES)
    for name in ("expert-", "router"):
        victims = [pid for pid, title in titles() if f"ServeReplica:moeret:{name}" in title]
        assert victims
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        if name == "router":  # whoever asks a router asks again
            wait_for(served)
        assert_same(served, index, QUERIES)


def titles():
    """Every process and what it is called."""
    return [(own.pid, " ".join(own.info["cmdline"] or [])) for own in psutil.process_iter(["cmdline"])]


def wait_for(served):
    """Until a router answers."""
    for _ in range(100):
        with contextlib.suppress(ray.exceptions.RayActorError):
            return served.search.remote(QUERIES[0]).result()
    raise AssertionError("no router answers")


def test_what_is_published_is_found_after_a_reload_and_no_query_is_lost(tmp_path, served, index):
    stop, errors, count = threading.Event(), [], [0]

    def ask():
        while not stop.is_set():
            try:
                assert served.search.remote(QUERIES[0], 3).result()
                count[0] += 1
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(6):  # more than an index keeps and a replica has open
        write_jsonl(tmp_path / "new.jsonl", [{"_id": f"n{number}", "text": f"the river nile {number}"}])
        update_index(index, corpora=[tmp_path / "new.jsonl"], delete={"": [f"l{10 + number}"]})
        if number % 2:
            assert served.reload.remote().result()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == [] and count[0] > 0
    assert_same(served, index, [*QUERIES, "the river nile 5"], k=40, route="all")


def test_what_makes_no_sense_is_refused(index, tmp_path):
    from moeret.retrieval.ray_serving import serve_index

    with pytest.raises(moeret.ConfigError, match="no expert 'pear'"):
        serve_index(index, replicas={"pear": 1})
    with pytest.raises(moeret.ConfigError, match="at least one router"):
        serve_index(index, routers=0)
    with pytest.raises(moeret.ArtifactError, match="no index at"):
        serve_index(tmp_path / "nothing")
