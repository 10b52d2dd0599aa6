"""Tokens to tokens: the transformer of VAR, which predicts an image one scale at a time (arXiv 2404.02905, Sec. 3).

Read `VAR` first: `forward` teaches all scales at once, behind the block-causal mask; `generate` makes one scale
after the other from a cache of keys and values. Both feed it the same inputs: scale 1 reads the class, scale k+1
reads what the tokenizer's running latent looks like after scale k, at the size of scale k+1.

Axes: B batch, L tokens of all scales (coarse to fine), l tokens of one scale, H heads, D head width, W = H * D model
width, C code channels, V codebook size, K number of scales.
"""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import KeyRanges, adaln, block_attention, sample_tokens

if TYPE_CHECKING:
    from tokenizer import Quantizer, Tokenizer

LARGEST_QK_SCALE = 100.0   # of the learned attention scale, when queries and keys are normalised


@dataclass(frozen=True)
class VARConfig:
    """Everything that fixes the transformer's shape, and the two regularisers that belong to its layers."""
    scales: tuple[int, ...]       # sides of the token maps, as in the tokenizer
    vocabulary: int               # V, as in the tokenizer
    code_channels: int            # C, as in the tokenizer
    classes: int                  # the null class, for guidance, is one more
    depth: int                    # layers
    width: int                    # W
    heads: int                    # H
    shared_adaln: bool            # one modulation for all layers, plus an offset per layer, instead of one per layer
    normalise_qk: bool            # unit queries and keys with a learned scale, against 0.25 / sqrt(D)
    label_dropout: float          # share of training labels replaced by the null class
    drop_path: float              # stochastic depth: the last layer's rate; the first layer's is 0
    last_scales: int | None       # how many scales a token sees, its own among them; None: all so far, as published

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")

    @property
    def length(self) -> int:
        return sum(s * s for s in self.scales)


