"""A model that went to the hub comes back as it was, whole or not at all; the hub is a small server on this machine."""

import base64
import errno
import hashlib
import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from conftest import QUERIES
from huggingface_hub import HfApi, constants, file_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

import moeret
from moeret import artifact, hub
from moeret.cli import main
from moeret.models.sharing import pull_model, push_model

TOKEN, REPO = "hf_of_the_test", "someone/experts"


class Hub(ThreadingHTTPServer):
    """As much of the hub as pushing and pulling need: repositories as {name: bytes}, numbered commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos, self.private, self.commits, self.served, self.broken = {}, {}, {}, [], None

    def sha(self, repo: str) -> str:
        digests = {name: hashlib.sha1(own).hexdigest() for name, own in self.repos[repo].items()}
        return artifact.fingerprint([repo, self.commits.setdefault(repo, 0), digests])[:40]


class Answer(BaseHTTPRequestHandler):
    """One request to the hub."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api, _, rest = path.partition("/api/models/")
        repo = "/".join((rest if not api else path.lstrip("/")).split("/")[:2])
        allowed = not self.server.private.get(repo) or self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.server.repos or not allowed:
            return self.say(404 if self.headers.get("Authorization") else 401, X_Error_Code="RepoNotFound")
        files, sha = self.server.repos[repo], self.server.sha(repo)
        if not api:
            about = {
                "id": repo,
                "sha": sha,
                "private": self.server.private[repo],
                "downloads": 0,
                "likes": 0,
                "tags": [],
            }
            return self.say(200, about | {"siblings": [{"rfilename": name} for name in files]})
        revision, _, name = path.partition("/resolve/")[2].partition("/")
        if revision != sha or name not in files:
            return self.say(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        self.server.served.append((self.command, name))
        if self.server.broken == name and self.command == "GET":
            return self.say(403)
        etag = hashlib.sha1(files[name]).hexdigest()
        return self.say(200, files[name], ETag=f'"{etag}"', X_Repo_Commit=sha)

    do_HEAD = do_GET

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        raw = b""
        while size := int(self.rfile.readline(), 16):
            raw += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return raw

    def do_POST(self):
        raw = self.body()
        if self.path == "/api/validate-yaml":
            return self.say(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(401, {"error": "who are you"})
        if self.path == "/api/repos/create":
            asked = json.loads(raw)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.server.repos:
                return self.say(409, {"url": repo})
            self.server.repos[repo] = {".gitattributes": b""}
            self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
            return self.say(200, {"url": f"{ADDRESS}/{repo}"})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            own = [
                {"path": own["path"], "uploadMode": "regular", "shouldIgnore": False}
                for own in json.loads(raw)["files"]
            ]
            return self.say(200, {"files": own})
        return self.commit(repo, [json.loads(line) for line in raw.splitlines()])

    def commit(self, repo, lines):
        [parent] = [line["value"]["parentCommit"] for line in lines if line["key"] == "header"]
        if parent != self.server.sha(repo):
            return self.say(412, {"error": "moved"})
        files = dict(self.server.repos[repo])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self.server.repos[repo] = files
        self.server.commits[repo] += 1
        sha = self.server.sha(repo)
        return self.say(200, {"commitUrl": f"{ADDRESS}/{repo}/commit/{sha}", "commitOid": sha})


ADDRESS = "https://huggingface.co"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub that knows one token, which is ours."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, address))
    monkeypatch.setattr(constants, "ENDPOINT", address)  # as HF_ENDPOINT would, had the client not been imported yet
    for place in (constants, file_download):
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_comes_back_as_it_was(server, model_folder, tmp_path):
    url = push_model(model_folder, REPO, private=True)
    assert url.startswith(f"{ADDRESS}/{REPO}/commit/") and server.private[REPO]
    assert not any(name.startswith("training") for name in server.repos[REPO])
    published = pull_model(REPO, tmp_path / "pulled")
    assert published.fingerprint == artifact.read(model_folder, "model").fingerprint
    before, after = (moeret.Model.load(folder) for folder in (model_folder, tmp_path / "pulled"))
    for expert in (None, "metal", "auto"):
        np.testing.assert_array_equal(
            before.encode_query(QUERIES, expert=expert), after.encode_query(QUERIES, expert=expert)
        )
    names = {path.name for path in (tmp_path / "pulled").iterdir()}
    assert names == {path.name for path in model_folder.iterdir()} - {"training", ".lock"} | {"README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["pulled"]


def test_the_clients_bars_are_as_they_were(server, model_folder, tmp_path):
    for shown in (True, False):
        (enable_progress_bars if shown else disable_progress_bars)()
        push_model(model_folder, REPO, show_progress_bar=not shown)
        pull_model(REPO, tmp_path / str(shown), show_progress_bar=not shown)
        assert are_progress_bars_disabled() != shown


def test_a_later_push_replaces_the_model_and_leaves_other_peoples_files(server, model_folder, tmp_path):
    push_model(model_folder, REPO)
    theirs = {"picture.png": b"1", "experts/notes.txt": b"2", "base/of-mine.txt": b"3"}
    server.repos[REPO] |= theirs
    shutil.copytree(model_folder, tmp_path / "m")
    moeret.remove_expert(tmp_path / "m", "metal")
    push_model(tmp_path / "m", REPO)
    assert "made.json" in server.repos[REPO]
    assert not any("metal" in name for name in server.repos[REPO]) and theirs.items() <= server.repos[REPO].items()
    pull_model(REPO, tmp_path / "pulled")
    assert moeret.Model.load(tmp_path / "pulled").experts == ("fruit",)


@pytest.mark.parametrize(
    "manifest", [b'{"name": "of a web page"}', b'{"kind": "index", "format": "moeret-10"}', b"[]", b"\xff"]
)
def test_somebody_elses_manifest_is_no_model_to_replace(server, model_folder, manifest):
    server.repos[REPO] = {"manifest.json": manifest, "base/x": b""}
    server.private[REPO] = False
    before = dict(server.repos[REPO])
    with pytest.raises(moeret.ArtifactError, match="holds something else"):
        push_model(model_folder, REPO)
    assert server.repos[REPO] == before


def test_a_model_of_another_format_is_replaced(server, model_folder):
    push_model(model_folder, REPO)
    raw = json.loads(server.repos[REPO]["manifest.json"]) | {"format": "moeret-1"}
    raw["files"]["old.bin"] = {}
    server.repos[REPO] |= {"manifest.json": json.dumps(raw).encode(), "old.bin": b""}
    push_model(model_folder, REPO)
    assert "old.bin" not in server.repos[REPO]


def test_the_card_says_what_is_known_and_no_file_has_a_path(server, model_folder, base_folder, two_domains):
    push_model(
        model_folder,
        REPO,
        license="apache-2.0",
        data_licenses={"metal": "cc0 | or\nso"},
        data_sources={"fruit": "trees"},
    )
    card = server.repos[REPO]["README.md"].decode()
    head, _, text = card.removeprefix("---\n").partition("---\n")
    own = dict(line.split(": ", 1) for line in head.splitlines())
    assert json.loads(own["library_name"]) == "moeret" and json.loads(own["license"]) == "apache-2.0"
    assert json.loads(own["pipeline_tag"]) == "sentence-similarity" and "moeret" in json.loads(own["tags"])
    assert "base_model" not in own, "a folder's name is nobody's business"
    for folder in (base_folder, model_folder, *two_domains.values()):
        assert not any(str(folder.parent).encode() in content for content in server.repos[REPO].values())
    [fruit] = [line for line in text.splitlines() if line.startswith("| fruit | 12 | ")]
    [metal] = [line for line in text.splitlines() if line.startswith("| metal | 12 | ")]
    assert fruit.endswith("| trees | unknown |") and metal.endswith(r"| unknown | cc0 \| or so |")
    entry = artifact.read(model_folder, "model").meta["experts"][0]
    assert f"{entry['base_dev_ndcg']['all']:.3f} → {entry['dev_ndcg']['all']:.3f}" in text
    made = json.loads((model_folder / "made.json").read_text())["train"]
    assert f"| train | {made['hours']:.2f} | {made['device']} | " in text and f"moeret pull {REPO}" in text


def test_a_base_that_the_hub_has_is_named(server, model_folder, monkeypatch):
    server.repos["someone/tiny"], server.private["someone/tiny"] = {}, False
    published = artifact.read(model_folder, "model")
    from moeret.models import sharing

    for name, found in (("someone/tiny", "someone/tiny"), ("data/base", None), ("../base", None), ("/a/base", None)):
        published.meta["base"]["name"] = name
        assert sharing._base_on_hub(published) == found


def test_without_hours_the_card_says_unknown(server, model_folder, tmp_path):
    push_model(model_folder, REPO)
    shutil.copytree(model_folder, tmp_path / "m")
    for damaged in (None, "[]", '{"train": {"hours": "x"}}'):
        (tmp_path / "m" / "made.json").unlink(missing_ok=True)
        if damaged:
            (tmp_path / "m" / "made.json").write_text(damaged)
        push_model(tmp_path / "m", REPO)
        assert ("made.json" in server.repos[REPO]) == (damaged is not None)
        assert "Hours and device: unknown." in server.repos[REPO]["README.md"].decode()


def test_a_folder_that_somebody_made_meanwhile_is_left_alone(server, model_folder, tmp_path, monkeypatch):
    push_model(model_folder, REPO)
    commit_of = hub.commit_of
    monkeypatch.setattr(hub, "commit_of", lambda *own: (tmp_path / "pulled").mkdir() or commit_of(*own))
    with pytest.raises(moeret.ConfigError, match="is there already"):
        pull_model(REPO, tmp_path / "pulled")
    assert [*(tmp_path / "pulled").iterdir()] == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_no_more_is_not_the_network(code):
    with pytest.raises(moeret.HubError, match="cannot be read or written here") as caught, hub._in_words(REPO):
        raise OSError(code, "no more")
    assert "network" not in str(caught.value)


def test_a_pull_that_was_cut_off_goes_on(server, model_folder, tmp_path):
    push_model(model_folder, REPO)
    server.broken = next(name for name in server.repos[REPO] if name.startswith("router"))
    with pytest.raises(moeret.HubError, match=REPO):
        pull_model(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()
    server.broken, server.served = None, []
    pull_model(REPO, tmp_path / "pulled")
    again = [name for kind, name in server.served if kind == "GET"]
    assert "base/model.safetensors" not in again and any(name.startswith("router") for name in again)
    assert moeret.Model.load(tmp_path / "pulled").experts == ("fruit", "metal")


def test_files_of_an_earlier_commit_do_not_stay(server, model_folder, tmp_path):
    push_model(model_folder, REPO)
    server.broken = next(name for name in server.repos[REPO] if name.startswith("router"))
    with pytest.raises(moeret.HubError):
        pull_model(REPO, tmp_path / "pulled")
    shutil.copytree(model_folder, tmp_path / "m")
    moeret.remove_expert(tmp_path / "m", "metal")
    push_model(tmp_path / "m", REPO)
    pull_model(REPO, tmp_path / "pulled")
    assert not [path for path in (tmp_path / "pulled").rglob("*metal*")]


@pytest.mark.parametrize(("damage", "told"), [
    (lambda files: files.update({"base/model.safetensors": b"other"}), "is damaged"),
    (lambda files: files.pop("base/config.json"), "is missing"),
    (lambda files: files.pop("manifest.json"), "no manifest.json"),
    (lambda files: files.update({"manifest.json": b"{}"}), "manifest.json is damaged"),
])  # fmt: skip
def test_what_is_no_whole_model_never_lies_at_out(server, model_folder, tmp_path, damage, told):
    push_model(model_folder, REPO)
    damage(server.repos[REPO])
    with pytest.raises(moeret.ArtifactError, match=f"{REPO} is no whole moeret model .*{told}"):
        pull_model(REPO, tmp_path / "pulled")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["../x", "/x", ".cache/x", ".lock", "x/", "", "README.md"])
def test_a_manifest_with_files_that_a_pull_would_not_keep_is_refused(server, model_folder, tmp_path, name):
    push_model(model_folder, REPO)
    server.repos[REPO][name] = b"x"
    raw = json.loads(server.repos[REPO]["manifest.json"])
    raw["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    digests = {name: own["sha256"] for name, own in raw["files"].items()}
    raw["fingerprint"] = artifact.fingerprint(["model", raw["meta"], digests])
    server.repos[REPO]["manifest.json"] = json.dumps(raw).encode()
    with pytest.raises(
        moeret.ArtifactError, match=r"names no file of its directory|lists README\.md, which is no part"
    ):
        pull_model(REPO, tmp_path / "pulled")
    assert [*tmp_path.iterdir()] == []


def run(monkeypatch, capsys, *arguments):
    """The command's exit code, and what it printed."""
    monkeypatch.setattr("sys.argv", ["moeret", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr()


def test_the_commands_push_and_pull(server, model_folder, tmp_path, capsys, monkeypatch):
    code, said = run(monkeypatch, capsys, "push", model_folder, REPO, "--data-license", "fruit=cc0-1.0", "--json")
    assert code == 0 and json.loads(said.out)["repo_id"] == REPO and not server.private[REPO]
    code, said = run(monkeypatch, capsys, "pull", REPO, "--out", tmp_path / "m", "--json")
    assert code == 0 and json.loads(said.out)["experts"] == ["fruit", "metal"]
    code, said = run(monkeypatch, capsys, "pull", REPO, "--out", tmp_path / "m")
    assert code == 1 and "is there already" in said.err
    server.repos["someone/else"], server.private["someone/else"] = {"pytorch_model.bin": b""}, False
    for arguments, told in (
        ((model_folder, REPO, "--private"), "is there and public"),
        ((model_folder, REPO, "--data-license", "law=x"), "there is no expert 'law'"),
        ((model_folder, REPO, "--data-source", "law"), "--data-source wants NAME=TEXT"),
        ((model_folder, "someone/else"), "holds something else"),
        ((tmp_path, REPO), "no manifest.json"),
        ((model_folder, "a/b/c"), "is no hub id"),
    ):
        before = dict(server.repos)
        code, said = run(monkeypatch, capsys, "push", *arguments)
        assert code == 1 and told in said.err and said.err.count("\n") == 1, said
        assert server.repos == before


def test_a_hub_that_refuses_is_told_in_one_line(server, model_folder, tmp_path, capsys, monkeypatch):
    push_model(model_folder, REPO)
    code, said = run(monkeypatch, capsys, "pull", "someone/missing", "--out", tmp_path / "m")
    assert code == 1 and "no such model" in said.err
    monkeypatch.setenv("HF_TOKEN", "")
    for command in (("push", model_folder, REPO), ("pull", "someone/missing", "--out", tmp_path / "m")):
        code, said = run(monkeypatch, capsys, *command)
        assert code == 1 and "hf auth login" in said.err and said.err.count("\n") == 1, said
    monkeypatch.setattr("huggingface_hub.HfApi", partial(HfApi, "http://127.0.0.1:9"))  # where nobody listens
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for command in (("push", model_folder, REPO), ("pull", REPO, "--out", tmp_path / "m")):
        code, said = run(monkeypatch, capsys, *command)
        assert code == 1 and "check the network" in said.err and said.err.count("\n") == 1, said
    assert [*tmp_path.iterdir()] == []


def test_nobody_elses_commit_is_overwritten_unseen(server, model_folder):
    push_model(model_folder, REPO)
    parent = server.sha(REPO)
    server.commits[REPO] += 1
    with pytest.raises(moeret.HubError, match="somebody else changed it"):
        hub.commit_files(REPO, parent, {"x": b"y"}, [], "late")
