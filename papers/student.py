"""A VAR that reads noise, and learns to draw several scales in one pass: for one_pass.py.

    x = embed(f_hat when the pass began, at s_k)  +  embed'(noise of the place)

embed' starts at zero: with a pass for every scale it begins as the VAR that it is tuned from. Each
place's token follows from its noise, in one of two ways, both of which draw from softmax(logits):

gumbel  argmax(logits + noise), with noise of V channels; this is how `VAR.draw` draws
flow    noise of C channels flows to a code. To codes e_j of chances p_j flow matching needs no
        training: at time t, between noise and code, x is on its way to e_j with the chance w_j,

            w_j ~ p_j exp(-|x - t e_j|^2 / 2 (1 - t)^2)       dx/dt = (sum_j w_j e_j - x) / (1 - t)
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from papers import Trained
from papers.tuning import Tuning
from tokenizer import Quantizer
from var import VAR

FLOW_STEPS = 16


def read_by_pass(quantizer: Quantizer, tokens_BL: Tensor, starts: Sequence[int]) -> Tensor:
    """What is read of an image's tokens, where passes start at these scales: [B, L, C]."""
    f_hat_BCSS = quantizer.initial(len(tokens_BL))
    inputs = []
    for k, tokens_Bl in enumerate(quantizer.split(tokens_BL)):
        if k in starts:
            begun_BCSS = f_hat_BCSS
        inputs.append(quantizer.read(begun_BCSS, k))
        f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
    return torch.cat(inputs, dim=1)


class Student(VAR):
    """A VAR, with its weights, that reads noise and draws by it.

    kind: "flow", "gumbel", or "unread": it draws by Gumbel noise, but does not read it.
    starts: the scales at which passes begin; all of them, until it is changed.
    """

    def __init__(self, plain: VAR, codebook_VC: Tensor, kind: str):
        super().__init__(plain.config)
        self.load_state_dict(plain.state_dict())
        self.kind = kind
        self.starts = range(len(plain.config.scales))
        std_C, mean_C = torch.std_mean(codebook_VC.detach(), dim=0)
        self.register_buffer("codes_VC", (codebook_VC.detach() - mean_C) / std_C)   # as noise is
        X = codebook_VC.shape[kind == "flow"]   # C, or V
        self.noise_embedding = nn.Linear(X, plain.config.width, bias=False)
        nn.init.zeros_(self.noise_embedding.weight)
        self.to(plain.level_L.device)

    def noise(self, count: int) -> Tensor:
        """Of so many images: [B, L, X]."""
        X = self.noise_embedding.in_features
        noise_BLX = self.codes_VC.new_empty(count, self.config.length, X)
        return noise_BLX.normal_() if self.kind == "flow" else -noise_BLX.exponential_().log()

    @torch.no_grad()
    def by_noise(self, logits_BlV: Tensor, noise_BlX: Tensor) -> Tensor:
        """The tokens [B, l] to which the noise leads."""
        if self.kind != "flow":
            return (logits_BlV + noise_BlX).argmax(dim=2)
        x_BlC = noise_BlX
        half_V = self.codes_VC.square().sum(dim=1) / 2
        for i in range(FLOW_STEPS):
            t = i / FLOW_STEPS
            likeness_BlV = t * x_BlC @ self.codes_VC.T - t * t * half_V
            towards_BlV = logits_BlV + likeness_BlV / (1 - t)**2
            code_BlC = towards_BlV.softmax(dim=2) @ self.codes_VC
            x_BlC = x_BlC + (code_BlC - x_BlC) / (FLOW_STEPS - i)
        return towards_BlV.argmax(dim=2)

    def read(self, class_BW: Tensor, read_BlC: Tensor, noise_BlX: Tensor, first: bool) -> Tensor:
        """What the first layer is given [B, l, W]. first: the first scale is among these."""
        x_BlW = self.code_embedding(read_BlC)
        if first:
            x_BlW = torch.cat([self.start(class_BW), x_BlW[:, 1:]], dim=1)
        return x_BlW if self.kind == "unread" else x_BlW + self.noise_embedding(noise_BlX)

    def forward(self, labels_B: Tensor, read_BLC: Tensor, noise_BLX: Tensor) -> Tensor:
        """Logits [B, L, V]. read_BLC: of `read_by_pass`."""
        class_BW = self.class_embedding(labels_B)
        modulations, head_B2W = self.modulations(class_BW)
        x_BLW = self.read(class_BW, read_BLC, noise_BLX, True)
        stream = self.through_layers(x_BLW, self.positions(), modulations, self.ranges, None)
        return self.logits(stream, head_B2W)

    @torch.no_grad()
    def drawn(self, quantizer: Quantizer, labels_B: Tensor, noise_BLX: Tensor
              ) -> tuple[Tensor, Tensor]:
        """Tokens [B, L], drawn in a pass for each of the starts, and the logits they are from."""
        spans = self.config.spans
        class_BW = self.class_embedding(labels_B)
        modulations, head_B2W = self.modulations(class_BW)
        caches = self.new_caches()
        f_hat_BCSS = quantizer.initial(len(labels_B))
        tokens_BL, logits = torch.zeros_like(noise_BLX[..., 0], dtype=torch.long), []
        for begin, end in pairwise([*self.starts, len(spans)]):
            span = slice(spans[begin].start, spans[end - 1].stop)
            noise_BlX = noise_BLX[:, span]
            read_BlC = torch.cat([quantizer.read(f_hat_BCSS, k) for k in range(begin, end)], dim=1)
            x_BlW = self.read(class_BW, read_BlC, noise_BlX, not begin)
            ranges = self.ranges.rows(span.start, span.stop)
            logits.append(self.logits(self.through_layers(
                x_BlW, self.positions()[:, span], modulations, ranges, caches), head_B2W))
            tokens_BL[:, span] = self.by_noise(logits[-1], noise_BlX)
            for k in range(begin, end):
                f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_BL[:, spans[k]], k)
        return tokens_BL, torch.cat(logits, dim=1)


