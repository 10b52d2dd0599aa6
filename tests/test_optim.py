"""The optimizers: which parameters are whose, and Muon takes the steps that it says."""
import numpy as np
import pytest
import torch
from test_var import config

from support.optim import Muon, adamw_and_muon, orthogonal
from var import VAR


@pytest.mark.parametrize("muon", [True, False])
def test_which_parameters_decay_and_which_go_to_muon(muon):
    model = VAR(config(depth=1, shared_adaln=True))
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = torch.nn.ModuleList([model.blocks[0].attention, model.blocks[0].mlp])
    adamw, *rest = adamw_and_muon(model, layers, 1e-3, 0.05, muon, torch.float32)
    groups = {group["weight_decay"]: {names[p] for p in group["params"]} for group in adamw.param_groups}
    inside = {f"blocks.0.{name}.weight" for name in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")}
    outside = {f"{name}.weight" for name in ("code_embedding", "shared_modulation", "head_modulation", "head")}
    assert groups[0.05] == (outside if muon else outside | inside)
    assert groups[0.0] == set(names.values()) - outside - inside
    assert {"class_embedding.weight", "blocks.0.modulation_offset_6W", "blocks.0.mlp.0.bias"} < groups[0.0]
    assert all(group["lr"] == 1e-3 and group["betas"] == (0.9, 0.95) for group in adamw.param_groups)
    assert len(rest) == muon
    for optimizer in rest:
        group, = optimizer.param_groups
        assert {names[p] for p in group["params"]} == inside
        assert (group["lr"], group["weight_decay"], optimizer.dtype) == (1e-3, 0.05, torch.float32)
    optimizers = adamw_and_muon(model, layers, 1e-3, 0.05, muon, torch.bfloat16)
    assert all(muon.dtype == torch.bfloat16 for muon in optimizers[1:])


@pytest.mark.parametrize("shape", [(6, 6), (6, 20), (20, 6)], ids=str)
def test_orthogonal_keeps_the_directions_and_levels_the_singular_values(shape):
    """U S V^T becomes U S' V^T with every S' near 1, however unlike the S were."""
    left, right = (np.linalg.qr(np.random.default_rng(n).normal(size=(n, 6)))[0] for n in shape)
    matrix = left @ np.diag([100, 50, 20, 5, 2, 1]) @ right.T
    result = orthogonal(torch.tensor(matrix)[None], torch.float64)[0].numpy()
    values = left.T @ result @ right
    assert np.abs(values - np.diag(np.diag(values))).max() < 1e-9
    assert np.diag(values).min() > 0.68 and np.diag(values).max() < 1.21
    np.testing.assert_allclose(left @ values @ right.T, result, atol=1e-9)   # and no other direction


def test_each_matrix_of_a_stack_is_taken_for_itself():
    matrix = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    stack = torch.stack([matrix, 1000 * matrix, 0 * matrix])
    first, second, third = orthogonal(stack, torch.float32)
    torch.testing.assert_close(first, second)
    assert first.any() and not third.any()


def test_muon_takes_the_steps_of_torch():
    """Which stacks nothing, and computes in bf16 on every device."""
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    optimizers = [Muon(ours, 0.1, 0.05, torch.float32),
                  torch.optim.Muon(theirs, 0.1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (b - before).norm()


def test_muon_takes_a_convolution_for_the_matrix_that_multiplies_a_patch():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3, generator=generator))
    matrix = torch.nn.Parameter(weight.detach().reshape(4, 27).clone())
    weight.grad = torch.randn(4, 3, 3, 3, generator=generator)
    matrix.grad = weight.grad.reshape(4, 27).clone()
    length = 0.1 * 0.2 * 27**0.5   # of the first step, which is along the gradient
    expected = 0.995 * matrix.detach() - length * orthogonal(matrix.grad[None], torch.float32)[0]
    for parameter in (weight, matrix):
        Muon([parameter], 0.1, 0.05, torch.float32).step()
    torch.testing.assert_close(matrix.detach(), expected)   # to the precision of fp32
    torch.testing.assert_close(weight.detach().reshape(4, 27), matrix.detach())


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_muon_in_fp16_takes_the_steps_of_fp32_however_large_gradients_are(size):
    generator = torch.Generator().manual_seed(0)
    gradient = size * torch.randn(24, 8, generator=generator)
    steps = []
    for dtype in (torch.float16, torch.float32):
        matrix = torch.nn.Parameter(torch.zeros(24, 8))
        matrix.grad = gradient.clone()
        Muon([matrix], 0.1, 0.05, dtype).step()
        steps.append(matrix.detach())
    assert (steps[0] - steps[1]).norm() < 0.01 * steps[1].norm()
