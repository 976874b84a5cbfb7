import copy
import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

import dino_loss
from dino_loss import (
    DINOHead,
    DINOLoss,
    MultiCropWrapper,
    cosine_schedule,
    koleo_loss,
    sinkhorn,
    teacher_temp_schedule,
    update_teacher,
)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_head_equals_the_reference(golden):
    g = golden("head")
    head = DINOHead(48, 128, hidden_dim=64, bottleneck_dim=32)
    head.load_state_dict({name[8:]: value for name, value in g.items() if name.startswith("weights.")})
    close(head(g["input"]), g["output"])


def test_head_is_float32_from_the_bottleneck_on():
    head = DINOHead(16, 32, hidden_dim=16, bottleneck_dim=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(torch.randn(4, 16)).dtype == torch.float32


def test_prototypes_are_initialized_as_a_linear_layer():
    torch.manual_seed(0)
    ours, theirs = DINOHead(8, 4096).last_layer.weight_v, torch.nn.Linear(256, 4096).weight
    assert ours.norm(dim=1).mean().item() == pytest.approx(theirs.norm(dim=1).mean().item(), rel=0.01)


def test_head_layers():
    assert [type(m).__name__ for m in DINOHead(8, 16, use_bn=True, nlayers=3).mlp] == [
        "Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]
    assert list(DINOHead(8, 16, nlayers=1).state_dict()) == [
        "mlp.weight", "mlp.bias", "last_layer.weight_g", "last_layer.weight_v"]
    assert not DINOHead(8, 16).last_layer.weight_g.requires_grad
    assert DINOHead(8, 16, norm_last_layer=False).last_layer.weight_g.requires_grad


def test_loss_gradient_and_center_equal_the_reference(golden):
    g = golden("loss")
    loss = DINOLoss(64)
    for epoch in range(5):
        student = g[f"{epoch}.student"].requires_grad_()
        temp = teacher_temp_schedule(epoch, 0.04, 0.07, 3)
        assert math.isclose(temp, g["teacher_temp_schedule"][epoch], abs_tol=1e-12)
        value = loss(student, g[f"{epoch}.teacher"], temp)
        value.backward()
        close(value.detach(), g[f"{epoch}.loss"])
        close(student.grad, g[f"{epoch}.student_grad"], atol=5e-7)  # of 0.6; its own rounding is 2.5e-7
        close(loss.center, g[f"{epoch}.center_after"])


def pair_by_pair(student, teacher, center, student_temp, teacher_temp, V):
    """Equation 3 and algorithm 1 as they are written, in float64."""
    q = ((teacher.double() - center.double()) / teacher_temp).softmax(dim=-1)
    return all_pairs(student, q, student_temp, V)


def all_pairs(student, q, student_temp, V):
    p = (student.double() / student_temp).log_softmax(dim=-1).chunk(V)
    q = q.chunk(2)
    pairs = [-(q[t] * p[v]).sum(dim=-1).mean() for t in range(2) for v in range(V) if v != t]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("V, B, K, chunk", [(2, 3, 40, 2**22), (10, 5, 40, 2**22), (10, 5, 40, 2 * 10 * 40 * 4),
                                            (4, 7, 1000, 1)])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss_is_the_sum_over_pairs(monkeypatch, V, B, K, chunk, overwrite, scale):
    torch.manual_seed(0)
    monkeypatch.setattr(dino_loss, "LOGIT_CHUNK_BYTES", (chunk, chunk))
    x, teacher = torch.randn(V * B, K) * scale, torch.randn(2 * B, K) * scale
    leaf = x.clone().requires_grad_()
    loss = DINOLoss(K)
    loss.center.normal_()
    exact = leaf.detach().double().requires_grad_()
    expected = pair_by_pair(exact, teacher, loss.center, 0.1, 0.05, V)
    expected.backward()
    student = leaf * 1
    value = loss(student, teacher, 0.05, overwrite=overwrite)
    (3 * value).backward()
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    close(leaf.grad.double(), 3 * exact.grad, atol=3e-6 * exact.grad.abs().max().item())
    assert torch.equal(student.detach(), x) == (not overwrite)


def test_logits_are_overwritten_only_on_request():
    student, teacher = torch.randn(6, 8), torch.randn(4, 8)
    before = student.clone()
    DINOLoss(8)(student, teacher, 0.04)
    with torch.no_grad():
        DINOLoss(8)(student, teacher, 0.04)
    assert torch.equal(student, before)


def test_a_head_computes_in_the_dtype_of_its_weights():
    x, head = torch.randn(4, 8), DINOHead(8, 40, bottleneck_dim=16)
    exact = copy.deepcopy(head).double()(x.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(head(x).double(), exact, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        alone = head.last_layer(x.repeat(1, 2))
    alone.sum().backward()
    assert alone.dtype == head.last_layer.weight_v.grad.dtype == torch.float32


def test_a_second_backward_is_refused():
    loss = DINOLoss(8)(torch.randn(6, 8, requires_grad=True), torch.randn(4, 8), 0.04)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_the_last_layer_equals_weight_norm_of_torch():
    torch.manual_seed(0)
    ours = DINOHead(8, 40, bottleneck_dim=16, norm_last_layer=False).last_layer.double()
    torch.nn.init.uniform_(ours.weight_g, 0.5, 2.0)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(16, 40, bias=False).double())
    theirs.parametrizations.weight.original0.data.copy_(ours.weight_g)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight_v)
    grad = torch.randn(5, 40, dtype=torch.float64)
    results = []
    for layer in (ours, theirs):
        x = torch.linspace(-1, 1, 80, dtype=torch.float64).view(5, 16).requires_grad_()
        y = layer(x)
        y.backward(grad)
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results):
        close(a, b, atol=1e-12)


def test_the_center_may_be_reduced_before_its_update():
    student, teacher = torch.randn(6, 8), torch.randn(4, 8)
    one, two = DINOLoss(8), DINOLoss(8)
    one(student, teacher, 0.04)
    two(student, teacher, 0.04, update_center=False)
    two.reduce_center()
    assert (two.center == 0).all()
    two.update_center()
    assert torch.equal(one.center, two.center) and (one.center != 0).any()


def test_accumulated_micro_batches_are_one_step():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 8, 16), torch.randn(2, 8, 16)  # 3 and 2 crops of 8 images
    whole, parts = DINOLoss(16), DINOLoss(16)
    for _ in range(2):
        expected = whole(student.flatten(0, 1), teacher.flatten(0, 1), 0.05)
        a = parts(student[:, :4].flatten(0, 1), teacher[:, :4].flatten(0, 1), 0.05, update_center=False)
        b = parts(student[:, 4:].flatten(0, 1), teacher[:, 4:].flatten(0, 1), 0.05)
        close((a + b) / 2, expected)
        close(parts.center, whole.center)


