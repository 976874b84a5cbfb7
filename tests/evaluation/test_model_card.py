"""A folder for the Hugging Face Hub: its weights in every library, its card, and its way back through the cache."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import onnxruntime
import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file

import evaluate
import export
import train
import visualize
from backbones import build_backbone
from common.initial_weights import read_initial_weights
from common.paths import find_model, sibling_path
from common.weights import load_backbone, save_model
from vit import VisionTransformer

ROOT = Path(__file__).parents[2]
FLAGS = ("--arch vit_tiny --patch_size 8 --embed_dim 32 --depth 2 --num_heads 4 --out_dim 16 --hidden_dim 16 "
         "--bottleneck_dim 8 --data_path shapes:32 --global_crops_size 32 --local_crops_size 16 --device cpu "
         "--local_crops_number 1 --batch_size_per_gpu 64 --num_workers 0 --epochs 1 --knn_every 1 --normalization "
         "0.1 0.2 0.3 0.4 0.5 0.6 --momentum_teacher 0.5 --lr 0.01").split()


def hub(ckpt, *flags):
    export.main(export.parse_args(["--format", "hub", "--ckpt", str(ckpt), *flags]))


@pytest.fixture
def run(tmp_path, small_shapes, monkeypatch):
    """A run with a result of k-NN, one of its untrained backbone, and one of another model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "secret" / "demo"
    train.main(train.parse_args([*FLAGS, "--output_dir", str(folder)]))
    knn = ["knn", "--ckpt", str(folder), "--num_workers", "0", "--device", "cpu", "--nb_knn", "3", "20"]
    evaluate.main(evaluate.parse_args(knn))
    evaluate.main(evaluate.parse_args([*knn, "--untrained"]))
    result = json.loads((folder / "teacher.knn.shapes-32.json").read_text())
    other = result | {"sha256": "0", "knn": {"7": {"top1": 99.0, "top5": 99.0}}}
    (folder / "teacher.knn.other.json").write_text(json.dumps(other))
    return folder, result["knn"]


def fill_cache(folder, cache, names=None):
    """The cache of huggingface_hub with a repository me/demo of these files: blobs, links of a snapshot, a reference.
    """
    repository, commit = cache / "models--me--demo", "0123456789" * 4
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        if names is None or file.name in names:
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (repository / "snapshots" / commit / file.name).symlink_to(os.path.relpath(
                blob, repository / "snapshots" / commit))


