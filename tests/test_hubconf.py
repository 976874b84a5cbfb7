"""Entry points of torch.hub, and published weights by name, from a server on the loopback address."""

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import backbones
import evaluate
import export
import hubconf
import train
from common.checkpoint import load_checkpoint
from common.hub import is_remote
from common.initial_weights import read_initial_weights
from common.weights import load_backbone, save_model
from vit import VisionTransformer

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "fixtures" / "reference_checkpoint" / "checkpoint.pth"
TINY = dict(img_size=32, patch_size=16, embed_dim=128, depth=2, num_heads=2)
FILE = "dino_deitsmall16_pretrain"


def load(name, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The authors' server: its folder, and a list of the paths that were requested; the cache of torch.hub is empty."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, text, *values):
            requests.append(self.path)

        def copyfile(self, source, output):
            output.write(source.read()[:1000 if (folder / "cut").exists() else None])

    folder, requests = tmp_path / "server", []
    torch.manual_seed(0)
    (folder / FILE).mkdir(parents=True)
    torch.save(VisionTransformer(**TINY).state_dict(), folder / FILE / f"{FILE}.pth")  # the layout of the real one
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Handler(*args, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(backbones, "PUBLISHED_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.chdir(tmp_path)
        yield folder, requests
        server.shutdown()
        thread.join()


# ---- torch.hub ----

def test_published_weights_are_downloaded_once(server, capsys, tmp_path):
    folder, requests = server
    arguments = {name: value for name, value in TINY.items() if name != "patch_size"}
    model = load("dino_vits16", drop_path_rate=0.3, **arguments)
    file = folder / FILE / f"{FILE}.pth"
    expected = torch.load(file, weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.drop_path_rate == 0.3 and not model.training
    assert f"pretrain.pth: SHA-256 {hashlib.sha256(file.read_bytes()).hexdigest()}\n" in capsys.readouterr().out
    assert equal(load("dino_vits16", **arguments), model) and requests == [f"/{FILE}/{FILE}.pth"]
    url = f"{backbones.PUBLISHED_URL}/mine/{FILE}.pth"  # another file of that name is not taken for the cached one
    (folder / "mine").mkdir()
    torch.save({name: tensor + 1 for name, tensor in expected.items()}, folder / "mine" / f"{FILE}.pth")
    theirs = load("dino_vits16", weights=url, **arguments)
    assert torch.equal(theirs.norm.bias, model.norm.bias + 1) and len(requests) == 2
    capsys.readouterr()
    load_backbone("dino_vits16", log=lambda text: None)
    shutil.rmtree(tmp_path / "cache")
    lines = []
    load_backbone("dino_vits16", log=lines.append)
    assert lines[0] == f"downloading {backbones.PUBLISHED_URL}/{FILE}/{FILE}.pth" and not capsys.readouterr().out


def test_weights_have_an_image_size_of_their_own(server):
    """Position embeddings of 32 pixels, not of 224, and the network takes other images than those."""
    arguments = {name: value for name, value in TINY.items() if name not in ("patch_size", "img_size")}
    model = load("dino_vits16", **arguments)
    assert model.grid == (2, 2) and model(torch.zeros(1, 3, 48, 64)).shape == (1, 128)
    with pytest.raises(ValueError, match=r"^dino_vits16: img_size=480 is for pretrained=False; these weights have 32, "
                                         r"and the model takes images of any size: leave it out$"):
        load("dino_vits16", img_size=480, **arguments)
    assert load("dino_vits16", pretrained=False, img_size=480, **arguments).grid == (30, 30)


def test_entry_points_are_the_networks_of_the_paper():
    models = {name: backbones.build_backbone(arguments) for name, (arguments, _) in backbones.PUBLISHED.items()
              if "vit" in name}
    assert {name: round(sum(p.numel() for p in model.parameters()) / 1e6) for name, model in models.items()} == {
        "dino_vits16": 22, "dino_vits8": 22, "dino_vitb16": 86, "dino_vitb8": 86}
    assert {model.patch_size for name, model in models.items() if name.endswith("8")} == {8}
    entry_points = {name for name, thing in vars(hubconf).items() if callable(thing) and not name.startswith("_")}
    assert entry_points == {"backbone", *backbones.PUBLISHED}  # as torch.hub.list finds them
    resnet = load("dino_resnet50", pretrained=False)
    assert resnet(torch.zeros(1, 3, 64, 64)).shape == (1, 2048) and not resnet.training
    released = {name: tensor + 1 for name, tensor in resnet.model.state_dict().items()}
    assert len(released) == 318


def test_weights_of_other_libraries_in_the_released_names(tmp_path, monkeypatch):
    """ResNets without counters of batches, and XCiTs with the authors' names."""
    for name, arch in (("dino_resnet50", "resnet18"), ("dino_xcit_small_12_p16", "timm:xcit_nano_12_p16_224")):
        monkeypatch.setitem(backbones.PUBLISHED, name, (dict(arch=arch), ""))
        torch.manual_seed(3)
        model = load(name, pretrained=False, img_size=64)
        weights = model.model.state_dict()
        released = {key.replace("pos_embed.", "pos_embeder."): tensor for key, tensor in weights.items()
                    if not key.endswith("num_batches_tracked")}
        for key in [key for key in released if ".attn.q." in key]:
            parts = [released.pop(key.replace(".q.", f".{part}.")) for part in "qkv"]
            released[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        torch.save(released, tmp_path / "released.pth")
        assert equal(load(name, weights=tmp_path / "released.pth", img_size=64), model)
        save_model(tmp_path / "ours.safetensors", {f"backbone.{key}": x for key, x in model.state_dict().items()},
                   dict(backbone=dict(arch=arch, img_size=64)))
        assert equal(load(name, weights=tmp_path / "ours.safetensors"), model)
        assert equal(load("backbone", weights=tmp_path / "ours.safetensors"), model)


def test_any_file_of_this_repository(tmp_path, model):
    network, path = model
    fixtures = ROOT / "tests" / "fixtures" / "before_redesign"
    for file in (path, fixtures / "teacher.safetensors", fixtures / "checkpoint.pth"):
        expected, _ = load_backbone(file)
        found = load("backbone", weights=str(file))
        assert equal(found, expected) and found.num_heads == expected.num_heads and not found.training
    sizes = dict(img_size=32, patch_size=16, embed_dim=384, depth=1, num_heads=12)  # the shapes of 6 heads
    save_model(tmp_path / "heads.safetensors", VisionTransformer(**sizes).state_dict(), dict(backbone=sizes))
    with pytest.raises(ValueError, match="heads.safetensors: its depth is 1, that of dino_vits16 is 12: use the entry"):
        load("dino_vits16", weights=tmp_path / "heads.safetensors")
    torch.save(network.state_dict(), tmp_path / "released.pth")
    with pytest.raises(ValueError, match="does not describe its backbone; name its architecture"):
        load("backbone", weights=tmp_path / "released.pth")


PROGRAM = """
import sys, torch
import common, data
model = torch.hub.load(sys.argv[1], "backbone", weights=sys.argv[2], source="local")
import common.mine, data.mine
ours = [name for name in sys.modules if name.split(".")[0] in ("common", "data")]
print(model(torch.zeros(2, 3, 32, 32)).shape, *ours)
"""


def test_folders_of_the_program_are_not_taken_for_ours(tmp_path, model):
    for name in ("common", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "mine.py").touch()
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run([sys.executable, tmp_path / "program.py", ROOT, model[1]], capture_output=True, text=True,
                            timeout=120, cwd=tmp_path)
    assert result.stdout == "torch.Size([2, 32]) common data common.mine data.mine\n", result.stderr


# ---- names of published weights on the command line ----

def test_commands_take_published_weights_by_name(server, capsys, small_shapes, tmp_path):
    folder, requests = server
    expected = load_backbone(folder / FILE / f"{FILE}.pth")[0]
    capsys.readouterr()
    flags = ["--ckpt", "dino_vits16", "--data_path", "shapes:32", "--num_workers", "0", "--device", "cpu"]
    evaluate.main(evaluate.parse_args(["knn", *flags]))
    digest = hashlib.sha256((folder / FILE / f"{FILE}.pth").read_bytes()).hexdigest()
    cached = tmp_path / "cache" / "hub" / "checkpoints" / f"{FILE}.pth"
    assert f"{cached}: SHA-256 {digest}\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "dino_vits16.knn.shapes-32.json").read_text())  # in the current folder
    assert result["ckpt"] == "dino_vits16" and result["sha256"] == digest
    export.main(export.parse_args(["--ckpt", "dino_vits16"]))
    export.main(export.parse_args(["--check", "dino_vits16.onnx", "--ckpt", "dino_vits16"]))
    export.main(export.parse_args(["--ckpt", "dino_vits16", "--format", "timm"]))
    assert equal(load_backbone("dino_vits16.timm.safetensors")[0], expected)
    assert requests == [f"/{FILE}/{FILE}.pth"]
    assert sorted(path.name for path in cached.parent.iterdir()) == [cached.name]
    torch.save({name: tensor + 1 for name, tensor in expected.state_dict().items()}, "dino_vits16")
    found, _ = load_backbone("dino_vits16")  # a file of that name wins
    assert torch.equal(found.norm.bias, expected.norm.bias + 1) and not is_remote("dino_vits16")


def test_runs_continue_from_published_weights_by_name(server, small_shapes, tmp_path, capsys, monkeypatch):
    """Heads and center are in the full checkpoint; it is read once for flags and networks."""
    folder, requests = server
    (folder / FILE / f"{FILE}_full_checkpoint.pth").write_bytes(REFERENCE.read_bytes())
    (tmp_path / "cache" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "cache" / "hub" / "checkpoints" / "config.json").write_text('{"num_heads": 2}')
    reads, read = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: reads.append(args) or read(*args, **kwargs))
    flags = ("--data_path shapes:32 --global_crops_size 32 --local_crops_size 16 --local_crops_number 1 --device cpu "
             "--batch_size_per_gpu 64 --num_workers 0 --knn_every 0 --epochs 1 --lr 1e-30 --min_lr 0 "
             "--precision fp32 --output_dir run --init dino_vits16_full").split()
    train.main(train.parse_args(flags))
    assert len(reads) == 1 and requests == [f"/{FILE}/{FILE}_full_checkpoint.pth"]
    out = capsys.readouterr().out
    assert out.count("downloading ") == 1 and out.count("_full_checkpoint.pth: SHA-256 ") == 1
    assert "student and teacher, with heads, the center\n" in out
    state, expected = load_checkpoint("run/checkpoint.pth"), load_checkpoint(REFERENCE)
    for name, tensor in state["student"].items():
        torch.testing.assert_close(tensor, expected["student"][f"module.{name}"], rtol=0, atol=1e-6)
    assert state["flags"]["init"] == "dino_vits16_full"
    assert read_initial_weights("dino_vits16").head is None


def test_predict_takes_no_backbone_by_name(exit_message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dino_vits16", "hf:me/demo"):
        assert exit_message(lambda *argv: evaluate.main(evaluate.parse_args(argv)), "predict", "--device", "cpu",
                            "--ckpt", name, "a.png").endswith(
            f"{name}: is a backbone; predict needs classifier.safetensors of evaluate.py linear, logistic or finetune")


def test_without_a_connection_it_is_one_line(server, monkeypatch, exit_message, tmp_path):
    url = backbones.PUBLISHED_URL
    cached = f"(HTTP 404 File not found): put a copy of the file at {tmp_path}/cache/hub/checkpoints/dino_"
    for main, *flags in ((lambda *argv: evaluate.main(evaluate.parse_args(argv)), "knn", "--ckpt", "dino_vitb8",
                          "--device", "cpu", "--data_path", "shapes:32"),
                         (lambda *argv: train.parse_args(argv), "--init", "dino_vitb8")):
        message = exit_message(main, *flags)
        assert f"{url}/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth cannot be downloaded {cached}" in message
    monkeypatch.setattr(backbones, "PUBLISHED_URL", "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(OSError, match="cannot be downloaded .*refused.*: go online, or put a copy of the file at"):
        load("dino_vits16")
    monkeypatch.setattr(backbones, "PUBLISHED_URL", url)
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="file.*: Not a directory, set TORCH_HOME to a"):
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file"))
        load("dino_vits16")
    (server[0] / "cut").touch()
    size = (server[0] / FILE / f"{FILE}.pth").stat().st_size
    with pytest.raises(OSError, match=f"the connection was closed after 1000 of {size} bytes"):
        load("dino_vits16")
    assert not [*(tmp_path / "cache").rglob("*.pth*")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no locks there: each process downloads")
def test_of_several_processes_one_downloads(server, tmp_path):
    """As of the ranks of torchrun train.py --init, which read the weights before they know of each other."""
    folder, requests = server
    cached = tmp_path / "cache" / "hub" / "checkpoints" / "one.pth"
    cached.parent.mkdir(parents=True)
    program = "import sys, backbones as b; print('ready', flush=True); print(b.download(sys.argv[1], 'one.pth', len))"
    with backbones.lock(f"{cached}.lock"):  # as a process that downloads
        process = subprocess.Popen([sys.executable, "-c", program, f"{backbones.PUBLISHED_URL}/{FILE}/{FILE}.pth"],
                                   cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)  # in which it would download
        shutil.copy(folder / FILE / f"{FILE}.pth", cached)
    assert process.communicate(timeout=60)[0] == f"{cached}\n" and requests == []
    assert [*cached.parent.iterdir()] == [cached]


@pytest.mark.parametrize("content", [b"no weights here", b""])
def test_a_download_that_is_no_checkpoint_is_refused(server, exit_message, content):
    (server[0] / FILE / f"{FILE}.pth").write_bytes(content)
    message = exit_message(lambda *argv: export.main(export.parse_args(argv)), "--ckpt", "dino_vits16")
    assert f"checkpoints/{FILE}.pth: not a checkpoint, or corrupt" in message
