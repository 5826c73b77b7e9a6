"""Filters: which documents a search may find, by their metadata.

`{"lang": "en", "year": {"gte": 2020}}` allows documents whose metadata fulfil every condition. A condition is a value that the
field equals, or operators with their operands: eq, ne, in, gt, gte, lt, lte, exists. A field that is a list fulfils what one of
its elements does (ne: what none equals); a field of an object within is written with dots. Texts compare with texts, numbers with
numbers, true and false count as 1 and 0, and null is as if the field were not there.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moeret.config import require
from moeret.errors import ConfigError

Where = Mapping[str, Any]
Select = Callable[[str, list[Any]], set[int]]
"""(SQL condition on a field's `value`, its parameters) -> the rows that have a field of which it holds."""

_COMPARE = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_LONGEST = 256
"""Characters of the longest text that can be filtered by: longer ones are no labels, and would be stored twice."""


def fields(metadata: str) -> Iterator[tuple[str, str | int | float]]:
    """Every (field, value) of a document's metadata that can be filtered by."""
    if metadata:
        yield from dict.fromkeys(_flat("", json.loads(metadata)))


def _flat(name: str, value: Any) -> Iterator[tuple[str, str | int | float]]:
    if isinstance(value, dict):
        for key, own in value.items():
            yield from _flat(f"{name}.{key}" if name else key, own)
    elif isinstance(value, list):
        for own in value:
            yield from _flat(name, own)
    elif value is not None and not (isinstance(value, str) and len(value) > _LONGEST):
        yield name, _stored(value)


def _stored(value: str | int | float) -> str | int | float:
    """As the database keeps it: its whole numbers have 64 bits."""
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else float(value) if abs(value) < 2**1023 else str(value)
    return value


def to_json(where: Where) -> str:
    """A filter as text, the same for equal ones; sets and tuples become lists."""
    return json.dumps(where, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return value.item()  # numpy's


def check(where: Where) -> None:
    """Raises ConfigError where a filter makes no sense."""
    try:
        repr(where)
    except ValueError:  # more digits than Python prints
        raise ConfigError("where: nothing can be compared with a whole number of thousands of digits") from None
    require(isinstance(where, Mapping), f"where must be a mapping of fields to conditions, got {type(where).__name__}")
    for field, condition in where.items():
        require(isinstance(field, str) and bool(field), f"where: a field is a non-empty string, got {field!r}")
        require(_is_written(field), f"where: field {field!r} is not valid Unicode text")
        if not isinstance(condition, Mapping):
            _check_value(field, condition)
            continue
        require(bool(condition), f"where: field {field!r} has no condition")
        for operator, operand in condition.items():
            known = ("eq", "ne", "in", *_COMPARE, "exists")
            require(operator in known, f"where: field {field!r} has no operator {operator!r}; use {', '.join(known)}")
            if operator == "exists":
                require(isinstance(operand, bool), f"where: {field!r} exists needs true or false, got {operand!r}")
            elif operator == "in":
                require(isinstance(operand, (list, tuple, set)), f"where: {field!r} in needs a list, got {operand!r}")
                for value in operand:
                    _check_value(field, value)
            else:
                _check_value(field, operand)


def _check_value(field: str, value: Any) -> None:
    require(_is_written(value), f"where: field {field!r} cannot be compared with a text that is not valid Unicode")
    fits = isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    require(fits, f"where: field {field!r} can be compared with a text or a finite number, got {value!r}")
    require(
        not isinstance(value, str) or len(value) <= _LONGEST,
        f"where: field {field!r} cannot be compared with a text of more than {_LONGEST} characters",
    )


def _is_written(value: Any) -> bool:
    """Whether a value is no text, or one that the database can hold."""
    try:
        value.encode() if isinstance(value, str) else None
    except UnicodeEncodeError:
        return False
    return True


def matching(where: Where, count: int, select: Callable[[str], Select]) -> set[int]:
    """The rows, of `count`, that fulfil every condition; `select` finds those of one field."""
    rows = set(range(count))
    for field, condition in where.items():
        conditions = condition if isinstance(condition, Mapping) else {"eq": condition}
        for operator, operand in conditions.items():
            rows = _kept(rows, operator, operand, select(field))
    return rows


def _kept(rows: set[int], operator: str, operand: Any, select: Select) -> set[int]:
    if operator == "exists":
        having = select("1", [])
        return rows & having if operand else rows - having
    if operator == "in":
        values = [_stored(value) for value in operand]
        return rows & set().union(*(select("value = ?", [value]) for value in values))
    if operator in ("eq", "ne"):
        equal = select("value = ?", [_stored(operand)])
        return rows & equal if operator == "eq" else rows - equal
    kind = "('text')" if isinstance(operand, str) else "('integer', 'real')"
    return rows & select(f"value {_COMPARE[operator]} ? AND typeof(value) IN {kind}", [_stored(operand)])