class Distilling(Tuning):
    """Tunes a copy of the run's model on what that draws by its noise."""

    def __init__(self, run: Trained, kind: str, steps: int, lr: float):
        self.teacher = Student(run.model, run.tokenizer.quantizer.codebook_VC, kind).eval()
        super().__init__(run, copy.deepcopy(self.teacher), f"one_pass-{kind}", steps, lr)

    def loss(self, model: nn.Module, _, labels_B: Tensor):
        labels_B = labels_B.to(self.settings.machine.device)
        noise_BLX = self.teacher.noise(len(labels_B))
        own_BL, own_BLV = self.teacher.drawn(self.tokenizer.quantizer, labels_B, noise_BLX)
        K = len(self.teacher.starts)
        second = max(0, int(torch.randint(1 - K, K, ())))   # in K of 2 K - 1 steps there is none
        read_BLC = read_by_pass(self.tokenizer.quantizer, own_BL, [0, second])
        lost_K = self.per_scale(lost(own_BLV, model(labels_B, read_BLC, noise_BLX)))
        return lost_K.mean(), lambda: {"loss_per_scale": lost_K.detach()}

    def example(self) -> tuple[Tensor, ...]:
        x_1L = torch.zeros_like(self.ema.level_L)[None]
        return x_1L[:, 0], read_by_pass(self.tokenizer.quantizer, x_1L, [0]), self.ema.noise(1)

    def validate(self) -> dict:
        return {}   # nothing is held out: the teacher never draws the same twice


def lost(own_BLV: Tensor, its_BLV: Tensor) -> Tensor:
    """KL(teacher's || student's) of the law of each token, in nats: [B, L]."""
    own_BLV, its_BLV = (x.float().log_softmax(dim=2) for x in (own_BLV, its_BLV))
    return (own_BLV.exp() * (own_BLV - its_BLV)).sum(dim=2)
