import sys

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from plotting.embedding import class_colors, embed_2d, plot_scatter, plot_thumbnails, principal_components


def clusters(count=30):
    generator = torch.Generator().manual_seed(0)
    centres = 6 * torch.randn(3, 16, generator=generator)
    return torch.cat([centre + torch.randn(count, 16, generator=generator) for centre in centres])


def test_components_are_scikit_learns():
    x = clusters()
    found, expected = principal_components(x, 3).numpy(), PCA(3).fit(x.double().numpy())
    signs = np.sign(expected.components_[np.arange(3), np.abs(expected.components_).argmax(axis=1)])
    np.testing.assert_allclose(found, expected.transform(x.double().numpy()) * signs, atol=1e-9)


def test_points_of_a_class_are_neighbours():
    labels = torch.arange(90) // 30
    points, method = embed_2d(clusters())
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(dim=1)
    assert method == "t-SNE" and points.shape == (90, 2) and (labels[nearest] == labels).all()
    assert torch.equal(points, embed_2d(clusters())[0])


def test_without_scikit_learn_or_for_few_it_is_pca(monkeypatch):
    few = clusters(2)
    assert embed_2d(few)[1] == "PCA" and embed_2d(few[:1])[0].shape == (1, 2)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    points, method = embed_2d(clusters())
    assert method == "PCA" and torch.equal(points, principal_components(clusters(), 2))


def test_every_point_is_drawn_in_its_color():
    points, labels = clusters()[:, :2].double(), torch.arange(90) // 30 - 1  # a third has no label
    figure = plot_scatter(points, labels, ["cat", "dog"], [(255, 0, 0), (0, 0, 255)], "t-SNE of 90 pictures")
    dots = figure.axes[0].collections
    assert [len(dot.get_offsets()) for dot in dots] == [30, 30, 30]
    np.testing.assert_allclose(dots[2].get_offsets(), points[60:])
    assert dots[1].get_facecolor()[0].tolist() == [1, 0, 0, 1] and dots[2].get_facecolor()[0].tolist() == [0, 0, 1, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "dog"]
    assert [patch.get_facecolor()[0].tolist() for patch in figure.legends[0].legend_handles] == [[1, 0, 0, 1],
                                                                                               [0, 0, 1, 1]]


def test_names_that_matplotlib_would_take_for_something_else(tmp_path):
    names = ["_misc", "$x_$y^", "a\udcff"]
    figure = plot_scatter(torch.zeros(3, 2), torch.arange(3), names, class_colors(3), "title")
    figure.savefig(tmp_path / "map.png")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_misc", r"\$x_\$y^", "a?"]
    many = plot_scatter(torch.zeros(41, 2), torch.arange(41), list(map(str, range(41))), class_colors(41), "title")
    assert not many.legends and many.axes[0].get_aspect() == 1


def test_t_sne_is_of_cosines(monkeypatch):
    import sklearn.manifold
    asked = {}

    class Kept(sklearn.manifold.TSNE):
        def __init__(self, **kwargs):
            asked.update(kwargs)
            super().__init__(**kwargs)
    monkeypatch.setattr(sklearn.manifold, "TSNE", Kept)
    found = [embed_2d(clusters(10), seed)[0] for seed in (3, 3, 4)]
    assert asked["metric"] == "cosine" and asked["random_state"] == 4 and asked["perplexity"] == 29 / 3
    assert torch.equal(found[0], found[1])


def test_colors_differ():
    for count in (3, 16, 17, 40):
        found = class_colors(count)
        assert len(set(found)) == len(found) == count


def test_pictures_lie_where_their_points_do():
    points = torch.tensor([[0.0, 0.0], [10.0, 0.0], [10.0, 5.0], [9.9, 4.9]]).double()
    shades = [(255, 0, 0), (0, 255, 0)]
    sheet = plot_thumbnails(points, torch.tensor([0, 1, -1, 0]), shades,
                       lambda i: Image.new("RGB", (30, 60), (0, 0, 60 * i + 20)), side=200, cell=20)
    pixels = np.asarray(sheet)
    assert sheet.size == (200, 200)
    for x, y, blue, frame in ((0, 2, 20, (255, 0, 0)), (9, 2, 80, (0, 255, 0))):  # cells from below, in the middle
        middle, edge = (200 - 20 * y - 10, 20 * x + 9), (200 - 20 * y - 10, 20 * x + 2)
        assert pixels[middle].tolist() == [0, 0, blue] and pixels[edge].tolist() == list(frame)
    column = [pixels[200 - 20 * y - 10, 189].tolist() for y in range(10)]
    shown = {y: color for y, color in enumerate(column) if color != [255, 255, 255]}
    assert shown == {2: [0, 0, 80], 7: [0, 0, 140]}  # of two in one cell the one in its middle is shown
