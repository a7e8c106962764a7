"""Priors from and to a hub: a local server that speaks its protocol, and no network at all."""

import base64
import copy
import dataclasses
import hashlib
import http.server
import json
import pickle
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from ncvsd_inverse.errors import CheckpointError
from ncvsd_inverse.networks import ConcatDenoiser, Denoiser
from ncvsd_inverse.priors import (
    DiffusionPrior,
    describe_prior,
    files,
    load_card,
    load_prior,
    registry,
    save_prior,
)
from ncvsd_inverse.priors import hub as ours
from ncvsd_inverse.priors.hub import Address, fetch
from ncvsd_inverse.priors.hub_prior import HubPrior
from ncvsd_inverse.priors.published import PUBLISHED, convert_once, fetch_published
from tests.priors.tiny import CARD, SHAPE, use_folders

CARD = {**CARD, "evaluation": {"psnr": 20.5}}
COMMITS = ("1" * 40, "2" * 40)
REPOSITORY, FILE = PUBLISHED["ncvsd_ffhq"].repository, PUBLISHED["ncvsd_ffhq"].file
PICKLE = b"no pickle at all, and nobody looks"
OTHER = b"another file"


class Hub(http.server.ThreadingHTTPServer):
    """What the hub does for one who downloads and uploads, in memory.

    Attributes:
        commits: files of each commit, the last one is main.
        asked: method and path of every request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.commits = {}
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, repository, files, commit=COMMITS[0]):
        self.commits.setdefault(repository, {})[commit] = files


class Requests(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer_file(with_body=False)

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            self.answer_listing()
        else:
            self.answer_file(with_body=True)

    def answer_listing(self):
        self.server.asked.append(f"{self.command} {self.path}")
        repository, _, revision = self.path.removeprefix("/api/models/").partition("/revision/")
        commits = self.server.commits.get(repository, {})
        commit = list(commits)[-1] if revision in ("", "main") and commits else revision
        if commit not in commits:
            error = "RevisionNotFound" if commits else "RepoNotFound"
            self.send(404, b"", {"X-Error-Code": error, "X-Error-Message": "not found"})
            return
        files = [{"rfilename": name} for name in commits[commit]]
        self.send_json({"id": repository, "sha": commit, "siblings": files})

    def answer_file(self, with_body):
        self.server.asked.append(f"{self.command} {self.path}")
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        commits = self.server.commits.get(repository, {})
        commit = list(commits)[-1] if revision == "main" and commits else revision
        content = commits.get(commit, {}).get(name)
        if content is None:
            error = "EntryNotFound" if commit in commits else "RepoNotFound"
            self.send(404, b"", {"X-Error-Code": error, "X-Error-Message": "not found"})
            return
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.send(200, content, headers, with_body)

    def do_POST(self):
        self.server.asked.append(f"{self.command} {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        repository = "/".join(self.path.split("/")[3:5])
        if self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made['organization']}/{made['name']}"
            self.send_json({"url": f"{self.server.url}/{name}", "name": name})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.send_json({"files": files})
        elif "/commit/" in self.path:
            entries = [json.loads(line)["value"] for line in body.splitlines()]
            files = {e["path"]: base64.b64decode(e["content"]) for e in entries if "path" in e}
            self.server.publish(repository, files)
            url = f"{self.server.url}/{repository}/commit/{COMMITS[0]}"
            self.send_json({"commitUrl": url, "commitOid": COMMITS[0], "success": True})
        else:
            self.send_json({})

    def send_json(self, entries):
        self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers, with_body=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def use(monkeypatch, url):
    """Let the hub be at `url` for this process."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (huggingface_hub.constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Look for priors and downloads in this test's folders, and for a hub where there is none."""
    use_folders(monkeypatch, tmp_path, tmp_path / "own")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    use(monkeypatch, "http://127.0.0.1:9")  # nothing listens at the port of "discard"
    (tmp_path / "own").mkdir()


@pytest.fixture
def hub(monkeypatch):
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        use(monkeypatch, server.url)
        yield server
        server.shutdown()


def save_tiny(stem, seed=0, **changes):
    torch.manual_seed(seed)
    cls = Denoiser if changes.get("kind") == "diffusion" else ConcatDenoiser
    save_prior(stem, cls(SHAPE), {**CARD, **changes})
    return stem