def test_no_gradient_reaches_the_teacher():
    teacher = torch.randn(4, 8, requires_grad=True)
    DINOLoss(8)(torch.randn(6, 8, requires_grad=True), teacher, 0.04).backward()
    assert teacher.grad is None


def test_entropies_show_both_collapses():
    loss, K = DINOLoss(32), 32
    uniform = loss.teacher_entropy(torch.zeros(10, K), 0.04)
    close(torch.stack(uniform), torch.full((2,), math.log(K)))
    one = torch.zeros(10, K)
    one[:, 3] = 5
    close(torch.stack(loss.teacher_entropy(one, 0.04)), torch.zeros(2))
    close(torch.stack(loss.teacher_entropy(torch.eye(K) * 5, 0.04)), torch.tensor([0.0, math.log(K)]))


def test_schedules_equal_the_reference(golden):
    for schedule in golden("schedules.json").values():
        n = schedule["steps_per_epoch"]
        values = [cosine_schedule(step, schedule["epochs"] * n, schedule["base"], schedule["final"],
                                  schedule["warmup_epochs"] * n, schedule["start_warmup_value"])
                  for step in range(schedule["epochs"] * n)]
        assert values == pytest.approx(schedule["values"], abs=1e-12)


def test_schedules_at_their_edges():
    assert cosine_schedule(0, 10, 1.0, 0.0, warmup_steps=1) == 0.0
    assert cosine_schedule(9, 10, 1.0, 0.0, warmup_steps=10) == 1.0
    assert teacher_temp_schedule(0, 0.02, 0.04, 0) == 0.04
    assert teacher_temp_schedule(0, 0.02, 0.04, 1) == 0.02


# ---- multi-crop and teacher ----

def test_crops_of_several_sizes_are_view_major():
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 8))
    network = MultiCropWrapper(backbone, DINOHead(8, 16, hidden_dim=8, bottleneck_dim=4))
    passes = []
    backbone.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    crops = [torch.randn(3, 3, s, s) for s in (32, 32, 16, 16, 16)]
    logits = network(crops)
    assert passes == [6, 9]  # one forward pass per size
    close(logits, torch.cat([network.head(backbone(crop)) for crop in crops]))
    logits, features = network(crops, return_features=True)
    close(features, torch.cat([backbone(crop) for crop in crops]))
    close(logits, network.head(features))


