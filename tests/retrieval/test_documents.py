"""The document store: every text comes back as it was, from any path, for any number of threads."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.errors import ArtifactError
from moeret.retrieval import documents as module
from moeret.retrieval.documents import DocumentStore, write_documents
from moeret.types import Document

AWKWARD = [
    Document("d\0", "a\0b", "\0"),
    Document("🦊", "👩‍👩‍👧 and é, e\u0301", "שלום"),
    Document("o'brien\"--;", "'); DROP TABLE documents; --", '"'),
    Document("empty title", "text", ""),
    Document("empty text", "", "title"),
    Document(" spaces\t\n", "\r\n\u2028 \u202e", " "),
    Document("7", "0", "007", '{"lang": "en"}'),
    Document("long", "x" * 2_000_000, ""),
]


@pytest.fixture
def store(tmp_path):
    write_documents(tmp_path / "documents.sqlite", AWKWARD)
    opened = DocumentStore(tmp_path / "documents.sqlite")
    yield opened
    opened.close()


def test_awkward_texts_come_back_as_they_were(store):
    assert store.fetch(range(len(AWKWARD))) == dict(enumerate(AWKWARD))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.builds(Document, id=st.text(), text=st.text(), title=st.text()), max_size=5))
def test_any_unicode_text_comes_back_as_it_was(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("documents") / "documents.sqlite"
    write_documents(path, rows)
    opened = DocumentStore(path)
    assert opened.fetch(range(len(rows))) == dict(enumerate(rows))
    opened.close()


def test_documents_are_found_by_their_ids(store):
    ids = [own.id for own in AWKWARD]
    assert store.rows_of([*ids, "nobody's", ids[0]]) == {id: [row] for row, id in enumerate(ids)}
    assert store.rows_of([]) == {}


def test_rows_are_fetched_in_any_order_once_each_and_by_the_thousand(tmp_path):
    write_documents(tmp_path / "d", [Document(str(row), f"text {row}") for row in range(2500)])
    opened = DocumentStore(tmp_path / "d")
    assert opened.fetch([7, 3, 7]) == {3: Document("3", "text 3"), 7: Document("7", "text 7")}
    assert opened.fetch([]) == {}
    assert {row: document.id for row, document in opened.fetch(range(2500)).items()} == {
        row: str(row) for row in range(2500)
    }
    opened.close()


@pytest.mark.parametrize("row", [len(AWKWARD), -1, 10**12])
def test_a_row_that_is_not_there_is_an_artifact_error_naming_the_file(store, row):
    with pytest.raises(ArtifactError, match=r"documents\.sqlite lacks 1 documents; build the index anew"):
        store.fetch([0, row])


@pytest.mark.parametrize(
    "name", ["a b.sqlite", "100%.sqlite", "%20.sqlite", "what?mode=rw.sqlite", "x#y.sqlite", "ü'\".db"]
)
def test_paths_with_letters_that_mean_something_in_an_address(tmp_path, name):
    folder = tmp_path / name.replace(".", "-")
    folder.mkdir()
    write_documents(folder / name, AWKWARD[:2])
    opened = DocumentStore(folder / name)
    assert opened.fetch([1]) == {1: AWKWARD[1]}
    opened.close()
    assert [path.name for path in folder.iterdir()] == [name]


def test_a_store_cannot_be_written_through_its_reader(store):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        store._connection.execute("DELETE FROM documents")


def test_a_file_that_is_no_database_is_an_artifact_error(tmp_path):
    (tmp_path / "d").write_bytes(b"no database at all" * 1000)
    opened = DocumentStore(tmp_path / "d")
    with pytest.raises(ArtifactError, match=r"cannot read .*d: .*build the index anew"):
        opened.fetch([0])
    opened.close()


def test_eight_threads_read_what_one_reads(tmp_path):
    rows = [Document(str(row), f"text {row}") for row in range(300)]
    write_documents(tmp_path / "d", rows)
    opened = DocumentStore(tmp_path / "d")
    with ThreadPoolExecutor(8) as threads:
        for start, found in enumerate(threads.map(lambda start: opened.fetch(range(start, start + 50)), range(250))):
            assert found == {row: rows[row] for row in range(start, start + 50)}
    opened.close()


def test_two_writes_of_the_same_documents_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_documents(tmp_path / name, AWKWARD)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_full_disk_is_an_os_error_naming_the_file(tmp_path, monkeypatch):
    real = sqlite3.connect

    def small(path):
        connection = real(path)
        connection.execute("PRAGMA max_page_count = 5")
        return connection

    monkeypatch.setattr(module.sqlite3, "connect", small)
    with pytest.raises(OSError, match="full") as raised:
        write_documents(tmp_path / "d", [Document(str(row), "x" * 1000) for row in range(1000)])
    assert raised.value.filename == str(tmp_path / "d")
