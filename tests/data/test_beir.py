"""Reading BEIR folders: any text is taken, anything unusable is refused with its file, its line and the reason."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.data.beir import (
    Domain,
    Judged,
    carve_dev,
    check_name,
    parse_domains,
    read_corpus,
    read_domain,
    read_qrels,
    read_queries,
    sample,
    sample_ids,
    write_domain,
)
from moeret.errors import DataError
from moeret.types import Document

ODD_TEXTS = [
    "🙂👩‍👩‍👧",
    "a\0b",
    "שלום עולם",
    "\u202eright to left",
    "x\u2028y\u2029z",
    "\x85\x0b\x0c",
    "\ufeffmark",
    "e\u0301",
    "\t\n",
]


def written(path: Path, *lines: str | bytes | dict) -> Path:
    """Writes a file of lines; what is neither text nor bytes becomes JSON."""
    raw = [line if isinstance(line, bytes | str) else json.dumps(line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in raw))
    return path


def document(id: str, text: str = "text", **more: str) -> dict[str, str]:
    return {"_id": id, "text": text, **more}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Where a corpus may be written."""
    return tmp_path / "corpus.jsonl"


HEADER = "query-id\tcorpus-id\tscore"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good BEIR folder with a train and a test split."""
    written(tmp_path / "corpus.jsonl", *(document(f"d{n}") for n in range(3)))
    written(tmp_path / "queries.jsonl", *({"_id": f"q{n}", "text": f"query {n}"} for n in range(4)))
    written(tmp_path / "qrels" / "train.tsv", HEADER, "q0\td0\t1", "q0\td1\t0", "q1\td1\t2", "q2\td2\t0", "q3\td0\t-1")
    written(tmp_path / "qrels" / "test.tsv", HEADER, "q2\td2\t1")
    return tmp_path


# Corpora


@pytest.mark.parametrize("plain", [True, False])
def test_any_text_is_read_as_it_was_written(corpus, plain):
    rows = [document(f"id {n}\0{text}", text=f"x{text}", title=text) for n, text in enumerate(ODD_TEXTS)]
    written(corpus, *(json.dumps(row, ensure_ascii=plain) for row in rows))
    assert [(read.id, read.title, read.text) for read in read_corpus(corpus)] == [
        (row["_id"], row["title"], row["text"]) for row in rows
    ]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(deadline=None)
@given(rows=st.dictionaries(texts.filter(bool), st.tuples(texts, texts), min_size=1, max_size=5), plain=st.booleans())
def test_a_corpus_survives_a_trip_through_a_file(tmp_path_factory, rows, plain):
    documents = [
        Document(id, text, title, '{"a": "ü", "more": 1}')
        for id, (text, title) in rows.items()
        if f"{title} {text}".strip()
    ]
    more = {"more": 1, "a": "ü"}
    lines = [{"_id": own.id, "title": own.title, "text": own.text, "metadata": more} for own in documents]
    path = written(tmp_path_factory.getbasetemp() / "trip.jsonl", *(json.dumps(x, ensure_ascii=plain) for x in lines))
    if documents:
        assert read_corpus(path) == documents
    else:
        with pytest.raises(DataError, match="empty"):
            read_corpus(path)


def test_titles_may_be_missing_ids_may_be_numbers_and_lines_may_be_blank(corpus):
    written(
        corpus, "", {"_id": 7, "text": "a"}, "  ", {"_id": "8", "title": None, "text": "b"}, b'{"_id":9,"text":"c"}\r'
    )
    assert read_corpus(corpus) == [Document("7", "a"), Document("8", "b"), Document("9", "c")]


def test_only_a_newline_ends_a_line(corpus):
    written(corpus, b'{"_id": "1",\r"text": "a"}\r', '{"_id": "2", "text": "b\u2028c\x85d"}', "bad")
    with pytest.raises(DataError, match="line 3: not JSON") as error:
        read_corpus(corpus)
    assert "line 1:" not in str(error.value)
    assert "line 2:" not in str(error.value)


def test_contents_are_title_and_text_in_one(corpus):
    written(corpus, document("1", "text", title="title"), document("2", "text"), document("3", "", title="title"))
    assert [read.contents for read in read_corpus(corpus)] == ["title text", "text", "title"]


def test_bad_json_at_line_40000_is_found_and_named(corpus):
    lines = [f'{{"_id": "{n}", "text": "t"}}' for n in range(1, 40_000)]
    written(corpus, *lines, '{"_id": "40000", "text": "t"')
    with pytest.raises(DataError, match=rf"{re.escape(str(corpus))}: line 40000: not JSON") as error:
        read_corpus(corpus)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("{} {}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("1", "expected a JSON object"),
        ('"text"', "expected a JSON object"),
        ("{}", "there is no _id; it has nothing"),
        ({"text": "t"}, "there is no _id; it has text"),
        ({"_id": "", "text": "t"}, "_id must be a non-empty string"),
        ({"_id": True, "text": "t"}, "_id must be a non-empty string"),
        ({"_id": 1.5, "text": "t"}, "_id must be a non-empty string"),
        ({"_id": "x"}, "there is no text; it has _id"),
        ({"_id": "x", "text": None}, "text must be a string"),
        ({"_id": "x", "text": ["t"]}, "text must be a string"),
        ({"_id": "x", "text": "t", "title": 3}, "title must be a string"),
        ('{"_id": "x\\ud800", "text": "t"}', "_id is not valid Unicode"),
        ('{"_id": "x", "text": "\\udfff t"}', "text is not valid Unicode"),
        ('{"_id": "x", "text": "t", "title": "\\ud83d"}', "title is not valid Unicode"),
        (b'{"_id": "x", "text": "caf\xe9"}', "text is not valid Unicode"),
        (b"\xff\xfe", "not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_line_that_is_no_document_is_refused_with_its_number_and_the_reason(corpus, line, reason):
    written(corpus, document("good"), "", line, document("fine"))
    with pytest.raises(DataError) as error:
        read_corpus(corpus)
    assert f"{corpus}: line 3: {reason}" in str(error.value)
    assert len(str(error.value)) < 1000
    str(error.value).encode()  # can be printed


def test_escaped_surrogate_pairs_are_ordinary_text(corpus):
    written(corpus, '{"_id": "x", "text": "\\ud83d\\ude42"}')
    assert read_corpus(corpus)[0].text == "🙂"


def test_an_id_that_comes_twice_is_named_with_both_lines(corpus):
    written(corpus, document("a"), "", document("5"), document("b"), {"_id": 5, "text": "another"})
    with pytest.raises(DataError, match="line 5: id '5' is already on line 3"):
        read_corpus(corpus)


def test_many_problems_are_counted_and_only_the_first_shown(corpus):
    written(corpus, *["bad"] * 10)
    with pytest.raises(DataError, match=r"line 1.*line 2.*line 3.*and 7 more$"):
        read_corpus(corpus)


def test_an_empty_document_is_kept(corpus):
    """Cranfield has two, and judges one of them relevant."""
    corpus.write_text('{"_id": "a", "text": ""}\n{"_id": "b", "title": "t", "text": "x"}\n')
    assert [document.id for document in read_corpus(corpus)] == ["a", "b"]


def test_an_empty_a_missing_and_an_unreadable_corpus_are_told_apart(corpus, tmp_path):
    with pytest.raises(DataError, match=r"corpus\.jsonl is not there"):
        read_corpus(corpus)
    for lines in ([], ["", "  "]):
        written(corpus, *lines)
        with pytest.raises(DataError, match="the corpus is empty"):
            read_corpus(corpus)
    with pytest.raises(DataError, match="cannot read"):
        read_corpus(tmp_path)


# Queries and judgments


NESTED = json.loads('{"a":' * 101 + "1" + "}" * 101)


@pytest.mark.parametrize("metadata", [[], "en", 7, {"year": float("nan")}, {"a": "\udc00"}, NESTED])
def test_metadata_that_is_no_object_is_refused_with_its_line(corpus, metadata):
    row = json.dumps({"_id": "b", "text": "x", "metadata": metadata})
    written(corpus, {"_id": "a", "text": "x", "metadata": None}, row)
    if not metadata:
        assert [own.metadata for own in read_corpus(corpus)] == ["", ""]
        return
    with pytest.raises(DataError, match=r"line 2: metadata (must|is not valid)"):
        read_corpus(corpus)


def test_queries_are_checked_like_documents(tmp_path):
    path = written(tmp_path / "queries.jsonl", {"_id": "a", "text": "🙂\0"}, {"_id": 2, "text": "ש"})
    assert read_queries(path) == {"a": "🙂\0", "2": "ש"}
    for bad, reason in [
        ({"_id": "a", "text": "again"}, "'a' comes twice"),
        ({"_id": "b", "text": " \n"}, "'b' is empty"),
        ({"_id": "b"}, "there is no text; it has _id"),
        ("[]", "expected a JSON object"),
        ('{"_id": "b", "text": "\\udc00"}', "not valid Unicode"),
    ]:
        written(path, {"_id": "a", "text": "first"}, bad)
        with pytest.raises(DataError, match="line 2: .*" + reason):
            read_queries(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("q0\tghost\t1", "document 'ghost' is not in corpus.jsonl"),
        ("ghost\td0\t1", "query 'ghost' is not in queries.jsonl"),
        ("q0\td0", "expected query-id, corpus-id and score"),
        ("q0 0 d0 1", "expected query-id, corpus-id and score"),
        ("q0\td0\t1\tmore", "expected query-id, corpus-id and score"),
        ("q0\td0\thigh", "score 'high' is not a whole number"),
        ("q0\td0\t0.5", "score '0.5' is not a whole number"),
        ("q0\td0\t", "score '' is not a whole number"),
        (b"q0\t\xff\t1", "is not in corpus.jsonl"),
    ],
)
def test_a_judgment_that_cannot_be_used_is_refused_with_its_line(tmp_path, line, reason):
    path = written(tmp_path / "test.tsv", HEADER, "q0\td0\t1", "", line)
    with pytest.raises(DataError) as error:
        read_qrels(path, {"q0"}, {"d0"})
    assert f"{path}: line 4: " in str(error.value)
    assert reason in str(error.value)


def test_judgments_with_odd_ids_are_read(tmp_path):
    names = ["a b", "ü", "🙂", "x\u2028y", "\x85", "#"]
    path = written(tmp_path / "test.tsv", HEADER, *(f"{name}\t{name}\t{n}\r" for n, name in enumerate(names)))
    assert read_qrels(path, set(names), set(names)) == {name: {name: n} for n, name in enumerate(names)}


def test_no_judgments_and_no_file_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_qrels(tmp_path / "test.tsv", {}, {})
    for lines in ([], [HEADER], [HEADER, "", ""]):
        with pytest.raises(DataError, match="no judgments"):
            read_qrels(written(tmp_path / "test.tsv", *lines), {}, {})


# Domains


def test_a_domain_has_the_queries_with_something_relevant(folder):
    domain = read_domain("name", folder, ("train", "test"))
    assert domain.splits["train"].queries == {"q0": "query 0", "q1": "query 1"}
    assert domain.splits["train"].qrels == {"q0": {"d0": 1, "d1": 0}, "q1": {"d1": 2}}
    assert domain.splits["test"].qrels == {"q2": {"d2": 1}}
    assert [document.id for document in domain.corpus] == ["d0", "d1", "d2"]


@given(data=st.data(), texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=5))
def test_a_domain_survives_a_trip_through_a_folder(tmp_path_factory, data, texts):
    corpus = [Document(f"d{number}", text, text[::-1]) for number, text in enumerate(texts)]
    splits = {}
    for split in data.draw(st.sets(st.sampled_from(["train", "dev", "test"]))):
        judged = st.dictionaries(st.sampled_from([own.id for own in corpus]), st.integers(1, 3), min_size=1)
        qrels = {f"{split} q{number}": data.draw(judged) for number in range(data.draw(st.integers(1, 3)))}
        splits[split] = Judged({query: f"what is {query}" for query in qrels}, qrels)
    domain = Domain("law", tmp_path_factory.mktemp("law"), corpus, splits)
    assert read_domain("law", write_domain(domain), (*splits,)) == domain


def test_a_split_that_was_not_asked_for_is_not_even_opened(folder):
    written(folder / "qrels" / "test.tsv", "nonsense", "nonsense")
    assert read_domain("name", folder, ("train",)).splits.keys() == {"train"}
    with pytest.raises(DataError, match=r"test\.tsv"):
        read_domain("name", folder, ("train",), optional=("test",))


def test_a_split_may_be_missing_only_if_it_is_optional(folder):
    assert read_domain("name", folder, ("train",), optional=("dev",)).splits.keys() == {"train"}
    with pytest.raises(DataError, match=r"dev\.tsv is not there; domain name needs .* dev split"):
        read_domain("name", folder, ("train", "dev"))


def test_a_corpus_alone_is_a_domain_without_splits(folder):
    (folder / "queries.jsonl").unlink()
    assert read_domain("name", folder, ()).splits == {}
    with pytest.raises(DataError, match=r"queries\.jsonl is not there"):
        read_domain("name", folder, ("train",))


def test_judgments_without_anything_relevant_are_refused(folder):
    written(folder / "qrels" / "train.tsv", HEADER, "q0\td0\t0", "q1\td1\t-1")
    with pytest.raises(DataError, match="no query has a relevant document"):
        read_domain("name", folder, ("train",))


def test_a_judgment_of_a_document_that_is_not_there_stops_the_domain(folder):
    written(folder / "qrels" / "train.tsv", HEADER, "q0\td0\t1", "q1\td9\t1")
    with pytest.raises(DataError, match=r"train\.tsv: line 3: document 'd9' is not in corpus\.jsonl"):
        read_domain("name", folder, ("train",))


def test_domains_are_named_folders(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert parse_domains([f"law={tmp_path}", f"My.domain_2-x={tmp_path}/a=b"]) == {
        "law": tmp_path,
        "My.domain_2-x": tmp_path / "a=b",
    }
    assert parse_domains([]) == {}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["law"], "expected NAME=BEIR_DIR"),
        (["law="], "expected NAME=BEIR_DIR"),
        (["=."], "'' cannot name a domain"),
        (["a/b=."], "cannot name a domain"),
        (["..=."], "cannot name a domain"),
        (["-x=."], "cannot name a domain"),
        (["base=."], "cannot name a domain"),
        (["auto=."], "cannot name a domain"),
        (["all=."], "cannot name a domain"),
        (["oracle=."], "cannot name a domain"),
        (["ü=."], "cannot name a domain"),
        ([f"{'x' * 65}=."], "cannot name a domain"),
        (["law=.", "law=.."], "law is given twice"),
        (["law=./no/such/folder"], "there is no directory ./no/such/folder"),
        ([f"law={__file__}"], "there is no directory"),
    ],
)
def test_a_domain_argument_that_cannot_work_is_refused_with_the_reason(arguments, reason):
    with pytest.raises(DataError, match=re.escape(reason)):
        parse_domains(arguments)


@given(st.text(max_size=70))
def test_a_name_that_is_taken_can_name_a_file(name):
    try:
        check_name(name)
    except DataError:
        return
    assert re.fullmatch(r"[\w.-]+", name, re.ASCII)
    assert Path(name).name == name


# Splits

names = st.sets(st.text("abcdef0123", min_size=1, max_size=5), min_size=2, max_size=40)


def judged(ids) -> Judged:
    return Judged({id: f"text {id}" for id in ids}, {id: {f"d{id}": 1} for id in ids})


@settings(deadline=None)
@given(ids=names, share=st.floats(0.01, 0.99), data=st.data())
def test_dev_is_carved_out_alike_whatever_the_order_and_never_overlaps(ids, share, data):
    train, dev = carve_dev(judged(sorted(ids)), share)
    assert train.queries.keys() | dev.queries.keys() == ids
    assert train.queries.keys().isdisjoint(dev.queries)
    assert train.queries
    assert dev.queries
    assert abs(len(dev.queries) - share * len(ids)) <= 1
    for part in (train, dev):
        assert part == judged(part.queries)
    again = carve_dev(judged(data.draw(st.permutations(sorted(ids)))), share)
    assert (again[0].queries, again[1].queries) == (train.queries, dev.queries)


def test_one_query_cannot_be_split():
    with pytest.raises(DataError, match="give at least two"):
        carve_dev(judged(["alone"]))


@settings(deadline=None)
@given(ids=names, most=st.integers(1, 50), data=st.data())
def test_a_sample_is_the_same_for_everybody_and_does_not_depend_on_what_was_left_out(ids, most, data):
    chosen = sample_ids(ids, most)
    assert len(chosen) == min(most, len(ids))
    assert set(chosen) <= ids
    assert sample_ids(data.draw(st.permutations(sorted(ids))), most) == chosen
    left_out = ids - set(chosen)
    gone = data.draw(st.sets(st.sampled_from(sorted(left_out)))) if left_out else set()
    assert sample_ids(ids - gone, most) == chosen
    assert sample_ids(ids, most + 1)[:most] == chosen
    assert sample(judged(ids), most) == judged([id for id in ids if id in chosen])


def test_qrels_without_a_header_lose_no_judgment(tmp_path):
    (tmp_path / "q.tsv").write_text("q1\td1\t1\nq2\td2\t0\n")
    assert read_qrels(tmp_path / "q.tsv", {"q1", "q2"}, {"d1", "d2"}) == {"q1": {"d1": 1}, "q2": {"d2": 0}}
