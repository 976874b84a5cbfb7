import sys

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from plotting import embedding
from plotting.embedding import (
    class_colors,
    cluster_features,
    draw_frames,
    embed_2d,
    embed_sequence,
    plot_scatter,
    plot_thumbnails,
)
from plotting.sheet import contact_sheet, principal_components


def clusters(count=30):
    generator = torch.Generator().manual_seed(0)
    centers = 6 * torch.randn(3, 16, generator=generator)
    return torch.cat([center + torch.randn(count, 16, generator=generator) for center in centers])


def test_components_equal_those_of_scikit_learn():
    x = clusters()
    found, expected = principal_components(x, 3).numpy(), PCA(3).fit(x.double().numpy())
    signs = np.sign(expected.components_[np.arange(3), np.abs(expected.components_).argmax(axis=1)])
    np.testing.assert_allclose(found, expected.transform(x.double().numpy()) * signs, atol=1e-9)


def test_layouts_of_a_sequence_stay_close():
    labels, noise = torch.arange(90) // 30, torch.Generator().manual_seed(1)
    features = [clusters() + 0.3 * step * torch.randn(90, 16, generator=noise) for step in range(4)]
    layouts, method = embed_sequence(features)
    alone = [embed_2d(x)[0] for x in features]
    assert method == "t-SNE" and len(layouts) == 4 and torch.equal(layouts[0], alone[0])

    def moves(layouts):
        return [((b - a).norm(dim=1).mean() / (a - a.mean(dim=0)).norm(dim=1).mean()).item()
                for a, b in zip(layouts, layouts[1:])]
    assert max(moves(layouts)) < 0.3 and 3 * max(moves(layouts)) < max(moves(alone))
    for points, x in zip(layouts, features):  # and they are as good as those of their own
        nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
        assert (labels[nearest] == labels).all()
        assert trustworthiness(x, points, n_neighbors=10, metric="cosine") > 0.85


def test_a_collapsed_model_is_no_start():
    """Its features are all the same, and so would be all later points."""
    equal, x = torch.ones(90, 16), clusters()
    layouts, method = embed_sequence([equal, x, equal, x])
    assert method == "t-SNE" and not layouts[0].any() and not layouts[2].any()
    assert torch.equal(layouts[1], embed_2d(x)[0])
    assert (layouts[3] - layouts[1]).norm(dim=1).mean() < 0.3 * layouts[1].norm(dim=1).mean()


def test_frames_move_from_layout_to_layout(monkeypatch):
    layouts = [torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()]
    layouts += [layouts[0] + torch.tensor([8.0, 0.0]), layouts[0] + torch.tensor([8.0, 4.0])]
    figures = []

    def record_scatter(*args):
        figures.append(plot_scatter(*args))
        return figures[0]
    monkeypatch.setattr(embedding, "plot_scatter", record_scatter)
    shifts, titles, sizes, limits = [], [], set(), set()
    for frame, is_layout in draw_frames(layouts, ["epoch 1", "epoch 5", "epoch 6"], torch.tensor([0, 1, -1]),
                                        ["cat", "dog"], [(255, 0, 0), (0, 0, 255)], "t-SNE, $x$", steps=4):
        (axes,) = figures[0].axes
        found = np.concatenate([axes.collections[label + 1].get_offsets() for label in (0, 1, -1)])
        np.testing.assert_allclose(found - found[0], layouts[0], atol=1e-12)
        shifts.append((*found[0].round(3).tolist(), is_layout))
        titles.append(axes.get_title())
        sizes.add(frame.size)
        limits.add((axes.get_xlim(), axes.get_ylim()))
        pixels = np.asarray(frame, int)  # the dot is where its point is
        rows, columns = np.nonzero((np.abs(pixels - (255, 0, 0)).sum(axis=-1) < 60)[:, :int(axes.bbox.x1)])
        x, y = axes.transData.transform(found[0])
        assert abs(columns.mean() - x) < 1.5 and abs(frame.height - rows.mean() - y) < 1.5
    assert shifts == [(0, 0, True), (1.172, 0, False), (4, 0, False), (6.828, 0, False), (8, 0, True),
                      (8, 0.586, False), (8, 2, False), (8, 3.414, False), (8, 4, True)]
    assert titles == [f"epoch {epoch}\nt-SNE, \\$x\\$" for epoch in [1] + [5] * 4 + [6] * 4]
    assert len(sizes) == len(limits) == 1


def test_points_of_a_class_are_neighbors():
    labels = torch.arange(90) // 30
    points, method = embed_2d(clusters())
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
    assert method == "t-SNE" and points.shape == (90, 2) and (labels[nearest] == labels).all()
    assert torch.equal(points, embed_2d(clusters())[0])


def test_pca_without_scikit_learn_or_for_few_images(monkeypatch):
    few = clusters(2)
    assert embed_2d(few)[1] == "PCA" and embed_2d(few[:1])[0].shape == (1, 2)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    points, method = embed_2d(clusters())
    assert method == "PCA" and torch.equal(points, principal_components(clusters(), 2))


def test_equal_features_do_not_crash_t_sne():
    """scikit-learn ends in a segmentation fault for them: their standard deviation is 0."""
    for features in (torch.zeros(40, 16), torch.full((40, 16), 0.3), 1e-30 * clusters()):
        points, method = embed_2d(features)
        assert method == "PCA (all features are the same)" and points.abs().max() < 1e-6
    assert embed_2d(torch.cat((torch.zeros(39, 16), torch.ones(1, 16))))[1] == "t-SNE"


