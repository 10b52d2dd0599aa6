"""The operations of VAR worth a hand-written kernel.

Read in this order: `KeyRanges`, the table every attention mask of this project is; then the operations, each with
its naive cost, its formula and its PyTorch form:

    block_attention    attention in which every query sees one range of keys     (var.py, every layer)
    nearest_code       index of the closest codebook row                         (tokenizer.py, every scale)
    adaln              layer norm, then a scale and a shift per image            (var.py, every layer)
    sample_tokens      guidance, top-k, top-p and the draw                       (var.py, generation)

Axes: B batch, H heads, L queries, S keys, D head width, W model width, V vocabulary, C code channels, N vectors.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


# ---------------------------------------------------------------------------------------------------------------
# Masks


class KeyRanges:
    """A mask as a table: query i sees the keys j with first[i] <= j < last[i].

    Both ends never decrease with i. That is all the masks of next-scale prediction, in O(L) memory:

        scales (1, 2)        every earlier scale      own scale only       the last n scales lie between
        query 0              keys 0                   keys 0
        queries 1..4         keys 0 1 2 3 4           keys 1 2 3 4

    first, last: L integers each. Raises ValueError where a range is empty or an end decreases.
    """

    def __init__(self, first: Sequence[int], last: Sequence[int]):
        self.first, self.last = tuple(map(int, first)), tuple(map(int, last))
        if len(self.first) != len(self.last) or not self.first:
            raise ValueError(f"a range needs both ends: {len(self.first)} firsts and {len(self.last)} lasts given")
        for ends in (self.first, self.last):
            if any(b < a for a, b in zip(ends, ends[1:])):
                raise ValueError(f"range ends must not decrease from one query to the next: {ends}")
        if self.first[0] < 0 or any(b <= a for a, b in zip(self.first, self.last)):
            raise ValueError("every query must see at least one key, and no key before 0")
        self.runs = self._runs()

    @classmethod
    def from_scales(cls, scales: Sequence[int], last_scales: int | None = None) -> KeyRanges:
        """The block-causal table of token maps of s x s tokens, coarse to fine.

        last_scales: how many scales a token sees, its own among them: None is all of them so far (VAR), 1 is its
        own alone (a Markov model).
        """
        if last_scales is not None and last_scales < 1:
            raise ValueError(f"last_scales is {last_scales}: a token sees at least its own scale, so 1 or more")
        ends = [0]
        for s in scales:
            ends.append(ends[-1] + s * s)
        first, last = [], []
        for k, s in enumerate(scales):
            seen = 0 if last_scales is None else max(0, k + 1 - last_scales)
            first += [ends[seen]] * (s * s)
            last += [ends[k + 1]] * (s * s)
        return cls(first, last)

    def rows(self, begin: int, end: int) -> KeyRanges:
        """The table of the queries begin .. end-1 alone, as when generating one scale; keys keep their numbers."""
        return KeyRanges(self.first[begin:end], self.last[begin:end])

    def dense(self) -> Tensor:
        """The same mask as a bool [L, S], S the highest key in sight + 1: for pictures, tests and comparison."""
        keys = torch.arange(self.last[-1])
        return (keys >= torch.tensor(self.first)[:, None]) & (keys < torch.tensor(self.last)[:, None])

    def __len__(self) -> int:
        return len(self.first)

    def _runs(self) -> list[tuple[int, int, int, int]]:
        """Neighbouring queries with the same range: (first query, last query + 1, first key, last key + 1)."""
        runs, begin = [], 0
        for i in range(1, len(self.first) + 1):
            if i == len(self.first) or (self.first[i], self.last[i]) != (self.first[begin], self.last[begin]):
                runs.append((begin, i, self.first[begin], self.last[begin]))
                begin = i
        return runs


# ---------------------------------------------------------------------------------------------------------------
# Attention over key ranges


def block_attention(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges, scale: float) -> Tensor:
    """softmax(scale * q k^T over the keys in range) v, as [B, H, L, D] (paper: Sec. 3.2, the block-wise causal mask).

    Floating point of one dtype. Raises ValueError where the ranges do not fit L queries and S keys.
    """
    if len(ranges) != q_BHLD.shape[2] or ranges.last[-1] > k_BHSD.shape[2]:
        raise ValueError(f"ranges of {len(ranges)} queries and {ranges.last[-1]} keys do not fit "
                         f"{q_BHLD.shape[2]} queries and {k_BHSD.shape[2]} keys")
    return block_attention_torch(q_BHLD, k_BHSD, v_BHSD, ranges, scale)


def block_attention_torch(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, ranges: KeyRanges, scale: float) -> Tensor:
    n=next((b for b,e,f,l in ranges.runs if e-b>=64), len(ranges)) if len(ranges.runs)>1 else 0
    parts=[]
    groups=([(0,n,0,ranges.last[n-1])] if n else [])+[r for r in ranges.runs if r[0]>=n]
    for b,e,f,l in groups:
        s=q_BHLD[:,:,b:e]*scale@k_BHSD[:,:,f:l].transpose(-1,-2)
        if b==0 and n:
            s=s.masked_fill(~ranges.rows(0,n).dense(),-torch.inf)
        parts.append(s.softmax(-1)@v_BHSD[:,:,f:l])
    return torch.cat(parts, dim=2)


# ---------------------------------------------------------------------------------------------------------------
# Nearest code


def nearest_code(x_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """argmin_v |x_n - e_v|^2 as int64 [N]; the lowest index wins a tie (paper: eq. 3).

    Always in fp32: half precision changes codes.
    """
    return nearest_code_torch(x_NC, codebook_VC)


def nearest_code_torch(x_NC: Tensor, codebook_VC: Tensor) -> Tensor:
    """|x - e|^2 = |x|^2 - 2 x.e + |e|^2, and the first term is the same for every code."""
    with torch.autocast(x_NC.device.type, enabled=False):
        x_NC, codebook_VC = x_NC.float(), codebook_VC.float()
        squares_V = codebook_VC.square().sum(dim=1)
        return torch.addmm(squares_V, x_NC, codebook_VC.T, alpha=-2).argmin(dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Adaptive layer norm


def adaln(x_BLW: Tensor, scale_BW: Tensor, shift_BW: Tensor) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift, one scale and shift per image; the norm has eps 1e-6 and no weights."""
    return adaln_torch(x_BLW, scale_BW, shift_BW)


