"""Optimization: parameter groups, AdamW / SGD / LARS, gradient clipping.

    optimizer = build_optimizer("adamw", build_param_groups(network))
    norms = clip_gradients(network.parameters(), 3.0, per_parameter=True)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0005, 0.04 * group["is_decayed"]     # both 0 until they are set
    optimizer.step()

Needs torch only.
"""

import torch


def build_param_groups(network: torch.nn.Module, lr_scales: dict[int, float] | None = None) -> list[dict]:
    """Groups of named trainable parameters: matrices, and biases and norms, which get no weight decay.

    Args:
        lr_scales: see `decay_layers`; each value gets groups of its own, with an "lr_scale".
    """
    groups, lr_scales = {}, lr_scales or {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            is_decayed, lr_scale = kind = p.ndim > 1, lr_scales.get(id(p), 1.0)
            group = {"params": [], "lr_scale": lr_scale, "is_decayed": is_decayed}
            groups.setdefault(kind, group | ({} if is_decayed else {"weight_decay": 0.0}))["params"].append((name, p))
    return list(groups.values())


def decay_layers(backbone: torch.nn.Module, layer_decay: float) -> dict[int, float]:
    """{id of a parameter: factor of its learning rate} of a backbone (ELECTRA, Clark et al. 2020; BEiT).

    With L blocks, block l of 1 to L has layer_decay^(L + 1 - l), the norm behind them layer_decay, the embeddings
    layer_decay^(L + 1). A backbone without blocks has layer_decay.
    """
    depth = len(backbone.blocks)
    layers = {id(p): 0 for p in backbone.parameters()}
    layers |= {id(p): i for i, block in enumerate(backbone.blocks, start=1) for p in block.parameters()}
    layers |= {id(p): depth for p in backbone.norm.parameters()} if depth else {}
    return {key: layer_decay ** (depth + 1 - layer) for key, layer in layers.items()}


class LARS(torch.optim.Optimizer):
    """SGD with momentum and layer-wise adaptive rates for matrices (You et al. 2017, section 4).

    Args:
        trust: trust coefficient; the update of a matrix is scaled to trust times the norm of the matrix.
    """

    def __init__(self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        """Update the parameters that have gradients; `build_optimizer` creates their momentum buffers."""
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


def build_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW, SGD or LARS by name. Before every step set lr, and weight_decay of the groups with is_decayed.

    The optimizer's state exists from the start, so that a checkpoint can be checked against it before the first step.

    Args:
        name: "adamw", "sgd" or "lars".
        groups: of `build_param_groups`.

    Raises:
        ValueError: another name, or other groups.
    """
    if name not in ("adamw", "sgd", "lars"):
        raise ValueError(f"no optimizer {name!r}, expected adamw, sgd or lars")
    if not isinstance(groups, list) or not isinstance(groups[0], dict):
        raise ValueError("expected groups of build_param_groups(network)")
    fused = groups[0]["params"][0][1].device.type != "mps"
    optimizer = {"adamw": lambda: torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=fused),
                 "sgd": lambda: torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused),
                 "lars": lambda: LARS(groups)}[name]()
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        buffers = ("exp_avg", "exp_avg_sq") if name == "adamw" else ("momentum_buffer",)
        optimizer.state[p] = {buffer: torch.zeros_like(p) for buffer in buffers}
        if name == "adamw":
            optimizer.state[p]["step"] = torch.zeros((), device=p.device if fused else "cpu")
    return optimizer


def clip_gradients(parameters, max_norm: float, per_parameter: bool) -> torch.Tensor:
    """Clip gradients in place to an l2 norm, each on its own (as the reference does) or all by their global norm.

    Args:
        max_norm: 0 for no clipping.

    Returns:
        the norms before clipping, [number of gradients].
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    if max_norm and not per_parameter:
        torch._foreach_mul_(grads, (max_norm / (norms.norm() + 1e-6)).clamp(max=1.0))
    elif max_norm:
        scales = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        factors = [scale.expand(grad.numel()) for scale, grad in zip(scales, grads)]
        if norms.is_cuda:  # a factor per element, as large as the gradients: scalars would be a launch for each of them
            factors = torch.cat(factors).split([grad.numel() for grad in grads])
        torch._foreach_mul_(grads, [factor.view_as(grad) for factor, grad in zip(factors, grads)])
    return norms
