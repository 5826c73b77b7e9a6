"""Rows of anchor, positive and negatives become a domain that can be read and trained on."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st

import moeret
from moeret.cli import main
from moeret.data.beir import read_domain
from moeret.data.convert import Columns, convert_dataset, convert_file, convert_rows

ROWS = [
    {"anchor": "who signs", "positive": "two directors sign", "negative": "the sea is deep"},
    {"query": "who signs", "positive": ["a director", "two directors sign"]},
    {"question": "how deep", "positive": "the sea is deep", "negative_1": "x", "negative_2": ["y", "x"], "label": 3},
]


def texts(folder):
    """What a folder says: query text -> texts of its positives; and all documents' texts."""
    domain = read_domain("law", folder, ("train",))
    documents = {own.id: own.text for own in domain.corpus}
    train = domain.splits["train"]
    judged = {train.queries[id]: {documents[own] for own in qrels} for id, qrels in train.qrels.items()}
    return judged, sorted(documents.values())


def test_rows_become_a_domain(tmp_path):
    assert convert_rows(ROWS, tmp_path / "law") == {"queries": 2, "documents": 5, "judgments": 3}
    judged, documents = texts(tmp_path / "law")
    assert judged == {"who signs": {"two directors sign", "a director"}, "how deep": {"the sea is deep"}}
    assert documents == ["a director", "the sea is deep", "two directors sign", "x", "y"]


text = st.text(min_size=1, max_size=8).filter(lambda own: own.strip() and own.isprintable())


@given(rows=st.lists(st.tuples(text, text, st.lists(text, max_size=2)), min_size=1, max_size=12))
def test_no_judgment_and_no_text_is_lost(tmp_path_factory, rows):
    out = tmp_path_factory.mktemp("converted") / "law"
    convert_rows(({"anchor": a, "positive": p, "negative": n} for a, p, n in rows), out)
    judged, documents = texts(out)
    assert {(query, own) for query, every in judged.items() for own in every} == {(a, p) for a, p, _ in rows}
    assert documents == sorted({p for _, p, _ in rows} | {own for _, _, n in rows for own in n})


@pytest.mark.parametrize("packed", [False, True])
def test_the_command_converts_files(tmp_path, capsys, monkeypatch, packed):
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    lines = "\n".join(map(json.dumps, ROWS)).encode()
    path.write_bytes(gzip.compress(lines) if packed else lines)
    monkeypatch.setattr("sys.argv", ["moeret", "convert", str(path), "--out", str(tmp_path / "law"), "--json"])
    main()
    assert json.loads(capsys.readouterr().out) == {"queries": 2, "documents": 5, "judgments": 3}
    assert len(texts(tmp_path / "law")[1]) == 5


