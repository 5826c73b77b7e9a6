"""The quickstart's corpora: docstrings are parsed, never run, and make BEIR folders that can be read back."""

import ast
from pathlib import Path

import pytest

from moeret.data import docstrings
from moeret.data.beir import read_domain
from moeret.data.docstrings import installed_libraries, read_library, write_domains
from moeret.errors import DataError

REST = "It does so with a good deal of care, step by step, and says in detail what became of every part of it."


def docstring(number: int) -> str:
    return f"Does useful thing number {number} well.\n\n    Thing {number}. {REST}"


def function(name: str, number: int, kind: str = "def") -> str:
    return f'{kind} {name}(x):\n    """{docstring(number)}\n    """\n\n'


def written(folder: Path, **files: str) -> Path:
    for name, source in files.items():
        path = folder / f"{name.replace('__SLASH__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def names(folder: Path) -> list[str]:
    return [entry.name for entry in read_library("lib", folder)]


def test_functions_classes_methods_and_modules_are_entries(tmp_path):
    written(
        tmp_path,
        __init__=f'"""{docstring(1)}\n    """\n',
        m=f'"""{docstring(2)}\n    """\n'
        + function("f", 3)
        + function("g", 4, "async def")
        + f'class C:\n    """{docstring(5)}\n    """\n    def method(self):\n        """{docstring(6)}\n        """\n',
    )
    assert names(tmp_path) == ["lib", "lib.m", "lib.m.f", "lib.m.g", "lib.m.C", "lib.m.C.method"]


def test_an_entry_is_the_summary_line_and_the_rest(tmp_path):
    (entry,) = read_library("lib", written(tmp_path, m=function("f", 7)))
    assert entry.summary == "Does useful thing number 7 well."
    assert entry.rest == f"Thing 7. {REST}"


def test_sources_are_never_run(tmp_path):
    written(tmp_path, m="from pathlib import Path\nPath(__file__).unlink()\nraise SystemExit\n" + function("f", 1))
    assert names(tmp_path) == ["lib.m.f"]
    assert (tmp_path / "m.py").is_file()


def test_private_names_and_tests_are_left_out(tmp_path):
    written(
        tmp_path,
        m=function("_private", 1) + function("public", 2),
        _hidden=function("f", 3),
        tests__SLASH__test_m=function("f", 4),
        _vendor__SLASH__other=function("f", 5),
        sub__SLASH__m=function("f", 6),
    )
    assert names(tmp_path) == ["lib.m.public", "lib.sub.m.f"]


def test_files_that_are_no_python_are_passed_over_in_silence(tmp_path):
    written(
        tmp_path,
        broken="def f(:\n",
        future="x = 1 is 1\ny = '\\d'\n" + function("f", 1),  # would warn
        deep="x = " + "(" * 500 + ")" * 500,
    )
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\0")
    (tmp_path / "folder.py").mkdir()
    assert names(tmp_path) == ["lib.future.f"]


@pytest.mark.parametrize(
    "text",
    {
        "short summary": f"Too short.\n\n{REST}",
        "long summary": f"{'word ' * 41}\n\n{REST}",
        "no rest": "Does a useful thing quite well.",
        "short rest": "Does a useful thing quite well.\n\nShort.",
        "rest that repeats the summary": f"Does a useful thing well.\n\nDOES a useful, thing well! {REST}",
        "summary without words": f"--- --- --- ---\n\n{REST}",
        "text that is not Unicode": f"Does a useful thing quite well.\n\n\\ud800 {REST}",
        "nothing": "",
    }.items(),
    ids=lambda case: case[0],
)
def test_docstrings_that_make_no_question_and_answer_are_left_out(tmp_path, text):
    written(tmp_path, m=f'def f():\n    """{text[1]}"""\n' + function("good", 1))
    assert names(tmp_path) == ["lib.m.good"]


def test_no_summary_and_no_text_comes_twice(tmp_path):
    again = f'def again():\n    """Another summary, but the same text.\n\n    Thing 1. {REST.upper()}\n    """\n'
    written(tmp_path, m=function("f", 1) + function("g", 1) + again + function("h", 2))
    assert names(tmp_path) == ["lib.m.f", "lib.m.h"]


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three libraries instead of the installed ones: two large enough, one not."""
    counts = {"large": 130, "larger": 160, "small": 99}
    folders = {}
    for number, (name, count) in enumerate(counts.items()):
        source = "".join(function(f"f{n}", 1000 * number + n) for n in range(count))
        folders[name] = written(tmp_path / "sources" / name, m=source)
    monkeypatch.setattr(docstrings, "installed_libraries", lambda: folders)


@pytest.mark.usefixtures("libraries")
def test_written_domains_can_be_read_and_their_splits_share_nothing(tmp_path):
    domains = write_domains(tmp_path / "out", per_library=120, libraries=5)
    assert list(domains) == ["larger", "large"]
    for name, folder in domains.items():
        domain = read_domain(name, folder, ("train", "dev", "test"))
        assert len(domain.corpus) == 120
        asked = [query for split in domain.splits.values() for query in split.queries]
        assert len(asked) == len({*asked}) == 120
        assert len(domain.splits["train"].queries) > len(domain.splits["test"].queries) > 10
        texts = {document.id: document.contents for document in domain.corpus}
        for split in domain.splits.values():
            for query, text in split.queries.items():
                (answer,) = split.qrels[query]
                assert text not in texts[answer]


@pytest.mark.usefixtures("libraries")
def test_the_same_sources_make_the_same_domains(tmp_path):
    for out in ("one", "two"):
        write_domains(tmp_path / out, per_library=110, libraries=2)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) == 2 * 5
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


@pytest.mark.usefixtures("libraries")
def test_only_as_many_libraries_as_asked_for(tmp_path):
    assert list(write_domains(tmp_path, per_library=10, libraries=1)) == ["larger"]


def test_one_library_is_nothing_to_route_between(tmp_path, monkeypatch):
    source = "".join(function(f"f{n}", n) for n in range(120))
    folder = written(tmp_path / "alone", m=source)
    ast.parse(source)
    monkeypatch.setattr(docstrings, "installed_libraries", lambda: {"alone": folder})
    with pytest.raises(DataError, match="fewer than two installed libraries"):
        write_domains(tmp_path / "out", per_library=100, libraries=5)


def test_the_standard_library_and_our_own_needs_are_there():
    found = installed_libraries()
    assert {"python", "jax", "numpy"} <= found.keys()
    assert all(folder.is_dir() for folder in found.values())
