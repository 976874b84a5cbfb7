import torch
from PIL import Image

from augment import MultiCrop
from data.sample import measure_normalization, sample_images, typical_side


class Sizes(list):
    def __getitem__(self, index):
        size = super().__getitem__(index)
        if size is None:
            raise OSError("corrupt")
        return Image.new("RGB", size), 0


def test_typical_side_is_the_median_of_what_can_be_read():
    for sizes, side in (([(30, 40), (90, 50), None, (70, 60)], 50), ([(8, 8)] * 990 + [(99, 99)] * 10, 8),
                        ([None, None], None), ([], None)):
        assert typical_side(sample_images(Sizes(sizes))) == side


def test_a_constant_channel_stays_small_in_crops():
    """Such as the alpha of RGBA: divided by a tiny standard deviation, its color jitter would dwarf the others."""
    images = [(torch.cat([torch.rand(3, 16, 16), torch.ones(1, 16, 16)]), 0) for _ in range(4)]
    mean, std = measure_normalization(images)
    pixels = torch.stack([image for image, _ in images]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(mean), pixels.mean(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(std[:3]), pixels[:3].std(dim=1, correction=0), rtol=0, atol=1e-5)
    crops = MultiCrop(16, jitter=1, local_number=0, channels=4, mean=mean, std=std)(images[0][0], key=0)
    assert std[3] == 1 and 0 < max(crop[3].abs().max() for crop in crops) <= 0.4