@pytest.mark.parametrize(("row", "told"), [
    ({"positive": "x"}, "no anchor"), ({"anchor": "x"}, r"no positive \(or answer\); it has anchor"), ({}, "it has nothing"),
    ({"anchor": ["a"], "positive": 3}, "positive must be text"), ({"anchor": "", "positive": "x"}, "anchor must be text"),
    ({"anchor": "a", "positive": []}, "positive must be text"), ({"anchor": "a", "positive": "p", "negative": [1]}, "negative"),
    ({"anchor": "a", "positive": "\ud800"}, "Unicode"),
])  # fmt: skip
def test_rows_that_are_none_are_told_and_leave_nothing_behind(tmp_path, row, told):
    with pytest.raises(moeret.DataError, match=f"row 2: .*{told}"):
        convert_rows([ROWS[0], row], tmp_path / "law")
    write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(moeret.DataError, match=rf"rows\.jsonl, line 2: .*{told}"):
        convert_file(tmp_path / "rows.jsonl", tmp_path / "law")
    assert [own.name for own in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("row", [None, "anchor", ["anchor", "positive"]])
def test_a_row_without_columns_is_told(tmp_path, row):
    with pytest.raises(moeret.DataError, match="row 2: a row has columns"):
        convert_rows([ROWS[0], row], tmp_path / "law")
    assert [*tmp_path.iterdir()] == []


def test_nothing_is_overwritten_and_nothing_is_no_domain(tmp_path):
    with pytest.raises(moeret.DataError, match="no rows"):
        convert_rows([], tmp_path / "law")
    (tmp_path / "law").mkdir()
    with pytest.raises(moeret.ConfigError, match="there already"):
        convert_rows(ROWS, tmp_path / "law")
    with pytest.raises(moeret.ConfigError, match="JSONL file is wanted"):
        convert_file(tmp_path / "rows.parquet", tmp_path / "other")


OTHERS = [{"ask": "who signs", "say": ["two directors sign"], "not": "the sea is deep", "also": None, "anchor": 7}]
NAMED = Columns(anchor="ask", positive="say", negative=("not", "also"))


def test_columns_may_be_named(tmp_path, capsys, monkeypatch):
    assert convert_rows(OTHERS, tmp_path / "a", columns=NAMED) == {"queries": 1, "documents": 2, "judgments": 1}
    assert texts(tmp_path / "a") == ({"who signs": {"two directors sign"}}, ["the sea is deep", "two directors sign"])
    write_jsonl(tmp_path / "rows.jsonl", OTHERS)
    command = ["moeret", "convert", str(tmp_path / "rows.jsonl"), "--anchor", "ask", "--positive", "say"]
    monkeypatch.setattr("sys.argv", [*command, "--negative", "not", "also", "--out", str(tmp_path / "b"), "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["documents"] == 2
    for column in ("anchor", "positive"):
        with pytest.raises(moeret.DataError, match=r"row 1: there is no missing; it has ask"):
            convert_rows(
                OTHERS, tmp_path / "c", columns=Columns(**{"anchor": "ask", "positive": "say", column: "missing"})
            )
    with pytest.raises(moeret.DataError, match="there is no missing"):
        convert_rows(ROWS, tmp_path / "c", columns=Columns(negative=("missing",)))


def test_a_column_says_one_thing(tmp_path):
    for named in ({"anchor": "a", "positive": "a"}, {"anchor": "a", "negative": ("b", "a")}):
        with pytest.raises(moeret.ConfigError, match="'a' is named twice"):
            Columns(**named)
    with pytest.raises(moeret.ConfigError, match="names of columns, got 'bad'"):
        Columns(negative="bad")
    row = {"negative_prompt": "who signs", "positive": "a director"}
    convert_rows([row], tmp_path / "law", columns=Columns(anchor="negative_prompt"))
    assert texts(tmp_path / "law") == ({"who signs": {"a director"}}, ["a director"])


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(moeret.DataError, match=r"rows\.jsonl: there are no rows"):
        convert_file(tmp_path / "rows.jsonl", tmp_path / "law")


def test_one_at_a_time_makes_a_folder(tmp_path):
    def rows():
        yield ROWS[0]
        with pytest.raises(moeret.BusyError):
            convert_rows(ROWS, tmp_path / "law")
        yield ROWS[1]

    assert convert_rows(rows(), tmp_path / "law")["judgments"] == 2
    assert {own.name for own in (tmp_path / "law").iterdir()} == {"corpus.jsonl", "queries.jsonl", "qrels"}
    assert [own.name for own in tmp_path.iterdir()] == ["law"]


def test_a_folder_that_somebody_made_meanwhile_is_left_alone(tmp_path):
    def rows():
        yield ROWS[0]
        (tmp_path / "law").mkdir()
        (tmp_path / "law" / "theirs").touch()

    with pytest.raises(moeret.ConfigError, match="is there already"):
        convert_rows(rows(), tmp_path / "law")
    assert [str(own.relative_to(tmp_path)) for own in tmp_path.rglob("*")] == ["law", "law/theirs"]


def test_an_answer_is_a_positive(tmp_path):
    convert_rows([{"question": "who signs", "answer": "two directors sign"}], tmp_path / "law")
    assert texts(tmp_path / "law")[0] == {"who signs": {"two directors sign"}}


def stand_in(monkeypatch, load):
    """Puts a library of that name where the real one may not be installed."""
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))


def test_a_data_set_is_streamed(tmp_path, capsys, monkeypatch):
    asked = []

    def load(*names, **how):
        asked.append((names, how))
        return iter(ROWS)

    stand_in(monkeypatch, load)
    command = ["moeret", "convert", "--dataset", "someone/law", "--subset", "en", "--split", "dev", "--json", "--out"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "law")])
    main()
    assert json.loads(capsys.readouterr().out) == {"queries": 2, "documents": 5, "judgments": 3}
    assert asked == [(("someone/law", "en"), {"split": "dev", "streaming": True})]


