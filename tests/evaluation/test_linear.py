import pytest
import torch
from sklearn.linear_model import LogisticRegression

from evaluation.linear import (
    fit_best_classifier,
    fit_best_logistic_regression,
    fit_classifiers,
    fit_logistic_regression,
    holdout_mask,
    linear_probe_accuracy,
    predict_classes,
)

GRID = [(lr, weight_decay) for lr in (0.003, 0.03, 0.3, 3.0) for weight_decay in (0.0, 1e-4, 1e-2)]


def clusters(seed, count, classes=8, width=40):
    """Overlapping classes in features of very different scale and offset."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (count,), generator=generator)
    x = centers[labels] + 2.2 * torch.randn(count, width, generator=generator)
    return x * torch.logspace(-2, 2, width) + 5, labels


def test_fit_equals_scikit_learns_logistic_regression():
    """Its C weighs the sum of the losses against half the squared weights: a weight decay of 1 / (C M)."""
    x, y = clusters(1, 4000)
    test_x, test_y = clusters(2, 4000)
    strengths = (0.003, 0.03, 0.3)
    ours = fit_classifiers(x, y, 8, [(0.1, 1 / (c * len(x))) for c in strengths], epochs=100)
    for c, predictions in zip(strengths, predict_classes(ours, test_x)):
        theirs = LogisticRegression(C=c, max_iter=1000).fit((x - ours.mean) / ours.std, y)
        accuracy = 100 * theirs.score((test_x - ours.mean) / ours.std, test_y)
        assert 80 < accuracy < 90
        assert 100 * (predictions == test_y).double().mean().item() == pytest.approx(accuracy, abs=0.3)


def test_the_best_hyperparameters_on_held_out_images_are_selected():
    x, y = clusters(1, 2000)
    _, best, accuracies = fit_best_classifier(x, y, 8, GRID, epochs=20, batch_size=256)
    assert accuracies[best] == max(accuracies) and len(accuracies) == len(GRID)
    held_out = holdout_mask(2000)
    assert held_out.sum() == 200 and len((torch.arange(2000)[held_out] % 8).unique()) == 8  # labels in order
    classifiers = fit_classifiers(x[~held_out], y[~held_out], 8, GRID, epochs=20, batch_size=256)
    for g, accuracy in enumerate(accuracies):
        correct = classifiers(x[held_out])[g].argmax(dim=1) == y[held_out]
        assert accuracy == pytest.approx(100 * correct.double().mean().item(), abs=1e-6)


def test_linear_probe_is_as_accurate_as_scikit_learn():
    (x, y), (test_x, test_y) = clusters(1, 2000), clusters(2, 2000)
    mean, std = x.mean(dim=0), x.std(dim=0)
    theirs = max(LogisticRegression(C=c, max_iter=1000).fit((x - mean) / std, y).score((test_x - mean) / std, test_y)
                 for c in (0.003, 0.03, 0.3))
    assert linear_probe_accuracy(x, y, test_x, test_y, epochs=20) == pytest.approx(100 * theirs, abs=0.5)


def test_classifiers_of_a_grid_are_independent():
    x, y = clusters(1, 300)
    together = fit_classifiers(x, y, 8, GRID[:4], epochs=3, batch_size=64)
    for g in range(4):
        alone = fit_classifiers(x, y, 8, GRID[g:g + 1], epochs=3, batch_size=64)
        torch.testing.assert_close(together.weight[g], alone.weight[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together(x)[g], alone(x)[0], rtol=1e-4, atol=1e-4)


def test_steps_equal_torch_sgd():
    """Gradient, weight decay and learning rate of two steps, by autograd and torch.optim."""
    x, y = clusters(1, 50)
    ours = fit_classifiers(x, y, 8, [(0.5, 0.1)], epochs=2, batch_size=50)
    layer = torch.nn.Linear(40, 8)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}], lr=0.5,
                                momentum=0.9)
    for lr in (0.5, 0.25):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer((x - ours.mean) / ours.std), y).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight[0].T, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.bias[0, 0], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_diverged_classifiers_are_not_selected():
    x, y = clusters(1, 400)
    _, best, accuracies = fit_best_classifier(x, y, 8, [(1e30, 1.0), (0.1, 0.0)], epochs=5)
    assert best == 1 and accuracies[0] == 0 and accuracies[1] > 40


def test_fit_best_classifier_scales_lr_and_trains_on_all_features():
    x, y = clusters(1, 600)
    scaled = [(2 * lr, weight_decay) for lr, weight_decay in GRID]  # batch size 512
    classifier, best, accuracies = fit_best_classifier(x, y, 8, GRID, batch_size=512, epochs=3)
    held_out = holdout_mask(600)
    selection = fit_classifiers(x[~held_out], y[~held_out], 8, scaled, batch_size=512, epochs=3)
    correct = predict_classes(selection, x[held_out]) == y[held_out]
    assert accuracies == pytest.approx((100 * correct.double().mean(dim=1)).tolist(), abs=1e-5)
    assert accuracies[best] == max(accuracies)
    expected = fit_classifiers(x, y, 8, [scaled[best]], batch_size=512, epochs=3)
    assert torch.equal(classifier.weight, expected.weight) and torch.equal(classifier.bias, expected.bias)
    torch.testing.assert_close(classifier.to_linear()(x), expected(x)[0], rtol=1e-4, atol=1e-4)


def test_constant_features_and_few_classes():
    classifiers = fit_classifiers(torch.ones(10, 3), torch.arange(10) % 2, 2, [(0.1, 0.0)], epochs=2)
    assert predict_classes(classifiers, torch.ones(4, 3)).shape == (1, 4) and classifiers.weight.isfinite().all()


# ---- logistic regression ----

def test_logistic_regression_equals_scikit_learn():
    """Coefficients and accuracy, for weak and strong penalties, features of different scale, and rows in chunks."""
    (x, y), (test_x, test_y) = clusters(1, 600, classes=4, width=8), clusters(2, 1000, classes=4, width=8)
    scale = torch.logspace(-0.5, 0.5, 8) / x.std(dim=0)
    x, test_x = ((features - 5) * scale + 1 for features in (x, test_x))
    for C in (1e-3, 0.1, 10):
        theirs = LogisticRegression(C=C, max_iter=10_000, tol=1e-8).fit(x.double(), y)
        ours = fit_logistic_regression(x, y, 4, C, chunk=250)
        weight, bias = (torch.from_numpy(value) for value in (theirs.coef_, theirs.intercept_))
        torch.testing.assert_close(ours.weight, weight, rtol=0, atol=1e-3 * weight.abs().max().item())
        torch.testing.assert_close(ours.bias - ours.bias.mean(), bias - bias.mean(), rtol=0,
                                   atol=1e-3 * bias.abs().max().item())
        correct = ours(test_x.double()).argmax(dim=1) == test_y
        assert 100 * correct.double().mean().item() == pytest.approx(100 * theirs.score(test_x, test_y), abs=0.2)


def test_two_classes_equal_scikit_learn_with_twice_the_cost():
    x, y = clusters(1, 600, classes=2, width=8)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    theirs, ours = LogisticRegression(C=0.02, tol=1e-8).fit(x.double(), y), fit_logistic_regression(x, y, 2, 0.01)
    torch.testing.assert_close(ours.weight[1] - ours.weight[0], torch.from_numpy(theirs.coef_[0]), rtol=0, atol=1e-4)


def test_the_best_penalty_on_held_out_images_is_selected():
    x, y = clusters(1, 600, classes=4, width=8)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    costs, held_out = (1e-5, 1e-3, 0.1), holdout_mask(600)
    layer, best, accuracies = fit_best_logistic_regression(x, y, 4, costs)
    for C, accuracy in zip(costs, accuracies, strict=True):
        theirs = LogisticRegression(C=C, max_iter=1000, tol=1e-7).fit(x[~held_out].double(), y[~held_out])
        assert accuracy == pytest.approx(100 * theirs.score(x[held_out], y[held_out]), abs=0.2)
    assert accuracies[0] < accuracies[best] == max(accuracies)
    torch.testing.assert_close(layer.weight, fit_logistic_regression(x, y, 4, costs[best]).weight, rtol=0, atol=0)


def test_logistic_regression_of_equal_features_and_absent_classes():
    layer = fit_logistic_regression(torch.ones(40, 3), torch.arange(40) % 4 // 2, 3)
    assert layer.weight.abs().max() < 1e-4 and layer.bias[2] < layer.bias[0] - 5
    assert layer.bias[0].item() == pytest.approx(layer.bias[1].item(), abs=1e-4)