def test_the_teacher_is_an_ema_of_the_student():
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    for momentum in (0.9, 0.0, 1.0):
        expected = [momentum * t.detach().double() + (1 - momentum) * s.detach().double()
                    for t, s in zip(teacher.parameters(), student.parameters())]
        update_teacher(teacher, student, momentum)
        for p, value in zip(teacher.parameters(), expected):
            close(p.detach().double(), value, atol=1e-7)
        torch.nn.init.normal_(student.weight)


def test_parameters_of_the_student_alone_are_ignored():
    student = torch.nn.ModuleDict(dict(a=torch.nn.Linear(2, 2), predictor=torch.nn.Linear(2, 2)))
    teacher = torch.nn.ModuleDict(dict(a=torch.nn.Linear(2, 2)))
    update_teacher(teacher, student, 0.0)
    assert torch.equal(teacher["a"].weight, student["a"].weight)


# ---- KoLeo ----

@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-5), (torch.bfloat16, 0.005)])
def test_koleo_equals_its_definition(dtype, rounding):
    torch.manual_seed(0)
    features = (0.1 * torch.randn(40, 16) + torch.randn(16)).to(dtype).requires_grad_()
    exact = features.detach().double().requires_grad_()
    x = exact / exact.norm(dim=1, keepdim=True)
    nearest = NearestNeighbors(n_neighbors=1).fit(x.detach()).kneighbors(return_distance=False)[:, 0]
    expected = -((x - x[nearest]).norm(dim=1) ** 2 + 0.01**2).sqrt().log().mean()
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        value = koleo_loss(features)
    value.backward()
    close(value.double(), expected, atol=1e-6)
    close(features.grad.double(), exact.grad, atol=rounding * exact.grad.abs().max().item())


@pytest.mark.parametrize("distance", [0, 1e-6, 1e-3, 1e-2])
def test_the_gradient_of_koleo_is_bounded_for_images_that_are_nearly_equal(distance):
    features = torch.tensor([[1.0, 0.0], [1.0, distance]], requires_grad=True)
    value = koleo_loss(features)
    value.backward()
    assert value <= math.log(100) + 1e-6 and features.grad.abs().max() <= 50 + 1e-3


def test_koleo_needs_two_images():
    with pytest.raises(ValueError, match="two images or more, not of 1"):
        koleo_loss(torch.randn(1, 4))


# ---- Sinkhorn-Knopp and batch softmax ----

def sinkhorn_by_definition(logits, temp, iterations):
    """Sinkhorn-Knopp as in SwAV, in float64: columns and rows of exp(logits / temp) are divided by their sums."""
    x = torch.exp(logits.double() / temp)
    for _ in range(iterations):
        x = x / x.sum(dim=0, keepdim=True)
        x = x / x.sum(dim=1, keepdim=True)
    return x


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_its_definition(iterations):
    torch.manual_seed(0)
    logits = torch.randn(24, 40) / 4
    close(sinkhorn(logits, 0.05, iterations).double(), sinkhorn_by_definition(logits, 0.05, iterations), atol=2e-6)
    close(sinkhorn(logits.double(), 0.05, iterations), sinkhorn_by_definition(logits, 0.05, iterations), atol=1e-12)


