"""hubconf.py: packed bits from a folder, an address and a repository on the Hub, with and without their SHA-256."""

import contextlib
import functools
import hashlib
import http.server
import pickle
import sys
import threading
import types

import pytest
import torch
from conftest import ROOT

import export_bits
import hubconf
import models
import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with packed bits, as export.py --to hub-folder writes it."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    net, arguments = models.build("resnet8", 10), {"arch": "resnet8", "num_classes": 10}
    export_bits.save_bits(net, folder / "model.safetensors", build=arguments)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """The folder on a local server."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fake_hub(monkeypatch, function):
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = function
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def refused(*arguments, **options) -> str:
    with pytest.raises(runs.RunError) as e:
        hubconf.from_pretrained(*arguments, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_name_that_is_too_long():
    assert "check the name" in refused("x" * 300)


def test_every_source_gives_the_network(folder, address, monkeypatch):
    file, asked = folder / "model.safetensors", []
    fake_hub(monkeypatch, lambda name, file, revision: asked.append((name, file, revision)) or folder / file)
    images = torch.randn(3, 3, 32, 32)
    expected = export_bits.load_bits(file)(images)
    sources = [file, str(folder), f"{address}/model.safetensors", "some-one/net", "some-one/net@v1.0"]
    for source in sources:
        for options in ({}, {"sha256": digest(file)}, {"sha256": digest(file).upper()}):
            net = hubconf.from_pretrained(source, **options)
            assert not net.training and torch.equal(net(images), expected)
    assert asked[0] == ("some-one/net", "model.safetensors", None) and asked[-1][2] == "v1.0"
    own = models.build("resnet8", 10)
    assert hubconf.from_pretrained(f"{address}/model.safetensors", own) is own
    assert torch.equal(own(images), expected)


def test_torch_hub_loads_it(folder, address):
    options = {"source": "local", "sha256": digest(folder / "model.safetensors")}
    net = torch.hub.load(str(ROOT), "from_pretrained", f"{address}/model.safetensors", **options)
    assert len(models.binary_layers(net)) > 5


def test_another_file_is_refused(folder, address, tmp_path):
    other = tmp_path / "model.safetensors"
    other.write_bytes((folder / "model.safetensors").read_bytes())
    export_bits.save_bits(models.build("resnet8", 10), other, build={"arch": "resnet8", "num_classes": 10})
    assert hubconf.from_pretrained(other), "whole, but not the one that is meant"
    assert "it is another file" in refused(other, sha256=digest(folder / "model.safetensors"))
    said = refused(f"{address}/model.safetensors", sha256=digest(other))
    assert f"{address}/model.safetensors has the SHA-256 {digest(folder / 'model.safetensors')}" in said
    for wrong in ("9f86d0", 5, b"0" * 64):
        assert f"64 hexadecimal digits; it is {wrong!r}" in refused(other, sha256=wrong)


@pytest.mark.parametrize(
    ("headers", "blocks", "said"),
    [
        ({"Content-Length": "9" * 20}, 1, "sends more than"),
        ({}, None, "sends more than"),
        ({"Content-Length": str(1 << 21)}, 1, "cannot be read (it ended after 1,048,576 of 2,097,152 bytes)"),
    ],
)
def test_a_body_of_another_length(monkeypatch, headers, blocks, said):
    sent = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while len(sent) != (blocks or 100):  # a body without end, if it were read
                    self.wfile.write(bytes(1 << 20))
                    sent.append(1)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(hubconf, "LARGEST", 5 << 20)
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        message = refused(f"http://127.0.0.1:{server.server_port}/net")
        thread.join()
    assert said in message and "check the address" in message
    assert len(sent) < 50  # the sockets buffer some


class Trap:
    def __reduce__(self):
        return (sys.exit, ("executed",))


def test_what_is_no_packed_file_is_refused_and_not_executed(folder, address, tmp_path, monkeypatch):
    whole = (folder / "model.safetensors").read_bytes()
    for name, contents in (("pickle", pickle.dumps(Trap())), ("half", whole[: len(whole) // 2]), ("none", b"")):
        (folder / name).write_bytes(contents)
        said = refused(f"{address}/{name}")
        assert said.startswith(f"{address}/{name} cannot be loaded"), said
    assert "404" in refused(f"{address}/nowhere")
    for wrong in ("http://127.0.0.1:1/x", f"http://127.0.0.1:{9**30}/x", "http://["):
        assert "check the address" in refused(wrong)
    assert f"no file {tmp_path}" in refused(tmp_path), "a folder without packed bits"
    assert "no file" in refused(tmp_path / "nowhere")

    def fails(*_, **__):
        raise ConnectionError("no route to host")

    fake_hub(monkeypatch, fails)
    assert "no route to host" in refused("some-one/net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("some-one/net")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-one").mkdir()
    assert "no file" in refused("some-one/net"), "a mistyped path is not looked for on the Hub"
