"""The objective: the projection head, the loss with its centring, and the schedules.

    head = DINOHead(in_dim=384, out_dim=65536)
    loss = DINOLoss(out_dim=65536)
    value = loss(head_s(features_of_all_views), head_t(features_of_the_two_global_views), teacher_temp=0.04)

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". This file needs torch
and nothing else; the loss works with and without a process group.

Shapes in this file: V views of B images, K prototypes. Logits are view-major: row v * B + b is view v
of image b, the two global views first.
"""

import functools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

CHUNK_BYTES = (2**26, 2**22)  # of student logits worked on at once: by a GPU, by a CPU with its cache


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have a direction and a length of their own.

    weight = weight_g * weight_v / |weight_v|, row by row (Salimans & Kingma 2016, equation 2). It computes in the
    precision of its weights, also under autocast.
    """

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear; the length sets how fast rows can turn

    def forward(self, x):  # [M, in_dim] -> [M, out_dim]
        with torch.autocast(x.device.type, enabled=False):
            return NormalizedProduct.apply(x.to(self.weight_v.dtype), self.weight_g, self.weight_v)


class NormalizedProduct(torch.autograd.Function):
    """x @ weight.T of WeightNormLinear without a copy of the weight: with K rows it is the largest there is."""

    @staticmethod
    def forward(ctx, x, weight_g, weight_v):
        length = weight_v.norm(dim=1, keepdim=True)  # [K, 1]
        ctx.save_for_backward(x, weight_g, weight_v, length)
        return (x @ weight_v.T).mul_((weight_g / length).T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # [M, K]
        x, weight_g, weight_v, length = ctx.saved_tensors
        grad_x = (grad * (weight_g / length).T) @ weight_v if ctx.needs_input_grad[0] else None
        grad_v = grad.T @ x  # with respect to weight; what is along the row changes its length, the rest its direction
        along = (grad_v.unsqueeze(1) @ weight_v.unsqueeze(2)).squeeze(2) / length  # [K, 1]
        grad_v.addcmul_(weight_v, along / length, value=-1).mul_(weight_g / length)
        return grad_x, along if ctx.needs_input_grad[1] else None, grad_v


class DINOHead(nn.Module):
    """Projection head: MLP, l2 bottleneck, weight-normalised prototypes (section 3.1, appendix C).

    Args:
        in_dim: width D of the backbone.
        out_dim: number K of prototypes.
        use_bn: batch norm after each hidden layer (the paper's heads have none).
        norm_last_layer: keep the prototypes at length 1 instead of training their lengths.
        nlayers: layers of the MLP.
        l2_bottleneck: bring what the prototypes are compared with to length 1.
        predictor: an MLP of two layers more before that, for the student alone (Grill et al. 2020, section 3.1).
    """

    def __init__(self, in_dim, out_dim, use_bn=False, norm_last_layer=True, nlayers=3, hidden_dim=2048,
                 bottleneck_dim=256, l2_bottleneck=True, predictor=False):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (nlayers - 1)
        layers = []
        for d_in, d_out in zip(dims, dims[1:]):
            layers += [nn.Linear(d_in, d_out)] + [nn.BatchNorm1d(d_out)] * use_bn + [nn.GELU()]
        layers.append(nn.Linear(dims[-1], bottleneck_dim))
        self.mlp = nn.Sequential(*layers) if nlayers > 1 else layers[0]
        self.predictor = nn.Sequential(nn.Linear(bottleneck_dim, hidden_dim), nn.GELU(), nn.Linear(
            hidden_dim, bottleneck_dim)) if predictor else nn.Identity()
        self.l2_bottleneck = l2_bottleneck
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x):
        """Features [M, in_dim] -> logits [M, K], in the weights' precision from the bottleneck on, autocast or not.

        The logits are divided by temperatures of 0.04 to 0.1, which would magnify half-precision error.
        """
        x = self.predictor(self.mlp(x)).to(self.last_layer.weight_v.dtype)
        return self.last_layer(F.normalize(x, dim=-1) if self.l2_bottleneck else x)


class DINOLoss(nn.Module):
    """Cross-entropy of the student's views against the teacher's global views, centred and sharpened.

    Equation 3 and algorithm 1: the mean over all pairs (global view t of the teacher, other view v of
    the student) of -softmax((g_t - c) / teacher_temp) . log_softmax(g_s / student_temp). The centre c
    is the running mean of the teacher's logits over all processes (equation 4).

    Args:
        out_dim: number K of prototypes.
        student_temp: temperature of the student.
        center_momentum: share of the centre that each step keeps; 1 for none.
        centering: what keeps the teacher from giving every image the same answer. "mean" takes the centre off its
            logits; "sinkhorn" shares the prototypes out among the images of the batch (see `sinkhorn`), and "batch",
            a softmax over the batch, is one iteration of that (appendix B, table 12).
        objective: "ce", or "mse" for `squared_distance` to the centred logits, without temperatures (table 7).
    """

    def __init__(self, out_dim, student_temp=0.1, center_momentum=0.9, centering="mean", objective="ce"):
        super().__init__()
        if objective == "mse" and centering != "mean":
            raise ValueError(f"centering {centering} makes probabilities, which the objective mse does not compare")
        self.objective = objective
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.iterations = {"mean": 0, "batch": 1, "sinkhorn": 3}[centering]
        self.register_buffer("center", torch.zeros(1, out_dim))
        self.pending = []  # means of the teacher's logits that the centre has not taken in yet
        self.reduced = None  # their mean over all processes, and what to wait for until it is one

    def forward(self, student_logits, teacher_logits, teacher_temp, update_center=True, overwrite=False):
        """student_logits [V*B, K] and teacher_logits [2*B, K] -> scalar, float32.

        The centre moves afterwards, on the teacher's logits. With gradient accumulation pass
        `update_center=False` for all but the last part of a step: then it moves once, on all parts. With it
        for all, `update_center()` is yours to call, and `reduce_center()` at an earlier time hides the wait.

        Args:
            overwrite: the gradient takes the place of student_logits, which must not be read any more;
                otherwise it takes as much memory again.

        Raises:
            ValueError: logits that are not view-major [V*B, K] and [2*B, K] with V >= 2.
        """
        K = self.center.shape[1]
        B = teacher_logits.shape[0] // 2
        if student_logits.shape[1:] != (K,) or teacher_logits.shape != (2 * B, K) or B == 0 \
                or student_logits.shape[0] % B or student_logits.shape[0] < 2 * B:
            raise ValueError(f"logits of {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}: expected "
                             f"[V*B, {K}] with V >= 2 and [2*B, {K}]")
        student, teacher = student_logits.float(), teacher_logits.float()
        answer = functools.partial(centered_softmax, center=self.center, temp=teacher_temp)
        if self.iterations:  # all images decide together, so not a few at a time
            teacher, answer = self.teacher_probabilities(teacher, teacher_temp), nn.Identity()
        if self.objective == "mse":
            loss = squared_distance(student.view(-1, B, K), (teacher - self.center).view(2, B, K))
        else:
            loss = CrossEntropy.apply(student, teacher, answer, self.student_temp, overwrite)
        self.pending.append(teacher_logits.detach().float().mean(dim=0, keepdim=True))
        if update_center:
            self.update_center()
        return loss

    @torch.no_grad()
    def teacher_probabilities(self, teacher_logits, teacher_temp):
        """[M, K] logits -> [M, K] targets, each row summing to 1."""
        if self.iterations:
            return sinkhorn(teacher_logits.float(), teacher_temp, self.iterations)
        return centered_softmax(teacher_logits.float(), self.center, teacher_temp)

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
    def reduce_center(self):
        """Start to average the pending logits over all processes, so that `update_center` need not wait for them."""
        mean, work = torch.stack(self.pending).mean(dim=0), None  # [1, K]
        self.pending.clear()
        if dist.is_available() and dist.is_initialized():
            mean /= dist.get_world_size()
            work = dist.all_reduce(mean, async_op=True)
        self.reduced = mean, work

    @torch.no_grad()
    def update_center(self):
        """Move the centre towards the mean of the pending logits over all processes, once (equation 4)."""
        if self.reduced is None:
            self.reduce_center()
        (mean, work), self.reduced = self.reduced, None
        if work:
            work.wait()
        self.center.lerp_(mean, 1 - self.center_momentum)


def centered_softmax(logits, center, temp):
    """What the teacher answers: centred, so that no prototype wins everywhere, and sharpened (equation 1)."""
    return F.softmax((logits - center) / temp, dim=-1)


def sinkhorn(logits, temp, iterations):
    """Softmax that uses all prototypes equally: by turns each prototype and each image is divided by its sum.

    Sinkhorn-Knopp as in SwAV (Caron et al. 2020, section 3.1), in logarithms; over the images of all processes. After
    many iterations rows sum to 1 and columns to images / prototypes.

    Args:
        logits: [M, K].

    Returns:
        [M, K], each row summing to 1.
    """
    log_q = logits / temp
    for _ in range(iterations):
        top = log_q.amax(dim=0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(top, dist.ReduceOp.MAX)
        given = (log_q - top).exp().sum(dim=0)  # [K], from all images
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(given)
        log_q = F.log_softmax(log_q - top - given.log(), dim=-1)
    return log_q.exp()


def squared_distance(student, teacher):
    """Between directions, mean over all pairs: [V, B, K] and [2, B, K] -> scalar (Grill et al. 2020, equation 2)."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    cosines = (teacher.sum(dim=0) * student.sum(dim=0)).sum() - (teacher * student[:2]).sum()
    return 2 - 2 * cosines / (student.shape[1] * (2 * len(student) - 2))


class CrossEntropy(torch.autograd.Function):
    """The mean over all pairs of DINOLoss, and its gradient, in one reading of the logits.

    The sum over pairs is a product of sums, -(q_0 + q_1) . (log p_0 + ... + log p_V-1), less each view with
    itself, and the gradient of -q . log_softmax(s / T) is (softmax(s / T) - q) / T. The images are taken a few
    at a time, so that what is in between stays in the cache and no second [V*B, K] is needed.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher, answer, student_temp, overwrite):
        B, K = teacher.shape[0] // 2, teacher.shape[1]
        student, teacher = student_logits.view(-1, B, K), teacher.view(2, B, K)
        V = len(student)
        gradient = student if overwrite else torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros(())
        chunk = max(1, CHUNK_BYTES[student.device.type == "cpu"] // (4 * V * K))
        for first in range(0, B, chunk):
            images = slice(first, first + chunk)
            q = answer(teacher[:, images])  # [2, b, K]
            q_sum = q.sum(dim=0)
            x = student[:, images] / student_temp  # [V, b, K]
            p = F.softmax(x, dim=-1)
            log_normalizer = x.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()
            log_p = x.sub_(log_normalizer)
            total += (q * log_p[:2]).sum() - (q_sum * log_p.sum(dim=0)).sum()
            if ctx.needs_input_grad[0]:
                torch.sub(p[:2], q.flip(0), out=gradient[:2, images])  # a global view learns from the other one,
                torch.sub(p[2:], q_sum, alpha=0.5, out=gradient[2:, images])  # a local view from both
        pairs = B * (2 * V - 2)
        ctx.gradient, ctx.scale = gradient, 1 / (pairs * student_temp)
        return total / pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("DINOLoss: a second backward; the gradient was handed out by the first")
        gradient[:2] *= grad_output * ctx.scale
        gradient[2:] *= grad_output * (2 * ctx.scale)
        return gradient.flatten(0, 1), None, None, None, None


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
