"""The code in docs/detection.md runs."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

PAGE = Path(__file__).parents[1] / "docs" / "detection.md"


@pytest.mark.slow
def test_a_detector_on_a_backbone_finds_a_box(model):
    """Faster R-CNN on random weights is trained on an image with a bright rectangle."""
    network, path = model
    namespace = {}
    exec(re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1], namespace)
    torch.manual_seed(0)
    detector = namespace["build_detector"](str(path), num_classes=3, min_size=64, max_size=96,
                                            out_channels=32)
    maps = detector.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps.values()] == [(1, 32, 32 // 2**i, 48 // 2**i) for i in range(4)]
    image, target = torch.zeros(3, 64, 90), {"boxes": torch.tensor([[20.0, 10, 52, 50]]), "labels": torch.tensor([2])}
    image[:, 10:50, 20:52] = 1
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    for _ in range(50):
        namespace["train_step"](detector, optimizer, [image], [target])
    with torch.no_grad():
        result = detector.eval()([image])[0]
    assert result["labels"][0] == 2 and box_iou(result["boxes"][:1], target["boxes"]).item() > 0.6
    assert not any(torch.equal(a, b) for a, b in zip(detector.backbone.vit.blocks.parameters(),
                                                     network.blocks.parameters()))