@pytest.fixture
def tiny(tmp_path):
    return save_tiny(tmp_path / "own" / "tiny")


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def same_weights(one, other):
    first, second = one.network.state_dict(), other.network.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_saved_folder_is_weights_card_and_readme(tiny, tmp_path):
    folder = tmp_path / "folder"
    HubPrior(str(tiny)).save_pretrained(folder)
    # No config.json either: it would tell the path on this machine.
    assert sorted(files_of(folder)) == ["README.md", "model.json", "model.safetensors"]
    assert all(str(tmp_path).encode() not in content for content in files_of(folder).values())
    assert load_card(folder / "model") == load_card("tiny")
    back = HubPrior.from_pretrained(folder)
    assert "not loaded" in repr(back)
    for twin in (copy.deepcopy(back), pickle.loads(pickle.dumps(back))):
        assert type(twin) is HubPrior
        assert twin.name == back.name
        assert "not loaded" in repr(twin)
    assert same_weights(back.load(), load_prior("tiny"))
    assert back.nfe_per_sample == 1


def test_the_readme_tells_what_the_card_does(tiny):
    card, readme = load_card(tiny), HubPrior(tiny).generate_model_card()
    assert readme.data.library_name == "ncvsd-inverse"
    assert readme.data.license == "other"
    for text in (card.licence, card.data, card.weaknesses, card.sha256, "20.5", "3 x 8 x 8"):
        assert text in readme.text


def test_saving_again_replaces_everything(tiny, tmp_path):
    folder = tmp_path / "folder"
    HubPrior(tiny).save_pretrained(folder)
    before = files_of(folder)
    save_tiny(tiny, seed=1, data="other noise")
    HubPrior(tiny).save_pretrained(folder)
    after = files_of(folder)
    assert sorted(after) == sorted(before)
    assert all(after[name] != before[name] for name in before)


def test_a_damaged_prior_is_not_saved(tiny, tmp_path):
    tiny.with_suffix(".safetensors").write_bytes(b"else")
    with pytest.raises(CheckpointError, match="SHA-256"):
        HubPrior(tiny).save_pretrained(tmp_path / "folder")
    assert files_of(tmp_path / "folder") == {}


def test_a_pushed_prior_is_the_one_that_is_fetched(tiny, hub, tmp_path):
    pushed = HubPrior(tiny).push_to_hub("someone/faces", token="hf_test")
    assert pushed.oid == COMMITS[0]
    assert sorted(hub.commits["someone/faces"][COMMITS[0]]) == [
        "README.md",
        "model.json",
        "model.safetensors",
    ]
    back = HubPrior.from_pretrained("someone/faces")
    assert same_weights(back.load(), load_prior("tiny"))
    u = torch.zeros(2, 3, 8, 8)
    draws = [
        prior.sample(u, 0.5, generator=torch.Generator().manual_seed(0))
        for prior in (back, load_prior("tiny"))
    ]
    assert torch.equal(*draws)


def published_tiny(hub, tmp_path, seed=0, commit=COMMITS[0], **changes):
    folder = tmp_path / f"made{seed}"
    HubPrior(save_tiny(tmp_path / "source", seed=seed, **changes)).save_pretrained(folder)
    hub.publish("someone/faces", files_of(folder), commit)


def downloads(hub):
    """Return what was downloaded, "REPOSITORY/FILE", in order."""
    gets = [line.removeprefix("GET /") for line in hub.asked if "/resolve/" in line]
    gets = [line.split("/resolve/") for line in gets if not line.startswith("HEAD")]
    return [f"{repository}/{rest.partition('/')[2]}" for repository, rest in gets]


def test_a_repository_is_fetched_once_and_works_offline_afterwards(hub, tmp_path, monkeypatch):
    published_tiny(hub, tmp_path)
    address = Address("someone/faces")
    stem = fetch(address)
    assert load_prior(stem).card.name == "tiny"
    both = ["someone/faces/model.json", "someone/faces/model.safetensors"]
    assert downloads(hub) == both  # and no file besides
    assert fetch(address) == stem
    assert downloads(hub) == both
    asked = len(hub.asked)
    assert fetch(address, local_files_only=True) == stem
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(address) == stem
    assert fetch(Address("someone/faces", COMMITS[0])) == stem
    assert len(hub.asked) == asked
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    use(monkeypatch, "http://127.0.0.1:9")
    assert fetch(address) == stem


