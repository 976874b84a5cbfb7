"""Built-in shapes: generated images with labels and masks, no download.

    image, label = Shapes("train", 10_000, 32)[0]
    image, mask = Shapes("train", 10_000, 32).render(0)
"""

import colorsys
import math
import random

import torch
from PIL import Image


class Shapes(torch.utils.data.Dataset):
    """Generated images of one to three objects on a background; the class is the hue of the objects.

    Number, outline, position, size, rotation, texture, background, light and noise depend on (part, index) only. The
    mean color of an image does not depend on its class, so the objects have to be found against their background.

    Args:
        part: "train" or "test", which share no image.
        length: number of images.
        size: side, pixels.
    """

    classes = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")
    colors = [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(label / 8, 0.85, 0.85)) for label in range(8)]

    def __init__(self, part: str, length: int, size: int):
        self.part, self.length, self.size = part, length, size

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.render(i)[0], i % len(self.classes)

    def render(self, i: int) -> tuple[Image.Image, torch.Tensor]:
        """RGB image i, and its mask, bool [size, size], True on the objects."""
        if not 0 <= i < self.length:
            raise IndexError(f"image {i} of {self.length}")
        rng = random.Random(f"shapes/{self.part}/{i}")
        axis = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        y, x = axis.view(-1, 1), axis.view(1, -1)  # both from -1 to 1
        image = (rng.uniform(0.2, 0.8) + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y).expand(3, -1, -1)
        mask = torch.zeros(self.size, self.size)
        for _ in range(rng.randint(1, 3)):
            dx, dy = x - rng.uniform(-0.7, 0.7), y - rng.uniform(-0.7, 0.7)
            inside = sample_outline(rng, torch.atan2(dy, dx)) * rng.uniform(0.3, 0.5) - torch.hypot(dx, dy)
            coverage = (inside * self.size / 2 + 0.5).clamp(0, 1)  # antialiased over one pixel
            angle = rng.uniform(0, math.pi)
            stripes = torch.sin(rng.uniform(4, 16) * (dx * math.cos(angle) + dy * math.sin(angle))) / 2 + 0.5
            hue = (i % len(self.classes) + rng.uniform(-0.15, 0.15)) / len(self.classes)
            color = torch.tensor(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0)))
            image = torch.lerp(image, color.view(3, 1, 1) * (1 - rng.uniform(0.1, 0.6) * stripes), coverage)
            mask = mask.maximum(coverage)
        mean_color = torch.tensor([rng.uniform(0.35, 0.65) for _ in range(3)])
        image = image + (mean_color - image.mean(dim=(1, 2))).view(3, 1, 1)
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        image = image + rng.uniform(0, 0.06) * torch.randn(image.shape, generator=generator)
        pixels = (image * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        return Image.frombytes("RGB", (self.size, self.size), pixels.numpy().tobytes()), mask > 0.5


def sample_outline(rng, angle):
    """Distance from center to outline at each angle: a disc, triangle, square or star of random rotation."""
    corners = rng.choice((0, 3, 4, 5))
    if corners == 0:
        return torch.ones_like(angle)
    sector = 2 * math.pi / corners
    angle = (angle + rng.uniform(0, sector)) % sector - sector / 2  # from the middle of a side
    if corners == 5:
        return 1.3 - 1.6 * angle.abs() / sector
    return math.cos(sector / 2) / torch.cos(angle) * {3: 1.5, 4: 1.25}[corners]