@torch.no_grad()
def test_every_library_reads_the_weights_to_the_bit(run, capsys):
    folder, _ = run
    capsys.readouterr()
    hub(folder)
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"hf upload USER/NAME {folder}/teacher.hub" and "adding a license" in out[-2]
    hub_folder = folder / "teacher.hub"
    assert {path.name for path in hub_folder.iterdir()} == {
        "README.md", "config.json", "model.onnx", "model.safetensors", "preprocessor_config.json",
        "teacher.safetensors"}
    expected, info = load_backbone(folder / "teacher.safetensors")
    theirs = transformers.ViTModel.from_pretrained(hub_folder, add_pooling_layer=False)
    theirs.save_pretrained(folder / "again")
    for copy in (hub_folder, hub_folder / "model.safetensors", folder / "again"):
        weights = load_backbone(copy)[0].state_dict()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.state_dict().items()), copy
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(x).last_hidden_state[:, 0], expected(x), rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(hub_folder / "model.onnx")
    features, = session.run(["features"], {"image": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(features), expected(x), rtol=0, atol=1e-4)
    backbone, read = load_backbone(find_model(str(hub_folder)))
    assert torch.equal(backbone(x), expected(x))
    assert {**read, "val_path": 0} == {**info, "val_path": 0} and read["mean"] == [0.1, 0.2, 0.3]
    ours, published = (load_file(path / "teacher.safetensors") for path in (folder, hub_folder))
    assert ours.keys() == published.keys() and all(torch.equal(ours[name], published[name]) for name in ours)
    assert read_initial_weights(str(hub_folder)).head["out_dim"] == 16
    export.main(export.parse_args(["--check", str(hub_folder / "model.onnx")]))  # which names its model beside it


def test_the_card_holds_what_is_known(run):
    folder, knn = run
    hub(folder, "--output", "out")
    text = Path("out", "README.md").read_text()
    data = huggingface_hub.ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-feature-extraction")
    assert data.tags == ["dino", "self-supervised-learning", "vit", "onnx"] and data.license is None
    tables = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    for k in ("3", "20"):
        assert [f"k-NN, k = {k}", "shapes-32", "60", "32", f"{knn[k]['top1']:.2f}", f"{knn[k]['top5']:.2f}"] in tables
    assert sum(line[0].startswith("k-NN, k") for line in tables) == 2  # not those of other weights
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    last = [record for record in log if record.get("eval") == "epoch 0"][-1]
    assert ["epoch 0", *(f"{last[key]:.2f}" for key in ("knn_top1", "knn_top5", "rankme"))] in tables
    flags = (folder / "flags.txt").read_text().splitlines()
    assert {line for line in flags if "--lr " in line or "--out_dir" in line or "--depth" in line} <= {
        *text.splitlines()}
    assert "Data: shapes:32." in text and "the mean (0.1, 0.2, 0.3)" in text and "(the teacher of the run)" in text
    for file in Path("out").iterdir():  # no path of this machine
        assert b"secret" not in file.read_bytes(), file
    export.main(export.parse_args(["--ckpt", str(folder), "--format", "safetensors", "--output", "b.safetensors"]))
    assert "head" not in load_backbone("b.safetensors")[1]
    hub("b.safetensors")
    assert "projection head" in text and "projection head" not in Path("b.hub", "README.md").read_text()


def test_no_folder_of_others_is_written_into(run, exit_message, tmp_path, capsys):
    folder, _ = run
    shutil.copy(folder / "teacher.safetensors", "copy.safetensors")

    def refused(ckpt, output):
        before = {path: path.read_bytes() for path in Path(output).iterdir() if path.is_file()}
        message = exit_message(hub, ckpt, "--output", str(output))
        assert before == {path: path.read_bytes() for path in Path(output).iterdir() if path.is_file()}
        return message

    assert f"--output {folder}: holds the model itself, name another folder" in refused(folder, folder)
    assert "holds checkpoint.pth, no folder of --format hub: name another" in refused("copy.safetensors", folder)
    for name in ("README.md", "teacher.safetensors", "flags.txt"):
        Path("out").mkdir()
        Path("out", name).write_text("---\nlicense: mit\nlibrary_name: transformers\n---\n# Mine\n")
        assert f"--output out: holds {name}, no folder of --format hub" in refused(folder, "out")
        shutil.rmtree("out")
    hub(folder, "--output", "out")
    card = Path("out", "README.md")
    card.write_text(text := card.read_text().replace("---\n", "---\nlicense: mit\n", 1) + "Mine.\n")
    Path("out", "model.onnx").write_bytes(b"old")
    capsys.readouterr()
    hub("copy.safetensors", "--output", "out")
    assert card.read_text() == text and f"kept {card} of an earlier export" in capsys.readouterr().out
    export.main(export.parse_args(["--check", "out/model.onnx"]))
    assert "holds the model itself" in refused("out", "out")


def test_results_are_those_of_the_network(run):
    """Teacher and student of a checkpoint.pth have its checksum; the results of either begin with checkpoint."""
    checkpoint = str(run[0] / "checkpoint.pth")
    knn = ["knn", "--ckpt", checkpoint, "--num_workers", "0", "--device", "cpu", "--nb_knn"]
    evaluate.main(evaluate.parse_args([*knn, "5"]))
    evaluate.main(evaluate.parse_args([*knn, "6", "--checkpoint_key", "student"]))
    linear = run[0] / "checkpoint.student.linear.shapes-32" / "result.json"
    linear.parent.mkdir()
    result = json.loads((run[0] / "checkpoint.student.knn.shapes-32.json").read_text())
    linear.write_text(json.dumps(result | dict(knn=None, top1=61.5, top5=70.25)))
    for flags, expected in (([], ["k-NN, k = 5"]), (["--checkpoint_key", "student"], ["k-NN, k = 6", "linear"])):
        hub(checkpoint, *flags, "--output", f"out{len(flags)}")
        results = Path(f"out{len(flags)}", "README.md").read_text().rpartition("## Results")[2]
        assert re.findall(r"^\| (k-NN.*?|linear) \|", results, re.MULTILINE) == expected
    assert "| linear | shapes-32 | 60 | 32 | 61.50 | 70.25 |" in results


def test_a_card_of_other_weights_claims_nothing(tmp_path, model, exit_message):
    network, _ = model
    torch.save(network.state_dict(), tmp_path / "other.pth")
    (tmp_path / "config.json").write_text('{"num_heads": 4}')
    hub(tmp_path / "other.pth")
    text = (tmp_path / "other.hub" / "README.md").read_text()
    assert "DINO" not in text and "dino" not in text and "How they were trained is not in that file" in text
    assert "None were found" in text and "`other.pth`" in text
    saved = load_file(tmp_path / "other.hub" / "teacher.safetensors")
    assert saved.keys() == {f"backbone.{name}" for name in network.state_dict()}
    resnet = tmp_path / "resnet.safetensors"
    arguments = dict(arch="resnet18", img_size=32)
    save_model(resnet, {f"backbone.{name}": x for name, x in build_backbone(arguments).state_dict().items()},
               dict(backbone=arguments))
    assert "resnet18 has no names in transformers, use --format" in exit_message(hub, resnet)


def test_the_data_of_a_published_model_have_no_path(tmp_path):
    arguments = dict(img_size=32, patch_size=8, in_chans=4, embed_dim=32, depth=1, num_heads=2)
    weights = {f"backbone.{name}": x for name, x in VisionTransformer(**arguments).state_dict().items()}
    path = tmp_path / "teacher.safetensors"
    save_model(path, weights, dict(
        backbone=arguments, head={"out_dim": 3}, channels=4, mean=[0.5] * 4, std=[0.25] * 4, value_range=[0, 4095],
        data_path=["/home/jane/cells/train", "/home/jane/more"], val_path="/home/jane/val"))
    (tmp_path / "flags.txt").write_text("--data_path /home/jane/cells/train\n--init /home/jane/start.pth\n--lr 0.1\n")
    hub(path)
    text = (tmp_path / "teacher.hub" / "README.md").read_text()
    assert "Data: cells+1. Training continued from `start.pth`." in text and "--lr 0.1\n" in text
    assert "Values of 4 channel(s), 0 to 4095 scaled to [0, 1], less the mean (0.5, 0.5, 0.5, 0.5)" in text
    for file in (tmp_path / "teacher.hub").iterdir():
        assert b"jane" not in file.read_bytes(), file


# ---- the way back ----

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of huggingface_hub, without a connection; the variables are read when the library is imported."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "hub"


@pytest.mark.parametrize("names", [None, ("model.safetensors", "config.json"), ("pytorch_model.bin", "config.json")])
def test_a_repository_is_read_from_the_cache(model, cache, tmp_path, monkeypatch, capsys, names):
    network, path = model
    hub(path)
    folder = path.parent / "teacher.hub"
    theirs = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    fill_cache(folder, cache, names)
    monkeypatch.chdir(tmp_path)
    export.main(export.parse_args(["--ckpt", "hf:me/demo"]))
    file = names[0] if names else "teacher.safetensors"
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    assert f"{file}: SHA-256 {digest}\n" in capsys.readouterr().out and Path("demo.onnx").exists()
    found, _ = load_backbone("hf:me/demo")
    assert found.num_heads == 4
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in network.state_dict().items())
    assert train.parse_args(["--init", "hf:me/demo", "--device", "cpu", "--global_crops_size", "32",
                             "--local_crops_size", "16"]).init == "hf:me/demo"
    assert sibling_path("hf:me/dino.v1", "student", "onnx", True) == Path("dino.v1.student.untrained.onnx")


