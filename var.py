"""Tokens to tokens: VAR's transformer, which predicts an image scale by scale (arXiv 2404.02905).

A language model predicts the next token from all tokens before it. VAR predicts the next scale:
all s x s tokens of it at once, from all coarser scales (Sec. 3.2).

    reads       the class    f_hat at 2x2    f_hat at 3x3    ...    f_hat at SxS
                    |              |               |                      |
                the transformer: a token sees its own scale and the coarser ones
                    |              |               |                      |
    predicts    the 1x1 map  the 2x2 map     the 3x3 map     ...    the SxS map

f_hat is the tokenizer's running latent: the sum of all maps up to then (tokenizer.py says why it
is f_hat that is read). So each place of a map reads what the image there is so far, and predicts
the token that corrects it; and the tokens of a scale are drawn independently, given the coarser.

`VAR.forward` teaches all scales at once: the maps of a real image are known, and so is what should
be read (teacher forcing). What a token may see is the block-causal mask, a table of key ranges in
kernels.py. `VAR.generate` makes one scale after the other, reading what it drew. Read `forward`
first, then `Block` and `Attention`, then `generate`.

Axes: B batch, L tokens of all scales (coarse to fine), l tokens of one scale, H heads, D width of
a head, W = H * D model width, C code channels, V codebook size, K number of scales, k one of them;
S side of the latent, in `Attention` number of keys; X = 3 W.
"""
from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import KeyRanges, adaln, block_attention, sample_tokens, split_heads
from support.devices import fp32_products
from support.published import transformer_of

if TYPE_CHECKING:
    from tokenizer import Tokenizer


@dataclass(frozen=True)
class VARConfig:
    """The transformer's shape, what it sees, and what its training drops."""
    scales: tuple[int, ...]     # sides of the token maps, as in the tokenizer
    vocabulary: int             # V, as in the tokenizer
    code_channels: int          # C, as in the tokenizer
    classes: int                # the null class, for guidance, is one more
    depth: int                  # layers
    width: int                  # W
    heads: int                  # H
    shared_adaln: bool          # one linear layer modulates all layers, plus offsets; or one each
    normalise_qk: bool          # unit queries and keys with a learned scale, or 0.25 / sqrt(D)
    label_dropout: float        # share of training labels that become the null class
    drop_path: float            # stochastic depth: the last layer's rate; the first layer's is 0
    last_scales: int | None     # scales that a token sees, its own among them; None: all so far

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")

    @property
    def length(self) -> int:
        return sum(s * s for s in self.scales)

    @property
    def spans(self) -> list[slice]:
        """Return where the tokens of each scale are among all L."""
        ends = list(accumulate((s * s for s in self.scales), initial=0))
        return [slice(begin, end) for begin, end in pairwise(ends)]


# -------------------------------------------------------------------------------------------------
# A layer of the transformer


