"""Whatever is added, replaced, deleted, joined, rolled back or cut off: an index holds what a dictionary would."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conftest import TOPICS, place_by_router, write_jsonl
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import moeret
from moeret import artifact
from moeret.config import IndexConfig
from moeret.models.model import Model
from moeret.retrieval import job, snapshot, update
from moeret.retrieval.build import build_index
from moeret.retrieval.update import compact_index, rollback_index, update_index

SMALL = IndexConfig(shard_documents=3, segment_documents=9, exact_below=3, snapshots=2)
WORDS = [word for topic in TOPICS.values() for word in topic]


@pytest.fixture
def index(tmp_path, index_folder) -> Path:
    """A copy of the shared index, to be changed."""
    shutil.copytree(index_folder, tmp_path / "index")
    return tmp_path / "index"


def documents_of(path: Path, texts: dict[str, str], **metadata) -> Path:
    write_jsonl(path, [{"_id": id, "text": text, "metadata": metadata} for id, text in texts.items()])
    return path


def domain_of(folder: Path, texts: dict[str, str]) -> Path:
    documents_of(folder / "corpus.jsonl", texts)
    return folder


def held(index: Path) -> dict[tuple[str, str], str]:
    """(domain, id) -> text of everything that a search can find."""
    retriever = moeret.Retriever.load(index)
    hits = retriever.search("find the apple", k=10_000, route="all")
    retriever.close()
    assert len({(hit.domain, hit.id) for hit in hits}) == len(hits)
    return {(hit.domain, hit.id): hit.text for hit in hits}


def test_documents_are_added_replaced_and_deleted_in_one_snapshot(tmp_path, index):
    before = held(index)
    fruit = domain_of(tmp_path / "fruit", {"d0": "another apple", "new": "a new plum"})
    loose = documents_of(tmp_path / "loose.jsonl", {"d1": "the rhine"})
    gone = {"metal": ["d2", "nobody"], "": ["nobody"]}
    done = update_index(index, {"fruit": fruit}, [loose], gone)
    assert (done.added, done.replaced, done.deleted, done.unchanged, done.unknown) == (2, 1, 1, 0, 2)
    assert done.published.snapshot == 2
    expected = before | {("fruit", "d0"): "another apple", ("fruit", "new"): "a new plum", ("", "d1"): "the rhine"}
    del expected["metal", "d2"]
    assert held(index) == expected
    assert done.published.meta["documents"]["count"] == len(expected)


def test_the_same_update_again_finds_nothing_to_do(tmp_path, index):
    fruit = domain_of(tmp_path / "fruit", {"d0": "another apple"})
    first = update_index(index, {"fruit": fruit}, delete={"metal": ["d2"]})
    again = update_index(index, {"fruit": fruit}, delete={"metal": ["d2"]})
    assert (again.added, again.replaced, again.deleted, again.unchanged, again.unknown) == (0, 0, 0, 1, 1)
    assert again.published.snapshot == first.published.snapshot == 2


def test_a_whole_corpus_given_again_embeds_what_changed_alone(tmp_path, monkeypatch, index, two_domains):
    embedded = []
    usual = Model.with_prompt
    monkeypatch.setattr(
        Model, "with_prompt", lambda self, texts, kind: embedded.extend(texts) or usual(self, texts, kind)
    )
    rows = [json.loads(line) for line in (two_domains["fruit"] / "corpus.jsonl").read_text().splitlines()]
    rows[3]["text"] = "changed"
    write_jsonl(tmp_path / "fruit" / "corpus.jsonl", rows)
    done = update_index(index, {"fruit": tmp_path / "fruit"})
    assert (done.replaced, done.unchanged) == (1, 11)
    assert embedded == [f"{rows[3]['title']} changed"]


def test_metadata_alone_may_change(tmp_path, index):
    path = documents_of(tmp_path / "loose.jsonl", {"a": "the rhine"}, year=2020)
    update_index(index, corpora=[path])
    documents_of(path, {"a": "the rhine"}, year=2021)
    assert update_index(index, corpora=[path]).replaced == 1
    [hit] = moeret.Retriever.load(index).search("the rhine", where={"year": {"exists": True}})
    assert hit.metadata == {"year": 2021}


def test_a_document_that_is_deleted_and_given_is_replaced(tmp_path, index):
    fruit = domain_of(tmp_path / "fruit", {"d0": "another apple"})
    done = update_index(index, {"fruit": fruit}, delete={"fruit": ["d0"]})
    assert (done.added, done.replaced, done.deleted, done.unknown) == (0, 1, 0, 0)
    assert held(index)["fruit", "d0"] == "another apple"


def test_an_updated_index_scores_as_one_built_of_the_same_documents(
    tmp_path, monkeypatch, index, model_folder, two_domains
):
    """Words and all: how rare a word is, is counted over what lives."""
    place_by_router(monkeypatch, 0.5)
    loose = documents_of(tmp_path / "loose.jsonl", {"a": "the rhine and the nile", "b": "iron zinc"})
    for name in ("fruit", "metal"):
        shutil.copytree(two_domains[name], tmp_path / name)
    rows = [json.loads(line) for line in (two_domains["fruit"] / "corpus.jsonl").read_text().splitlines()]
    write_jsonl(tmp_path / "fruit" / "corpus.jsonl", [rows[0] | {"text": "a long text on apple gold"}, *rows[2:]])
    change = domain_of(tmp_path / "change", {})
    write_jsonl(change / "corpus.jsonl", [rows[0] | {"text": "a long text on apple gold"}])
    update_index(index, {"fruit": change}, [loose], {"fruit": [rows[1]["_id"]]})
    build_index(model_folder, tmp_path / "anew", {name: tmp_path / name for name in ("fruit", "metal")}, [loose])
    for joined in (False, True):
        if joined:
            compact_index(index)
        one, other = moeret.Retriever.load(index), moeret.Retriever.load(tmp_path / "anew")
        for query in ("gold of the rhine", "apple", "find the metal nick3"):
            for route in ("all", "base"):
                found = [
                    {(h.domain, h.id): h.score for h in own.search(query, 50, route=route)} for own in (one, other)
                ]
                assert found[0].keys() == found[1].keys()
                np.testing.assert_allclose([found[0][key] for key in found[1]], [*found[1].values()], atol=1e-5)
        one.close(), other.close()


def test_joining_forgets_what_was_deleted_and_changes_no_result(tmp_path, index):
    for number in range(3):
        update_index(
            index,
            {"fruit": domain_of(tmp_path / "f", {f"n{number}": f"apple {number}"})},
            delete={"metal": [f"d{number}"]},
        )
    before, sizes = held(index), artifact.read(index, "index").meta["experts"]
    assert len(sizes["fruit"]["segments"]) == 4 and sizes["metal"]["segments"][0]["deleted"] == 3
    published = compact_index(index)
    for entry in published.meta["experts"].values():
        assert [(own["deleted"], own["tombstones"]) for own in entry["segments"]] == [(0, None)]
    assert held(index) == before
    assert compact_index(index).snapshot == published.snapshot
    assert {path.name for path in (index / "snapshots").iterdir()} == {f"00000{number}.json" for number in (2, 3, 4)}


def test_many_small_updates_leave_few_segments(tmp_path, index):
    for number in range(20):
        update_index(index, {"fruit": domain_of(tmp_path / "f", {f"n{number}": f"apple {number}"})})
    segments = artifact.read(index, "index").meta["experts"]["fruit"]["segments"]
    assert len(segments) <= 2 * update._TIER
    assert sum(own["documents"] for own in segments) == 32
    assert len(held(index)) == 24 + 20


def test_an_earlier_snapshot_comes_back_and_goes_again(tmp_path, index):
    first = held(index)
    update_index(index, delete={"fruit": ["d0"]})
    second = held(index)
    update_index(index, delete={"fruit": ["d1"]})
    assert rollback_index(index).snapshot == 4
    assert held(index) == second
    rollback_index(index, to=1)
    assert held(index) == first
    with pytest.raises(moeret.ConfigError, match=r"no earlier snapshot 1; it has 2, 3, 4"):
        rollback_index(index, to=1)


def test_there_is_nothing_to_go_back_to(index):
    with pytest.raises(moeret.ConfigError, match="keeps no earlier snapshot"):
        rollback_index(index)


def test_all_documents_may_go_and_come_again(tmp_path, index):
    ids = {name: [f"d{number}" for number in range(12)] for name in ("fruit", "metal")}
    assert update_index(index, delete=ids).deleted == 24
    retriever = moeret.Retriever.load(index)
    assert retriever.search("find the apple") == []
    assert retriever.rank(["find the apple"]).indexes == [()]
    assert retriever.route(["find the apple"])[0].probabilities
    update_index(index, corpora=[documents_of(tmp_path / "l.jsonl", {"a": "apple"})])
    assert retriever.reload() and [hit.id for hit in retriever.search("find the apple")] == ["a"]
    assert compact_index(index).meta["documents"]["count"] == 1


def test_what_cannot_be_changed_is_refused_before_anything_is_done(tmp_path, index, model_folder, both):
    before = artifact.read(index, "index")
    path = documents_of(tmp_path / "loose.jsonl", {"a": "x"})
    for arguments, reason in [
        ({}, "nothing to change"),
        ({"delete": {"fruit": []}}, "nothing to change"),
        ({"delete": {"river": ["d0"]}}, "cannot delete from domain river"),
        ({"delete": {"fruit": "d0"}}, "ids of domain 'fruit' must be a list of strings"),
        ({"delete": {"": [5]}}, "ids of domain '' must be a list of strings"),
        ({"domains": {"river": tmp_path}}, "no expert river"),
        ({"corpora": [path], "model": both.model.published.root}, "built with another model"),
    ]:
        with pytest.raises(moeret.ConfigError, match=reason):
            update_index(index, **arguments)
    with pytest.raises(moeret.DataError, match="is not there"):
        update_index(index, corpora=[tmp_path / "nowhere.jsonl"])
    with pytest.raises(moeret.DataError, match="an id of domain '' is not valid Unicode"):
        update_index(index, delete={"": ["\ud800"]})
    with pytest.raises(moeret.ArtifactError, match="no index at"):
        update_index(tmp_path / "nowhere", corpora=[path])
    with pytest.raises(moeret.ArtifactError, match="expected an index"):
        update_index(model_folder, corpora=[path])
    assert not (tmp_path / "nowhere").exists()
    update_index(index, corpora=[path], model=model_folder)
    assert artifact.read(index, "index").snapshot == before.snapshot + 1


def test_an_index_that_was_changed_is_not_taken_for_the_one_that_was_built(index, model_folder, two_domains):
    update_index(index, delete={"fruit": ["d0"]})
    with pytest.raises(
        moeret.ConfigError, match=r"other things \(1 updates since it was built\).*change it with --update, or"
    ):
        build_index(model_folder, index, two_domains)
    again = build_index(model_folder, index, two_domains, overwrite=True)
    assert len(held(index)) == 24 and not (index / "snapshots").exists()
    assert artifact.read(index, "index") == again


def test_a_reader_keeps_its_snapshot_until_it_reloads(tmp_path, index):
    retriever = moeret.Retriever.load(index)
    assert not retriever.reload()
    found = retriever.rank(["find the apple"], 50, route="all")
    for number in range(6):  # more than are kept
        update_index(index, {"fruit": domain_of(tmp_path / "f", {"d0": f"apple {number}"})})
    compact_index(index)
    assert {hit.text for hit in retriever.search("find the apple", 50, route="all")} == {
        hit.text for hit in retriever.hits(found)[0]
    }
    assert retriever.reload()
    assert "apple 5" in {hit.text for hit in retriever.search("find the apple", 50, route="all")}
    assert "apple 5" not in {hit.text for hit in retriever.hits(found)[0]}  # what was found then is fetched from then
    retriever.close()


def test_a_reload_reads_what_is_new_alone(tmp_path, monkeypatch, index):
    retriever = moeret.Retriever.load(index)
    update_index(index, {"fruit": domain_of(tmp_path / "f", {"new": "a new apple"})})
    read = []
    usual = artifact._check_file
    monkeypatch.setattr(artifact, "_check_file", lambda own, name, entry: read.append(name) or usual(own, name, entry))
    assert retriever.reload()
    assert read and all(name.startswith(("segments/fruit-", "sketches-", "words-")) for name in read)
    retriever.close()


class Interrupted(BaseException):
    """As if the process had been killed."""


class Changing(RuleBasedStateMachine):
    """An index beside a dictionary (domain, id) -> (text, year)."""

    model_folder: Path

    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="changing"))
        self.index, self.expected = self.root / "index", {}
        for number, word in enumerate(WORDS[:5]):
            self.expected["", str(number)] = (word, number % 2)
        write_jsonl(self.root / "loose.jsonl", self.rows(self.expected))
        build_index(self.model_folder, self.index, {}, [self.root / "loose.jsonl"], config=SMALL)
        self.retriever = moeret.Retriever.load(self.index)
        self.history = [dict(self.expected)]

    def teardown(self):
        self.retriever.close()
        shutil.rmtree(self.root)

    @staticmethod
    def rows(documents):
        return [
            {"_id": id, "text": text, "metadata": {"year": year}} for (_, id), (text, year) in sorted(documents.items())
        ]

    def publish(self, expected, run, crash):
        """Runs a change, killed at some write if `crash`; then again, as a user would."""
        before, usual = self.expected, artifact.sync
        if crash is not None:
            left = crash

            def dying(path):
                nonlocal left
                left -= 1
                if left < 0:
                    raise Interrupted
                usual(path)

            artifact.sync = dying
            try:
                run()
            except Interrupted:
                assert self.held() in (self.plain(before), self.plain(expected))
            finally:
                artifact.sync = usual
        run()
        self.expected = expected
        if expected != before:
            self.history.append(dict(expected))

    @staticmethod
    def plain(expected):
        return {key: text for key, (text, _) in expected.items()}

    def held(self):
        return held(self.index)

    @rule(
        given=st.dictionaries(
            st.tuples(st.sampled_from(["", "fruit", "metal"]), st.sampled_from("abcdefg0123")),
            st.tuples(st.sampled_from(WORDS), st.integers(0, 1)),
            max_size=5,
        ),
        gone=st.sets(st.tuples(st.sampled_from(["", "fruit", "metal"]), st.sampled_from("abcdefg0123")), max_size=3),
        crash=st.none() | st.integers(0, 60),
    )
    def change(self, given, gone, crash):
        if not given and not gone:
            return
        # A document of two domains that is the same in both is one hit: here each says whose it is.
        given = {(domain, id): (f"{word} {domain}", year) for (domain, id), (word, year) in given.items()}
        domains, corpora = {}, []
        for domain in sorted({own for own, _ in given}):
            folder = self.root / (domain or "loose")
            rows = self.rows({key: value for key, value in given.items() if key[0] == domain})
            write_jsonl(folder / "corpus.jsonl", rows)
            if domain:
                domains[domain] = folder
            else:
                corpora.append(folder / "corpus.jsonl")
        delete = {domain: [id for own, id in gone if own == domain] for domain in {own for own, _ in gone}}
        expected = {key: value for key, value in self.expected.items() if key not in gone} | given
        self.publish(expected, lambda: update_index(self.index, domains, corpora, delete), crash)

    @rule(crash=st.none() | st.integers(0, 60))
    def compact(self, crash):
        self.publish(self.expected, lambda: compact_index(self.index), crash)

    @precondition(lambda self: len(artifact.snapshots(self.index, "index")) > 1)
    @rule()
    def roll_back_and_forth(self):
        before = self.held()
        rollback_index(self.index)
        rollback_index(self.index)
        assert self.held() == before

    @rule(word=st.sampled_from(WORDS), year=st.integers(0, 2), k=st.integers(1, 12))
    def filtered(self, word, year, k):
        self.retriever.reload()
        hits = self.retriever.search(f"find the {word}", k, where={"year": {"gte": year}})
        passing = {key for key, (_, own) in self.expected.items() if own >= year}
        assert len(hits) == min(k, len(passing))
        assert {(hit.domain, hit.id) for hit in hits} <= passing

    @invariant()
    def holds_what_it_should(self):
        assert self.held() == self.plain(self.expected)
        self.retriever.reload()
        hits = self.retriever.search("find the gold", 1000, route="base")
        vectors = self.retriever.model.encode_document([f"{hit.title} {hit.text}".strip() for hit in hits] or ["x"])
        query = self.retriever.model.encode_query(["find the gold"], expert="base")[0]
        self.retriever.blends = {}
        assert {(hit.domain, hit.id): hit.text for hit in hits} == self.plain(self.expected)
        if hits:
            scores = [hit.score for hit in self.retriever.search("find the gold", 1000, route="base")]
            np.testing.assert_allclose(scores, np.sort(vectors @ query)[::-1], atol=1e-4)
        assert not (self.index / job.FOLDER).exists()


def test_any_sequence_of_changes_leaves_what_a_dictionary_holds(model_folder):
    Changing.model_folder = model_folder
    checks, phases = list(HealthCheck), [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking would take minutes
    run_state_machine_as_test(
        Changing,
        settings=settings(
            max_examples=12, stateful_step_count=8, deadline=None, suppress_health_check=checks, phases=phases
        ),
    )


@pytest.mark.parametrize("name", ["words", "sketches"])
def test_verification_sees_summaries_of_other_documents(tmp_path, monkeypatch, index, name):
    usual = getattr(snapshot, f"{name}_of")
    with monkeypatch.context() as wrong:
        wrong.setattr(snapshot, f"{name}_of", lambda held: usual({own: held[own][:1] for own in held}))
        update_index(index, {"fruit": domain_of(tmp_path / "f", {"new": "a new apple"})})
    [problem] = moeret.verify_index(index)["problems"]
    assert f"{name}-" in problem
