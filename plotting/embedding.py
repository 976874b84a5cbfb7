"""Two-dimensional embedding of features: t-SNE or PCA, drawn as a scatter plot and as thumbnails.

    points, method = embed_2d(features)                         # [M, D] -> [M, 2]: t-SNE, or PCA without scikit-learn
    plot_scatter(points, labels, names, class_colors(len(names)), title).savefig("scatter.png")
    plot_thumbnails(points, labels, names, class_colors(len(names)), load_image).save("thumbnails.png")

t-SNE needs scikit-learn, the scatter plot matplotlib.
"""

import colorsys
import importlib.util

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from plotting.draw import COLORS, escape_text

UNLABELED = (120, 120, 120)


def principal_components(x, n):
    """Projections on the n directions of largest variance: [M, D] -> float64 [M, n].

    The largest entry of each direction is positive, so that signs do not depend on the machine.
    """
    x = x.double() - x.double().mean(dim=0)
    directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -n:].flip(1)  # [D, n]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return x @ (directions * largest.sign())


def embed_2d(features, seed=0):
    """Features [M, D] -> points float64 [M, 2] and the method: t-SNE of cosines (van der Maaten & Hinton 2008).

    The method is PCA without scikit-learn, and for fewer than eight images.
    """
    if len(features) < 8 or not importlib.util.find_spec("sklearn"):
        return principal_components(features, 2), "PCA"
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", metric="cosine", random_state=seed)
    return torch.from_numpy(tsne.fit_transform(features.numpy())).double(), "t-SNE"


def class_colors(count):
    """Distinct colors, RGB from 0 to 255."""
    if count <= len(COLORS):
        return COLORS[:count]
    hues = ((i / count, (0.9, 0.6)[i % 2], (0.85, 0.65)[i // 2 % 2]) for i in range(count))
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*hue)) for hue in hues]


def list_legend(labels, names):
    """Labels to list in a legend: each class, unless there are too many, and -1 ("no label") if it occurs."""
    shown = list(range(len(names))) if len(names) <= 40 else []
    return shown + [-1] * bool((labels < 0).any())


def plot_scatter(points, labels, names, colors, title):
    """Points [M, 2] in the color of their label, [M], -1 for none: a matplotlib figure."""
    from matplotlib.figure import Figure

    shown, names, colors = list_legend(labels, names), [*names, "no label"], [*colors, UNLABELED]  # at index -1
    figure = Figure(figsize=(10, 8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=14)
    axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    dots = {label: axes.scatter(*points[labels == label].T, s=14, color=np.divide(colors[label], 255), linewidths=0)
            for label in range(-1, len(names) - 1)}
    if shown:
        figure.legend([dots[label] for label in shown], escape_text(names[label] for label in shown),
                      loc="outside right upper", fontsize=12, markerscale=2, frameon=False)
    return figure


def plot_thumbnails(points, labels, names, colors, load_image, side=1200, cell=48):
    """Images at their points, framed in the color of their label; in each grid cell the image nearest to its center.

    Args:
        points: [M, 2].
        labels: [M], -1 for none.
        names, colors: name and RGB color of each class.
        load_image: index of a point -> PIL image.
        side, cell: pixels of the grid and of an image in it.
    """
    shown, names, colors = list_legend(labels, names), [*names, "no label"], [*colors, UNLABELED]  # at index -1
    low, high = points.amin(dim=0), points.amax(dim=0)
    places = ((points - (low + high) / 2) / (high - low).max().clamp(min=1e-12) + 0.5) * (side // cell - 1)  # in cells
    nearest = {}
    for i in (places - places.round()).norm(dim=1).argsort(stable=True).tolist():
        nearest.setdefault(tuple(places[i].round().int().tolist()), i)
    sheet = Image.new("RGB", (side + 200 * bool(shown), side), "white")
    for (x, y), i in nearest.items():
        image = ImageOps.expand(ImageOps.fit(load_image(i), (cell - 8, cell - 8)), 3, tuple(colors[labels[i]]))
        sheet.paste(image, (x * cell + 1, side - (y + 1) * cell + 1))  # y points up, as in the scatter plot
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for top, label in zip(range(8, side, 28), shown):
        draw.rectangle([side + 12, top + 4, side + 28, top + 20], tuple(colors[label]))
        draw.text((side + 36, top), names[label], "black", font)
    return sheet