def test_every_point_is_drawn_in_its_color():
    points, labels = clusters()[:, :2].double(), torch.arange(90) // 30 - 1  # a third has no label
    figure = plot_scatter(points, labels, ["cat", "dog"], [(255, 0, 0), (0, 0, 255)], "t-SNE of 90 images")
    assert figure.axes[0].get_title() == "t-SNE of 90 images"
    dots = figure.axes[0].collections
    assert [len(dot.get_offsets()) for dot in dots] == [30, 30, 30]
    np.testing.assert_allclose(dots[2].get_offsets(), points[60:])
    assert dots[1].get_facecolor()[0].tolist() == [1, 0, 0, 1] and dots[2].get_facecolor()[0].tolist() == [0, 0, 1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat (30)", "dog (30)", "no label (30)"]
    handles = [dot.get_facecolor()[0].tolist() for dot in figure.legends[0].legend_handles]
    assert handles[:2] == [[1, 0, 0, 1], [0, 0, 1, 1]] and handles[2][0] == handles[2][1] == handles[2][2]


def test_names_are_escaped_and_long_legends_shortened(tmp_path):
    names = ["_misc", "$x_$y^", "a\udcff"]
    figure = plot_scatter(torch.zeros(3, 2), torch.arange(3), names, class_colors(3), "title")
    figure.savefig(tmp_path / "map.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_misc (1)", r"\$x_\$y^ (1)", "a? (1)"]
    labels = torch.cat([torch.arange(50), torch.arange(10, 50)])  # ten classes with one image, forty with two
    names = [f"{'a class of a long name ' * 3}{i}" for i in range(50)]
    many = plot_scatter(torch.zeros(90, 2), labels, names, class_colors(50), "title " * 40)
    many.draw_without_rendering()
    legend, axes = many.legends[0], many.axes[0]
    assert len(legend.get_texts()) == 30 and legend.get_title().get_text() == "20 smaller classes left out"
    assert all(text.get_text().endswith(" (2)") for text in legend.get_texts())
    box, page = legend.get_window_extent(), many.bbox
    assert page.x0 <= axes.bbox.x1 < box.x0 < box.x1 <= page.x1 and page.y0 <= box.y0 < box.y1 <= page.y1
    assert axes.bbox.width > 0.5 * page.width and axes.get_aspect() == 1
    assert not axes.title.get_window_extent().overlaps(box)


def test_unlabeled_images_are_colored_by_cluster(monkeypatch):
    centers = torch.eye(8, 16).repeat_interleave(torch.arange(3, 11), dim=0)  # 3 to 10 images around eight directions
    features = 5 * centers + 0.1 * torch.randn(centers.shape, generator=torch.Generator().manual_seed(0))
    found, truth = cluster_features(features), torch.arange(8).repeat_interleave(torch.arange(3, 11))
    assert found.tolist() == (7 - truth).tolist()  # the largest first
    assert (cluster_features(features[:5]) == -1).all()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (cluster_features(features) == -1).all()


def test_t_sne_uses_cosine_distance(monkeypatch):
    import sklearn.manifold
    arguments = {}

    class RecordingTSNE(sklearn.manifold.TSNE):
        def __init__(self, **kwargs):
            arguments.update(kwargs)
            super().__init__(**kwargs)
    monkeypatch.setattr(sklearn.manifold, "TSNE", RecordingTSNE)
    found = [embed_2d(clusters(10), seed)[0] for seed in (3, 3, 4)]
    assert arguments["metric"] == "cosine" and arguments["random_state"] == 4 and arguments["perplexity"] == 29 / 3
    assert torch.equal(found[0], found[1])


def test_class_colors_differ():
    for count in (3, 16, 17, 40):
        found = class_colors(count)
        assert len(set(found)) == len(found) == count


def test_thumbnails_are_at_their_points(monkeypatch):
    points = torch.tensor([[0.0, 0.0], [10.0, 0.0], [10.0, 5.0], [9.9, 4.9]]).double()
    colors = [(255, 0, 0), (0, 255, 0)]
    recorded = {}

    def record_sheet(grids, width, title, legend):
        recorded.update(cell=grids[0][0][0], title=title, legend=legend)
        return contact_sheet(grids, width, title, legend)
    monkeypatch.setattr(embedding, "contact_sheet", record_sheet)
    sheet = plot_thumbnails(points, torch.tensor([0, 1, -1, 0]), ["cat", "dog"], colors,
                            lambda i: Image.new("RGB", (30, 60), (0, 0, 60 * i + 20)), "t-SNE", side=200, cell=20)
    assert sheet.width == 200 + 2 * 8 and recorded["title"] == "t-SNE"
    assert [swatch.getpixel((2, 2)) for swatch in recorded["legend"]] == [*colors, (120, 120, 120)]
    grid, caption = recorded["cell"]
    assert caption.startswith("3 of 4 images")
    pixels = np.asarray(grid)  # rows 2 to 7 from below: others are empty
    assert grid.size == (200, 6 * 20)
    for x, y, blue, frame in ((0, 2, 20, (255, 0, 0)), (9, 2, 80, (0, 255, 0))):  # cells from below, at the center
        middle, edge = (120 - 20 * (y - 2) - 10, 20 * x + 9), (120 - 20 * (y - 2) - 10, 20 * x + 2)
        assert pixels[middle].tolist() == [0, 0, blue] and pixels[edge].tolist() == list(frame)
    column = [pixels[120 - 20 * (y - 2) - 10, 189].tolist() for y in range(2, 8)]
    shown = {y: color for y, color in enumerate(column, start=2) if color != [255, 255, 255]}
    assert shown == {2: [0, 0, 80], 7: [0, 0, 140]}  # of two in one cell the one at its center