def test_what_goes_wrong_with_a_data_set_is_told_and_leaves_nothing_behind(tmp_path, monkeypatch):
    def breaks(*_, **__):
        yield ROWS[0]
        raise ConnectionError("the line is dead\nand a long story")

    for load, told in (
        (breaks, "data set a/b, split train: cannot be read .*the line is dead"),
        (
            lambda *_, **__: [ROWS[0], {"anchor": 1, "positive": "x"}],
            "data set a/b, split train: row 2: anchor must be",
        ),
        (lambda *_, **__: [], "there are no rows"),
    ):
        stand_in(monkeypatch, load)
        with pytest.raises(moeret.DataError, match=told) as caught:
            convert_dataset("a/b", tmp_path / "law")
        assert "long story" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(moeret.ConfigError, match=r"pip install .moeret\[datasets\]"):
        convert_dataset("a/b", tmp_path / "law")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("arguments", [(), ("rows.jsonl", "--dataset", "a/b"), ("rows.jsonl", "--subset", "en")])
def test_the_command_wants_one_source(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.setattr("sys.argv", ["moeret", "convert", *arguments, "--out", str(tmp_path / "law")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and "--" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_real_library_reads_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(
        tmp_path / "rows" / "train.jsonl", [{"query": own, "positive": ["x" + own], "negative_1": "y"} for own in "abc"]
    )
    counts = convert_dataset(str(tmp_path / "rows"), tmp_path / "law")
    assert counts == {"queries": 3, "documents": 4, "judgments": 3}
    with pytest.raises(moeret.DataError, match=r"split nowhere: cannot be read \(.*nowhere"):
        convert_dataset(str(tmp_path / "rows"), tmp_path / "b", split="nowhere")
    with pytest.raises(moeret.DataError, match="cannot be read"):
        convert_dataset(str(tmp_path / "missing"), tmp_path / "b")


DOCUMENTS = [
    {
        "doc_id": "7/a",
        "heading": "Signing",
        "body": "Two directors sign\n together.",
        "metadata": {"year": 2024},
        "extra": 1,
    },
    {"doc_id": 8, "heading": "", "body": "The sea is deep."},
    {"doc_id": "c", "heading": "Again", "body": "The sea  is deep."},
]
NAMES = Columns(id="doc_id", title="heading", text="body")


def joined(tmp_path, rows, documents=DOCUMENTS, **how):
    """Rows and documents made one folder, and which ids answer which query in it."""
    write_jsonl(tmp_path / "documents.jsonl", documents)
    counts = convert_rows(rows, tmp_path / "law", columns=NAMES, corpus=tmp_path / "documents.jsonl", **how)
    domain = read_domain("law", tmp_path / "law", ("train",))
    train = domain.splits["train"]
    return counts, domain.corpus, {train.queries[id]: {*own} for id, own in train.qrels.items()}


def test_rows_are_joined_to_documents_by_text_and_by_id(tmp_path):
    rows = [
        {"anchor": "who signs", "positive": "Two directors sign together.", "negative": "nobody's"},
        {"anchor": "who then", "positive": "Signing Two directors  sign together."},
        {"anchor": "how deep", "positive": ["The sea is deep.", "7/a"]},
    ]
    counts, corpus, judged = joined(tmp_path, rows)
    assert counts == {"queries": 3, "documents": 3, "judgments": 5}
    assert [(own.id, own.title, own.text) for own in corpus] == [
        (str(own["doc_id"]), own["heading"], own["body"]) for own in DOCUMENTS
    ]
    assert json.loads(corpus[0].metadata) == {"year": 2024}
    assert judged == {"who signs": {"7/a"}, "who then": {"7/a"}, "how deep": {"8", "c", "7/a"}}


def test_what_cannot_be_used_stops_or_is_skipped_and_listed(tmp_path, capsys, monkeypatch):
    rows = [
        {"anchor": "who signs", "positive": "8"},
        {"anchor": "no answer", "positive": ["8", "somebody else"]},
        {"anchor": "nothing"},
    ]
    bad = [{"doc_id": 8, "heading": "", "body": "twice"}, {"body": "x"}, {"doc_id": "a\tb", "heading": "", "body": "x"}]
    with pytest.raises(moeret.DataError, match=r"row 2: 'somebody else' is neither .* of .*documents\.jsonl"):
        joined(tmp_path, [dict(own, positive="somebody else") if own is rows[1] else own for own in rows])
    for one, told in zip(
        bad, ("id '8' is already", "there is no doc_id; it has body; id, title and text", "a tab"), strict=True
    ):
        with pytest.raises(moeret.DataError, match=rf"documents\.jsonl, line 4: .*{told}"):
            joined(tmp_path, rows, [*DOCUMENTS, one])
    assert [own.name for own in tmp_path.iterdir()] == ["documents.jsonl"]
    counts, corpus, judged = joined(tmp_path, rows, [*bad[1:], *DOCUMENTS, bad[0]], on_error="skip")
    assert counts == {"queries": 1, "documents": 3, "judgments": 1, "skipped": 5}
    assert judged == {"who signs": {"8"}} and len(corpus) == 3
    listed = [json.loads(line) for line in (tmp_path / "law" / "skipped.jsonl").read_text().splitlines()]
    ends = ["line 1", "line 2", "line 6", "row 2", "row 3"]
    assert all(own["where"].endswith(end) for own, end in zip(listed, ends, strict=True)), listed
    write_jsonl(tmp_path / "rows.jsonl", rows)
    command = ["moeret", "convert", str(tmp_path / "rows.jsonl"), "--corpus", str(tmp_path / "documents.jsonl")]
    command += ["--id", "doc_id", "--text", "body", "--on-error", "skip", "--out", str(tmp_path / "by-command")]
    monkeypatch.setattr("sys.argv", command)
    main()
    told = capsys.readouterr()
    assert (
        "1 queries, 3 documents, 1 judgments, 5 skipped" in told.out.replace("\n", "") and "skipped.jsonl" in told.err
    )


def test_skipping_everything_is_an_error(tmp_path):
    with pytest.raises(moeret.DataError, match="none of the rows can be used; the last, row 1: there is no anchor"):
        convert_rows([{"positive": "x"}], tmp_path / "law", on_error="skip")
    with pytest.raises(
        moeret.DataError, match=r"none of the documents can be used; the last, .*line 1: there is no doc_id"
    ):
        joined(tmp_path, ROWS, [{"_id": "d"}], on_error="skip")
    with pytest.raises(moeret.ConfigError, match="on_error must be stop or skip, got 'ignore'"):
        convert_rows(ROWS, tmp_path / "law", on_error="ignore")
    assert not (tmp_path / "law").exists()


def test_columns_of_documents_want_documents(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["moeret", "convert", "rows.jsonl", "--id", "doc_id", "--out", str(tmp_path / "law")]
    )
    with pytest.raises(SystemExit):
        main()
    assert "--id goes with --corpus" in capsys.readouterr().err