def test_a_repository_is_downloaded_once(model, cache, tmp_path, monkeypatch, capsys, exit_message):
    """By the library itself, from a server on the loopback address that answers as the Hub does."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self, with_content=True):
            requests.append(f"{self.command} {self.path}")
            owner, _, name = self.path.removeprefix("/api/models/").partition("/resolve/main/")
            file = folder / name
            content = b'{"id": "me/demo", "sha": "%s", "siblings": []}' % (b"01234567" * 5)
            if name:
                content = file.read_bytes() if file.exists() else b""
            self.send_response(200 if content and owner.strip("/") == "me/demo" else 404)
            self.send_header("X-Repo-Commit", "01234567" * 5)
            self.send_header("X-Error-Code", "EntryNotFound" if name else "RepoNotFound")
            self.send_header("ETag", hashlib.sha256(content).hexdigest())
            self.send_header("Content-Length", len(content))
            self.end_headers()
            if with_content:
                self.wfile.write(content)

        def do_HEAD(self):
            self.do_GET(with_content=False)

        def log_message(self, *args):
            pass

    network, path = model
    hub(path)
    folder, requests = path.parent / "teacher.hub", []
    (folder / "teacher.safetensors").unlink()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name, value in (("HF_HUB_OFFLINE", False), ("ENDPOINT", url),
                            ("HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        try:
            for _ in range(2):
                found, _ = load_backbone("hf:me/demo")
                assert all(torch.equal(x, found.state_dict()[name]) for name, x in network.state_dict().items())
            downloads = [request for request in requests if request.startswith("GET /me")]
            assert sorted(downloads) == [f"GET /me/demo/resolve/main/{name}" for name in ("config.json",
                                                                                          "model.safetensors")]
            monkeypatch.chdir(tmp_path)
            flags = ["--ckpt", "hf:me/demo"]
            for command in (lambda: export.main(export.parse_args(flags)),
                            lambda: hub("hf:me/demo"),
                            lambda: export.main(export.parse_args([*flags, "--check", "demo.onnx"])),
                            lambda: visualize.main(visualize.parse_args(
                                ["features", "shapes:32", *flags, "--device", "cpu"]))):
                requests.clear()
                command()
                assert requests.count("GET /api/models/me/demo") == 1
            capsys.readouterr()
            assert "hf:me/none: cannot be read from the Hugging Face Hub or its cache (404 Client" in exit_message(
                load_backbone, "hf:me/none")
            (folder / "model.safetensors").unlink()
            shutil.rmtree(cache)
            assert "(no teacher.safetensors, model.safetensors, pytorch_model.bin)" in exit_message(
                load_backbone, "hf:me/demo")
        finally:
            server.shutdown()
            thread.join()


def test_what_cannot_be_read_is_one_line(cache, monkeypatch, exit_message):
    def embed(ckpt):
        export.main(export.parse_args(["--ckpt", ckpt]))

    failure = "cannot be read from the Hugging Face Hub or its cache ("
    for ckpt, reason in (("hf:me/none", "Cannot reach https://huggingface.co/api/models/me/none: offline mode is enab"),
                         ("hf:a/b/c", "Repo id must be"), ("hf:", "Repo id must")):
        assert f"{ckpt}: {failure}{reason}" in exit_message(embed, ckpt)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert f"hf:me/none: {failure}" in exit_message(embed, "hf:me/none")  # one line, not one of each try
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "huggingface_hub is not installed: pip install huggingface_hub" in exit_message(embed, "hf:me/none")


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import re, torch
from pathlib import Path
from PIL import Image
Image.new("RGB", (50, 40), (200, 100, 50)).save("photo.jpg")
for code in re.findall(r"```python\\n(.*?)```", Path(sys.argv[2], "README.md").read_text(), re.DOTALL):
    names = {}
    exec(code.replace("USER/NAME", "me/demo"), names)
    from common.weights import load_backbone
    backbone, _ = load_backbone("hf:me/demo", log=lambda text: None)
    with torch.no_grad():
        expected = backbone(torch.as_tensor(names["images"]))
    print(tuple(names["feature"].shape), (torch.as_tensor(names["feature"]) - expected).abs().max().item() < 1e-5)
"""


@pytest.mark.slow
def test_the_code_of_the_card_runs(model, tmp_path):
    """With the variables of huggingface_hub, which it reads when it is imported."""
    hub(model[1])
    folder = model[1].parent / "teacher.hub"
    fill_cache(folder, tmp_path / "home" / "hub")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT, folder], capture_output=True, text=True, timeout=200, cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"})
    assert result.stdout.splitlines() == ["(1, 32) True"] * 3, result.stdout + result.stderr