class Attention(nn.Module):
    """Every token looks at those in its range: its own scale and, as a rule, all coarser ones."""

    def __init__(self, config: VARConfig):
        super().__init__()
        W = config.width
        self.heads = config.heads
        self.normalise_qk = config.normalise_qk
        self.qkv = nn.Linear(W, 3 * W, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(W))   # as published, keys have none
        self.v_bias = nn.Parameter(torch.zeros(W))
        self.out = nn.Linear(W, W)
        if config.normalise_qk:
            log_scale_H11 = torch.full((config.heads, 1, 1), math.log(4))
            self.log_scale_H11 = nn.Parameter(log_scale_H11)

    def project(self, x_BLW: Tensor, cache: LayerCache | None = None
                ) -> tuple[Tensor, Tensor, Tensor, float]:
        """Return queries [B, H, L, D], keys and values [B, H, S, D], the scale of their products.

        S is the number of keys: with a cache all so far, else L.
        """
        product_BLX = self.qkv(x_BLW)                                    # [B, L, 3 W]
        if self.normalise_qk:   # each head learns how sharply it attends
            scale = 1.0
            log_scale_H = self.log_scale_H11.flatten()
        else:
            scale = 0.25 / math.sqrt(x_BLW.shape[2] // self.heads)
            log_scale_H = None
        kv_slots = None if cache is None else cache.slots(product_BLX, self.heads)
        q_BHLD, k_BHSD, v_BHSD = split_heads(
            product_BLX, self.q_bias, self.v_bias, log_scale_H, self.heads, kv_slots)
        if cache is not None:
            k_BHSD, v_BHSD = cache.so_far()
        return q_BHLD, k_BHSD, v_BHSD, scale

    def forward(self, x_BLW: Tensor, ranges: KeyRanges, cache: LayerCache | None) -> Tensor:
        q_BHLD, k_BHSD, v_BHSD, scale = self.project(x_BLW, cache)
        o_BHLD = block_attention(q_BHLD, k_BHSD, v_BHSD, ranges, scale)  # [B, H, L, D]
        return self.out(o_BHLD.transpose(1, 2).flatten(2))               # [B, L, W]


# The residual stream x [B, L, W] between two layers, and what is still to be added to it: the last
# branch h [B, L, W], times its gate [B, W]. The next AdaLN adds it, in the same pass over memory.
Stream = tuple[Tensor, Tensor, Tensor]


class Block(nn.Module):
    """It is attention, then a two-layer perceptron, each after an AdaLN and scaled by a gate.

    AdaLN, adaptive layer norm, is how the class enters (as in DiT, arXiv 2212.09748).
    Instead of being one more token to look at, it sets in every layer the scale and shift that
    follow a norm and the gate, per channel, of what a branch adds: six vectors, the modulation.
    """

    def __init__(self, config: VARConfig, drop_path: float):
        super().__init__()
        W = config.width
        self.drops = config.drop_path > 0
        # A tensor: torch.compile makes one program for all layers then, and not one for each rate.
        self.register_buffer("survival", torch.tensor(1 - drop_path), persistent=False)
        self.attention = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(W, 4 * W),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * W, W),
        )
        if config.shared_adaln:
            self.modulation_offset_6W = nn.Parameter(torch.zeros(6, W))
        else:
            self.modulation = nn.Linear(W, 6 * W)

    def forward(self, stream: Stream, modulation_B6W: Tensor, ranges: KeyRanges,
                cache: LayerCache | None) -> Stream:
        gate1_BW, gate2_BW, scale1_BW, scale2_BW, shift1_BW, shift2_BW = modulation_B6W.unbind(1)
        x_BLW, y_BLW = adaln(*stream, scale1_BW, shift1_BW)                # [B, L, W] each
        h_BLW = self.attention(y_BLW, ranges, cache)                       # [B, L, W]
        gate1_BW = self.skip(gate1_BW)                                     # [B, W]
        x_BLW, y_BLW = adaln(x_BLW, h_BLW, gate1_BW, scale2_BW, shift2_BW)
        h_BLW = self.mlp(y_BLW)                                            # [B, L, W], 4 W between
        return x_BLW, h_BLW, self.skip(gate2_BW)

    def skip(self, gate_BW: Tensor) -> Tensor:
        """Return the gate with stochastic depth, in training.

        Each image skips the branch with probability drop_path, so that no layer can count on all
        others. Where it is not skipped it counts for more, so that on average nothing changes.
        """
        if not self.training or not self.drops:
            return gate_BW
        survives_B1 = self.survival.expand(len(gate_BW), 1).bernoulli()
        return gate_BW * survives_B1 / self.survival


