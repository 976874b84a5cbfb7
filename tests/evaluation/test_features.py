import pytest
import torch

from evaluation.features import extract_features


def test_a_share_without_pictures():
    with pytest.raises(OSError, match="no picture could be read, the last: bad"):
        none = torch.empty(0, dtype=torch.int64)
        extract_features(lambda x: x, [(torch.empty(0), none, none, ["bad"])])


def test_features_come_back_in_order():
    batches = [(torch.tensor([[3.0], [1.0]]), torch.tensor([30, 10]), torch.tensor([3, 1]), ["bad picture"]),
               (torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), []),
               (torch.tensor([[2.0]]), torch.tensor([20]), torch.tensor([2]), [])]
    features, labels, unreadable = extract_features(lambda x: x * 2, batches)
    assert features.tolist() == [[2], [4], [6]] and labels.tolist() == [10, 20, 30] and unreadable == ["bad picture"]


SCRIPT = """
import torch, torch.distributed as dist
from data.loaders import eval_loader
from data.shapes import Shapes
from evaluation.features import extract_features
dist.init_process_group("gloo")
loader = eval_loader(Shapes("train", 23, 32), 32, 4, 0, dist.get_rank(), dist.get_world_size())
features, labels, _ = extract_features(lambda x: x.flatten(1), loader)
alone = eval_loader(Shapes("train", 23, 32), 32, 4).dataset
expected = torch.stack([alone[i][0] for i in range(23)]).flatten(1)
assert torch.equal(features, expected), features.shape
assert labels.tolist() == [i % 8 for i in range(23)]
dist.destroy_process_group()
"""


def test_three_processes_bring_each_picture_once(run_torchrun):
    run_torchrun(3, SCRIPT)
