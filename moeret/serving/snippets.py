"""The part of a text that shows why it was found: where most of a query's words stand, and where exactly."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from moeret.data.lexical import stem_words

Range = tuple[int, int]
"""[start, end) of a word in a text, in characters."""
_WORD = re.compile(r"\w\w+")
_READ = 20_000
"""Characters of a text that are looked at."""


class Excerpt(NamedTuple):
    """Part of a text, where it begins there, and where in it the query's words stand."""

    text: str
    start: int
    words: list[Range]


def words_in(text: str, stems: frozenset[str]) -> list[tuple[Range, str]]:
    """Where words of these stems stand in a text, and the stem of each."""
    places = [match.span() for match in _WORD.finditer(text)]
    own = stem_words([text[start:end].lower() for start, end in places])
    return [(place, stem) for place, stem in zip(places, own, strict=True) if stem in stems]


def excerpt(text: str, stems: frozenset[str], width: int = 240) -> Excerpt:
    """At most `width` characters that have the most of these stems, the first such; the beginning if it has none."""
    text = text[:_READ]
    found = words_in(text, stems)
    start, end = _window(text, found, width)
    inside = [(a - start, b - start) for (a, b), _ in found if start <= a and b <= end]
    return Excerpt(text[start:end], start, inside)


def _window(text: str, found: Sequence[tuple[Range, str]], width: int) -> Range:
    """Where the words with the most different stems, then the most words, stand in so many characters."""
    best, begin, last = (0, 0), 0, 0
    for first, ((start, _), _) in enumerate(found):
        inside = [(end, stem) for (_, end), stem in found[first : first + width] if end <= start + width]
        kinds = len({stem for _, stem in inside})
        if (kinds, len(inside)) > best:
            best, begin, last = (kinds, len(inside)), start, inside[-1][0]
    start = max(0, begin - (width - (last - begin)) // 2)
    if start:  # at a word's beginning
        start = text.find(" ", start, begin) + 1 or begin
    end = min(len(text), start + width)
    space = text.rfind(" ", max(last, start + 1), end + 1)
    return start, space if space > 0 and end < len(text) else end
