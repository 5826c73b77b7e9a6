"""The report is one file that needs no other, and its numbers are those of the evaluation."""

import re
import shutil
from xml.etree import ElementTree

import pytest

import moeret
from moeret.cli import main
from moeret.evaluation.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory, model_folder, index_folder, two_domains):
    out = tmp_path_factory.mktemp("report") / "report.html"
    return write_report(model_folder, index_folder, two_domains, out).read_text()


def test_it_has_every_part_with_a_picture_and_asks_nobody(page):
    parts = re.split("<h2>", page)[1:]
    assert [part.partition("<")[0] for part in parts] == [
        "Quality",
        "Routing",
        "Domains",
        "Training",
        "Lengths",
        "Cost",
    ]
    assert all("<svg" in part for part in parts[:-1])
    assert all(part.index("<svg") < part.index("<table") for part in parts if "<svg" in part and "<table" in part)
    for svg in re.findall("<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", re.sub(r"xlink:href=\"#", "", page))
    assert "<script" not in page and "nan" not in re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_its_numbers_are_the_evaluations(page, index_folder, two_domains):
    report = moeret.evaluate(moeret.Retriever.load(index_folder), two_domains)
    for name, own in report["domains"].items():
        cells = re.search(f"<tr><td>{name}</td>(.*?)</tr>", page)[1]
        found = re.findall("<td>(.*?)</td>", cells)
        assert found[0] == str(own["queries"])
        assert found[5] == f"{100 * own['nDCG@10']:.1f}" and found[7] == f"{100 * own['R@100']:.1f}"
    assert f"for {report['router']['accuracy']:.1%} of the queries" in page
    assert f"searches {report['cost']['indexes']:.2f} of" in page


def test_without_the_training_folder_the_curves_are_gone_and_the_rest_is_there(
    tmp_path, model_folder, index_folder, two_domains, capsys, monkeypatch
):
    bare = shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("training"))
    domains = [word for name, path in two_domains.items() for word in ("--domain", f"{name}={path}")]
    out = tmp_path / "own.html"
    monkeypatch.setattr("sys.argv", ["moeret", "report", str(bare), str(index_folder), *domains, "--out", str(out)])
    main()
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert "is gone, and with it the curves" in out.read_text()


def test_two_towers_are_reported_too(tmp_path, both, two_domains):
    folder = both.index.root.parent
    page = write_report(folder / "model", folder / "index", two_domains, tmp_path / "report.html").read_text()
    base = moeret.evaluate(both, two_domains, baselines=True)["systems"]["base_one_index"]["domains"]
    for name, own in base.items():
        found = re.findall("<td>(.*?)</td>", re.search(f"<tr><td>{name}</td>(.*?)</tr>", page)[1])
        assert found[6] == f"{100 * own['nDCG@10']:.1f}"


def test_what_cannot_be_reported_is_refused(tmp_path, model_folder, index_folder, two_domains, both):
    with pytest.raises(moeret.ConfigError, match="directory that is there"):
        write_report(model_folder, index_folder, two_domains, tmp_path / "none" / "report.html")
    other = both.index.root.parent / "model"
    with pytest.raises(moeret.ConfigError, match="another model"):
        write_report(other, index_folder, two_domains, tmp_path / "report.html")
    with pytest.raises(moeret.ArtifactError):
        write_report(tmp_path, index_folder, two_domains, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