def adaln_torch(x_BLW: Tensor, scale_BW: Tensor, shift_BW: Tensor) -> Tensor:
    """In fp32 whatever x is: a mean and a variance in bf16 are worth little."""
    normed_BLW = F.layer_norm(x_BLW.float(), x_BLW.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_BW.float()[:, None], normed_BLW, 1 + scale_BW.float()[:, None]).to(x_BLW.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Sampling


def sample_tokens(cond_BlV: Tensor, uncond_BlV: Tensor | None, guidance: float, top_k: int, top_p: float,
                  noise_BlV: Tensor) -> Tensor:
    """Draw one token per place: int64 [B, l].

    logits = (1 + guidance) * cond - guidance * uncond   (classifier-free guidance; uncond None: cond alone)
    top_k: keep the k most likely tokens; k <= 0 or >= V keeps all. Of equal logits the lower index ranks first.
    top_p: of those, keep a token if the tokens ranked before it hold less than p of the probability; 1 keeps all.
    noise_BlV: Exponential(1) draws. argmax(logits - ln noise) is a draw from softmax(logits) (Gumbel-max).
    """
    return sample_tokens_torch(cond_BlV, uncond_BlV, guidance, top_k, top_p, noise_BlV)


def sample_tokens_torch(cond_BlV: Tensor, uncond_BlV: Tensor | None, guidance: float, top_k: int, top_p: float,
                        noise_BlV: Tensor) -> Tensor:
    logits_BlV = cond_BlV.float()
    if uncond_BlV is not None:
        logits_BlV = (1 + guidance) * logits_BlV - guidance * uncond_BlV.float()
    V = logits_BlV.shape[-1]
    limited = 0 < top_k < V
    if limited or top_p < 1:
        ranked_BlV, order_BlV = logits_BlV.sort(dim=-1, descending=True, stable=True)
        if limited:
            ranked_BlV[..., top_k:] = -torch.inf
        probability_BlV = ranked_BlV.softmax(dim=-1)
        before_BlV = probability_BlV.cumsum(dim=-1) - probability_BlV
        if top_p < 1:
            dropped_BlV = before_BlV >= top_p
            dropped_BlV[..., 0] = False   # the most likely token stays, whatever p
            ranked_BlV[dropped_BlV] = -torch.inf
        logits_BlV = torch.empty_like(ranked_BlV).scatter_(-1, order_BlV, ranked_BlV)
    return (logits_BlV - noise_BlV.log()).argmax(dim=-1)