class LayerCache:
    """It keeps one layer's keys and values in one generation, for all later scales to see.

    Room for all L tokens is taken at the first scale.
    """

    def __init__(self, length: int):
        self.length = length
        self.filled = 0

    def slots(self, product_BlX: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Return where the keys and values of the next scale, made of this product, go."""
        B, l, X = product_BlX.shape
        if self.filled == 0:
            shape = B, heads, self.length, X // 3 // heads
            self.k_BHLD = product_BlX.new_empty(shape)
            self.v_BHLD = product_BlX.new_empty(shape)
        begin = self.filled
        self.filled += l
        return self.k_BHLD[:, :, begin:self.filled], self.v_BHLD[:, :, begin:self.filled]

    def so_far(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, filled, D] of all scales up to the one just written."""
        return self.k_BHLD[:, :, :self.filled], self.v_BHLD[:, :, :self.filled]


# -------------------------------------------------------------------------------------------------
# The transformer


class VAR(nn.Module):
    """It reads the class and what is decided so far, and returns logits of every token."""

    def __init__(self, config: VARConfig):
        super().__init__()
        W = config.width
        K = len(config.scales)
        self.config = config
        self.class_embedding = nn.Embedding(config.classes + 1, W)   # the last row: the null class
        self.code_embedding = nn.Linear(config.code_channels, W)
        self.start_position_11W = nn.Parameter(torch.empty(1, 1, W))
        self.position_1LW = nn.Parameter(torch.empty(1, config.length, W))
        self.level_embedding = nn.Embedding(K, W)
        if config.shared_adaln:
            self.shared_modulation = nn.Linear(W, 6 * W)
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.head_modulation = nn.Linear(W, 2 * W)
        self.head = nn.Linear(W, config.vocabulary)
        self.ranges = KeyRanges.from_scales(config.scales, config.last_scales)
        sizes_K = torch.tensor([s * s for s in config.scales])
        level_L = torch.repeat_interleave(sizes_K)
        self.register_buffer("level_L", level_L, persistent=False)   # the scale of each token
        self.ranges.prepare(level_L.device)
        self.initialise()

    def forward(self, labels_B: Tensor, inputs: Tensor) -> Tensor:
        """Return logits [B, L, V] of every token given the class and coarser scales (paper: eq. 6).

        labels_B: int64 [B], the null class being `config.classes`.
        inputs: [B, L-1, C] from `tokenizer.teacher_inputs`.
        """
        labels_B = self.drop_labels(labels_B)                               # [B]
        class_BW = self.class_embedding(labels_B)                           # [B, W]
        modulations, head_B2W = self.modulations(class_BW)                  # depth x [B, 6, W]
        read = self.code_embedding(inputs)                                  # [B, L-1, W]
        x_BLW = torch.cat([self.start(class_BW), read], dim=1)              # [B, L, W]
        stream = self.through_layers(x_BLW, self.positions(), modulations, self.ranges, None)
        return self.logits(stream, head_B2W)                                # [B, L, V]

    def drop_labels(self, labels_B: Tensor) -> Tensor:
        """Replace some labels by the null class in training: guidance needs its logits."""
        if not self.training:
            return labels_B
        chance_B = torch.rand(labels_B.shape, device=labels_B.device)
        dropped_B = chance_B < self.config.label_dropout
        return labels_B.masked_fill(dropped_B, self.config.classes)

    def start(self, class_BW: Tensor) -> Tensor:
        """Return what the first scale, a single token, reads: [B, 1, W]."""
        return class_BW[:, None] + self.start_position_11W

    def positions(self) -> Tensor:
        """Return where each token is, in its map and among the scales: [1, L, W]."""
        return self.position_1LW + self.level_embedding(self.level_L)

    def modulations(self, class_BW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the modulation of each layer [B, 6, W] and of the head [B, 2, W]: linear functions
        of SiLU(class), one for each layer, or one for all plus an offset for each layer."""
        W = self.config.width
        c_BW = F.silu(class_BW)
        head_B2W = self.head_modulation(c_BW).unflatten(1, (2, W))
        if self.config.shared_adaln:
            shared_B6W = self.shared_modulation(c_BW).unflatten(1, (6, W))
            layers = [shared_B6W + block.modulation_offset_6W for block in self.blocks]
        else:
            layers = [block.modulation(c_BW).unflatten(1, (6, W)) for block in self.blocks]
        return layers, head_B2W

    def through_layers(self, x_BLW: Tensor, positions_1LW: Tensor, modulations: list[Tensor],
                       ranges: KeyRanges, caches: list[LayerCache] | None) -> Stream:
        """Pass what is read through all layers. caches: one for each, or none."""
        # The residual stream starts with the positions. What is read is the first branch, added by
        # the first AdaLN with a gate of 1.
        gate_BW = torch.ones_like(x_BLW[:, 0])
        stream = positions_1LW.expand_as(x_BLW), x_BLW, gate_BW
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            stream = block(stream, modulations[i], ranges, cache)
        return stream

    def logits(self, stream: Stream, head_B2W: Tensor) -> Tensor:
        """Make logits [B, L, V] of what comes out of the last layer.

        Except in training they are in fp32 (TF32 where autocast is on and the GPU has it): guidance
        multiplies the difference of two logits, and of a number from 4 to 16 bf16 keeps only four
        or five binary places after the point.
        """
        scale_BW, shift_BW = head_B2W.unbind(1)
        with nullcontext() if self.training else fp32_products(scale_BW.device.type):
            _, y_BLW = adaln(*stream, scale_BW, shift_BW)
            return self.head(y_BLW)

    @torch.no_grad()
    def generate(
        self,
        tokenizer: Tokenizer,
        labels_B: Tensor,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float | tuple[float, float] = 0.96,
        generator: torch.Generator | None = None,
        known: Any = None,
        growth: float = 1.0,
        smooth: float = 0.0,
        latents: list[Tensor] | None = None,
    ) -> Tensor:
        """Return tokens [B, L] of new images, drawn one scale per pass (paper: eq. 6).

        cfg: strength of classifier-free guidance at the last scale, see `draw`; 0 is none.
            The defaults are the authors' for FID; those of sample.py are for clean shapes.
        top_k, top_p: how many tokens, and how much probability, to draw from: see `sample_tokens`.
            Two numbers for top_p are those of the first and of the last scale, see `draw`.
        generator: on the device of the labels; the same state gives the same tokens.
        known: what is known of the images that are only to be completed: any object with the `put`
            of `sample.Known`, which puts their own tokens in place of those drawn.
        growth: how late guidance grows and top_p falls, see `draw`; 1 is evenly, as published.
        smooth: how much of a code makes way for the mean at the last scale, see `smoothed`; 0 is
            nothing, as published; with `known` it has to be 0.
        latents: a list to which f_hat [B, C, S, S] after each scale is appended; smooth images are
            decoded from the last.
        """
        assert known is None or not smooth, "what is known is codes"
        quantizer = tokenizer.quantizer
        f_hat_BCSS = quantizer.initial(len(labels_B))                           # [B, C, S, S]
        if cfg:   # each image is computed twice, for its class and for the null class
            null_B = torch.full_like(labels_B, self.config.classes)
            labels_B = torch.cat([labels_B, null_B])                            # [2 B]
        class_BW = self.class_embedding(labels_B)                               # [B or 2 B, W]
        modulations, head_B2W = self.modulations(class_BW)                      # as in `forward`
        caches = self.new_caches()
        positions_1LW = self.positions()                                        # [1, L, W]
        x_BlW = self.start(class_BW)                                            # [B or 2 B, 1, W]
        tokens = []
        for k, span in enumerate(self.config.spans):
            ranges = self.ranges.rows(span.start, span.stop)
            stream = self.through_layers(
                x_BlW, positions_1LW[:, span], modulations, ranges, caches)
            logits_BlV = self.logits(stream, head_B2W)                          # [B or 2 B, l, V]
            tokens_Bl = self.draw(
                logits_BlV, k, cfg, top_k, top_p, generator, growth)            # [B, l]
            if known is not None:
                tokens_Bl = known.put(tokens_Bl, quantizer, f_hat_BCSS, k)      # [B, l]
            tokens.append(tokens_Bl)
            if smooth:
                fineness = self.fineness(k, growth)
                h_BlC = self.smoothed(tokens_Bl, logits_BlV, cfg * fineness, smooth * fineness,
                                      quantizer.codebook_VC)                    # [B, l, C]
                f_hat_BCSS = quantizer.add(f_hat_BCSS, h_BlC, k)                # [B, C, S, S]
            else:
                f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)     # [B, C, S, S]
            if latents is not None:
                latents.append(f_hat_BCSS)
            if k + 1 < len(self.config.scales):
                read_BlC = quantizer.read(f_hat_BCSS, k + 1)                    # [B, next l, C]
                x_BlW = self.code_embedding(read_BlC)                           # [B, next l, W]
                if cfg:
                    x_BlW = x_BlW.repeat(2, 1, 1)                               # [2 B, next l, W]
        return torch.cat(tokens, dim=1)                                         # [B, L]

    def draw(
        self,
        logits_BlV: Tensor,
        k: int,
        cfg: float,
        top_k: int,
        top_p: float | tuple[float, float],
        generator: torch.Generator | None,
        growth: float = 1.0,
    ) -> Tensor:
        """Draw tokens [B, l] of scale k. With guidance there are 2 B logits: class, null class.

        Classifier-free guidance (arXiv 2207.12598) moves logits away from those without a class,
        beyond those with it:

            logits = (1 + t) cond - t uncond,    t = cfg (k / (K - 1))^growth

        t starts at 0: the coarse scales choose among all images of the class, and pressed to be
        typical they would always choose alike. It grows because the finer ones have less and less
        to choose, and what is not typical there is mostly a mistake. For the same reason top_p may
        fall from one number to another. A growth of 1, as published, changes both evenly; more
        leaves the coarse scales more to themselves.
        """
        fineness = self.fineness(k, growth)
        guidance = cfg * fineness
        first, last = top_p if isinstance(top_p, tuple) else (top_p, top_p)
        cond_BlV = logits_BlV
        uncond_BlV = None
        if cfg:
            cond_BlV, uncond_BlV = logits_BlV.chunk(2)
        noise_BlV = torch.empty_like(cond_BlV, dtype=torch.float32)
        noise_BlV.exponential_(generator=generator)
        noise_BlV.clamp_(min=2**-25)   # Apple's GPU draws zeros
        own_top_p = first + (last - first) * fineness
        return sample_tokens(cond_BlV, uncond_BlV, guidance, top_k, own_top_p, noise_BlV)

    @staticmethod
    def smoothed(tokens_Bl: Tensor, logits_BlV: Tensor, guidance: float, share: float,
                 codebook_VC: Tensor) -> Tensor:
        """Return vectors [B, l, C] to be added in place of the codes of a scale's tokens.

        The tokens of a scale are drawn independently. Where an edge may run here or one place on,
        each place throws its own dice, and the edge is ragged. The mean of all codes, by their
        guided probability, takes no dice: places that expect the like get the like. But it is
        shorter than codes are, the more so the less they agree, and would blur; so it is stretched
        to their length (root mean square):

            h = (1 - share) code + share mean |codes| / |mean|

        The coarse scales have to choose, so the share grows as guidance does. At 1 neither draw nor
        filters are seen. (For demonstrations the published code averages, too, by Gumbel softmax.)
        """
        if len(logits_BlV) > len(tokens_Bl):   # with guidance, as in `draw`
            cond_BlV, uncond_BlV = logits_BlV.chunk(2)
            logits_BlV = torch.lerp(uncond_BlV, cond_BlV, 1 + guidance)
        p_BlV = logits_BlV.softmax(dim=-1)
        with fp32_products(p_BlV.device.type):   # see `logits`
            means_BlC = p_BlV @ codebook_VC
            lengths_Bl1 = (p_BlV @ codebook_VC.square()).sum(dim=-1, keepdim=True).sqrt()
        means_BlC = F.normalize(means_BlC, dim=-1) * lengths_Bl1
        codes_BlC = F.embedding(tokens_Bl, codebook_VC)
        return torch.lerp(codes_BlC, means_BlC, share)

    def fineness(self, k: int, growth: float) -> float:
        """Return (k / (K - 1))^growth: 0 at the first scale, 1 at the last."""
        return (k / max(len(self.config.scales) - 1, 1)) ** growth

    def new_caches(self) -> list[LayerCache]:
        """Return one for each layer, for one generation; they go when it ends or is interrupted."""
        return [LayerCache(self.config.length) for _ in self.blocks]

    def _apply(self, *arguments, **more) -> VAR:
        """Take the tables of the mask along: `to` and its kin call this."""
        super()._apply(*arguments, **more)
        self.ranges.prepare(self.level_L.device)
        return self

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all weights at std sqrt(1 / 3W), and those that add to the residual stream smaller.

        This is the published program's default, and d30's.

        Gates start near zero, so every block starts near the identity (less near where layers share
        their AdaLN); the head starts near zero, so the first loss is ln V.
        """
        W = self.config.width
        std = math.sqrt(1 / (3 * W))
        branches = 2 * self.config.depth   # all of which add up in the residual stream
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_position_11W, std=std)
        nn.init.trunc_normal_(self.position_1LW, std=std)
        for block in self.blocks:
            block.attention.out.weight.div_(math.sqrt(branches))
            block.mlp[2].weight.div_(math.sqrt(branches))
            if self.config.shared_adaln:
                parts = nn.init.normal_(block.modulation_offset_6W, std=math.sqrt(1 / W))  # [6, W]
            else:
                parts = block.modulation.weight.view(6, W, W)
            parts[:2].mul_(1e-5)   # gates
            parts[2:].mul_(0.5)    # scales and shifts
        self.head_modulation.weight.mul_(0.5)
        self.head.weight.mul_(0.02)

    def cast_layers(self, dtype: torch.dtype) -> None:
        """Keep weights, for drawing, in the dtype to which autocast would cast them at every use.

        The tokens are the same, and less memory is read. There is no training after it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head:
                module.to(dtype)

    def compile_layers(self) -> None:
        """Compile for drawing: every scale has a graph of the first layer, whose residual stream
        is still the same for all images, and one of all others, whatever the depth."""
        # Two graphs a scale for a batch size, and four of these.
        torch._dynamo.config.recompile_limit = 8 * len(self.config.scales)
        for span in self.config.spans:   # tables of the mask are there before torch.compile looks
            self.ranges.rows(span.start, span.stop).prepare(self.level_L.device)
        for block in self.blocks:
            block.compile(dynamic=False)

    @classmethod
    def from_official(cls, state_dict: dict) -> VAR:
        """Make a published transformer of what its file holds: see support/published.py.

        Raises ValueError for a file of anything else.
        """
        values, state = transformer_of(state_dict)
        model = cls(VARConfig(**values))
        model.load_state_dict(state)
        return model.eval()