def test_weights_and_card_are_of_one_commit(hub, tmp_path):
    published_tiny(hub, tmp_path, seed=0)
    published_tiny(hub, tmp_path, seed=1, commit=COMMITS[1])
    old = load_prior(fetch(Address("someone/faces", COMMITS[0])))
    assert not same_weights(old, load_prior(fetch(Address("someone/faces"))))
    assert any(f"resolve/{COMMITS[1]}/model.safetensors" in line for line in hub.asked)
    assert same_weights(old, HubPrior.from_pretrained("someone/faces", revision=COMMITS[0]).load())


def test_a_repository_with_other_weights_is_refused(hub, tmp_path):
    published_tiny(hub, tmp_path)
    files = hub.commits["someone/faces"][COMMITS[0]]
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"?"
    with pytest.raises(CheckpointError, match="SHA-256 of its card"):
        HubPrior.from_pretrained("someone/faces").load()


def test_a_diffusion_prior_counts_its_calls(hub, tmp_path):
    published_tiny(hub, tmp_path, kind="diffusion", gamma=None)
    prior = HubPrior.from_pretrained("someone/faces")
    assert prior.nfe_per_sample == prior.load().nfe_per_sample


@pytest.mark.parametrize("absent", ["network", "repository", "file"])
def test_what_cannot_be_fetched_is_named(absent, hub, tmp_path, monkeypatch):
    published_tiny(hub, tmp_path)
    name = "someone/faces"
    if absent == "network":
        use(monkeypatch, "http://127.0.0.1:9")
    elif absent == "repository":
        name = "no/body"
    else:
        del hub.commits[name][COMMITS[0]]["model.safetensors"]
    with pytest.raises(CheckpointError) as caught:
        HubPrior.from_pretrained(name)
    for part in (name, f"{name}/resolve/", "model.safetensors"):
        assert part in str(caught.value)


class Convert:
    """A stand-in for `convert` that counts how often it is called."""

    def __init__(self, **changes):
        self.sources = []
        self.changes = changes

    def __call__(self, source, stem):
        self.sources.append(source.read_bytes())
        save_tiny(stem, name=stem.name, **self.changes)


def test_a_published_prior_is_fetched_and_converted_once(hub, tmp_path, monkeypatch):
    hub.publish(REPOSITORY, {FILE: PICKLE})
    convert = Convert()
    stem = fetch_published("ncvsd_ffhq", convert)
    assert convert.sources == [PICKLE]
    assert hashlib.sha256(PICKLE).hexdigest() in stem.parts
    assert load_prior(stem).card.name == "ncvsd_ffhq"
    # From now on neither the network nor the pickle is needed.
    use(monkeypatch, "http://127.0.0.1:9")
    (tmp_path / "downloads").rename(tmp_path / "gone")
    asked = len(hub.asked)
    assert fetch_published("ncvsd_ffhq", convert) == stem
    assert len(convert.sources) == 1
    assert len(hub.asked) == asked


def test_a_pickle_fetched_by_hand_is_taken_from_the_folder(tmp_path):
    (tmp_path / "own" / FILE).write_bytes(PICKLE)
    convert = Convert()
    stem = fetch_published("ncvsd_ffhq", convert)
    assert convert.sources == [PICKLE]
    (tmp_path / "own" / FILE).unlink()
    assert fetch_published("ncvsd_ffhq", convert) == stem


def test_without_a_network_it_is_said_what_to_fetch(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError) as caught:
        fetch_published("ncvsd_ffhq", Convert())
    for part in (
        f"http://127.0.0.1:9/{REPOSITORY}/resolve/main/{FILE}",
        str(tmp_path / "own"),
        str(tmp_path / "cache" / "ncvsd_inverse"),
        "$NCVSD_WEIGHTS",
        "never unpickled",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="resolve/main"):
        fetch_published("ncvsd_ffhq", Convert())


def test_a_failed_conversion_leaves_nothing_to_be_taken_for_a_prior(tmp_path):
    (tmp_path / "own" / FILE).write_bytes(PICKLE)

    def fail(source, stem):
        raise CheckpointError("this one holds os.system")

    with pytest.raises(CheckpointError, match=r"os\.system"):
        fetch_published("ncvsd_ffhq", fail)
    with pytest.raises(CheckpointError, match="there is no"):
        fetch_published("ncvsd_ffhq", lambda source, stem: None)
    convert = Convert()
    fetch_published("ncvsd_ffhq", convert)
    assert convert.sources == [PICKLE]


