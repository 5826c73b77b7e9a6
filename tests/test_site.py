"""The site of the docs can be built without a warning, has every page, and asks no other host."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import moeret

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. --strict makes an error of any warning: a link or an anchor that leads nowhere, a page without a place."""
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        ROOT / "mkdocs.yml",
        "--site-dir",
        out,
    ]
    built = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return out


class Requests(HTMLParser):
    """Collects what a browser asks for when it opens a page; links that a reader may click are not of them."""

    def __init__(self, page: Path):
        super().__init__()
        self.found: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        if tag != "a":
            self.found += [value for name in ("src", "href", "data") if (value := own.get(name))]


def test_every_page_and_picture_is_there(site):
    pages = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    pictures = {path.relative_to(DOCS) for path in DOCS.rglob("*.svg")}
    for path in {Path("index.html"), Path("BENCHMARKS.html")} | pages | pictures:
        assert (site / path).is_file(), path


def test_opening_a_page_asks_this_host_alone(site):
    for page in site.rglob("*.html"):
        for wanted in Requests(page).found:
            assert not re.match(r"(\w+:)?//", wanted), (page.name, wanted)
            place = site / wanted[1:] if wanted.startswith("/") else page.parent / wanted
            assert wanted.startswith(("#", "data:")) or Path(str(place).split("?")[0]).exists(), (page.name, wanted)
    assert not any(re.search(r"url\(.?(https?:)?//|@import", style.read_text()) for style in site.rglob("*.css"))


def test_the_reference_has_every_public_name(site):
    page = (DOCS / "reference.md").read_text()
    described = re.findall(r"^::: (moeret\.\S+)$", page, re.MULTILINE)
    assert {f"moeret.{home}.{name}" for name, home in moeret._HOMES.items()} <= {*described}
    anchors = (site / "reference.html").read_text()
    for name in described:
        assert f'"{name}"' in anchors, name
