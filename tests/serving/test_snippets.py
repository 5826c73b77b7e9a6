"""Snippets show the words of a query where they stand."""

from hypothesis import given
from hypothesis import strategies as st

from moeret.data.lexical import stems
from moeret.serving.snippets import excerpt, words_in


def stems_of(query):
    return frozenset(stems([query])[0])


def test_words_are_found_by_their_stems_where_they_stand():
    text = "Signing İ is for SIGNATORIES; the signer signed."
    assert [text[start:end] for (start, end), _ in words_in(text, stems_of("who signed"))] == ["Signing", "signed"]


def test_a_snippet_is_where_most_of_the_words_stand():
    text = "gold " + "filler words here " * 50 + "gold and silver are metals " + "more of the same " * 50
    found = excerpt(text, stems_of("silver and gold"), 100)
    assert "gold and silver" in found.text
    assert [found.text[start:end] for start, end in found.words] == ["gold", "silver"]
    assert not found.text.startswith(" ") and len(found.text) <= 100


def test_without_the_words_it_is_the_beginning():
    assert excerpt("a long story about fruit", stems_of("iron"), 12) == ("a long story", 0, [])
    assert excerpt("", stems_of("iron")) == ("", 0, [])


@given(st.text(alphabet="ab sS\U0001f34eß ", max_size=200), st.text(alphabet="ab s", max_size=20), st.integers(1, 60))
def test_a_snippet_is_part_of_the_text_and_its_words_are_words_of_the_query(text, query, width):
    wanted = stems_of(query)
    found = excerpt(text, wanted, width)
    assert text[found.start :].startswith(found.text) and len(found.text) <= width
    for start, end in found.words:
        assert 0 <= start < end <= len(found.text)
        assert stems([found.text[start:end]])[0][0] in wanted