def test_sinkhorn_ends_doubly_stochastic():
    torch.manual_seed(0)
    q = sinkhorn(torch.randn(30, 12) / 4, 0.05, 2000)
    close(q.sum(dim=1), torch.ones(30), atol=1e-6)
    close(q.sum(dim=0) * 12 / 30, torch.ones(12), atol=1e-6)
    large = sinkhorn(100 * torch.randn(8, 16), 0.04, 3)  # whose exponentials no float holds
    assert large.isfinite().all()
    close(large.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize("centering, iterations", [("batch", 1), ("sinkhorn", 3)])
def test_loss_with_balanced_prototypes(monkeypatch, centering, iterations):
    torch.manual_seed(0)
    monkeypatch.setattr(dino_loss, "LOGIT_CHUNK_BYTES", (1, 1))  # image by image
    student, teacher = torch.randn(4 * 6, 20), torch.randn(2 * 6, 20) / 4
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss = DINOLoss(20, centering=centering)
    loss.center.normal_()  # is not used
    q = sinkhorn_by_definition(teacher, 0.05, iterations)
    value, expected = loss(leaf, teacher, 0.05, update_center=False), all_pairs(exact, q, 0.1, 4)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
    close(leaf.grad.double(), exact.grad, atol=1e-6)
    close(loss.teacher_probabilities(teacher, 0.05).double(), q, atol=2e-6)
    entropy, marginal_entropy = loss.teacher_entropy(teacher, 0.05)
    assert entropy.item() == pytest.approx(torch.special.entr(q).sum(dim=1).mean().item(), rel=1e-5)
    assert marginal_entropy.item() == pytest.approx(torch.special.entr(q.mean(dim=0)).sum().item(), rel=1e-5)


def test_batch_softmax_is_one_iteration():
    logits = torch.randn(9, 7, dtype=torch.float64)
    x = (logits / 0.1).softmax(dim=0)
    close(sinkhorn(logits, 0.1, 1), x / x.sum(dim=1, keepdim=True), atol=1e-12)


SPLIT = """
import torch, torch.distributed as dist
from dino_loss import DINOLoss, sinkhorn
logits = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)) / 4
whole = {name: DINOLoss(40, centering=name).teacher_probabilities(logits, 0.05) for name in ("batch", "sinkhorn")}
dist.init_process_group("gloo")
rank = dist.get_rank()
mine = slice(0, 10) if rank == 0 else slice(10, 24)
for name, expected in whole.items():
    found = DINOLoss(40, centering=name).teacher_probabilities(logits[mine], 0.05)
    assert (found - expected[mine]).abs().max() < 1e-6, name
dist.destroy_process_group()
"""


def test_two_processes_balance_prototypes_over_both(run_torchrun):
    run_torchrun(2, SPLIT)


def test_center_momentum_1_disables_centering():
    loss = DINOLoss(8, center_momentum=1)
    loss(torch.randn(6, 8), torch.randn(4, 8), 0.04)
    assert (loss.center == 0).all()


@pytest.mark.parametrize("student, teacher", [
    ((7, 16), (4, 16)), ((2, 16), (4, 16)), ((8, 8), (4, 8)), ((8, 16), (3, 16))])
def test_wrong_shapes_are_named(student, teacher):
    with pytest.raises(ValueError, match="expected \\[V\\*B, 16\\]"):
        DINOLoss(16)(torch.zeros(student), torch.zeros(teacher), 0.04)


# ---- ablations ----

def test_squared_error_is_the_sum_over_pairs():
    torch.manual_seed(0)
    V, B, K = 4, 5, 12
    leaf, teacher = torch.randn(V * B, K, requires_grad=True), torch.randn(2 * B, K)
    loss = DINOLoss(K, objective="mse")
    loss.center.normal_()
    exact = leaf.detach().double().requires_grad_()
    s = [x / x.norm(dim=1, keepdim=True) for x in exact.chunk(V)]
    t = [x / x.norm(dim=1, keepdim=True) for x in (teacher - loss.center).double().chunk(2)]
    pairs = [((s[v] - t[w]) ** 2).sum(dim=1).mean() for w in range(2) for v in range(V) if v != w]
    expected = sum(pairs) / len(pairs)
    center = 0.9 * loss.center + 0.1 * teacher.mean(dim=0)
    value = loss(leaf, teacher, 0.04, overwrite=True)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    close(leaf.grad.double(), exact.grad, atol=1e-7)
    close(loss.center, center)
    for wrong in (dict(centering="softmax"), dict(objective="l2")):
        with pytest.raises(ValueError, match="expected ce with mean, batch or sinkhorn"):
            DINOLoss(8, **wrong)
    for objective in ("mse", "infonce"):
        with pytest.raises(ValueError, match="mse or infonce, which compare logits"):
            DINOLoss(K, centering="sinkhorn", objective=objective)


def infonce_by_definition(student, teacher, queue, temp, V):
    """MoCo's loss as cross-entropy of class 0, the positive key, over all pairs of crops, in float64."""
    def unit(x):
        return x.double() / x.double().norm(dim=1, keepdim=True)
    pairs = []
    for t, keys in enumerate(unit(teacher).chunk(2)):
        for v, queries in enumerate(unit(student).chunk(V)):
            if v != t:
                logits = torch.stack([torch.cat((k[None], queue.double())) @ q for q, k in zip(queries, keys)]) / temp
                pairs.append(torch.nn.functional.cross_entropy(logits, torch.zeros(len(keys), dtype=torch.long)))
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("V, temp, scale", [(2, 0.2, 1.0), (4, 0.2, 30.0), (3, 0.05, 1.0)])
def test_infonce_equals_its_definition(V, temp, scale):
    torch.manual_seed(0)
    B, K, Q = 5, 12, 40
    loss = DINOLoss(K, temp, objective="infonce", queue_size=Q)
    assert DINOLoss(2, objective="infonce").queue.shape == (65536, 2)
    close(loss.queue.norm(dim=1), torch.ones(Q))
    for _ in range(5):  # ten keys in each
        leaf, teacher = (scale * torch.randn(V * B, K)).requires_grad_(), torch.randn(2 * B, K, requires_grad=True)
        queue, exact = loss.queue.clone(), leaf.detach().double().requires_grad_()
        expected = infonce_by_definition(exact, teacher.detach(), queue, temp, V)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(leaf, teacher, 0.04)
        value.backward()
        expected.backward()
        assert value.dtype == torch.float32 and teacher.grad is None
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=0)
        close(leaf.grad.double(), exact.grad, atol=3e-6 * exact.grad.abs().max().item())
        keys = teacher.detach() / teacher.detach().norm(dim=1, keepdim=True)
        close(loss.queue, torch.cat((keys, queue[:-2 * B])), atol=1e-6)  # the oldest have dropped out


