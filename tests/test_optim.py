import pytest
import torch

import optim


def test_clipping_per_parameter_and_global():
    grads = [torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.zeros(2)]

    def clip(per_parameter):
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(4)]
        for p, grad in zip(parameters, grads):
            p.grad = grad.clone()
        optim.clip_gradients(parameters, 1.0, per_parameter)
        return parameters

    assert [p.grad.norm().item() for p in clip(True)[:3]] == pytest.approx([1.0, 0.5, 0.0], abs=1e-5)
    theirs = [torch.nn.Parameter(torch.zeros(2)) for _ in grads]
    for p, grad in zip(theirs, grads):
        p.grad = grad.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for ours, p in zip(clip(False), theirs):
        torch.testing.assert_close(ours.grad, p.grad)


def test_lars_equals_the_formula():
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))
    optimizer = optim.build_optimizer("lars", [{"params": [w]}, {"params": [b], "weight_decay": 0.0}])
    optimizer.param_groups[0]["weight_decay"] = 0.1
    expected_w, expected_b, mw, mb = w.detach().double(), b.detach().double(), 0, 0
    for lr in (0.5, 0.3):
        w.grad, b.grad = torch.randn(4, 3), torch.randn(3)
        for group in optimizer.param_groups:
            group["lr"] = lr
        g = w.grad.double() + 0.1 * expected_w
        mw = 0.9 * mw + g * 0.001 * expected_w.norm() / g.norm()
        mb = 0.9 * mb + b.grad.double()
        expected_w, expected_b = expected_w - lr * mw, expected_b - lr * mb
        optimizer.step()
    torch.testing.assert_close(w.detach().double(), expected_w, rtol=0, atol=1e-6)
    torch.testing.assert_close(b.detach().double(), expected_b, rtol=0, atol=1e-6)


def test_misuse_is_one_clear_line():
    network = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no optimizer 'adam', expected adamw, sgd or lars"):
        optim.build_optimizer("adam", optim.build_param_groups(network))
    for groups in (network.parameters(), list(network.parameters())):
        with pytest.raises(ValueError, match="expected groups of build_param_groups"):
            optim.build_optimizer("adamw", groups)
