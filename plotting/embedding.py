"""Two-dimensional embedding of features: t-SNE or PCA, drawn as a scatter plot and as thumbnails.

    points, method = embed_2d(features)                         # [M, D] -> [M, 2]: t-SNE, or PCA without scikit-learn
    plot_scatter(points, labels, names, class_colors(len(names)), title).savefig("scatter.png")
    plot_thumbnails(points, labels, names, class_colors(len(names)), load_image, title).save("thumbnails.png")

    layouts, method = embed_sequence(features_of_epochs)        # each layout starts from the one before
    frames = draw_frames(layouts, captions, labels, names, colors, title)       # of an animation

t-SNE and k-means need scikit-learn, the scatter plot matplotlib.
"""

import colorsys
import importlib.util
import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from plotting.draw import COLORS, escape_text
from plotting.sheet import GAP, contact_sheet, draw_swatch, principal_components

UNLABELED = (120, 120, 120)


def embed_2d(features, seed=0, init=None):
    """Features [M, D] -> points float64 [M, 2] and the method: t-SNE of cosines (van der Maaten & Hinton 2008).

    t-SNE starts from the layout `init` [M, 2], or from the principal components.

    The method is PCA without scikit-learn, for fewer than eight images, and for features that are all the same, of
    which t-SNE would crash.
    """
    if len(features) < 8 or not importlib.util.find_spec("sklearn"):
        return principal_components(features, 2), "PCA"
    if features.std(dim=0).max() <= 1e-6 * features.abs().max().clamp(min=1e-12):
        return principal_components(features, 2), "PCA (all features are the same)"
    from sklearn.manifold import TSNE

    # from a given layout without exaggeration, which would contract it first
    start = dict(init="pca") if init is None else dict(init=init.float().numpy(), early_exaggeration=1.0)
    tsne = TSNE(perplexity=min(30, (len(features) - 1) / 3), metric="cosine", random_state=seed, **start)
    return torch.from_numpy(tsne.fit_transform(features.numpy())).double(), "t-SNE"


def embed_sequence(features, seed=0):
    """Features [M, D] of the same images by several models -> a layout [M, 2] for each, and the method.

    Each starts from the one before, so that what a model does not change stays in place. The start is a layout of
    t-SNE, as it cannot separate equal points, such as those of a model that has collapsed.
    """
    layouts, start = [], None
    for x in features:
        points, method = embed_2d(x, seed, start)
        layouts.append(points)
        start = points if method == "t-SNE" else start
    return layouts, method