def test_the_same_content_is_converted_once_and_other_content_again(tmp_path):
    convert = Convert()
    paths = [tmp_path / name for name in ("one.pkl", "two.pkl", "three.pkl")]
    for path, content in zip(paths, (b"a", b"a", b"b"), strict=True):
        path.write_bytes(content)
    stems = [convert_once(path, "mine", convert) for path in paths]
    assert stems[0] == stems[1] != stems[2]
    assert convert.sources == [b"a", b"b"]


def test_a_damaged_download_is_not_converted(hub, tmp_path):
    hub.publish(REPOSITORY, {FILE: PICKLE})
    blob = hashlib.sha256(PICKLE).hexdigest()
    fetch_published("ncvsd_ffhq", Convert())
    (tmp_path / "cache").rename(tmp_path / "gone")
    (kept,) = (tmp_path / "downloads").rglob(blob)
    kept.write_bytes(PICKLE[:-1])
    convert = Convert()
    with pytest.raises(CheckpointError, match="is damaged"):
        fetch_published("ncvsd_ffhq", convert)
    assert convert.sources == []


def test_the_converter_is_the_packages_own_unless_another_is_given(tmp_path):
    (tmp_path / "own" / FILE).write_bytes(PICKLE)
    with pytest.raises(CheckpointError):
        fetch_published("ncvsd_ffhq")  # the real one knows that this is no pickle


def test_load_prior_takes_repositories_and_published_names(hub, tmp_path, monkeypatch):
    published_tiny(hub, tmp_path)
    assert load_prior("someone/faces").card.name == "tiny"
    assert load_card(f"someone/faces@{COMMITS[0]}").name == "tiny"
    hub.publish(REPOSITORY, {FILE: PICKLE})
    monkeypatch.setattr("ncvsd_inverse.priors.published.own_convert", Convert())
    assert load_prior("ncvsd_ffhq").card.name == "ncvsd_ffhq"

    assert load_card("ncvsd_ffhq").name == "ncvsd_ffhq"


NONE, FACES = None, Address("someone/faces")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/faces", FACES),
        ("some-one/faces.v2@1a2b3c", Address("some-one/faces.v2", "1a2b3c")),
        ("someone/faces@refs/pr/1", Address("someone/faces", "refs/pr/1")),
        ("someone/faces@v1/deep/x.pkl", Address("someone/faces", "v1", "deep/x.pkl")),
        ("someone/faces@refs/pr/1/x.pt", Address("someone/faces", "refs/pr/1", "x.pt")),
        ("someone/faces/x.pth", Address("someone/faces", None, "x.pth")),
        ("hf:someone/faces", FACES),
        ("hf:own/tiny", Address("own/tiny")),
        ("hf:own/tiny.pt@main", Address("own/tiny.pt", "main")),
        ("own/tiny", NONE),  # a prior of that path
        ("own/other", NONE),
        ("own/other/x.pkl", NONE),
        ("own", NONE),
        ("ncvsd_ffhq", NONE),
        ("a/b.pkl", NONE),
        ("a/b.json", NONE),
        ("a/b/c", NONE),
        ("/a/b", NONE),
        ("../b", NONE),
        ("./b", NONE),
        ("~/b", NONE),
    ],
)
def test_names_of_the_hub(name, expected, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Address.parse(name) == expected


@pytest.mark.parametrize("name", ["hf:", "hf:faces", "hf:a/b/c", "hf:a/b/code.py", "hf:../b"])
def test_odd_names_of_the_hub_are_refused(name):
    with pytest.raises(CheckpointError, match=r"must be owner/name\[@revision\]\[/FILE\]"):
        load_prior(name)


def test_hf_means_the_hub_whatever_paths_there_are(hub, tmp_path, monkeypatch):
    published_tiny(hub, tmp_path, data="of the hub")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    save_tiny(tmp_path / "someone" / "faces", data="of a path")
    assert load_card("someone/faces").data == "of a path"
    assert hub.asked == []
    assert load_card("hf:someone/faces").data == "of the hub"


def test_without_path_and_hub_the_path_is_said_first(monkeypatch):
    with pytest.raises(CheckpointError, match=r"^there is no path some/body here, nor a prior at"):
        load_prior("some/body")
    with pytest.raises(CheckpointError, match=r"^some/body cannot be had"):
        load_prior("hf:some/body")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match=r"x\.pkl here, nor a prior at the hub: some/body can"
    ):
        load_prior("some/body/x.pkl")


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    released = threading.Event()

    def hang(*_, **__):
        # Looking up a name takes no heed of time limits.
        released.wait(20)

    monkeypatch.setattr(ours.HfApi, "model_info", hang)
    monkeypatch.setattr(ours, "PATIENCE", 0.1)
    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"no answer within 0\.1 s, which \$HF_HUB_ETAG_TIMEOU"
    ):
        load_prior("hf:some/body")
    with pytest.raises(CheckpointError, match="no answer within"):
        fetch_published("ncvsd_ffhq", Convert())
    assert time.monotonic() - started < 5
    released.set()


