"""Built-in shapes: generated images with labels and masks, no download.

    image, label = Shapes("train", 10_000, 32)[0]

This file needs torch and Pillow.
"""

import colorsys
import math
import random

import torch
from PIL import Image


class Shapes(torch.utils.data.Dataset):
    """Generated pictures: one to three objects of one hue on a ground, with label and mask.

    The class is the hue. Everything else is a nuisance drawn from (part, index) alone: number, outline,
    place, size, turn, stripes, shade, ground, light and noise. The mean colour of every picture is set to one
    drawn without regard to the class, so it says nothing about the label: only the objects against their
    ground do.

    Args:
        part: "train" or "test"; the two never share a picture.
        length: number of pictures.
        size: side, pixels.
    """

    classes = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")
    colors = [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(label / 8, 0.85, 0.85)) for label in range(8)]

    def __init__(self, part, length, size):
        self.part, self.length, self.size = part, length, size

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.render(i)[0], self.label(i)

    def label(self, i):
        return i % len(self.classes)

    def mask(self, i):
        """Where the objects are: bool [size, size]."""
        return self.render(i)[1]

    def render(self, i):
        """Picture i and its mask: RGB image of size x size, bool [size, size]."""
        if not 0 <= i < self.length:
            raise IndexError(f"picture {i} of {self.length}")
        rng = random.Random(f"shapes/{self.part}/{i}")
        axis = (torch.arange(self.size) + 0.5) / self.size * 2 - 1
        y, x = axis.view(-1, 1), axis.view(1, -1)  # the picture spans [-1, 1] both ways
        picture = (rng.uniform(0.2, 0.8) + rng.uniform(-0.2, 0.2) * x + rng.uniform(-0.2, 0.2) * y).expand(3, -1, -1)
        mask = torch.zeros(self.size, self.size)
        for _ in range(rng.randint(1, 3)):
            dx, dy = x - rng.uniform(-0.7, 0.7), y - rng.uniform(-0.7, 0.7)
            inside = self.radius(rng, torch.atan2(dy, dx)) * rng.uniform(0.3, 0.5) - torch.hypot(dx, dy)
            cover = (inside * self.size / 2 + 0.5).clamp(0, 1)  # anti-aliased over one pixel
            turn = rng.uniform(0, math.pi)
            stripes = torch.sin(rng.uniform(4, 16) * (dx * math.cos(turn) + dy * math.sin(turn))) / 2 + 0.5
            hue = (self.label(i) + rng.uniform(-0.15, 0.15)) / len(self.classes)
            color = torch.tensor(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0)))
            picture = torch.lerp(picture, color.view(3, 1, 1) * (1 - rng.uniform(0.1, 0.6) * stripes), cover)
            mask = mask.maximum(cover)

        tint = torch.tensor([rng.uniform(0.35, 0.65) for _ in range(3)])
        picture = picture + (tint - picture.mean(dim=(1, 2))).view(3, 1, 1)  # the mean colour is now the tint
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        picture = picture + rng.uniform(0, 0.06) * torch.randn(picture.shape, generator=noise)
        pixels = (picture * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        return Image.frombytes("RGB", (self.size, self.size), pixels.numpy().tobytes()), mask > 0.5

    @staticmethod
    def radius(rng, angle):
        """Distance from centre to outline in each direction: a disc, triangle, square or star, turned at random."""
        corners = rng.choice((0, 3, 4, 5))
        if corners == 0:
            return torch.ones_like(angle)
        sector = 2 * math.pi / corners
        off = (angle + rng.uniform(0, sector)) % sector - sector / 2  # angle from the middle of a side
        if corners == 5:
            return 1.3 - 1.6 * off.abs() / sector
        return math.cos(sector / 2) / torch.cos(off) * {3: 1.5, 4: 1.25}[corners]
