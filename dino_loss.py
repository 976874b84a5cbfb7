"""The objective: the projection head, the loss with its centring, and the schedules.

    head = DINOHead(in_dim=384, out_dim=65536)
    loss = DINOLoss(out_dim=65536)
    value = loss(head_s(features_of_all_views), head_t(features_of_the_two_global_views), teacher_temp=0.04)

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". This file needs torch
and nothing else; the loss works with and without a process group.

Shapes in this file: V views of B images, K prototypes. Logits are view-major: row v * B + b is view v
of image b, the two global views first.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have a direction and a length of their own.

    weight = weight_g * weight_v / |weight_v|, row by row (Salimans & Kingma 2016, equation 2).
    """

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear; the length sets how fast rows can turn

    def forward(self, x):  # [..., in_dim] -> [..., out_dim]
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class DINOHead(nn.Module):
    """Projection head: MLP, l2 bottleneck, weight-normalised prototypes (section 3.1, appendix C).

    Args:
        in_dim: width D of the backbone.
        out_dim: number K of prototypes.
        use_bn: batch norm after each hidden layer (the paper's heads have none).
        norm_last_layer: keep the prototypes at length 1 instead of training their lengths.
        nlayers: layers of the MLP.
    """

    def __init__(self, in_dim, out_dim, use_bn=False, norm_last_layer=True, nlayers=3, hidden_dim=2048,
                 bottleneck_dim=256):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (nlayers - 1)
        layers = []
        for d_in, d_out in zip(dims, dims[1:]):
            layers += [nn.Linear(d_in, d_out)] + [nn.BatchNorm1d(d_out)] * use_bn + [nn.GELU()]
        layers.append(nn.Linear(dims[-1], bottleneck_dim))
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x):
        """Features [M, in_dim] -> logits [M, K], float32 from the bottleneck on, also under autocast.

        The logits are divided by temperatures of 0.04 to 0.1, which would magnify half-precision error.
        """
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(F.normalize(x.float(), dim=-1))


class DINOLoss(nn.Module):
    """Cross-entropy of the student's views against the teacher's global views, centred and sharpened.

    Equation 3 and algorithm 1: the mean over all pairs (global view t of the teacher, other view v of
    the student) of -softmax((g_t - c) / teacher_temp) . log_softmax(g_s / student_temp). The centre c
    is the running mean of the teacher's logits over all processes (equation 4).

    Args:
        out_dim: number K of prototypes.
        student_temp: temperature of the student.
        center_momentum: share of the centre that each step keeps.
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.pending = []  # means of the teacher's logits that the centre has not taken in yet

    def forward(self, student_logits, teacher_logits, teacher_temp, update_center=True):
        """student_logits [V*B, K] and teacher_logits [2*B, K] -> scalar, float32.

        The centre moves afterwards, on the teacher's logits. With gradient accumulation pass
        `update_center=False` for all but the last part of a step: then it moves once, on all parts.

        Raises:
            ValueError: logits that are not view-major [V*B, K] and [2*B, K] with V >= 2.
        """
        B, K = teacher_logits.shape[0] // 2, self.center.shape[1]
        if student_logits.shape[1:] != (K,) or teacher_logits.shape != (2 * B, K) or B == 0 \
                or student_logits.shape[0] % B or student_logits.shape[0] < 2 * B:
            raise ValueError(f"logits of {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}: expected "
                             f"[V*B, {K}] with V >= 2 and [2*B, {K}]")
        V = student_logits.shape[0] // B
        log_p = F.log_softmax(student_logits.float() / self.student_temp, dim=-1).view(V, B, K)
        q = self.teacher_probabilities(teacher_logits, teacher_temp).view(2, B, K)
        # The sum over pairs is a product of sums, (q_0 + q_1) . (p_0 + ... + p_V-1), less each view with itself.
        all_pairs = (q.sum(dim=0) * log_p.sum(dim=0)).sum()
        same_view = (q * log_p[:2]).sum()
        self.pending.append(teacher_logits.detach().float().mean(dim=0, keepdim=True))
        if update_center:
            self.update_center()
        return (same_view - all_pairs) / (B * (2 * V - 2))

    @torch.no_grad()
    def teacher_probabilities(self, teacher_logits, teacher_temp):
        """[M, K] logits -> [M, K] targets, each row summing to 1."""
        return F.softmax((teacher_logits.float() - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def teacher_entropy(self, teacher_logits, teacher_temp):
        """How the teacher decides, for diagnosis: two scalars in nats, between 0 and ln K.

        The mean entropy of its outputs, and the entropy of its mean output. The first near ln K: each
        image gets the uniform answer. The second near 0: all images get the same prototype
        (section 5.3, figure 7). Call it before `forward`, which moves the centre.
        """
        q = self.teacher_probabilities(teacher_logits, teacher_temp)
        return torch.special.entr(q).sum(dim=-1).mean(), torch.special.entr(q.mean(dim=0)).sum()

    @torch.no_grad()
    def update_center(self):
        """Move the centre towards the mean of the pending logits over all processes, once (equation 4)."""
        mean = torch.stack(self.pending).mean(dim=0)  # [1, K]
        self.pending.clear()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 1 - self.center_momentum)


def cosine_schedule(step, total_steps, base, final, warmup_steps=0, start=0.0):
    """Value at `step`: linear from start to base over the warm-up, then half a cosine from base to final.

    The warm-up ends on base and the cosine begins on it; `final` itself would be reached at total_steps.
    """
    if step < warmup_steps:
        return start + (base - start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def teacher_temp_schedule(epoch, warmup_temp, temp, warmup_epochs):
    """Teacher temperature of an epoch: linear over the first `warmup_epochs`, then constant (appendix C)."""
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)


if __name__ == "__main__":
    torch.manual_seed(0)
    student, teacher, loss = DINOHead(384, 4096), DINOHead(384, 4096), DINOLoss(4096)
    teacher.load_state_dict(student.state_dict())
    features = torch.randn(10 * 8, 384)  # 10 views of 8 images
    value = loss(student(features), teacher(features[:16]), teacher_temp=0.04)
    value.backward()
    print(f"loss {value.item():.4f} (ln K = {math.log(4096):.4f}), centre {list(loss.center.shape)}, "
          f"gradient norm of the prototypes {student.last_layer.weight_v.grad.norm():.4f}")
