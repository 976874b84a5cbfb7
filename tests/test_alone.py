"""Copy-alone files: each file that imports nothing local works in an empty folder of another codebase."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = {  # file -> code that uses a copy of it
    "vit.py": """
import torch, vit
model = vit.vit_tiny(patch_size=8, img_size=32)
assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 192)
assert model.get_last_selfattention(torch.zeros(1, 3, 16, 32)).sum().round() == 3 * (1 + 2 * 4)  # rows sum to 1
""",
    "dino_loss.py": """
import math, torch, dino_loss
loss = dino_loss.DINOLoss(out_dim=8)(torch.zeros(4 * 3, 8), torch.zeros(2 * 3, 8), 0.04)
assert abs(loss.item() - math.log(8)) < 1e-6
assert dino_loss.DINOHead(6, 8, hidden_dim=4, bottleneck_dim=2)(torch.randn(5, 6)).shape == (5, 8)
""",
    "augment.py": """
import torch, augment
from PIL import Image
image = Image.new("RGB", (50, 40), (124, 116, 104))
crops = augment.MultiCrop(global_size=32, local_size=16, local_number=3, jitter=0, grayscale=0, solarize=0)(image)
assert [tuple(crop.shape) for crop in crops] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
assert all(crop.abs().max() < 0.01 for crop in crops)  # the mean of ImageNet
assert augment.EvalTransform(32)(image).shape == (3, 32, 32) and augment.EvalTransform(32)(image).abs().max() < 0.01
""",
    "optim.py": """
import torch, optim
network = torch.nn.Linear(2, 1)
optimizer = optim.build_optimizer("sgd", optim.build_param_groups(network))
network.weight.grad, network.bias.grad = torch.tensor([[3.0, 4.0]]), torch.zeros(1)
assert optim.clip_gradients(network.parameters(), 1.0, True).tolist() == [5, 0]
before = network.weight.detach().clone()
for group in optimizer.param_groups:
    group["lr"], group["weight_decay"] = 0.1, 0.0
optimizer.step()
assert torch.allclose(before - network.weight, torch.tensor([[0.06, 0.08]]), atol=1e-6)
""",
    "onnx_graph.py": """
import onnx_graph, torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
graph = onnx_graph.Graph(18, "fp32")
graph.linear("y", "x", torch.tensor([[1.0, 2.0]]), torch.ones(1))
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 2), ("y", 1)))
model = helper.make_model(helper.make_graph(graph.nodes, "linear", [x], [y], list(graph.constants.values())))
assert ReferenceEvaluator(model).run(None, {"x": torch.tensor([[3.0, 4.0]]).numpy()})[0].tolist() == [[12]]
""",
    "infer.py": """
import infer
from PIL import Image
assert infer.prepare(Image.new("L", (97, 61)), dict(patch_size=8, image_size=None)).size == (96, 56)
white = infer.prepare(Image.new("RGBA", (97, 61)), dict(patch_size=8, image_size=(32, 32)))
assert white.size == (32, 32) and white.getpixel((9, 9)) == (255, 255, 255)
""",
    "evaluation/knn.py": """
import knn, torch
labels = torch.arange(8) % 4
assert knn.knn_classifier(torch.eye(4), labels[:4], torch.eye(4)[labels], labels, ks=(1, 3)) == {
    1: (100, 100), 3: (100, 100)}
assert knn.knn_predict(torch.eye(4), labels[:4], torch.eye(4)[labels], k=3)[0].tolist() == labels.tolist()
""",
    "evaluation/rankme.py": """
import rankme, torch
assert abs(rankme.effective_rank(torch.eye(9)) - 9) < 1e-4
""",
    "evaluation/linear.py": """
import linear, torch
torch.manual_seed(0)
labels = torch.arange(100) % 2
features = torch.randn(100, 4) + 8 * labels.view(-1, 1)
assert linear.linear_probe_accuracy(features, labels, features, labels, epochs=5) == 100
""",
    "evaluation/masks.py": """
import masks, torch
assert masks.jaccard(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])).item() == 0.5
assert masks.threshold_attention(torch.tensor([0.5, 0.05, 0.3, 0.15]), 0.6).tolist() == [True, False, True, False]
""",
    "evaluation/label_propagation.py": """
import label_propagation, torch
mask = torch.arange(16).view(4, 4) // 8
labels = label_propagation.mask_to_labels(mask, 2, 4, 4)
features = torch.eye(16).view(4, 4, 16)
frames = list(label_propagation.propagate_labels([features] * 3, labels, topk=1))
assert len(frames) == 2 and all(label_propagation.labels_to_mask(frame, 4, 4).equal(mask) for frame in frames)
""",
    "evaluation/ranking.py": """
import ranking, torch
precision, at = ranking.average_precision(torch.tensor([2, 0, 1]), [2, 1])
assert abs(precision - (1 + (1 / 2 + 2 / 3) / 2) / 2) < 1e-9 and at[0] == 1
""",
    "evaluation/descriptor.py": """
import descriptor, torch
features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 25.0])
features = torch.cat((features, -features))
white = descriptor.fit_whitening(features)(features)
assert torch.allclose(white.T @ white / 100, torch.eye(3), atol=1e-4)
"""}
RUNNER = """
import json, os, sys, traceback
problems = {}
for name, folder, code in json.load(sys.stdin):
    sys.path[0] = folder
    os.chdir(folder)
    try:
        exec(code, {})
    except Exception:
        problems[name] = traceback.format_exc()
    for module in os.listdir(folder):
        sys.modules.pop(module.removesuffix(".py"), None)
json.dump(problems, sys.stdout)
"""


def find_independent_files():
    """The repository's Python files that import nothing local."""
    folders = [path.parent for path in ROOT.glob("[!.]*/*.py") if path.parent.name not in ("tests", "runs")]
    local = {path.stem for path in ROOT.glob("*.py")} | {folder.name for folder in folders}
    files = [path for folder in {ROOT, *folders} for path in folder.glob("*.py") if path.name != "__init__.py"]
    return sorted(str(path.relative_to(ROOT)) for path in files if not local & imported_packages(path))


def imported_packages(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


FILES = find_independent_files()


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """{file: traceback} of the checks that failed: each file in a folder of its own, one process for all."""
    checks = []
    for name in FILES:
        folder = tmp_path_factory.mktemp(Path(name).stem)
        shutil.copy(ROOT / name, folder)
        checks.append((name, str(folder), CHECKS.get(name, f"import {Path(name).stem}")))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", RUNNER], input=json.dumps(checks), capture_output=True, text=True,
                            timeout=300, env=environment, cwd=checks[0][1])
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_copy_alone_files_import_nothing_local():
    assert CHECKS.keys() - set(FILES) == set()


def test_copy_alone_files_of_the_readme_are_checked():
    marked = re.findall(r"^\| `(\w+\.py)` .*\*copy\*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(marked) >= 6 and set(marked) <= CHECKS.keys()


@pytest.mark.parametrize("name", FILES)
def test_works_alone(problems, name):
    assert name not in problems, problems[name]
