"""One training step: both networks forward, loss, backward, clip, optimizer, teacher.

    student, teacher = build_networks(dict(img_size=224, patch_size=16), dict(out_dim=65536), seed=0)
    stats = train_step(student, teacher, dino_loss, optimizer, scaler, reached, [views], settings)

Caron et al. 2021, algorithm 1. A step never waits for the device; whoever wants to see a number of it does.
"""

import contextlib
import itertools
from typing import NamedTuple

import torch
from torch import nn

from backbones import build_backbone
from common.precision import autocast
from dino_loss import DINOHead
from optim import clip_gradients

# ---- networks ----

class MultiCropWrapper(nn.Module):
    """Backbone and projection head, for views of several sizes."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, views):
        """List of V tensors [B, C, s, s] -> logits [V*B, K], view-major; one backbone pass per run of equal sizes."""
        runs = [torch.cat(list(run)) for _, run in itertools.groupby(views, key=lambda view: view.shape)]
        return self.head(torch.cat([self.backbone(run) for run in runs]))


def build_networks(backbone, head, drop_path_rate=0.0, seed=0, predictor=False):
    """Student, and teacher: its copy, without stochastic depth, predictor or gradients (section 3.1).

    Args:
        backbone: see `build_backbone`.
        head: arguments of DINOHead behind the first.
    """
    def network(backbone, **more):
        return MultiCropWrapper(backbone, DINOHead(backbone.embed_dim, **head, **more))

    torch.manual_seed(seed)
    student = network(build_backbone(backbone, drop_path_rate), predictor=predictor)
    teacher = network(build_backbone(backbone))
    weights = student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return student, teacher.requires_grad_(False)


def compile_blocks(student, teacher):
    """Compile the blocks of both backbones, or all of one that has none, for every size of view by itself."""
    for network in (student, teacher):
        for region in network.backbone.blocks or [network.backbone]:
            region.compile(dynamic=False)


@torch.no_grad()
def update_teacher(teacher, student, momentum, applied=1.0):
    """teacher <- momentum * teacher + (1 - momentum) * student, for every parameter (section 3.1).

    Args:
        applied: 0-dim tensor, 0 where the step was not applied: then the teacher stays as it is.
    """
    parameters, theirs = list(teacher.parameters()), dict(student.named_parameters())
    weight = (1 - momentum) * torch.as_tensor(applied, dtype=torch.float32, device=parameters[0].device)
    torch._foreach_lerp_(parameters, [theirs[name] for name, _ in teacher.named_parameters()],
                         [weight] * len(parameters))


# ---- the step ----

class Settings(NamedTuple):
    """What the schedules say about one step."""

    step: int
    lr: float
    weight_decay: float
    momentum: float  # of the teacher: 1 leaves it as it is, 0 makes it the student
    teacher_temp: float
    frozen: bool  # whether the prototypes rest
    lagging: bool = False  # whether the teacher moves before the student does, to where that was


def train_step(student, teacher, dino_loss, optimizer, scaler, reached, batches, now, precision="fp32", clip_grad=3.0,
               per_parameter=True, diagnose=False):
    """Change student, teacher, centre and optimizer by one step.

    A step whose gradient is not finite changes nothing. Under fp16 scaling it is left out alone. Otherwise
    all later steps change nothing either, so that the device never waits to be asked: whoever finds `reached`
    behind has the state before the step that failed.

    Args:
        student: Network, or DistributedDataParallel around it.
        scaler: torch.amp.GradScaler, enabled for fp16 alone.
        reached: 0-dim int64 tensor, the step that the state has reached; moved on by each step.
        batches: one list of V view tensors [B, C, s, s] for each accumulated pass.
        now: Settings of this step.
        precision: fp32, bf16 or fp16; weights, loss and optimizer stay float32.
        clip_grad, per_parameter: see clip_gradients.
        diagnose: also return the teacher's entropies, which cost a pass over its logits.

    Returns:
        [1] or [3], still on the device, this process's part: the loss, and by request the teacher's
        entropy and the entropy of its mean output (see DINOLoss.teacher_entropy), all in nats.
    """
    network = getattr(student, "module", student)
    moved_early = [*network.buffers(), *teacher.buffers(), *dino_loss.buffers()]  # the centre, batch norm's statistics
    before = [(buffer, buffer.clone()) for buffer in moved_early]
    results = []
    for i, views in enumerate(batches):
        last = i == len(batches) - 1
        with student.no_sync() if student is not network and not last else contextlib.nullcontext():
            with autocast(views[0].device, precision):
                with torch.no_grad():
                    teacher_logits = teacher(views[:2])
                student_logits = student(views)
            stats = dino_loss.teacher_entropy(teacher_logits, now.teacher_temp) if diagnose else ()
            loss = dino_loss(student_logits, teacher_logits, now.teacher_temp, update_center=False, overwrite=True)
            if last:
                dino_loss.reduce_center()  # while the gradients are on their way
            scaler.scale(loss / len(batches)).backward()
        results.append(torch.stack((loss.detach(), *stats)))
    dino_loss.update_center()
    if now.frozen:
        for p in network.head.last_layer.parameters():
            p.grad = None
    apply_gradients(network, teacher, optimizer, scaler, reached, before, now, clip_grad, per_parameter)
    return torch.stack(results).mean(dim=0)


def apply_gradients(student, teacher, optimizer, scaler, reached, before, now, clip_grad=3.0, per_parameter=True):
    """The second half of a step: clip, optimizer, teacher, all of it or nothing.

    Args:
        before: (tensor, its value before the step) of all that has moved already.
    """
    is_fused = optimizer.defaults.get("fused")  # then it can leave out a step by itself
    if not is_fused:
        moved = [*student.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
        before = before + [(tensor, tensor.detach().clone()) for tensor in moved]
    optimizer.param_groups[0]["weight_decay"] = now.weight_decay
    for group in optimizer.param_groups:
        group["lr"] = now.lr
    scaler.unscale_(optimizer)
    norms = clip_gradients(student.parameters(), clip_grad, per_parameter)
    applied = norms.isfinite().all()  # of gradients that DDP has averaged: the same on every process
    if not scaler.is_enabled():
        applied &= reached == now.step
        if is_fused:
            optimizer.found_inf = (~applied).float()
    moves = applied | (scaler.is_enabled() and now.momentum == 0)  # a step that fp16 left out may end an epoch
    if now.lagging:
        update_teacher(teacher, student, now.momentum, moves)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for tensor, old in before:
            tensor.copy_(torch.where(applied.to(tensor.device), tensor, old))
    if not now.lagging:
        update_teacher(teacher, student, now.momentum, moves)
    reached += applied | scaler.is_enabled()


if __name__ == "__main__":
    from dino_loss import DINOLoss
    from optim import build_optimizer, build_param_groups

    student, teacher = build_networks(dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2),
                                      dict(out_dim=256, hidden_dim=128))
    dino_loss, optimizer = DINOLoss(256), build_optimizer("adamw", build_param_groups(student))
    scaler, reached = torch.amp.GradScaler("cpu", enabled=False), torch.tensor(0)
    pictures = torch.randn(16, 3, 32, 32)
    for step in range(50):
        views = [pictures + 0.1 * torch.randn_like(pictures) for _ in range(2)]
        now = Settings(step, lr=0.002, weight_decay=0.04, momentum=0.99, teacher_temp=0.04, frozen=False)
        stats = train_step(student, teacher, dino_loss, optimizer, scaler, reached, [views], now, diagnose=True)
        if step % 10 == 9:
            print("step {}  loss {:.3f}  teacher entropy {:.3f}  of its mean output {:.3f}".format(step + 1, *stats))