CONFIG = json.dumps({"_class_name": "UNet2DModel"}).encode()
SAFE, UNSAFE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"


@pytest.fixture
def loaded(monkeypatch):
    """Record what `load_foreign` is given instead of loading it."""
    paths = []

    def load(path, device, dtype):
        paths.append(path)
        return DiffusionPrior.from_function(lambda x, sigma: x)

    monkeypatch.setattr(registry, "load_foreign", load)
    return paths


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (
            f"README.md model_index.json pipeline.py unet/code.py unet/config.json unet/{SAFE} "
            f"unet/{UNSAFE} scheduler/scheduler_config.json vae/config.json vae/{SAFE}",
            f"unet/config.json model_index.json scheduler/scheduler_config.json unet/{SAFE}",
        ),
        (
            f"config.json {UNSAFE} model_index.json scheduler_config.json",
            f"config.json model_index.json scheduler_config.json {UNSAFE}",
        ),
        (f"config.json {SAFE} code.py", f"config.json {SAFE}"),
    ],
)
def test_of_diffusers_what_is_needed_is_fetched(there, wanted, hub, loaded):
    # Every file is another one, as the client fetches no content twice.
    hub.publish("someone/cats", {name: CONFIG + b" " * i for i, name in enumerate(there.split())})
    load_prior("someone/cats")
    (folder,) = loaded
    assert downloads(hub) == [f"someone/cats/{name}" for name in wanted.split()]
    assert all((folder / name).is_file() for name in wanted.split())
    assert HubPrior.from_pretrained("someone/cats").name == str(folder)


def test_of_other_diffusers_no_weights_are_fetched(hub, loaded):
    config = json.dumps({"_class_name": "UNet2DConditionModel"}).encode()
    hub.publish("someone/texts", {"unet/config.json": config, f"unet/{SAFE}": b""})
    with pytest.raises(CheckpointError, match=r"hold a UNet2DModel .*, got 'UNet2DConditionModel'"):
        load_prior("someone/texts")
    assert downloads(hub) == ["someone/texts/unet/config.json"]
    hub.publish("someone/parts", {"config.json": CONFIG, "model_index.json": b"{}"})
    with pytest.raises(CheckpointError, match="must hold its weights in one file"):
        load_prior("someone/parts")
    hub.publish("someone/odd", {"config.json": b"[" * 10**5, SAFE: b""})
    with pytest.raises(CheckpointError, match="must be JSON"):
        load_prior("someone/odd")
    assert loaded == []


def test_single_files_of_a_repository_are_taken(hub, loaded, tmp_path):
    hub.publish("someone/one", {"README.md": b"", "deep/net.pkl": PICKLE})
    hub.publish("someone/two", {"a.pt": PICKLE, "b.pth": OTHER})
    load_prior("someone/one")
    load_prior("someone/two/b.pth")
    load_prior(f"hf:someone/two@{COMMITS[0]}/a.pt")
    assert [path.read_bytes() for path in loaded] == [PICKLE, OTHER, PICKLE]
    assert downloads(hub) == ["someone/one/deep/net.pkl", "someone/two/b.pth", "someone/two/a.pt"]
    with pytest.raises(CheckpointError, match=r"got a\.pt, b\.pth: name one as someone/two/FILE"):
        load_prior("someone/two")
    hub.publish("someone/none", {"README.md": b""})
    with pytest.raises(CheckpointError, match="got none"):
        load_prior("someone/none")
    with pytest.raises(CheckpointError, match=r"c\.pkl of someone/two, http.*, cannot be"):
        load_prior("someone/two/c.pkl")
    with pytest.raises(CheckpointError, match="`ncvsd convert` makes both"):
        load_card("someone/one")
    stem = save_tiny(tmp_path / "small")
    hub.publish("someone/ours", files_of_prior(stem))
    assert load_prior("someone/ours/small.safetensors").card.name == "tiny"