def class_colors(count):
    """Distinct colors, RGB from 0 to 255."""
    if count <= len(COLORS):
        return COLORS[:count]
    hues = ((i / count, (0.9, 0.6)[i % 2], (0.85, 0.65)[i // 2 % 2]) for i in range(count))
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(*hue)) for hue in hues]


def cluster_features(features, seed=0, count=8):
    """k-means of L2-normalized features: cluster of each [M], largest first; all -1 without scikit-learn."""
    if len(features) < count or not importlib.util.find_spec("sklearn"):
        return torch.full((len(features),), -1)
    from sklearn.cluster import KMeans

    clusters = KMeans(count, n_init=3, random_state=seed).fit_predict(F.normalize(features).numpy())
    order = torch.from_numpy(clusters).bincount(minlength=count).argsort(descending=True)
    return order.argsort()[clusters]


def group_images(data, labels, features, seed):
    """Labels, names and colors of the classes or, without labels, of clusters of features, and a note of these."""
    if (labels < 0).all() and (clusters := cluster_features(features, seed)).max() >= 0:
        names = [f"cluster {i + 1}" for i in range(clusters.max() + 1)]
        return clusters, names, class_colors(len(names)), "; colors: k-means clusters of the features"
    names = [str(name) for name in getattr(data.train, "classes", None) or range(labels.max() + 1)]
    return labels, names, getattr(data.train, "colors", None) or class_colors(len(names)), ""


def list_legend(labels, names, most=30):
    """[(label, name and number of images)] of the largest classes and of -1, "no label"; number of classes left out.
    """
    counts = labels[labels >= 0].bincount(minlength=len(names))
    shown = sorted(counts.argsort(descending=True, stable=True)[:most].tolist())
    entries = [(label, f"{names[label][:24]} ({counts[label]:,})") for label in shown if counts[label]]
    rest = (labels < 0).sum()
    return entries + [(-1, f"no label ({rest:,})")] * bool(rest), int((counts > 0).sum()) - len(entries)


def plot_scatter(points, labels, names, colors, title):
    """Points [M, 2] in the color of their label, [M], -1 for none: a matplotlib figure."""
    from matplotlib.figure import Figure

    shown, left_out = list_legend(labels, names)
    colors = [*colors, UNLABELED]  # at index -1
    figure = Figure(figsize=(10, 8), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(*escape_text([title]), fontsize=11, wrap=True)
    axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    size = min(14, 40_000 / len(points))
    dots = {label: axes.scatter(*points[labels == label].T, s=size, color=np.divide(colors[label], 255), linewidths=0)
            for label in range(-1, len(names))}
    entries = escape_text(name for _, name in shown)
    figure.legend([dots[label] for label, _ in shown], entries, loc="outside right upper", fontsize=11, frameon=False,
                  markerscale=(60 / size) ** 0.5, title=f"{left_out} smaller classes left out" if left_out else None)
    return figure


def render_figure(figure, dpi=100):
    """A matplotlib figure as RGB image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi)
    return Image.open(buffer).convert("RGB")


def draw_frames(layouts, captions, labels, names, colors, title, steps=12):
    """Frames of an animation from layout to layout, [M, 2] each: yields (PIL image, whether it is a layout itself).

    Args:
        captions: of the layouts, such as "epoch 19", above the title.
        labels, names, colors: see `plot_scatter`.
        steps: frames from one layout to the next, the last of which is the next.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot_scatter(layouts[0], labels, names, colors, title)
    figure.set_dpi(80)
    canvas, (axes,) = FigureCanvasAgg(figure), figure.axes
    low, high = torch.cat(layouts).amin(dim=0).numpy(), torch.cat(layouts).amax(dim=0).numpy()
    margin = 0.03 * (high - low).max()
    xlim, ylim = zip(low - margin, high + margin)
    axes.set(xlim=xlim, ylim=ylim, adjustable="box")
    for i, (caption, points) in enumerate(zip(captions, layouts)):
        axes.title.set_text("\n".join(escape_text([caption, title])))
        for step in range(1, steps + 1) if i else [steps]:
            share = (1 - math.cos(math.pi * step / steps)) / 2  # slow at both ends
            for label, dots in enumerate(axes.collections, start=-1):
                dots.set_offsets(torch.lerp(layouts[max(i - 1, 0)], points, share)[labels == label])
            canvas.draw()
            figure.set_layout_engine("none")  # that of the first frame stays
            image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
            yield image, step == steps


def plot_thumbnails(points, labels, names, colors, load_image, title, side=1200, cell=48):
    """Images at their points, framed in the color of their label; in each grid cell the image nearest to its center.

    Args:
        points: [M, 2].
        labels: [M], -1 for none.
        names, colors: name and RGB color of each class.
        load_image: index of a point -> PIL image.
        title: what the points are; the number of images that are drawn is added.
        side, cell: pixels of the grid and of an image in it.
    """
    (shown, left_out), colors = list_legend(labels, names), [*colors, UNLABELED]  # at index -1
    low, high = points.amin(dim=0), points.amax(dim=0)
    places = ((points - (low + high) / 2) / (high - low).max().clamp(min=1e-12) + 0.5) * (side // cell - 1)  # in cells
    nearest = {}
    for i in (places - places.round()).norm(dim=1).argsort(stable=True).tolist():
        nearest.setdefault(tuple(places[i].round().int().tolist()), i)
    grid = Image.new("RGB", (side, side), "white")
    for (x, y), i in nearest.items():
        image = ImageOps.expand(ImageOps.fit(load_image(i), (cell - 8, cell - 8)), 3, tuple(colors[labels[i]]))
        grid.paste(image, (x * cell + 1, side - (y + 1) * cell + 1))  # y points up, as in the scatter plot
    rows = [y for _, y in nearest]
    grid = grid.crop((0, side - (max(rows) + 1) * cell, side, side - min(rows) * cell))
    legend = [draw_swatch(colors[label], name, side) for label, name in shown]
    if left_out:
        legend.append(f"{left_out} smaller classes are not listed.")
    caption = f"{len(nearest):,} of {len(points):,} images: of those that would overlap, one."
    return contact_sheet([([(grid, caption)], 1)], side + 2 * GAP, title, legend)
