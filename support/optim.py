"""The optimizers of both models, AdamW and Muon; the learning-rate schedule, and the EMA.

`adamw_and_muon` makes the optimizers; train.py steps them.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)   # Keller Jordan's a, b, c: see `orthogonal`


def adamw_and_muon(
    model: nn.Module,
    layers: nn.Module,
    lr: float,
    weight_decay: float,
    muon: bool,
    dtype: torch.dtype,
) -> list[Optimizer]:
    """AdamW takes all parameters; or, with Muon, all but the weights inside the layers.

    Biases, embeddings and scales have no weight decay. layers: whose weights are Muon's.
    """
    decayed = multiplying_weights(model)
    for_muon = multiplying_weights(layers) if muon else []
    matrices = [p for p in decayed if p not in set(for_muon)]
    others = [p for p in model.parameters() if p not in set(decayed)]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    adamw = AdamW(groups, lr, betas=(0.9, 0.95), fused=True)
    return [adamw, Muon(for_muon, lr, weight_decay, dtype)] if muon else [adamw]


def multiplying_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights of its linear layers and its convolutions."""
    kinds = (nn.Linear, nn.Conv2d)
    return [module.weight for module in model.modules() if isinstance(module, kinds)]


class Muon(Optimizer):
    """Steps along the orthogonal matrix that is nearest to the momentum (Jordan et al., 2024).

    A convolution [out, in, 3, 3] counts as the matrix [out, in * 9] that multiplies a patch.

    Momentum U S V^T has a few large singular values in S: a step along it moves far in a few
    directions and hardly in all others. U V^T moves as far in each. Times 0.2 sqrt(max(rows,
    columns)) its entries have a root mean square of 0.2, about that of AdamW's steps, whose
    learning rate and weight decay then fit (arXiv 2502.16982, Sec. 2.2).

    dtype: what to orthogonalise in: that of the model's products. (Emulated bf16 takes many times
    as long as fp32.)
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
    ):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = {}   # by shape
            for matrix in group["params"]:
                alike.setdefault(matrix.shape, []).append(matrix)
            for matrices in alike.values():
                # Matrices of one shape are one stack: a few large products, not many small ones.
                momenta = torch.stack([self.momentum(matrix) for matrix in matrices])
                momenta_NRC = momenta.flatten(2)
                steps = orthogonal(momenta_NRC, self.dtype).view_as(momenta)
                length = 0.2 * math.sqrt(max(momenta_NRC.shape[1:]))
                for matrix, step in zip(matrices, steps):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"])
                    matrix.add_(step, alpha=-group["lr"] * length)

    def momentum(self, matrix: nn.Parameter) -> Tensor:
        """The EMA of the gradient, the newest counted once more (Nesterov's)."""
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(matrix.grad, 1 - MUON_MOMENTUM)
        return matrix.grad.lerp(state["momentum"], MUON_MOMENTUM)


def orthogonal(x_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of each matrix U S V^T, in matrix products alone (Newton-Schulz iteration).

        (a I + b X X^T + c (X X^T)^2) X  =  U (a S + b S^3 + c S^5) V^T

    changes nothing but the singular values. Five times over, it takes any of them between 0.004 and
    1 to between 0.68 and 1.21; polynomials that converge to 1 take small values many more rounds.
    """
    a, b, c = NEWTON_SCHULZ
    wide = x_NRC.shape[1] <= x_NRC.shape[2]   # X X^T is the smaller product then
    x_Nrc = x_NRC if wide else x_NRC.mT
    norm_N11 = x_Nrc.norm(dim=(1, 2), keepdim=True)
    # No singular value is above 1 then, and no number too large or small for fp16:
    x_Nrc = (x_Nrc / norm_N11.clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram_Nrr = x_Nrc @ x_Nrc.mT
        factor_Nrr = torch.baddbmm(gram_Nrr, gram_Nrr, gram_Nrr, beta=b, alpha=c)
        x_Nrc = torch.baddbmm(x_Nrc, factor_Nrr, x_Nrc, beta=a)
    return x_Nrc if wide else x_Nrc.mT


def learning_rate(step: int, steps: int, warmup: int, final: float) -> float:
    """Linear warm-up, then linearly down to the final share; as a share of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    return final + (1 - final) * (1 - progress)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay ema + (1 - decay) model, of the weights; buffers are copied."""
    # One launch on a GPU for all:
    torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - decay)
    for copied, value in zip(ema.buffers(), model.buffers(), strict=True):
        copied.copy_(value)