def files_of_prior(stem):
    paths = files.card_path(stem), files.weights_path(stem)
    return {path.name: path.read_bytes() for path in paths}


def test_the_first_file_of_a_published_prior_is_recorded(hub, tmp_path):
    hub.publish(REPOSITORY, {FILE: PICKLE})
    fetch_published("ncvsd_ffhq", Convert())
    sha256 = hashlib.sha256(PICKLE).hexdigest()
    assert files.accepted_file("ncvsd_ffhq") == (sha256, COMMITS[0])
    # What was converted is gone: the commit that was recorded is fetched again, not a newer one.
    (tmp_path / "cache" / "ncvsd_inverse" / "converted").rename(tmp_path / "gone")
    hub.publish(REPOSITORY, {FILE: OTHER}, COMMITS[1])
    convert = Convert()
    fetch_published("ncvsd_ffhq", convert)
    assert convert.sources == [PICKLE]


def test_a_later_file_of_other_content_is_refused(tmp_path):
    source = tmp_path / "own" / FILE
    source.write_bytes(PICKLE)
    stem = fetch_published("ncvsd_ffhq", Convert())
    source.write_bytes(OTHER)
    record = files.record_path("ncvsd_ffhq")
    convert = Convert()
    with pytest.raises(CheckpointError) as caught:
        fetch_published("ncvsd_ffhq", convert)
    digests = [hashlib.sha256(content).hexdigest() for content in (PICKLE, OTHER)]
    for part in (*digests, f"delete {source}", str(record)):
        assert part in str(caught.value)
    assert convert.sources == []
    record.unlink()
    assert fetch_published("ncvsd_ffhq", convert) != stem
    assert convert.sources == [OTHER]


def test_a_file_of_another_sha256_than_is_stated_is_refused(tmp_path, monkeypatch):
    entry = dataclasses.replace(PUBLISHED["ncvsd_ffhq"], sha256="0" * 64)
    monkeypatch.setitem(PUBLISHED, "ncvsd_ffhq", entry)
    source = tmp_path / "own" / FILE
    source.write_bytes(PICKLE)
    with pytest.raises(CheckpointError, match=f"{'0' * 64}, got .*; delete {source}") as caught:
        fetch_published("ncvsd_ffhq", Convert())
    assert "to accept" not in str(caught.value)


def test_the_teacher_under_the_name_of_the_student_is_refused(tmp_path, monkeypatch):
    for name, kind in (("ncvsd_ffhq", "diffusion"), ("ncvsd_ffhq_teacher", "ncvsd")):
        source = tmp_path / "own" / PUBLISHED[name].file
        source.write_bytes(PICKLE)
        convert = Convert(kind=kind, gamma=None if kind == "diffusion" else 0.4)
        monkeypatch.setattr("ncvsd_inverse.priors.published.own_convert", convert)
        for times in (1, 2):
            with pytest.raises(CheckpointError, match=f"of kind '{kind}': delete {source}, which"):
                load_prior(name)
            assert len(convert.sources) == times
        assert files.accepted_file(name) is None
        assert describe_prior(name) is PUBLISHED[name]


def test_threads_fetch_and_convert_once(hub, tmp_path, at_once):
    hub.publish(REPOSITORY, {FILE: PICKLE})
    convert = Convert()
    stems = at_once([lambda: fetch_published("ncvsd_ffhq", convert)] * 8)
    assert len(set(stems)) == 1
    assert convert.sources == [PICKLE]
    path = tmp_path / "other.pkl"
    path.write_bytes(OTHER)
    stems = at_once([lambda: convert_once(path, "mine", convert)] * 8)
    assert len(set(stems)) == 1
    assert convert.sources == [PICKLE, OTHER]
