"""DINO objective: projection head, multi-crop forward, loss with centering, KoLeo, EMA teacher, schedules.

    student = MultiCropWrapper(backbone, DINOHead(in_dim=384, out_dim=65536))
    teacher = copy.deepcopy(student).requires_grad_(False)
    dino_loss = DINOLoss(out_dim=65536)
    loss = dino_loss(student(crops), teacher(crops[:2]), teacher_temp=0.04)
    update_teacher(teacher, student, momentum=0.996)

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers". This file needs torch only; the loss
works with and without a process group.

Shapes in this file: V crops of B images, K prototypes (out_dim). Logits are view-major: row v * B + b is crop v of
image b, the two global crops first.
"""

import functools
import itertools
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

LOGIT_CHUNK_BYTES = (2**28, 2**22)  # student logits processed at once: on a GPU, on a CPU (its cache)


# ---- networks ----

class WeightNormLinear(nn.Module):
    """Weight-normalized linear layer without bias: weight = weight_g * weight_v / |weight_v|, row by row.

    Salimans & Kingma 2016, equation 2. Computes in the dtype of its weights, also under autocast.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear; the norm sets how fast rows can turn

    def extra_repr(self) -> str:
        return f"in_dim={self.weight_v.shape[1]}, out_dim={self.weight_v.shape[0]}"

    def forward(self, x: Tensor) -> Tensor:  # [M, in_dim] -> [M, out_dim]
        with torch.autocast(x.device.type, enabled=False):
            return WeightNormProduct.apply(x.to(self.weight_v.dtype), self.weight_g, self.weight_v)


class WeightNormProduct(torch.autograd.Function):
    """x @ weight.T of WeightNormLinear without a copy of the weight, which with K rows is the largest tensor."""

    @staticmethod
    def forward(ctx, x, weight_g, weight_v):
        norm = weight_v.norm(dim=1, keepdim=True)  # [K, 1]
        ctx.save_for_backward(x, weight_g, weight_v, norm)
        return (x @ weight_v.T).mul_((weight_g / norm).T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # [M, K]
        x, weight_g, weight_v, norm = ctx.saved_tensors
        grad_x = (grad * (weight_g / norm).T) @ weight_v if ctx.needs_input_grad[0] else None
        grad_v = grad.T @ x  # its part along the row changes the row's norm, the rest its direction
        grad_g = torch.linalg.vecdot(grad_v, weight_v).unsqueeze(1) / norm  # [K, 1]
        grad_v.addcmul_(weight_v, grad_g / norm, value=-1).mul_(weight_g / norm)
        return grad_x, grad_g if ctx.needs_input_grad[1] else None, grad_v


class DINOHead(nn.Module):
    """Projection head: MLP, L2-normalized bottleneck, weight-normalized last layer (section 3.1, appendix C).

    Args:
        in_dim: width D of the backbone.
        out_dim: number K of prototypes.
        use_bn: batch norm after each hidden layer (the paper's heads have none).
        norm_last_layer: keep the rows of the last layer at norm 1 instead of training their norm.
        nlayers: layers of the MLP.
        l2_bottleneck: normalize the input of the last layer.
        predictor: two more layers before the bottleneck, for the student only (Grill et al. 2020, section 3.1).
    """

    def __init__(self, in_dim: int, out_dim: int, use_bn: bool = False, norm_last_layer: bool = True, nlayers: int = 3,
                 hidden_dim: int = 2048, bottleneck_dim: int = 256, l2_bottleneck: bool = True,
                 predictor: bool = False):
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

    def forward(self, x: Tensor) -> Tensor:
        """Features [M, in_dim] -> logits [M, K].

        Float32 from the bottleneck on, also under autocast: the loss divides logits by temperatures of 0.04 to 0.1,
        which would amplify half-precision error.
        """
        x = self.predictor(self.mlp(x)).to(self.last_layer.weight_v.dtype)
        return self.last_layer(F.normalize(x, dim=-1) if self.l2_bottleneck else x)


class MultiCropWrapper(nn.Module):
    """Backbone and projection head on crops of several sizes: one backbone forward pass per size (section 3.1)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: list[Tensor], return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """V tensors [B, C, s, s] -> logits [V*B, K], view-major. One pass per size if equal sizes are neighbors.

        Args:
            return_features: return the backbone's features too, (logits, [V*B, D]).
        """
        batches = [torch.cat(list(group)) for _, group in itertools.groupby(crops, key=lambda crop: crop.shape)]
        features = torch.cat([self.backbone(batch) for batch in batches])
        logits = self.head(features)
        return (logits, features) if return_features else logits


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """EMA of the student's parameters: teacher <- momentum * teacher + (1 - momentum) * student (section 3.1).

    Buffers of batch norm are not copied: the teacher has its own, of its forward passes in train mode.
    """
    student_parameters = dict(student.named_parameters())
    names, parameters = zip(*teacher.named_parameters())
    torch._foreach_lerp_(parameters, [student_parameters[name] for name in names], 1 - momentum)


# ---- loss ----

class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's global crops and the student's crops, with centering and sharpening.

    Equation 3 and algorithm 1: mean over all pairs (global crop t of the teacher, other crop s of the student) of
    -softmax((g_t - c) / teacher_temp) . log_softmax(g_s / student_temp). The center c is an EMA of the teacher's mean
    logits over all ranks (equation 4).

    Args:
        out_dim: number K of prototypes.
        student_temp: temperature of the student.
        center_momentum: momentum of the center's EMA; 1 disables centering.
        centering: "mean" subtracts the center from the teacher's logits; "sinkhorn" balances the prototypes over the
            batch (see `sinkhorn`), "batch", a softmax over the batch, is one iteration of it (appendix B, table 12).
        objective: "ce"; or of table 7 "mse" for `squared_distance` to the centered logits, without temperatures, and
            "infonce" for `contrast` of the logits as embeddings, with student_temp, without centering.
        queue_size: keys of earlier steps that are the negatives of "infonce".

    Raises:
        ValueError: another centering or objective, or one other than "ce" with a centering that gives probabilities.
    """

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9, centering: str = "mean",
                 objective: str = "ce", queue_size: int = 65536):
        super().__init__()
        centerings = {"ce": ("mean", "batch", "sinkhorn"), "mse": ("mean",), "infonce": ("mean",)}
        if centering not in centerings.get(objective, ()):
            raise ValueError(f"objective {objective!r} with centering {centering!r}: expected ce with mean, batch or "
                             f"sinkhorn, or mse or infonce, which compare logits, with mean")
        self.centering = centering
        self.objective = objective
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.iterations = {"mean": 0, "batch": 1, "sinkhorn": 3}[centering]
        self.register_buffer("center", torch.zeros(1, out_dim))
        if objective == "infonce":
            self.register_buffer("queue", F.normalize(torch.randn(queue_size, out_dim), dim=-1))  # the newest first
        self.keys = []  # of micro-batches that the queue does not include yet
        self.pending = []  # mean teacher logits of micro-batches that the center does not include yet
        self.reduced = None  # their mean over all ranks, and the collective to wait for

    def extra_repr(self) -> str:
        return (f"out_dim={self.center.shape[1]}, student_temp={self.student_temp}, center_momentum="
                f"{self.center_momentum}, centering={self.centering}, objective={self.objective}")

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float, update_center: bool = True,
                overwrite: bool = False) -> Tensor:
        """student_logits [V*B, K] and teacher_logits [2*B, K] -> scalar loss, float32.

        Then the center, or queue, is updated with the teacher's logits. With gradient accumulation, pass
        `update_center=False` and call `update_center()` once per step; `reduce_center()` before it overlaps the
        all-reduce with backward.

        Args:
            overwrite: write the gradient over student_logits, which must not be read any more, instead of
                allocating as much memory again.

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
        to_target = functools.partial(centered_softmax, center=self.center, temp=teacher_temp)
        if self.iterations:  # couples all images of the batch, so it cannot be done chunk by chunk
            teacher, to_target = self.teacher_probabilities(teacher, teacher_temp), nn.Identity()
        if self.objective == "mse":
            loss = squared_distance(student.view(-1, B, K), (teacher - self.center).view(2, B, K))
        elif self.objective == "infonce":
            self.keys.append(F.normalize(teacher.detach(), dim=-1))
            loss = contrast(student.view(-1, B, K), self.keys[-1].view(2, B, K), self.queue, self.student_temp)
        else:
            loss = CrossEntropy.apply(student, teacher, to_target, self.student_temp, overwrite)
        self.pending.append(teacher_logits.detach().float().mean(dim=0, keepdim=True))
        if update_center:
            self.update_center()
        return loss

    @torch.no_grad()
    def teacher_probabilities(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """[M, K] logits -> [M, K] targets, each row summing to 1."""
        if self.iterations:
            return sinkhorn(teacher_logits.float(), teacher_temp, self.iterations)
        return centered_softmax(teacher_logits.float(), self.center, teacher_temp)

    @torch.no_grad()
    def teacher_entropy(self, teacher_logits: Tensor, teacher_temp: float) -> tuple[Tensor, Tensor]:
        """Mean entropy of the teacher's outputs, and entropy of its mean output: two scalars in nats, 0 to ln K.

        The first near ln K is a collapse to uniform, the second near 0 a collapse to one prototype (section 5.3,
        figure 7). Call it before `forward`, which updates the center.
        """
        q = self.teacher_probabilities(teacher_logits, teacher_temp)
        return torch.special.entr(q).sum(dim=-1).mean(), torch.special.entr(q.mean(dim=0)).sum()

    @torch.no_grad()
    def reduce_center(self) -> None:
        """Start averaging the pending logits over all ranks, so that `update_center` need not wait for it."""
        mean, work = torch.stack(self.pending).mean(dim=0), None  # [1, K]
        self.pending.clear()
        if dist.is_available() and dist.is_initialized():
            mean /= dist.get_world_size()
            work = dist.all_reduce(mean, async_op=True)
        self.reduced = mean, work

    @torch.no_grad()
    def update_center(self) -> None:
        """Update the center with the mean of the pending logits over all ranks (equation 4), and the queue."""
        if self.reduced is None:
            self.reduce_center()
        (mean, work), self.reduced = self.reduced, None
        if work:
            work.wait()
        self.center.lerp_(mean, 1 - self.center_momentum)
        if self.keys:
            self.update_queue()

    @torch.no_grad()
    def update_queue(self) -> None:
        """Put the keys of all ranks into the queue, from which the oldest drop out (He et al. 2020, section 3.2)."""
        keys = torch.cat(self.keys)
        self.keys.clear()
        if dist.is_available() and dist.is_initialized():
            local, keys = keys, keys.new_empty(dist.get_world_size() * len(keys), keys.shape[1])
            dist.all_gather_into_tensor(keys, local)
        self.queue = torch.cat((keys, self.queue))[:len(self.queue)].clone()  # not in place: backward needs the old one


def centered_softmax(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Teacher targets: centered, so that no prototype dominates, and sharpened (equation 1)."""
    return F.softmax((logits - center) / temp, dim=-1)


def sinkhorn(logits: Tensor, temp: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp: softmax with equal use of all prototypes over the images of all ranks.

    Alternately normalizes prototypes and images, in logarithms (Caron et al. 2020, SwAV, section 3.1). [M, K] logits
    -> [M, K], each row summing to 1 and, after many iterations, each column to images / prototypes.
    """
    log_q = logits / temp
    for _ in range(iterations):
        top = log_q.amax(dim=0)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(top, dist.ReduceOp.MAX)
        column_sum = (log_q - top).exp().sum(dim=0)  # [K], over all images
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(column_sum)
        log_q = F.log_softmax(log_q - top - column_sum.log(), dim=-1)
    return log_q.exp()


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of normalized logits over all pairs: [V, B, K], [2, B, K] -> scalar.

    Grill et al. 2020, equation 2.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    cosines = (teacher.sum(dim=0) * student.sum(dim=0)).sum() - (teacher * student[:2]).sum()
    return 2 - 2 * cosines / (student.shape[1] * (2 * len(student) - 2))


def contrast(student: Tensor, keys: Tensor, queue: Tensor, temp: float) -> Tensor:
    """InfoNCE over all pairs: [V, B, K], normalized [2, B, K] and [Q, K] -> scalar.

    Mean of -log(exp(q . k / temp) / (exp(q . k / temp) + sum over n of exp(q . n / temp))): q is a normalized crop of
    the student, k the teacher's other crop of the image, n a key in the queue (He et al. 2020, MoCo, equation 1).
    """
    with torch.autocast(student.device.type, enabled=False):
        queries = F.normalize(student, dim=-1)
        positive = torch.einsum("tbk,vbk->tvb", keys, queries) / temp
        negative = (queries @ queue.T / temp).logsumexp(dim=-1)  # [V, B]
        losses = F.softplus(negative - positive)
        return (losses.sum() - losses.diagonal().sum()) / (student.shape[1] * (2 * len(student) - 2))


def koleo_loss(features: Tensor) -> Tensor:
    """KoLeo regularizer: [M, D] features of M images of one process -> scalar; spreads them over the unit sphere.

    Mean of -log of the distance between each normalized feature and its nearest neighbor, the Kozachenko-Leonenko
    estimate of the negative entropy up to a factor and a constant (Sablayrolles et al. 2019, section 3.1). DINOv2 adds
    it to the loss with a weight of 0.1 (Oquab et al. 2023, section 4, appendix B.1), in its code for each global crop.

    Raises:
        ValueError: fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"KoLeo needs the features of two images or more, not of {len(features)}")
    x = F.normalize(features.float(), dim=-1)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(dim=-1)
    # 0.01**2 bounds the gradient, 1 / distance otherwise, between images that are nearly equal, such as blank tiles
    return -0.5 * ((x - x[nearest]).square().sum(dim=-1) + 1e-4).log().mean()


class CrossEntropy(torch.autograd.Function):
    """DINOLoss over all pairs and its gradient in one pass over the logits.

    The sum over pairs is a product of sums, -(q_0 + q_1) . (log p_0 + ... + log p_V-1), minus the pairs of a crop with
    itself, and the gradient of -q . log_softmax(s / T) is (softmax(s / T) - q) / T. Images are processed in chunks, so
    that intermediate results stay in the cache and no second [V*B, K] is needed.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher, to_target, student_temp, overwrite):
        B, K = teacher.shape[0] // 2, teacher.shape[1]
        student, teacher = student_logits.view(-1, B, K), teacher.view(2, B, K)
        V = len(student)
        gradient = student if overwrite else torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = student.new_zeros(())
        chunk = max(1, LOGIT_CHUNK_BYTES[student.device.type == "cpu"] // (4 * V * K))
        for first in range(0, B, chunk):
            images = slice(first, first + chunk)
            q = to_target(teacher[:, images])  # [2, b, K]
            q_sum = q.sum(dim=0)
            x = student[:, images] / student_temp  # [V, b, K]
            p = F.softmax(x, dim=-1)
            log_normalizer = x.amax(dim=-1, keepdim=True) - p.amax(dim=-1, keepdim=True).log()
            log_p = x.sub_(log_normalizer)
            total += (q * log_p[:2]).sum() - (q_sum * log_p.sum(dim=0)).sum()
            if ctx.needs_input_grad[0]:
                torch.sub(p[:2], q.flip(0), out=gradient[:2, images])  # the target of a global crop is the other one,
                torch.sub(p[2:], q_sum, alpha=0.5, out=gradient[2:, images])  # of a local crop both
        pairs = B * (2 * V - 2)
        ctx.gradient, ctx.scale = gradient, 1 / (pairs * student_temp)
        return total / pairs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("DINOLoss: second backward; the first one has consumed the gradient")
        gradient[:2] *= grad_output * ctx.scale
        gradient[2:] *= grad_output * (2 * ctx.scale)
        return gradient.flatten(0, 1), None, None, None, None


# ---- schedules: pure functions of the step ----

def cosine_schedule(step: int, total_steps: int, base: float, final: float, warmup_steps: int = 0,
                    start: float = 0.0) -> float:
    """Value at `step`: linear warm-up from start to base, then half a cosine from base to final.

    The last of several warm-up steps and the first cosine step both have the value base; final would be reached at
    total_steps.
    """
    if step < warmup_steps:
        return start + (base - start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def teacher_temp_schedule(epoch: int, warmup_temp: float, temp: float, warmup_epochs: int) -> float:
    """Teacher temperature of an epoch: linear over the first `warmup_epochs`, then constant (appendix C)."""
    if epoch >= warmup_epochs:
        return temp
    return warmup_temp + (temp - warmup_temp) * epoch / max(warmup_epochs - 1, 1)