def test_infonce_of_accumulated_micro_batches_is_one_step():
    torch.manual_seed(0)
    whole = DINOLoss(16, 0.2, objective="infonce", queue_size=32)
    parts = copy.deepcopy(whole)
    for _ in range(3):
        student, teacher = torch.randn(3, 8, 16), torch.randn(2, 8, 16)
        expected = whole(student.flatten(0, 1), teacher.flatten(0, 1), 0.05)
        a = parts(student[:, :4].flatten(0, 1), teacher[:, :4].flatten(0, 1), 0.05, update_center=False)
        b = parts(student[:, 4:].flatten(0, 1), teacher[:, 4:].flatten(0, 1), 0.05)
        close((a + b) / 2, expected)
    few = DINOLoss(16, objective="infonce", queue_size=3)  # fewer than the keys of a step
    few(student.flatten(0, 1), teacher.flatten(0, 1), 0.05)
    close(few.queue, torch.nn.functional.normalize(teacher[0, :3], dim=1))


CONTRAST = """
import copy, torch, torch.distributed as dist
from dino_loss import DINOLoss
torch.manual_seed(0)
whole = DINOLoss(16, 0.2, objective="infonce", queue_size=64)
half, steps = copy.deepcopy(whole), [(torch.randn(3, 8, 16), torch.randn(2, 8, 16)) for _ in range(6)]
expected = []
for student, teacher in steps:
    leaf = student.clone().requires_grad_()
    loss = whole(leaf.flatten(0, 1), teacher.flatten(0, 1), 0.05)
    loss.backward()
    expected.append((loss.detach(), leaf.grad))
dist.init_process_group("gloo")
mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
for (student, teacher), (value, gradient) in zip(steps, expected):
    leaf = student[:, mine].clone().requires_grad_()
    loss = half(leaf.flatten(0, 1), teacher[:, mine].flatten(0, 1), 0.05)
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    assert (mean / 2 - value).abs() < 1e-6
    assert (leaf.grad / 2 - gradient[:, mine]).abs().max() < 1e-6
found, wanted = ({tuple(row) for row in (1e5 * queue).round().int().tolist()} for queue in (half.queue, whole.queue))
assert found == wanted and len(found) == 64
dist.destroy_process_group()
"""


def test_infonce_of_two_processes_is_that_of_twice_the_batch(run_torchrun):
    run_torchrun(2, CONTRAST)


def test_a_head_without_l2_bottleneck():
    torch.manual_seed(0)
    head, x = DINOHead(8, 20, hidden_dim=16, bottleneck_dim=4, l2_bottleneck=False), torch.randn(3, 8)
    layer = head.last_layer
    expected = head.mlp(x) @ (layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True)).T
    close(head(x), expected, atol=1e-6)
    head.l2_bottleneck = True
    close(head(x), expected / head.mlp(x).norm(dim=1, keepdim=True), atol=1e-6)


def test_the_predictor_is_before_the_bottleneck():
    torch.manual_seed(0)
    head, x = DINOHead(8, 20, hidden_dim=16, bottleneck_dim=4, predictor=True), torch.randn(3, 8)
    one, two = head.predictor[0], head.predictor[2]
    assert (one.weight.shape, two.weight.shape) == ((16, 4), (4, 16)) and one.weight.std() < 0.03
    y = torch.nn.functional.gelu(head.mlp(x) @ one.weight.T) @ two.weight.T
    close(head(x), head.last_layer(y / y.norm(dim=1, keepdim=True)), atol=1e-5)


def test_repr_shows_the_parameters():
    assert repr(DINOLoss(8, centering="batch")) == (
        "DINOLoss(out_dim=8, student_temp=0.1, center_momentum=0.9, centering=batch, objective=ce)")
    assert "WeightNormLinear(in_dim=4, out_dim=7)" in repr(DINOHead(5, 7, bottleneck_dim=4))