@dataclass
class Kept:
    """What a generation keeps of an image: in-painting and its kin (paper: Sec. 5.3).

    latent_BCSS: the latent of the image, its holes filled plausibly.
    where_B1SS: the share of each place that is kept; elsewhere tokens are generated.
    scales: how many of the scales, from the coarsest, keep anything.
    own_tokens_BL: if given, the image's tokens, computed beforehand and pasted as they are: the open loop, as published.
    """
    latent_BCSS: Tensor
    where_B1SS: Tensor
    scales: int
    own_tokens_BL: Tensor | None = None

    def tokens(self, quantizer: Quantizer, f_hat_BCSS: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Tokens [B, l] for the kept part of scale k, and where to take them.

        The image's own tokens stand for what its own coarser scales left over. Here some of those were generated, so
        the loop is closed: a token stands for what the image has more than the latent that was generated so far.
        The tokens of a scale do not see each other, so only coarser ones can tell the generated part what surrounds it:
        on maps of up to a quarter of the finest side all cells are kept, on finer ones those of which any part is, and on
        the finest those of which half is, so that the hole ends where it was asked to.
        """
        share_Bl, s, S = quantizer.read(self.where_B1SS, k).squeeze(-1), quantizer.scales[k], quantizer.scales[-1]
        if 4 * s <= S:
            share_Bl = share_Bl.amax(dim=1, keepdim=True).expand_as(share_Bl)
        kept_Bl = share_Bl >= 0.5 if s == S else share_Bl > 0
        if self.own_tokens_BL is None:
            tokens_Bl = quantizer.nearest(quantizer.read(self.latent_BCSS - f_hat_BCSS, k))
        else:
            tokens_Bl = quantizer.split(self.own_tokens_BL)[k]
        return tokens_Bl, kept_Bl & (k < self.scales)


class LayerCache:
    """Keys and values of one layer for one generation; room for all L tokens is taken at the first scale."""

    def __init__(self, length: int):
        self.length, self.filled = length, 0

    def extend(self, k_BHlD: Tensor, v_BHlD: Tensor) -> tuple[Tensor, Tensor]:
        """Append one scale; returns the keys and values so far."""
        if not self.filled:
            B, H, _, D = k_BHlD.shape
            self.k_BHLD, self.v_BHLD = k_BHlD.new_empty(B, H, self.length, D), v_BHlD.new_empty(B, H, self.length, D)
        begin, self.filled = self.filled, self.filled + k_BHlD.shape[2]
        self.k_BHLD[:, :, begin:self.filled] = k_BHlD
        self.v_BHLD[:, :, begin:self.filled] = v_BHlD
        return self.k_BHLD[:, :, :self.filled], self.v_BHLD[:, :, :self.filled]


class Attention(nn.Module):
    def __init__(self, config: VARConfig):
        super().__init__()
        W, self.heads = config.width, config.heads
        self.normalise_qk = config.normalise_qk
        self.qkv = nn.Linear(W, 3 * W, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(W)), nn.Parameter(torch.zeros(W))   # keys have none
        self.out = nn.Linear(W, W)
        if config.normalise_qk:
            self.log_scale_H11 = nn.Parameter(torch.full((self.heads, 1, 1), math.log(4)))

    def project(self, x_BLW: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """Queries, keys and values [B, H, L, D], and the scale of their products."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv_BL3HD = F.linear(x_BLW, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        q_BHLD, k_BHLD, v_BHLD = qkv_BL3HD.permute(2, 0, 3, 1, 4)
        scale = 0.25 / math.sqrt(q_BHLD.shape[-1])
        if self.normalise_qk:
            scale = 1.0
            learned_H11 = self.log_scale_H11.clamp(max=math.log(LARGEST_QK_SCALE)).exp()
            q_BHLD = (F.normalize(q_BHLD.float(), dim=-1) * learned_H11).to(v_BHLD.dtype)
            k_BHLD = F.normalize(k_BHLD.float(), dim=-1).to(v_BHLD.dtype)
        return q_BHLD, k_BHLD, v_BHLD, scale

    def forward(self, x_BLW: Tensor, ranges: KeyRanges, cache: LayerCache | None) -> Tensor:
        q_BHLD, k_BHLD, v_BHLD, scale = self.project(x_BLW)
        if cache is not None:
            k_BHLD, v_BHLD = cache.extend(k_BHLD, v_BHLD)
        o_BHLD = block_attention(q_BHLD, k_BHLD, v_BHLD, ranges, scale)
        return self.out(o_BHLD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind an AdaLN and scaled by a gate (paper: Sec. 3.3)."""

    def __init__(self, config: VARConfig, drop_path: float):
        super().__init__()
        W, self.drop_path = config.width, drop_path
        self.attention = Attention(config)
        self.mlp = nn.Sequential(nn.Linear(W, 4 * W), nn.GELU(approximate="tanh"), nn.Linear(4 * W, W))
        if config.shared_adaln:
            self.modulation_offset_6W = nn.Parameter(torch.zeros(6, W))
        else:
            self.modulation = nn.Linear(W, 6 * W)

    def forward(self, x_BLW: Tensor, modulation_B6W: Tensor, ranges: KeyRanges, cache: LayerCache | None) -> Tensor:
        gate1_BW, gate2_BW, scale1_BW, scale2_BW, shift1_BW, shift2_BW = modulation_B6W.unbind(1)
        h_BLW = self.attention(adaln(x_BLW, scale1_BW, shift1_BW), ranges, cache)
        x_BLW = x_BLW + self.kept(gate1_BW)[:, None] * h_BLW
        h_BLW = self.mlp(adaln(x_BLW, scale2_BW, shift2_BW))
        return x_BLW + self.kept(gate2_BW)[:, None] * h_BLW

    def kept(self, gate_BW: Tensor) -> Tensor:
        """Stochastic depth: in training, an image's branch is dropped by closing its gate, the others are scaled up."""
        if not self.training or not self.drop_path:
            return gate_BW
        keep = 1 - self.drop_path
        return gate_BW * torch.bernoulli(torch.full_like(gate_BW[:, :1], keep)) / keep


class VAR(nn.Module):
    def __init__(self, config: VARConfig):
        super().__init__()
        self.config, W, K = config, config.width, len(config.scales)
        self.class_embedding = nn.Embedding(config.classes + 1, W)   # the last row is the null class
        self.code_embedding = nn.Linear(config.code_channels, W)
        self.start_position_11W = nn.Parameter(torch.empty(1, 1, W))
        self.position_1LW = nn.Parameter(torch.empty(1, config.length, W))
        self.level_embedding = nn.Embedding(K, W)
        self.shared_modulation = nn.Linear(W, 6 * W) if config.shared_adaln else None
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_modulation = nn.Linear(W, 2 * W)
        self.head = nn.Linear(W, config.vocabulary)

        level_L = torch.repeat_interleave(torch.arange(K), torch.tensor([s * s for s in config.scales]))
        self.register_buffer("level_L", level_L, persistent=False)
        self.ranges = KeyRanges.from_scales(config.scales, config.last_scales)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As published: everything at std sqrt(1 / 3W), then the places that add to the residual stream scaled down.

        Gates start near zero, so every block starts near the identity; the head starts near zero, so the first
        loss is ln V.
        """
        depth, W, std = len(self.blocks), self.config.width, math.sqrt(1 / (3 * self.config.width))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_position_11W, std=std)
        nn.init.trunc_normal_(self.position_1LW, std=std)
        for block in self.blocks:
            block.attention.out.weight.div_(math.sqrt(2 * depth))
            block.mlp[2].weight.div_(math.sqrt(2 * depth))
            if self.config.shared_adaln:
                modulation_6W = nn.init.normal_(block.modulation_offset_6W, std=math.sqrt(1 / W))
            else:
                modulation_6W = block.modulation.weight.view(6, W, W)
            modulation_6W[:2].mul_(1e-5)   # gates
            modulation_6W[2:].mul_(0.5)    # scales and shifts
        self.head_modulation.weight.mul_(0.5)
        self.head.weight.mul_(0.02)

    def forward(self, labels_B: Tensor, inputs: Tensor) -> Tensor:
        """Logits [B, L, V] of every token given the class and all coarser scales (paper: eq. 6).

        labels_B: int64 [B], the null class being `config.classes`; inputs: [B, L-1, C] from
        `tokenizer.teacher_inputs`.
        """
        if self.training:
            dropped_B = torch.rand(labels_B.shape, device=labels_B.device) < self.config.label_dropout
            labels_B = torch.where(dropped_B, self.config.classes, labels_B)
        class_BW = self.class_embedding(labels_B)
        x_BLW = torch.cat([self.start(class_BW), self.code_embedding(inputs)], dim=1) + self.places()
        return self.run(x_BLW, *self.modulations(class_BW), self.ranges, [None] * len(self.blocks))

    @torch.no_grad()
    def generate(self, tokenizer: Tokenizer, labels_B: Tensor, cfg: float = 1.5, top_k: int = 900, top_p: float = 0.96,
                 generator: torch.Generator | None = None, kept: Kept | None = None) -> Tensor:
        """Tokens [B, L] of new images, one scale per pass (paper: Fig. 4).

        cfg: strength of classifier-free guidance at the last scale, growing from 0 at the first; 0 is none.
        top_k, top_p: how many tokens, and how much probability, to draw from; see `sample_tokens`.
        generator: on the device of the labels; the same state gives the same tokens.
        kept: what to keep of an image, one for each label.
        """
        B, K, quantizer = len(labels_B), len(self.config.scales), tokenizer.quantizer
        null_B = torch.full_like(labels_B, self.config.classes)
        class_BW = self.class_embedding(torch.cat([labels_B, null_B]) if cfg else labels_B)
        modulations, head_modulation = self.modulations(class_BW)
        caches = [LayerCache(self.config.length) for _ in self.blocks]

        x_BlW, places_1LW = self.start(class_BW), self.places()
        f_hat_BCSS, tokens, begin = quantizer.empty(B), [], 0
        for k, s in enumerate(self.config.scales):
            end = begin + s * s
            logits_BlV = self.run(x_BlW + places_1LW[:, begin:end], modulations, head_modulation,
                                  self.ranges.rows(begin, end), caches)
            cond_BlV, uncond_BlV = logits_BlV.chunk(2) if cfg else (logits_BlV, None)
            noise_BlV = torch.empty(cond_BlV.shape, device=cond_BlV.device).exponential_(generator=generator)
            guidance = cfg * k / max(K - 1, 1)
            tokens.append(sample_tokens(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV))
            if kept is not None:
                kept_tokens_Bl, kept_Bl = kept.tokens(quantizer, f_hat_BCSS, k)
                tokens[-1] = torch.where(kept_Bl, kept_tokens_Bl, tokens[-1])
            if k + 1 < K:
                f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens[-1], k)
                x_BlW = self.code_embedding(quantizer.read(f_hat_BCSS, k + 1))
                x_BlW = x_BlW.repeat(2, 1, 1) if cfg else x_BlW
            begin = end
        return torch.cat(tokens, dim=1)

    def start(self, class_BW: Tensor) -> Tensor:
        """What the first scale, a single token, reads: [B, 1, W]."""
        return class_BW[:, None] + self.start_position_11W

    def places(self) -> Tensor:
        """Where each token is, in its map and in the pyramid: [1, L, W]."""
        return self.position_1LW + self.level_embedding(self.level_L)

    def modulations(self, class_BW: Tensor) -> tuple[list[Tensor], Tensor]:
        """What the class does to every layer [B, 6, W] and to the head [B, 2, W]: the same for all scales."""
        c_BW, W = F.silu(class_BW), self.config.width
        head_B2W = self.head_modulation(c_BW).unflatten(1, (2, W))
        if self.shared_modulation is None:
            return [block.modulation(c_BW).unflatten(1, (6, W)) for block in self.blocks], head_B2W
        shared_B6W = self.shared_modulation(c_BW).unflatten(1, (6, W))
        return [shared_B6W + block.modulation_offset_6W for block in self.blocks], head_B2W

    def run(self, x_BLW: Tensor, modulations: list[Tensor], head_modulation_B2W: Tensor, ranges: KeyRanges,
            caches: list[LayerCache] | list[None]) -> Tensor:
        """Embeddings to logits, through all layers."""
        for block, modulation_B6W, cache in zip(self.blocks, modulations, caches):
            x_BLW = block(x_BLW, modulation_B6W, ranges, cache)
        return self.head(adaln(x_BLW, *head_modulation_B2W.unbind(1)))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor]) -> VAR:
        """A published transformer, from its state dict as downloaded; its shape is read off the tensors.

        Raises ValueError for a state dict of anything else.
        """
        if "pos_1LC" not in state_dict:
            raise ValueError("not a published VAR transformer: it has no pos_1LC")
        skipped = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias")   # buffers that the config implies
        state = {rename(name): tensor for name, tensor in state_dict.items() if not name.endswith(skipped)}
        for name, tensor in state.items():
            if name.endswith(("log_scale_H11", "modulation_offset_6W")):
                state[name] = tensor.flatten(0, 1) if name.endswith("H11") else tensor.flatten(0, 2)
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        W, C = state["code_embedding.weight"].shape
        log_scale_H11 = state.get("blocks.0.attention.log_scale_H11")
        model = cls(VARConfig(
            scales=tuple(math.isqrt(n) for n in torch.bincount(state_dict["lvl_1L"].flatten()).tolist()),
            vocabulary=len(state["head.bias"]), code_channels=C, classes=len(state["class_embedding.weight"]) - 1,
            depth=depth, width=W, heads=W // 64 if log_scale_H11 is None else len(log_scale_H11),
            shared_adaln="shared_modulation.weight" in state, normalise_qk=log_scale_H11 is not None,
            label_dropout=0.1, drop_path=0.1 * depth / 24, last_scales=None))   # the last three: as published
        model.load_state_dict(state)
        return model.eval()


OFFICIAL_NAMES = [   # published name -> ours, applied in this order
    (r"^class_emb\.", "class_embedding."),
    (r"^word_embed\.", "code_embedding."),
    (r"^pos_start$", "start_position_11W"),
    (r"^pos_1LC$", "position_1LW"),
    (r"^lvl_embed\.", "level_embedding."),
    (r"^shared_ada_lin\.1\.", "shared_modulation."),
    (r"^head_nm\.ada_lin\.1\.", "head_modulation."),
    (r"\.ada_lin\.1\.", ".modulation."),
    (r"\.ada_gss$", ".modulation_offset_6W"),
    (r"\.attn\.mat_qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.scale_mul_1H11$", ".attention.log_scale_H11"),
    (r"\.attn\.", ".attention."),
    (r"\.ffn\.fc1\.", ".mlp.0."),
    (r"\.ffn\.fc2\.", ".mlp.2."),
]


def rename(name: str) -> str:
    for pattern, ours in OFFICIAL_NAMES:
        name = re.sub(pattern, ours, name)
    return name
