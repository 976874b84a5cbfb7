import os
from types import SimpleNamespace

import pytest
import torch

from common.checkpoint import CheckpointError
from common.weights import save_model
from data.shapes import Shapes
from evaluation.features import extract_features, load_features

ARGS = SimpleNamespace(batch_size_per_gpu=2, num_workers=0)


class Images(list):
    """Numbers in place of images; None cannot be read."""

    def __getitem__(self, i):
        if super().__getitem__(i) is None:
            raise OSError(f"image {i} is bad")
        return super().__getitem__(i), 10 * i


def extract(images):
    return extract_features(lambda x: x * 2, Images(images), 32, ARGS, view=lambda image, size: torch.tensor([image]))


def test_no_readable_image():
    with pytest.raises(OSError, match="no image can be read, the last: image 2 is bad"):
        extract([None, None, None])


def test_corrupt_images_are_left_out():
    features, labels, indices, corrupt = extract([1.0, None, None, None, 2.0, 3.0])  # the second batch is empty
    assert features.tolist() == [[2], [4], [6]] and labels.tolist() == [0, 40, 50] and indices.tolist() == [0, 4, 5]
    assert corrupt == ["image 1 is bad", "image 2 is bad", "image 3 is bad"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_batches_of_loader_workers_keep_no_files_open():
    counts, args = [], SimpleNamespace(batch_size_per_gpu=1, num_workers=1)
    extract_features(lambda x: counts.append(len(os.listdir("/proc/self/fd"))) or x.mean(dim=(2, 3)),
                     Shapes("train", 200, 32), 32, args)
    assert counts[-1] < counts[0] + 100


def test_saved_features_are_loaded_for_the_same_origin_only(tmp_path):
    path = tmp_path / "features.safetensors"
    features = dict(train_features=torch.randn(6, 4), train_labels=torch.arange(6), test_features=torch.randn(2, 4),
                    test_labels=torch.arange(2))
    save_model(path, features, dict(backbone={}, ckpt="a.pth", image_size=32))
    loaded = load_features(path, dict(ckpt="moved.pth", image_size=32))
    assert loaded.keys() == features.keys() and all(torch.equal(loaded[name], features[name]) for name in features)
    with pytest.raises(CheckpointError, match="holds features with image_size 32, not 40: delete it"):
        load_features(path, dict(ckpt="a.pth", image_size=40))
    with pytest.raises(CheckpointError, match="holds features with avgpool None, not True"):
        load_features(path, dict(ckpt="a.pth", image_size=32, avgpool=True))
    save_model(tmp_path / "other.safetensors", dict(x=torch.ones(2)), dict(backbone={}, ckpt="a.pth", image_size=32))
    with pytest.raises(CheckpointError, match="other.safetensors: not a features file"):
        load_features(tmp_path / "other.safetensors", dict(ckpt="a.pth", image_size=32))
    for name, tensor in (("train_features", features["train_features"].to(torch.float8_e4m3fn)),
                         ("test_features", torch.ones(2)), ("train_labels", features["train_labels"][:1]),
                         ("test_labels", features["test_labels"].float())):
        save_model(tmp_path / "wrong.safetensors", features | {name: tensor}, dict(backbone={}, image_size=32))
        with pytest.raises(CheckpointError, match=r"not float32 \[M, D\] with int64 \[M\]: delete it"):
            load_features(tmp_path / "wrong.safetensors", dict(image_size=32))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="not a safetensors file, or corrupt"):
        load_features(truncated, dict(ckpt="a.pth", image_size=32))


SCRIPT = """
import torch, torch.distributed as dist
from types import SimpleNamespace
from data.loaders import center_crop_view
from data.shapes import Shapes
from evaluation.features import extract_features
from evaluation.knn import knn_classifier
images = Shapes("train", 7, 32)
x, y = torch.stack([center_crop_view(images[i][0], 32) for i in range(7)]).flatten(1), torch.arange(7)
accuracies = [knn_classifier(x, y, x[:count], y[:count] + 1, ks=(3,)) for count in (7, 1)]
dist.init_process_group("gloo")
for count, expected in zip((7, 1), accuracies):  # one image leaves a process without any
    args = SimpleNamespace(batch_size_per_gpu=2, num_workers=0)
    features, labels, indices, corrupt = extract_features(lambda x: x.flatten(1), Shapes("train", count, 32), 32, args)
    assert torch.equal(features, x[:count]) and labels.tolist() == indices.tolist() == list(range(count))
    assert corrupt == []
    assert knn_classifier(x, y, features, labels + 1, ks=(3,)) == expected
dist.destroy_process_group()
"""


def test_two_processes_extract_and_classify_each_image_once(run_torchrun):
    run_torchrun(2, SCRIPT)
