import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score, recall_score
from torch import nn

from evaluation.segmentation import (
    PatchFeatures,
    SegmentationHead,
    count_confusions,
    pixel_cross_entropy,
    predict_pixels,
    summarize_confusions,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_patch_features_are_the_tokens_in_row_major_order(model):
    network, images = model[0], draw(2, 3, 16, 40)
    with torch.no_grad():
        features, layers = PatchFeatures(network, 2)(images), network.get_intermediate_layers(images, 2)
    assert features.shape == (2, 64, 2, 5) and PatchFeatures(network).dim == 32
    for row, column in ((0, 0), (0, 4), (1, 3)):
        expected = torch.cat([layer[:, 1 + 5 * row + column] for layer in layers], dim=1)
        torch.testing.assert_close(features[:, :, row, column], expected)


def test_head_equals_torch_batch_norm_and_convolution():
    """Outputs and gradients in training, and running statistics in evaluation."""
    torch.manual_seed(0)
    head = SegmentationHead(6, 4)
    norm, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
    conv.load_state_dict({name: head.state_dict()[name] for name in ("weight", "bias")})
    for module in (head.norm, norm):
        module.weight.data, module.bias.data = draw(6, seed=1), draw(6, seed=2)
    for step in range(3):
        x = 3 + 2 * draw(2, 6, 3, 5, seed=step)
        outputs = head(x), conv(norm(x))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        for output in outputs:
            output.square().sum().backward()
    torch.testing.assert_close(head.norm.weight.grad, norm.weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.weight.grad, conv.weight.grad, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(norm.running_var, torch.ones(6), atol=0.1)
    torch.testing.assert_close(head.norm.running_var, norm.running_var)
    torch.testing.assert_close(head.eval()(x), conv(norm.eval()(x)), rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_all_pixels():
    logits, labels = draw(2, 3, 4, 6), torch.randint(0, 3, (2, 8, 12), generator=torch.Generator().manual_seed(1))
    labels[0, :5] = 255
    large = nn.Upsample(scale_factor=2, mode="bilinear")(logits.double()).numpy()
    total = 0.0
    for b, y, x in np.argwhere(labels.numpy() != 255):
        values = large[b, :, y, x]
        total += np.log(np.exp(values).sum()) - values[labels[b, y, x]]
    assert pixel_cross_entropy(logits, labels.byte()).item() == pytest.approx(total / (2 * 8 * 12), rel=1e-5)
    assert pixel_cross_entropy(logits, torch.full((2, 8, 12), 255, dtype=torch.uint8)).item() == 0


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_classes_in_chunks_equal_the_argmax_of_all(chunk):
    logits = draw(2, 10, 5, 7)
    expected = nn.functional.interpolate(logits, (33, 20), mode="bilinear").argmax(dim=1)
    assert predict_pixels(logits, (33, 20), chunk).equal(expected) and len(expected.unique()) == 10


def test_confusions_equal_scikit_learn():
    """Of a set of two images; class 4 occurs in none, class 3 in the predictions alone."""
    rng, matrix, pairs = np.random.default_rng(0), torch.zeros(5, 5, dtype=torch.int64), []
    for shape in ((6, 9), (5, 4)):
        truth, predicted = rng.choice([0, 1, 2, 255], shape), rng.integers(0, 4, shape)
        matrix += count_confusions(torch.from_numpy(predicted), torch.from_numpy(truth).byte(), 5)
        pairs.append(np.stack((truth, predicted)).reshape(2, -1))
    truth, predicted = np.concatenate(pairs, axis=1)
    truth, predicted = truth[truth != 255], predicted[truth != 255]
    assert (matrix.numpy() == confusion_matrix(truth, predicted, labels=range(5))).all()
    before, result = copy.deepcopy(matrix), summarize_confusions(matrix)
    iou = jaccard_score(truth, predicted, labels=range(4), average=None)
    assert result["iou"][:4].numpy() == pytest.approx(iou) and result["iou"][3] == 0 and result["iou"][4].isnan()
    assert result["miou"] == pytest.approx(iou.mean()) and result["accuracy"] == pytest.approx(
        (truth == predicted).mean())
    recall = recall_score(truth, predicted, labels=range(3), average=None)
    assert result["class_accuracy"][:3].numpy() == pytest.approx(recall) and result["class_accuracy"][3:].isnan().all()
    assert result["mean_accuracy"] == pytest.approx(recall.mean()) and matrix.equal(before)
