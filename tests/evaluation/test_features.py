import pytest
import torch

from common.checkpoint import CheckpointError
from evaluation.features import FEATURES, extract_features, load_features, save_features

NONE = torch.empty(0, dtype=torch.int64)


def test_no_readable_image():
    with pytest.raises(OSError, match="no image can be read, the last: bad"):
        extract_features(lambda x: x, [(torch.empty(0), NONE, NONE, ["bad"])])


def test_features_are_ordered_by_index():
    batches = [(torch.tensor([[3.0], [1.0]]), torch.tensor([30, 10]), torch.tensor([3, 1]), ["bad image"]),
               (torch.empty(0), NONE, NONE, []),
               (torch.tensor([[2.0]]), torch.tensor([20]), torch.tensor([2]), [])]
    features, labels, corrupt = extract_features(lambda x: x * 2, batches)
    assert features.tolist() == [[2], [4], [6]] and labels.tolist() == [10, 20, 30] and corrupt == ["bad image"]


def test_saved_features_are_loaded_for_the_same_origin_only(tmp_path):
    path = tmp_path / "features.safetensors"
    features = {name: torch.arange(6) if "labels" in name else torch.randn(6, 4) for name in FEATURES}
    save_features(path, features, dict(ckpt="a.pth", image_size=32))
    loaded = load_features(path, dict(ckpt="moved.pth", image_size=32))
    assert list(loaded) == list(FEATURES) and all(torch.equal(loaded[name], features[name]) for name in FEATURES)
    with pytest.raises(CheckpointError, match="holds features with image_size 32, not 40: delete it"):
        load_features(path, dict(ckpt="a.pth", image_size=40))
    with pytest.raises(CheckpointError, match="holds features with avgpool None, not True"):
        load_features(path, dict(ckpt="a.pth", image_size=32, avgpool=True))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="not a features file, or corrupt"):
        load_features(truncated, dict(ckpt="a.pth", image_size=32))


SCRIPT = """
import torch, torch.distributed as dist
from data.loaders import build_eval_loader, center_crop_view
from data.shapes import Shapes
from evaluation.features import extract_features
from evaluation.knn import knn_classifier
images = Shapes("train", 7, 32)
x, y = torch.stack([center_crop_view(images[i][0], 32) for i in range(7)]).flatten(1), torch.arange(7)
accuracies = [knn_classifier(x, y, x[:count], y[:count] + 1, ks=(3,)) for count in (7, 1)]
dist.init_process_group("gloo")
for count, expected in zip((7, 1), accuracies):  # one image leaves a process without any
    loader = build_eval_loader(Shapes("train", count, 32), 32, 2, 0, dist.get_rank(), 2)
    features, labels, corrupt = extract_features(lambda x: x.flatten(1), loader)
    assert torch.equal(features, x[:count]) and labels.tolist() == list(range(count)) and corrupt == []
    assert knn_classifier(x, y, features, labels + 1, ks=(3,)) == expected
dist.destroy_process_group()
"""


def test_two_processes_extract_and_classify_each_image_once(run_torchrun):
    run_torchrun(2, SCRIPT)
