"""How a step changes the weights: parameter groups, optimizers, gradient clipping.

    optimizer = build_optimizer("adamw", param_groups(network))
    norms = clip_gradients(network.parameters(), 3.0, per_parameter=True)

This file needs torch and nothing else.
"""

import torch


def build_param_groups(network):
    """Two groups of named parameters: matrices, which are regularised, then biases and norms, which are not."""
    trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    regularized = [(name, p) for name, p in trained if p.ndim > 1]
    others = [(name, p) for name, p in trained if p.ndim <= 1]
    return [{"params": regularized}, {"params": others, "weight_decay": 0.0}]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on each matrix is scaled to the matrix's norm (You et al. 2017, section 4)."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    scale = group["trust"] * p.norm() / update.norm()
                    update = update * torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
                momentum = self.state[p]["momentum_buffer"]
                momentum.mul_(group["momentum"]).add_(update)
                p.sub_(momentum, alpha=group["lr"])


def build_optimizer(name, groups):
    """The optimizer by name, its state there from the start; lr and weight decay are set before every step."""
    fused = groups[0]["params"][0][1].device.type != "mps"
    optimizer = {"adamw": lambda: torch.optim.AdamW(groups, lr=0.0, fused=fused),
                 "sgd": lambda: torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused),
                 "lars": lambda: LARS(groups)}[name]()
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        names = ("exp_avg", "exp_avg_sq") if name == "adamw" else ("momentum_buffer",)
        optimizer.state[p] = {name: torch.zeros_like(p) for name in names}
        if name == "adamw":
            optimizer.state[p]["step"] = torch.zeros((), device=p.device if fused else "cpu")
    return optimizer


def clip_gradients(parameters, max_norm, per_parameter):
    """Scale gradients down to the given l2 norm, each on its own or all by one factor; 0 leaves them as they are.

    Returns the norms that they had, [number of gradients].
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm:
        scales = (max_norm / ((norms if per_parameter else norms.norm()) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(scales.expand(len(grads))))
    return norms


if __name__ == "__main__":
    torch.manual_seed(0)
    network = torch.nn.Linear(100, 10)
    for name, lr in (("adamw", 0.01), ("sgd", 0.1), ("lars", 10.0)):
        optimizer = build_optimizer(name, build_param_groups(network))
        for group in optimizer.param_groups:
            group["lr"] = lr
        network(torch.randn(8, 100)).square().sum().backward()
        norms = clip_gradients(network.parameters(), 3.0, per_parameter=True)
        before = network.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name:5s}  gradient norms {norms.tolist()}, weights moved by {(network.weight - before).norm():.4f}")
