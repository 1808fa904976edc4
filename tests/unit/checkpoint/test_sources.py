"""A checkpoint is looked for in its places in order, then downloaded; an error says where it was looked for."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from made_up import random_model, stored_tensors, write_fair_esm, write_hugging_face
from made_up_families import ESM_C_SHAPES, random_esm_c, write_esm_c
from safetensors.torch import save_file

from esmflow.checkpoint import sources as checkpoint_sources
from esmflow.checkpoint.convert import convert_checkpoint
from esmflow.checkpoint.file import CheckpointError
from esmflow.checkpoint.models import OFFICIAL_MODELS, is_path
from esmflow.checkpoint.sources import find_checkpoint

NAME = "esm2_t6_8M_UR50D"


class Places:
    """Empty caches below one folder, and the paths where a checkpoint belongs in each."""

    def __init__(self, folder: Path) -> None:
        self.given = folder / "given"
        self.in_given = self.given / f"{NAME}.pt"
        self.folder_in_given = self.given / NAME
        self.torch_hub = folder / "torch" / "hub" / "checkpoints" / f"{NAME}.pt"
        self.snapshots = folder / "huggingface" / "hub" / f"models--facebook--{NAME}" / "snapshots"
        self.hugging_face = self.snapshots / "abc123"

    def put(self, path: Path) -> Path:
        if path.suffix == ".pt":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"weights")
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / "model.safetensors").write_bytes(b"weights")
        return path


@pytest.fixture
def places(tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.chdir(tmp_path)
    return Places(tmp_path)


def find(places: Places) -> Path:
    return find_checkpoint(NAME, str(places.given), download=False)


def test_the_given_folder_comes_first_then_torch_hub_then_hugging_face(places):
    in_order = [places.in_given, places.folder_in_given, places.torch_hub, places.hugging_face]
    for path in reversed(in_order):
        places.put(path)
        # What was put before stays: each place goes before those after it.
        assert find(places) == path


def test_without_a_given_folder_the_caches_are_looked_at(places):
    places.put(places.in_given)
    places.put(places.torch_hub)
    assert find_checkpoint(NAME, None, download=False) == places.torch_hub


@pytest.mark.parametrize("name", [name for name, model in OFFICIAL_MODELS.items() if model.family.in_fair_esm])
def test_every_official_name_is_found(places, name):
    path = places.put(places.torch_hub.with_name(f"{name}.pt"))
    assert find_checkpoint(name, None, download=False) == path


def test_esm_c_is_looked_for_in_the_given_folder_then_where_it_is_downloaded_to_then_in_hugging_face_s(
    places, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    hub = places.snapshots.parent.parent
    in_order = [
        places.given / "ESMC-600M",
        places.given / "ESMC-600M-hf",
        tmp_path / "cache" / "esmflow" / "models" / "ESMC-600M",
        hub / "models--biohub--ESMC-600M" / "snapshots" / "abc",
        hub / "models--biohub--ESMC-600M-hf" / "snapshots" / "def",
    ]
    for path in reversed(in_order):
        places.put(path)
        assert find_checkpoint("ESMC-600M", str(places.given), download=False) == path


def test_torch_hub_is_looked_at_where_torch_itself_puts_its_files(places):
    assert places.torch_hub.parent == Path(torch.hub.get_dir()) / "checkpoints"


def test_the_caches_follow_xdg_cache_home(places, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    moved = Places(tmp_path / "xdg")
    moved.put(moved.hugging_face)
    assert find_checkpoint(NAME, download=False) == moved.hugging_face
    moved.put(moved.torch_hub)
    assert find_checkpoint(NAME, download=False) == moved.torch_hub
    assert moved.torch_hub.parent == Path(torch.hub.get_dir()) / "checkpoints"


def test_the_caches_are_in_the_home_folder_where_nothing_else_is_said(places, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = Places(tmp_path / "home" / ".cache")
    home.put(home.hugging_face)
    assert find_checkpoint(NAME, download=False) == home.hugging_face
    home.put(home.torch_hub)
    assert find_checkpoint(NAME, download=False) == home.torch_hub


def test_hf_hub_cache_goes_before_hf_home(places, tmp_path, monkeypatch):
    places.put(places.hugging_face)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    snapshot = tmp_path / "elsewhere" / f"models--facebook--{NAME}" / "snapshots" / "def456"
    places.put(snapshot)
    assert find_checkpoint(NAME, download=False) == snapshot


def test_the_newest_snapshot_that_has_weights_is_taken(places):
    old, new, without_weights = (places.snapshots / name for name in ("b", "a", "c"))
    places.put(old)
    places.put(new)
    without_weights.mkdir()
    (without_weights / "config.json").write_text("{}")
    for age, path in enumerate((without_weights, new, old)):
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    assert find(places) == new


def test_a_snapshot_with_bin_weights_is_taken_too(places):
    places.hugging_face.mkdir(parents=True)
    (places.hugging_face / "pytorch_model.bin").write_bytes(b"weights")
    assert find(places) == places.hugging_face


def test_what_is_found_converts(places, tmp_path):
    tensors = stored_tensors(random_model())
    write_hugging_face(places.hugging_face, tensors)
    digests = [convert_checkpoint(find(places), tmp_path / "target", NAME).digest]
    write_fair_esm(places.torch_hub, tensors)
    digests.append(convert_checkpoint(find(places), tmp_path / "target", NAME).digest)
    assert digests[0] == digests[1]


# Paths


def test_a_path_is_that_path_and_no_place_is_looked_at(places, tmp_path):
    places.put(places.torch_hub)
    own = places.put(tmp_path / "own" / f"{NAME}.pt")
    assert find_checkpoint(str(own)) == own
    assert find_checkpoint(f"own/{NAME}.pt") == Path("own") / f"{NAME}.pt"


def test_a_path_below_the_home_folder_may_begin_with_a_tilde(places, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    places.put(tmp_path / "own.pt")
    assert find_checkpoint("~/own.pt") == tmp_path / "own.pt"


@pytest.mark.parametrize("model", ["own/none.pt", "none.pt", "./folder"])
def test_a_path_with_nothing_there_is_an_error(places, model):
    with pytest.raises(CheckpointError, match=f"model: {model} does not exist"):
        find_checkpoint(model)


def test_an_official_name_is_no_path_until_there_is_a_folder_of_that_name(places, tmp_path):
    assert not is_path(NAME)
    (tmp_path / NAME).mkdir()
    assert is_path(NAME)
    assert is_path("some/folder")
    assert is_path("own.pt")


def test_a_name_that_is_not_official_is_an_error_that_lists_those_that_are(places):
    with pytest.raises(CheckpointError) as error:
        find_checkpoint("esm_msa1b_t12_100M_UR50S")
    assert all(name in str(error.value) for name in OFFICIAL_MODELS)


# Offline


def test_the_error_offline_lists_every_place_and_how_to_put_the_file_there(places):
    with pytest.raises(CheckpointError) as error:
        find(places)
    message = str(error.value)
    lines = message.splitlines()
    assert lines[0] == (
        f"{NAME} is not on this machine and could not be downloaded (downloading is switched off). Looked at:"
    )
    assert lines[1:-1] == [
        f"  - model_folder: {places.in_given}",
        f"  - model_folder: {places.folder_in_given}",
        f"  - torch hub's cache: {places.torch_hub}",
        f"  - Hugging Face's cache: {places.snapshots / '*'}",
    ]
    assert f"https://dl.fbaipublicfiles.com/fair-esm/models/{NAME}.pt" in lines[-1]
    assert f"https://dl.fbaipublicfiles.com/fair-esm/regression/{NAME}-contact-regression.pt" in lines[-1]
    assert "name that folder as model_folder" in lines[-1]


def test_following_the_error_by_hand_helps(places):
    with pytest.raises(CheckpointError):
        find(places)
    write_fair_esm(places.in_given, stored_tensors(random_model()))
    assert find(places) == places.in_given


# Downloads


class Handler(http.server.SimpleHTTPRequestHandler):
    """promised: bytes that are said to come and do not. unsized: whether an answer does not say its length."""

    promised, unsized = 0, False

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Length":
            value = str(int(value) + self.promised)
        if keyword != "Content-Length" or not self.unsized:
            super().send_header(keyword, value)

    def log_message(self, *message) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that stands for fair-esm's; gives the folder that it serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(checkpoint_sources, "_WEIGHTS_URL", address + "/{name}.pt")
        monkeypatch.setattr(checkpoint_sources, "_REGRESSION_URL", address + "/{name}-contact-regression.pt")
        yield folder
        server.shutdown()
        thread.join()


def test_what_is_nowhere_is_downloaded_with_its_contact_regression(places, server, tmp_path):
    tensors = stored_tensors(random_model())
    write_fair_esm(server / f"{NAME}.pt", tensors)
    found = find_checkpoint(NAME)
    assert found == places.torch_hub
    assert convert_checkpoint(found, tmp_path / "target", NAME).dimensions.has_contact_head
    # It is a cache: the second time nothing is asked for.
    for file in server.iterdir():
        file.unlink()
    assert find_checkpoint(NAME) == found


def test_a_download_that_fails_is_an_error_that_lists_every_place_and_leaves_no_checkpoint(places, server):
    write_fair_esm(server / f"{NAME}.pt", stored_tensors(random_model()))
    (server / f"{NAME}.pt").unlink()
    with pytest.raises(CheckpointError) as error:
        find_checkpoint(NAME)
    assert "could not be downloaded (HTTP Error 404: File not found)" in str(error.value)
    assert str(places.torch_hub) in str(error.value)
    assert not places.torch_hub.exists()


def names_in_cache(places: Places) -> list[str]:
    return sorted(path.name for path in places.torch_hub.parent.glob("*"))


def test_a_download_that_breaks_off_leaves_nothing_and_goes_well_the_next_time(places, server, monkeypatch):
    write_fair_esm(server / f"{NAME}.pt", stored_tensors(random_model()))
    with monkeypatch.context() as patched:
        patched.setattr(Handler, "promised", 1000)
        with pytest.raises(CheckpointError, match=r"-contact-regression\.pt broke off: .* of .* bytes came"):
            find_checkpoint(NAME)
        assert names_in_cache(places) == []
    assert find_checkpoint(NAME) == places.torch_hub
    assert names_in_cache(places) == [f"{NAME}-contact-regression.pt", f"{NAME}.pt"]


def flipped(data: bytes) -> bytes:
    """One bit of a tensor is another, as a worn disk or cable does it."""
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda data: b"<html>Sign in to the network of this hotel</html>", "is no checkpoint"),
        (lambda data: b"", "is no checkpoint"),
        (lambda data: data[: len(data) // 2], "is no checkpoint"),
        (flipped, "is damaged: the checksum of its .*data/.* is not right"),
    ],
    ids=["a web page", "nothing", "half", "a bit"],
)
@pytest.mark.parametrize("unsized", [False, True])
def test_what_is_no_whole_checkpoint_is_refused_whatever_its_length(
    places, server, monkeypatch, wrong, message, unsized
):
    write_fair_esm(server / f"{NAME}.pt", stored_tensors(random_model()))
    whole = (server / f"{NAME}.pt").read_bytes()
    (server / f"{NAME}.pt").write_bytes(wrong(whole))
    monkeypatch.setattr(Handler, "unsized", unsized)
    with pytest.raises(CheckpointError, match=rf"could not be downloaded \(what came from .*/{NAME}\.pt {message}"):
        find_checkpoint(NAME)
    assert names_in_cache(places) == [f"{NAME}-contact-regression.pt"]
    (server / f"{NAME}.pt").write_bytes(whole)
    assert find_checkpoint(NAME).read_bytes() == whole


def test_a_checkpoint_in_the_older_format_of_torch_is_downloaded_too(places, server, tmp_path):
    write_fair_esm(server / f"{NAME}.pt", stored_tensors(random_model()))
    regression = server / f"{NAME}-contact-regression.pt"
    torch.save(torch.load(regression), regression, _use_new_zipfile_serialization=False)
    assert convert_checkpoint(find_checkpoint(NAME), tmp_path / "target", NAME).dimensions.has_contact_head


def test_a_download_that_is_killed_is_not_taken_for_a_checkpoint(places, server):
    write_fair_esm(server / f"{NAME}.pt", stored_tensors(random_model()))
    urls = (checkpoint_sources._REGRESSION_URL, checkpoint_sources._WEIGHTS_URL)
    script = (
        "import os, shutil; from esmflow.checkpoint import sources\n"
        "def stops(answer, file, size): file.write(answer.read(100)); file.flush(); os.kill(os.getpid(), 9)\n"
        f"sources._REGRESSION_URL, sources._WEIGHTS_URL = {urls!r}\n"
        f"shutil.copyfileobj = stops; sources.find_checkpoint({NAME!r})"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    assert [name for name in names_in_cache(places) if not name.startswith(".")] == []
    assert find_checkpoint(NAME) == places.torch_hub
    assert convert_checkpoint(places.torch_hub, places.given / "target", NAME).dimensions.layers


def test_nothing_is_downloaded_where_that_is_switched_off(places, server):
    write_fair_esm(server / f"{NAME}.pt", stored_tensors(random_model()))
    with pytest.raises(CheckpointError, match="downloading is switched off"):
        find_checkpoint(NAME, download=False)
    assert not places.torch_hub.parent.exists()


# Hugging Face's hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch) -> Path:
    """The folder in which a server that stands for Hugging Face's has ESMC-300M."""
    port = checkpoint_sources._WEIGHTS_URL.split(":")[2].split("/")[0]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server / "biohub" / "ESMC-300M" / "resolve" / "main"


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "esmflow" / "models" / "ESMC-300M"


