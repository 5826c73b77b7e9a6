"""Filters allow what a plain reading of them allows."""

import json
import operator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeret.errors import ConfigError
from moeret.retrieval.documents import DocumentStore, write_documents
from moeret.retrieval.filters import check
from moeret.types import Document

SCALARS = st.one_of(
    st.sampled_from(["en", "de", "", "2020", "ü'\"; --", "a%_"]),
    st.sampled_from([-1, 0, 1, 2020, 2021, 2**70, -(2**70), 10**400]),
    st.sampled_from([0.0, 0.5, 2020.0, 2020.5]),
    st.booleans(),
)
VALUES = st.one_of(SCALARS, st.none(), st.lists(SCALARS, max_size=3))
METADATA = st.dictionaries(
    st.sampled_from(["lang", "year"]), st.one_of(VALUES, st.fixed_dictionaries({"sub": VALUES})), max_size=2
)
CONDITION = st.one_of(
    SCALARS,
    st.dictionaries(st.sampled_from(["eq", "ne", "gt", "gte", "lt", "lte"]), SCALARS, min_size=1, max_size=2),
    st.fixed_dictionaries({"in": st.lists(SCALARS, max_size=3)}),
    st.fixed_dictionaries({"exists": st.booleans()}),
)
WHERE = st.dictionaries(st.sampled_from(["lang", "year", "year.sub"]), CONDITION, max_size=2)
ORDER = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


def values_of(metadata, field):
    for name in field.split("."):
        metadata = metadata.get(name) if isinstance(metadata, dict) else None
    own = metadata if isinstance(metadata, list) else [metadata]
    return [value for value in own if value is not None and not isinstance(value, dict)]


def number(value):
    """As the database has it: whole numbers beyond 64 bits are floating, those beyond these texts."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return float(value) if abs(value) < 2**1023 else str(value)
    return value


def holds(name, operand, values):
    if name == "exists":
        return bool(values) is operand
    if name == "in":
        return any(holds("eq", one, values) for one in operand)
    values, operand = [number(value) for value in values], number(operand)
    if name in ("eq", "ne"):
        return (operand in values) is (name == "eq")
    alike = [value for value in values if isinstance(value, str) is isinstance(operand, str)]
    return any(ORDER[name](value, operand) for value in alike)


def by_hand(where, metadata):
    conditions = {field: own if isinstance(own, dict) else {"eq": own} for field, own in where.items()}
    return all(
        holds(name, operand, values_of(metadata, field))
        for field, own in conditions.items()
        for name, operand in own.items()
    )


@settings(deadline=None, max_examples=150)
@given(st.lists(METADATA, min_size=1, max_size=6), WHERE)
def test_a_filter_allows_the_documents_that_fulfil_every_condition(tmp_path_factory, rows, where):
    check(where)
    path = tmp_path_factory.mktemp("filters") / "d"
    write_documents(path, [Document(str(n), "x", "", json.dumps(row) if row else "") for n, row in enumerate(rows)])
    store = DocumentStore(path)
    assert store.matching(where, len(rows)).tolist() == [by_hand(where, row) for row in rows]
    store.close()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        pytest.param({"a": {"in": [10**5000]}}, "thousands of digits", id="more digits than Python prints"),
        ("lang", " must be a mapping"),
        ({"": 1}, "a field is a non-empty string"),
        ({3: 1}, "a field is a non-empty string"),
        ({"year": {}}, "'year' has no condition"),
        ({"year": {"above": 3}}, "no operator 'above'; use eq, ne, in, gt, gte, lt, lte, exists"),
        ({"year": {"$gt": 3}}, "no operator"),
        ({"year": None}, "a text or a finite number, got None"),
        ({"year": [1, 2]}, "a text or a finite number"),
        ({"year": float("nan")}, "a text or a finite number, got nan"),
        ({"year": {"in": "abc"}}, "in needs a list"),
        ({"year": {"in": [None]}}, "a text or a finite number"),
        ({"year": {"exists": 1}}, "exists needs true or false"),
        ({"url": "x" * 257}, "more than 256 characters"),
        ({"url": {"in": ["\ud800"]}}, "a text that is not valid Unicode"),
        ({"\ud800": 1}, "is not valid Unicode text"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(where, reason):
    with pytest.raises(ConfigError, match=r"where.*" + reason.replace("$", r"\$").replace("?", r"\?")):
        check(where)


def test_long_texts_and_null_are_as_if_not_there(tmp_path):
    rows = [{"a": "x" * 257}, {"a": None}, {"a": []}, {"a": "x" * 256}]
    write_documents(tmp_path / "d", [Document(str(n), "", "", json.dumps(row)) for n, row in enumerate(rows)])
    store = DocumentStore(tmp_path / "d")
    assert store.matching({"a": {"exists": True}}, 4).tolist() == [False, False, False, True]
    assert store.matching({"a": "x" * 256}, 4).tolist() == [False, False, False, True]
    store.close()
