"""Many numbers in a plane: features of pictures brought to two dimensions, and drawn there.

    points, method = in_a_plane(features)                         # [M, D] -> [M, 2]: t-SNE, or PCA without scikit-learn
    scatter(points, labels, names, colors(len(names)), title).savefig("classes.png")
    thumbnails(points, labels, colors(len(names)), open_picture).save("pictures.png")

t-SNE needs scikit-learn, the scatter plot matplotlib.
"""

import colorsys
import importlib.util

import torch
from PIL import Image, ImageOps

from plotting.draw import COLORS

GREY = (120, 120, 120)  # without a label


def principal_components(x, n):
    """Projections on the n directions in which x varies most: [M, D] -> float64 [M, n].

    The largest entry of each direction is positive, so that the signs do not depend on the machine.
    """
    x = x.double() - x.double().mean(dim=0)
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -n:].flip(1)  # [D, n]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return x @ (directions * largest.sign())


def embed_2d(features, seed=0):
    """Features [M, D] -> points float64 [M, 2], and by what method: t-SNE of cosines (van der Maaten & Hinton 2008).

    It is PCA without scikit-learn, and for fewer than eight pictures.
    """
    if len(features) < 8 or not importlib.util.find_spec("sklearn"):
        return principal_components(features, 2), "PCA"
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", metric="cosine", random_state=seed)
    return torch.from_numpy(tsne.fit_transform(features.numpy())).double(), "t-SNE"


def class_colors(count):
    """Colours of so many classes, as RGB from 0 to 255."""
    if count <= len(COLORS):
        return COLORS[:count]
    hues = ((i / count, (0.9, 0.6)[i % 2], (0.85, 0.65)[i // 2 % 2]) for i in range(count))
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*hue)) for hue in hues]


def plot_scatter(points, labels, names, class_colors, title):
    """Points [M, 2] in the colour of their label [M], -1 for none: a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    for label, color in enumerate([GREY, *class_colors], start=-1):
        x, y = points[labels == label].T
        axes.scatter(x, y, s=14, color=[channel / 255 for channel in color], linewidths=0)
    if 0 < len(names) <= 40:
        names = [name.replace("$", r"\$").encode(errors="replace").decode() for name in names]  # "$" begins a formula
        figure.legend(axes.collections[1:], names, loc="outside right upper", fontsize=9, markerscale=2, frameon=False)
    return figure


def plot_thumbnails(points, labels, class_colors, open_picture, side=1200, cell=48):
    """Pictures at their points, framed in the colour of their label; where several meet the one in the middle.

    Args:
        points: [M, 2].
        labels: [M], -1 for none.
        colors: RGB of each label.
        open_picture: number of a point -> PIL image.
        side, cell: pixels of the result and of a picture in it.
    """
    low, high = points.amin(dim=0), points.amax(dim=0)
    places = ((points - (low + high) / 2) / (high - low).max().clamp(min=1e-12) + 0.5) * (side // cell - 1)  # in cells
    nearest = {}
    for i, (place, off) in enumerate(zip(places.round().int().tolist(), (places - places.round()).norm(dim=1))):
        if tuple(place) not in nearest or off < nearest[tuple(place)][0]:
            nearest[tuple(place)] = off, i
    sheet = Image.new("RGB", (side, side), "white")
    for (x, y), (_, i) in nearest.items():
        picture = ImageOps.fit(open_picture(i), (cell - 8, cell - 8))
        framed = ImageOps.expand(picture, 3, class_colors[labels[i]] if labels[i] >= 0 else GREY)
        sheet.paste(framed, (x * cell + 1, side - (y + 1) * cell + 1))  # upwards, as in the plot
    return sheet


if __name__ == "__main__":
    torch.manual_seed(0)
    features = torch.cat([torch.randn(50, 16) + 4 * torch.randn(16) for _ in range(3)])
    labels = torch.arange(150) // 50
    points, method = embed_2d(features)
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
    print(f"{method} of 150 points in three classes: the nearest is of the same class for "
          f"{(labels[nearest] == labels).double().mean():.0%}")
    print("picture:", plot_thumbnails(points, labels, COLORS, lambda i: Image.new("RGB", (32, 32))).size)
