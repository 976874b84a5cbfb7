import copy

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay

from evaluation.classifiers import Classifiers, FeatureExtractor
from evaluation.supervised import (
    build_head_groups,
    build_layer_decay_groups,
    build_mixup,
    supervised_step,
)
from optim import build_optimizer
from vit import VisionTransformer

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(**SIZES)


@pytest.fixture
def batch():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 5


NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def test_frozen_backbone_classifiers_equal_torch_sgd(backbone, batch):
    images, labels = batch
    before = copy.deepcopy(backbone.state_dict())
    backbone.drop_path_rate = 0.5  # must have no effect on a frozen backbone
    network = Classifiers(FeatureExtractor(backbone, 2, avgpool=True), 5, count=2).train()
    alone = copy.deepcopy(network.heads)
    optimizer = build_optimizer("sgd", build_head_groups(network, [(0.1, 0.0), (0.4, 0.01)]))
    for lr_factor in (1.0, 0.5):
        losses = supervised_step(network, optimizer, NO_SCALER, images, labels, lr_factor)
    with torch.no_grad():
        tokens = backbone.eval().get_intermediate_layers(images, 2)
        features = torch.cat((tokens[0][:, 0], tokens[1][:, 0], tokens[1][:, 1:].mean(dim=1)), dim=1)
    for head, ours, loss, (lr, weight_decay) in zip(alone, network.heads, losses, ((0.1, 0.0), (0.4, 0.01))):
        sgd = torch.optim.SGD(head.parameters(), momentum=0.9, weight_decay=weight_decay)
        for lr_factor in (1.0, 0.5):
            sgd.param_groups[0]["lr"] = lr * lr_factor
            sgd.zero_grad()
            expected = torch.nn.functional.cross_entropy(head(features), labels)
            expected.backward()
            sgd.step()
        torch.testing.assert_close(ours.state_dict(), head.state_dict(), rtol=1e-5, atol=1e-6)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_layer_decay_equals_timm(backbone):
    """Every parameter's learning rate, by name."""
    network = Classifiers(FeatureExtractor(backbone), 7, frozen=False)
    theirs = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7)
    names = {id(p): name for name, p in theirs.named_parameters()}
    expected = {names[id(p)]: group["lr_scale"] for group in param_groups_layer_decay(theirs, layer_decay=0.6)
                for p in group["params"]}
    ours = {name.replace("tokens.backbone.", "").replace("heads.0", "head"): (group["peak"], group["weight_decay"])
            for group in build_layer_decay_groups(network, lr=2.0, weight_decay=0.3, layer_decay=0.6)
            for name, _ in group["params"]}
    assert ours.keys() == expected.keys()
    for name, (peak, weight_decay) in ours.items():
        assert peak == pytest.approx(2 * expected[name]), name
        assert weight_decay == (0.3 if theirs.get_parameter(name).ndim > 1 else 0)


def test_fine_tuning_equals_torch_adamw_on_timms_loss(backbone, batch):
    images, labels = batch
    network = Classifiers(FeatureExtractor(backbone), 5, frozen=False)
    alone = copy.deepcopy(network)
    optimizer = build_optimizer("adamw", build_layer_decay_groups(network, 0.01, 0.1, 1.0))
    adamw = torch.optim.AdamW([{"params": [p for p in alone.parameters() if p.ndim > 1], "weight_decay": 0.1},
                               {"params": [p for p in alone.parameters() if p.ndim <= 1], "weight_decay": 0.0}])
    for lr_factor in (0.3, 1.0):
        loss = supervised_step(network, optimizer, NO_SCALER, images, labels, lr_factor, label_smoothing=0.1)
        for group in adamw.param_groups:
            group["lr"] = 0.01 * lr_factor
        adamw.zero_grad()
        expected = LabelSmoothingCrossEntropy(0.1)(alone(images)[0], labels)
        expected.backward()
        adamw.step()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for (name, ours), theirs in zip(network.named_parameters(), alone.parameters()):
        # AdamW's first steps normalize gradients: those near 0 are rounding errors
        assert (ours - theirs).abs().max() < 2e-3 and (ours - theirs).abs().mean() < 2e-5, name


def test_mixup_and_cutmix(backbone, batch):
    images, labels = batch
    assert build_mixup(5, 0, 0) is None
    for mixup, cutmix in ((0.8, 0.0), (0.0, 1.0)):
        torch.manual_seed(3)
        mixed, shares = build_mixup(5, mixup, cutmix)(images, labels)
        one_hot = torch.nn.functional.one_hot(labels, 5)
        share = ((shares - one_hot.roll(1, 0)) / (one_hot - one_hot.roll(1, 0))).nanmean()  # of each image's own label
        assert 0.02 < share < 0.98
        torch.testing.assert_close(shares, share * one_hot + (1 - share) * one_hot.roll(1, 0))
        if mixup:
            torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
        else:
            assert ((mixed == images) | (mixed == images.roll(1, 0))).all()
            assert (mixed == images).float().mean() == pytest.approx(share.item(), abs=1e-6)
        network = Classifiers(FeatureExtractor(backbone), 5, frozen=False).eval()
        expected = SoftTargetCrossEntropy()(network(mixed)[0], shares).item()
        optimizer = build_optimizer("adamw", build_layer_decay_groups(network, 0.01, 0.1, 1.0))
        assert supervised_step(network, optimizer, NO_SCALER, mixed, shares).item() == pytest.approx(expected, abs=1e-5)


def test_classifiers_compute_in_float32(backbone, batch):
    network = Classifiers(FeatureExtractor(backbone), 5).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = network(batch[0])
        features = network.tokens(batch[0])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0], network.heads[0](features.float()), rtol=0, atol=1e-6)


def test_stochastic_depth_in_fine_tuning_only(backbone, batch):
    backbone.drop_path_rate = 0.5
    outputs = []
    for frozen in (False, True):
        network = Classifiers(FeatureExtractor(backbone), 5, frozen=frozen).train()
        torch.manual_seed(0)
        outputs.append((network(batch[0]), network(batch[0])))
    assert not torch.equal(*outputs[0]) and torch.equal(*outputs[1])