def in_two_files(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The weights in two files and an index."""
    names = sorted(tensors)
    files = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, keys in files.items():
        save_file({key: tensors[key] for key in keys}, folder / file, {"format": "pt"})
    index = {"weight_map": {key: file for file, keys in files.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("files", [1, 2])
def test_esm_c_is_downloaded_from_the_hub_and_the_second_time_nothing_is_asked_for(places, hub, tmp_path, files):
    tensors = random_esm_c(*ESM_C_SHAPES["head 64"])
    write_esm_c(hub, tensors, 2)
    if files == 2:
        in_two_files(hub, tensors)
    found = find_checkpoint("ESMC-300M")
    assert found == cached(tmp_path)
    assert convert_checkpoint(found, tmp_path / "target", "x").dimensions.family_name == "ESM C"
    shutil.rmtree(hub)
    assert find_checkpoint("ESMC-300M") == found


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", None, r"HTTP Error 404"),
        ("config.json", b"<html>", r"config\.json is no configuration"),
        ("model.safetensors", b"<html>", r"model\.safetensors is no checkpoint"),
        ("model.safetensors", "half", r"model\.safetensors is not whole"),
        ("model.safetensors.index.json", b"{}", r"model\.safetensors\.index\.json is no index of weight files"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}', "which is no such file beside"),
    ],
)
def test_a_hub_that_lacks_or_breaks_a_file_is_a_sentence_and_what_was_whole_is_kept(
    places, hub, tmp_path, file, content, sentence
):
    write_esm_c(hub, random_esm_c(*ESM_C_SHAPES["head 64"]), 2)
    whole = {path.name: path.read_bytes() for path in hub.iterdir()}
    if content is None:
        (hub / file).unlink()
    else:
        (hub / file).write_bytes(whole[file][: len(whole[file]) // 2] if content == "half" else content)
    with pytest.raises(CheckpointError, match=sentence):
        find_checkpoint("ESMC-300M")
    assert not cached(tmp_path).exists()
    for path in hub.iterdir():
        path.unlink()
    for name, data in whole.items():
        (hub / name).write_bytes(data)
    assert find_checkpoint("ESMC-300M") == cached(tmp_path)


def test_the_error_offline_says_how_to_put_esm_c_there(places, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(CheckpointError) as error:
        find_checkpoint("ESMC-6B", str(places.given), download=False)
    assert "config.json and all .safetensors files of https://huggingface.co/biohub/ESMC-6B" in str(error.value)
    assert "into a folder ESMC-6B within another folder, and name that folder as model_folder" in str(error.value)
    assert str(places.given / "ESMC-6B-hf") in str(error.value)


def test_the_error_offline_says_nothing_of_contacts_that_were_never_published(places):
    with pytest.raises(CheckpointError) as error:
        find_checkpoint("esm1v_t33_650M_UR90S_1", str(places.given), download=False)
    assert "regression" not in str(error.value)
    assert "copy it into one folder, and name that folder" in str(error.value)
