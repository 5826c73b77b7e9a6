"""Files become shards: every document once, in order, whatever the format; what cannot be used is named with its place."""

import builtins
import gzip
import hashlib
import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from moeret.data import sources
from moeret.data.beir import read_corpus
from moeret.data.sources import Plan, Shard, Skipped, Source, read_shard, scan
from moeret.errors import ConfigError, DataError
from moeret.types import Document

ENDINGS = [".jsonl", ".jsonl.gz", ".parquet"]


def line(id: str | int, text: str = "text", **more: object) -> dict[str, object]:
    return {"_id": id, "text": text, **more}


def written(path: Path, *lines: str | bytes | dict, end: bytes = b"\n") -> Path:
    """Writes lines in the format of the path's name; Parquet takes dicts only."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([*lines]), path, row_group_size=max(3, len(lines) // 4))
        return path
    raw = [
        own if isinstance(own, bytes) else (own if isinstance(own, str) else json.dumps(own)).encode() for own in lines
    ]
    data = b"".join(own + end for own in raw)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def texts_of(plan: Plan) -> list[str]:
    return [f"{own.id} {own.text}" for shard in plan.shards for own in read_shard(shard)]


def places(plan: Plan) -> list[tuple[str, int, str]]:
    return [(own.path.name, own.line, own.reason) for own in plan.skipped]


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), size=st.integers(1, 6), ending=st.sampled_from(ENDINGS), end=st.sampled_from([b"\n", b"\r\n"]))
def test_shards_have_every_document_once_and_in_order(tmp_path_factory, data, size, ending, end):
    folder = tmp_path_factory.mktemp("sources")
    ids = data.draw(st.lists(words.filter(bool), unique=True, min_size=1, max_size=14))
    rows = [line(id, data.draw(words), title=data.draw(words), metadata=json.dumps({"n": len(id)})) for id in ids]
    plain = [row | {"metadata": json.loads(str(row["metadata"]))} for row in rows]
    expected = read_corpus(written(folder / "reference.jsonl", *plain))
    lines = rows
    if ending != ".parquet":
        blank = st.lists(st.sampled_from(["", "  ", "\x85"]), max_size=2)
        escaped = data.draw(st.booleans())
        lines = [own for row in plain for own in (*data.draw(blank), json.dumps(row, ensure_ascii=escaped))]
    path = written(folder / f"more{ending}", *lines, end=end)
    plan = scan([Source(folder / "reference.jsonl", "law"), Source(path)], size)
    first = sum(shard.source.domain == "law" for shard in plan.shards)
    order = data.draw(st.permutations(plan.shards))
    read = {shard.number: read_shard(shard) for shard in order}
    assert [own for shard in plan.shards[:first] for own in read[shard.number]] == expected
    assert [own for shard in plan.shards[first:] for own in read[shard.number]] == expected
    assert [shard.number for shard in plan.shards] == [*range(len(plan.shards))]
    assert all(0 < shard.documents == len(read[shard.number]) <= size for shard in plan.shards)
    assert all(shard.end - shard.start <= size for shard in plan.shards)
    assert plan.documents == 2 * len(expected)
    assert plan.digests == {
        "domain law": hashlib.sha256((folder / "reference.jsonl").read_bytes()).hexdigest(),
        "corpus 1": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert plan.skipped == ()


def test_a_shard_says_where_it_begins(tmp_path):
    path = written(tmp_path / "a.jsonl", "", line("ü"), "", line("b"), line("c"))
    lines = path.read_bytes().splitlines(keepends=True)
    assert scan([Source(path)], 2).shards == (
        Shard(0, Source(path), 0, 2, 1, 2, ()),
        Shard(1, Source(path), 2, 3, len(b"".join(lines[:4])), 5, ()),
    )
    path = written(tmp_path / "a.parquet", *map(line, "abcdefgh"))
    assert [(shard.offset, shard.line) for shard in scan([Source(path)], 5).shards] == [(0, 1), (0, 6)]
    assert scan([], 5) == Plan((), {}, ())


def test_parquet_metadata_may_be_a_struct_a_map_or_json(tmp_path):
    def metadata(values: list, kind: pa.DataType) -> list[str]:
        ids = pa.array(range(len(values)), pa.int64())
        table = pa.table({"_id": ids, "text": ["x"] * len(values), "metadata": pa.array(values, kind), "other": ids})
        parquet.write_table(table, tmp_path / "a.parquet")
        return [own.metadata for shard in scan([Source(tmp_path / "a.parquet")], 2).shards for own in read_shard(shard)]

    inner = pa.struct({"year": pa.int32(), "tags": pa.list_(pa.string()), "more": pa.map_(pa.string(), pa.float64())})
    rows = [{"year": 7, "tags": ["ü"], "more": [("a", 0.5)]}, {"tags": None}, None]
    assert metadata(rows, inner) == ['{"more": {"a": 0.5}, "tags": ["ü"], "year": 7}', "", ""]
    assert metadata([[("b", 1), ("a", None)], []], pa.map_(pa.string(), pa.int8())) == ['{"b": 1}', ""]
    assert metadata(['{"b": null, "a": 1}', "", None], pa.string()) == ['{"a": 1, "b": null}', "", ""]
    for values, kind, reason in [
        (["{"], pa.string(), "metadata: not JSON"),
        (["[1]"], pa.string(), "metadata: expected a JSON object"),
        ([[1]], pa.list_(pa.int8()), "metadata must be a JSON object"),
        ([{"a": float("nan")}], pa.struct({"a": pa.float32()}), "finite"),
        ([{"a": b"x"}], pa.struct({"a": pa.binary()}), "metadata cannot be written as JSON"),
    ]:
        with pytest.raises(DataError, match=f"row 1: .*{reason}"):
            metadata(values, kind)


# Ids


@pytest.fixture(params=[False, True], ids=["hashed", "colliding"])
def hashes(request, monkeypatch):
    """All that is said of ids holds even if all have the same hash."""
    if request.param:
        monkeypatch.setattr(sources, "_hash", lambda id: 0)


@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("domain", ["law", ""])
def test_an_id_comes_once_in_a_source(tmp_path, domain):
    rows = [line("a"), line("b"), "", line("a"), line("b", "other"), line("a"), "{"]
    source = Source(written(tmp_path / "a.jsonl", *rows), domain)
    plan = scan([source], 2, "skip")
    assert texts_of(plan) == ["a text", "b text"]
    assert [(own, reason[:29]) for _, own, reason in places(plan)] == [
        (4, "id 'a' is already on line 1"),
        (5, "id 'b' is already on line 2"),
        (6, "id 'a' is already on line 1"),
        (7, "not JSON (Expecting property "),
    ]
    assert plan.skipped[0] == Skipped(source.path, 4, "id 'a' is already on line 1")
    written(source.path, *rows[:-1], line("b"))
    message = "line 4: id 'a' is already on line 1; line 5: id 'b' .* line 2; line 6: id 'a' .* line 1; and 1 more$"
    with pytest.raises(DataError, match=f"^{re.escape(str(source.path))}: {message}"):
        scan([source], 2)


@pytest.mark.usefixtures("hashes")
@pytest.mark.parametrize("domain", ["law", ""])
def test_a_document_that_comes_again_in_a_later_source_is_left_out_and_another_of_its_id_refused(tmp_path, domain):
    one = written(tmp_path / "one.jsonl", line("a", metadata={"y": 1}), line("b"))
    two = written(tmp_path / "two.parquet", *(line(id, title=None) for id in "xybc"))
    three = written(tmp_path / "three.gz", line("c"), line("d"), line("a", metadata={"y": 1}))
    given = [Source(path, domain) for path in (one, two, three)]
    plan = scan(given, 2)
    assert texts_of(plan) == ["a text", "b text", "x text", "y text", "c text", "d text"]
    assert [shard.skipped for shard in plan.shards] == [(), (), (2,), (0,)]
    assert plan.skipped == ()
    written(three, line("d"), line("a"), line("a"))
    reason = f"id 'a' is another document's on line 1 of {one}; give one of them another id"
    with pytest.raises(DataError, match=re.escape(f"{three}: line 2: {reason}; line 3: id 'a' is already on line 2")):
        scan(given, 2)
    plan = scan(given, 2, "skip")
    assert places(plan) == [("three.gz", 2, reason), ("three.gz", 3, "id 'a' is already on line 2")]
    assert texts_of(plan)[-1] == "d text"
    keys = ["domain law", "domain law 2", "domain law 3"] if domain else ["corpus 1", "corpus 2", "corpus 3"]
    assert [*plan.digests] == keys
    with pytest.raises(DataError, match=r"a\.parquet: row 2: id 'b' is already on row 1"):
        scan([Source(written(tmp_path / "a.parquet", line("b"), line("b")), domain)], 1)


@pytest.mark.usefixtures("hashes")
def test_a_file_that_is_given_twice_counts_once_and_domains_have_ids_of_their_own(tmp_path):
    path = written(tmp_path / "a.jsonl", line("a"), line("b"))
    plan = scan([Source(path), Source(path)], 1)
    assert texts_of(plan) == ["a text", "b text"]
    assert [*plan.digests] == ["corpus 1", "corpus 2"]
    other = written(tmp_path / "b.jsonl", line("a", "other"))
    plan = scan([Source(path, "law"), Source(other), Source(other, "tax")], 9)
    assert texts_of(plan) == ["a text", "b text", "a other", "a other"]
    assert [shard.source.domain for shard in plan.shards] == ["law", "", "tax"]


# What cannot be used

BAD = ["{", "[]", line("x", title=3), b'{"_id": "x", "text": "caf\xe9"}', '{"text": "x"}', "[" * 10**5, b"\xff\xfe"]


@pytest.mark.parametrize("ending", [".jsonl", ".gz"])
@pytest.mark.parametrize("domain", ["law", ""])
def test_lines_are_refused_as_read_corpus_refuses_them(tmp_path, ending, domain):
    lines = [b"\xef\xbb\xbf" + json.dumps(line("first")).encode(), "", *BAD, line("good"), line("fine")]
    with pytest.raises(DataError) as known:
        read_corpus(written(tmp_path / "a.jsonl", *lines))
    path = written(tmp_path / f"a{ending}", *lines)
    with pytest.raises(DataError) as error:
        scan([Source(path, domain)], 3)
    assert str(error.value) == str(known.value).replace("a.jsonl", path.name)
    assert "line 1: not JSON (Unexpected UTF-8 BOM" in str(error.value)
    plan = scan([Source(path, domain)], 3, "skip")
    assert [own.line for own in plan.skipped] == [1, *range(3, 3 + len(BAD))]
    assert [own.reason for own in plan.skipped if own.line == 6] == ["text is not valid Unicode text"]
    assert texts_of(plan) == ["good text", "fine text"]


def test_a_parquet_row_that_cannot_be_used_is_named(tmp_path):
    raw = pa.array([b"a", b"\xff", b"c", b"d"])
    text = pa.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pa.table({"_id": ["1", "2", None, "4"], "text": text}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: row 2: cannot be read .*; row 3: _id must be"):
        scan([Source(tmp_path / "a.parquet")], 3)
    plan = scan([Source(tmp_path / "a.parquet")], 3, "skip")
    assert texts_of(plan) == ["1 a", "4 d"]
    assert [own.line for own in plan.skipped] == [2, 3]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_that_is_of_no_use_at_all_is_always_refused(tmp_path, on_error):
    whole = gzip.compress(b"".join(json.dumps(line(n)).encode() + b"\n" for n in range(99)))
    table = written(tmp_path / "whole.parquet", *map(line, "abcdefg")).read_bytes()
    lacking = written(tmp_path / "lacking.parquet", {"_id": "a", "body": "x"}).read_bytes()
    for name, data, reason in [
        ("a.jsonl", b"", "the corpus is empty"),
        ("a.jsonl", b" \n\n", "the corpus is empty"),
        ("a.gz", b"", "the corpus is empty"),
        ("a.jsonl", b"{\n[]\n", "(none of its 2 records can be used; the first, )?line 1: not JSON"),
        ("a.gz", b'{"_id": "a", "text": "x"}', "not a gzip file"),
        ("a.gz", whole[: len(whole) // 2], "the gzip file ends too early"),
        ("a.gz", whole[:50] + b"\xff" * 50 + whole[100:], "not a gzip file, or a damaged one"),
        ("a.parquet", b"", "not a Parquet file"),
        ("a.parquet", b"nonsense" * 9, "not a Parquet file"),
        ("a.parquet", table[: len(table) // 2], "not a Parquet file"),
        ("a.parquet", lacking, "there is no column text; it needs _id and text, and has"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{re.escape(str(tmp_path / name))}: {reason}"):
            scan([Source(tmp_path / name)], 2, on_error)
    for ending in ENDINGS:
        with pytest.raises(DataError, match=f"ghost{ending} is not there"):
            scan([Source(tmp_path / f"ghost{ending}")], 2, on_error)
        (tmp_path / f"folder{ending}").mkdir()
        with pytest.raises(DataError, match=f"cannot read .*folder{ending}: Is a directory"):
            scan([Source(tmp_path / f"folder{ending}")], 2, on_error)


def test_arguments_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="shard_documents must be at least 1, got 0"):
        scan([], 0)
    with pytest.raises(ConfigError, match="on_error must be stop or skip, got 'warn'"):
        scan([], 1, "warn")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path, real = written(tmp_path / "a.parquet", line("a")), builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"a\.parquet: .* pip install 'moeret\[parquet\]'"):
        scan([Source(path)], 1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_that_changed_since_is_refused(tmp_path, ending):
    path = written(tmp_path / f"a{ending}", *map(line, range(9)))
    shards = scan([Source(path)], 4).shards
    written(path, *map(line, range(7)))
    assert read_shard(shards[0]) == [Document(str(n), "text") for n in range(4)]
    for shard in shards[1:]:
        with pytest.raises(DataError, match=r"changed while it was being indexed; run the command again$"):
            read_shard(shard)
    written(path, *(line(n, "") | {"text": None} for n in range(9)))
    with pytest.raises(DataError, match=r"changed while it was being indexed; run the command again$"):
        read_shard(shards[1])


@pytest.mark.parametrize("ending", ENDINGS)
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    text = "word " * 200
    path = written(tmp_path / f"a{ending}", *(line(n, text) for n in range(20_000)))
    tracemalloc.start()
    try:
        plan = scan([Source(path)], 1000)
        read_shard(plan.shards[-1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.documents == 20_000
    assert peak < 20_000 * len(text) / 5
