"""The math of kernels.py, and of the quantizer, in NumPy and float64: slow and obvious.

Where an output is a sum, the size of what was summed (the same sum over absolute values) comes with it: rounding
errors are in proportion to that, also where the sum itself cancels to nothing.
"""
from __future__ import annotations

import numpy as np


def attention(q_BHLD, k_BHSD, v_BHSD, first_L, last_L, scale, do_BHLD) -> tuple[dict, dict]:
    """({name: value}, {name: size of its terms}) of the output o and of the gradients dq, dk, dv of sum(o do)."""
    keys_S = np.arange(k_BHSD.shape[2])
    seen_LS = (keys_S >= np.array(first_L)[:, None]) & (keys_S < np.array(last_L)[:, None])
    scores = np.where(seen_LS, scale * q_BHLD @ k_BHSD.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    o = weights @ v_BHSD
    delta = (o * do_BHLD).sum(axis=-1, keepdims=True)
    dscores = weights * (do_BHLD @ v_BHSD.swapaxes(2, 3) - delta)
    value = dict(o=o, dq=scale * dscores @ k_BHSD, dk=scale * dscores.swapaxes(2, 3) @ q_BHLD,
                 dv=weights.swapaxes(2, 3) @ do_BHLD)
    q, k, v, do = map(np.abs, (q_BHLD, k_BHSD, v_BHSD, do_BHLD))
    dscores = weights * (do @ v.swapaxes(2, 3) + (weights @ v * do).sum(axis=-1, keepdims=True))
    size = dict(o=weights @ v, dq=scale * dscores @ k, dk=scale * dscores.swapaxes(2, 3) @ q,
                dv=weights.swapaxes(2, 3) @ do)
    return value, size


def distances(x_NC, codebook_VC):
    """Squared, [N, V]."""
    return np.square(x_NC[:, None] - codebook_VC[None]).sum(axis=2)


def adaln(x_BLW, h_BLW, gate_BW, scale_BW, shift_BW, dsum_BLW, dy_BLW) -> tuple[dict, dict]:
    """As `attention`: x + gate h, y, and the gradients dx, dh, dgate, dscale, dshift of sum((x + gate h) dsum + y dy)."""
    gate, scale, shift = gate_BW[:, None], scale_BW[:, None], shift_BW[:, None]
    x = x_BLW + gate * h_BLW
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = 1 / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    n, g = centred * inverse, dy_BLW * (1 + scale)
    mean_g, mean_gn = g.mean(axis=-1, keepdims=True), (g * n).mean(axis=-1, keepdims=True)
    dx = dsum_BLW + (g - mean_g - n * mean_gn) * inverse
    value = dict(sum=x, y=n * (1 + scale) + shift, dx=dx, dh=dx * gate, dgate=(dx * h_BLW).sum(axis=1),
                 dscale=(dy_BLW * n).sum(axis=1), dshift=dy_BLW.sum(axis=1))
    # The mean of x rounds in proportion to x, not to what is left after it is taken away.
    x, gate, h = np.abs(x_BLW) + np.abs(gate * h_BLW), np.abs(gate), np.abs(h_BLW)
    n = np.abs(n) + x.max(axis=-1, keepdims=True) * inverse
    g, dy = np.abs(g), np.abs(dy_BLW)
    mean_g, mean_gn = g.mean(axis=-1, keepdims=True), (g * n).mean(axis=-1, keepdims=True)
    dx = np.abs(dsum_BLW) + (g + mean_g + n * mean_gn) * inverse
    size = dict(sum=x, y=n * (1 + np.abs(scale)) + np.abs(shift), dx=dx, dh=dx * gate, dgate=(dx * h).sum(axis=1),
                dscale=(dy * n).sum(axis=1), dshift=dy.sum(axis=1))
    return value, size


def split_heads(product_BLX, q_bias_W, v_bias_W, log_scale_H, heads, dq_BHLD, dk_BHLD, dv_BHLD) -> tuple[dict, dict]:
    """As `attention`: q, k, v and the gradients of product, biases and log scale of sum(q dq + k dk + v dv)."""
    B, L, X = product_BLX.shape
    bias_X = np.concatenate([q_bias_W, np.zeros(X // 3), v_bias_W])

    def split(x_BLX):
        return x_BLX.reshape(B, L, 3, heads, -1).transpose(2, 0, 3, 1, 4)

    def joined(*parts):
        return np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(B, L, X)

    given = dq_BHLD, dk_BHLD, dv_BHLD
    (q, k, v), (dq, dk, dv) = split(product_BLX + bias_X), given
    q_size, k_size, v_size = split(np.abs(product_BLX) + np.abs(bias_X))
    dq_size, dk_size, dv_size = map(np.abs, given)
    dlog_scale = dlog_scale_size = None
    if log_scale_H is not None:
        a = np.minimum(np.exp(log_scale_H), 100)[:, None, None]
        free_H = np.exp(log_scale_H) <= 100

        def normalised(x, size, dn):
            """n(x), dx, and the sizes of both."""
            norm = np.maximum(np.sqrt(np.square(x).sum(axis=-1, keepdims=True)), 1e-12)
            n, n_size = x / norm, (np.abs(x) + size) / norm
            dx = (dn - n * (n * dn).sum(axis=-1, keepdims=True)) / norm
            dn = np.abs(dn)
            return n, dx, n_size, (dn + n_size * (n_size * dn).sum(axis=-1, keepdims=True)) / norm

        q, dq_in, q_size, dq_size_in = normalised(q, q_size, a * dq)
        q, q_size = a * q, a * q_size
        dlog_scale = (q * dq).sum(axis=(0, 2, 3)) * free_H
        dlog_scale_size = (q_size * np.abs(dq)).sum(axis=(0, 2, 3))
        dq, dq_size = dq_in, dq_size_in
        k, dk, k_size, dk_size = normalised(k, k_size, dk)
    value = dict(q=q, k=k, v=v, dproduct=joined(dq, dk, dv), dq_bias=dq.sum(axis=(0, 2)).reshape(-1),
                 dv_bias=dv.sum(axis=(0, 2)).reshape(-1), dlog_scale=dlog_scale)
    size = dict(q=q_size, k=k_size, v=v_size, dproduct=joined(dq_size, dk_size, dv_size),
                dq_bias=dq_size.sum(axis=(0, 2)).reshape(-1), dv_bias=dv_size.sum(axis=(0, 2)).reshape(-1),
                dlog_scale=dlog_scale_size)
    return ({name: x for name, x in part.items() if x is not None} for part in (value, size))


def kept_probabilities(logits_V, top_k: int, top_p: float):
    """(probability of each token after top-k and top-p, how near a token came to the edge of top-p)."""
    order = sorted(range(len(logits_V)), key=lambda token: (-logits_V[token], token))
    if 0 < top_k:
        order = order[:top_k]
    probability_V = np.zeros(len(logits_V))
    probability_V[order] = np.exp(logits_V[order] - logits_V[order[0]])
    probability_V /= probability_V.sum()
    before, margin = 0.0, np.inf
    for rank, token in enumerate(order):
        share = probability_V[token]
        if rank > 0 and top_p < 1:
            margin = min(margin, abs(before - top_p))
            if before >= top_p:
                probability_V[token] = 0
        before += share
    return probability_V / probability_V.sum(), margin


def bicubic(side_in: int, side_out: int):
    """[side_out, side_in]: along one axis, what each place of a map gives to each of the enlarged map (Keys, a -0.75)."""
    near = lambda d: 1.25 * d**3 - 2.25 * d**2 + 1
    far = lambda d: -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3
    matrix = np.zeros((side_out, side_in))
    for out in range(side_out):
        centre = (out + 0.5) * side_in / side_out - 0.5
        for i in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            distance = abs(centre - i)
            weight = near(distance) if distance <= 1 else far(distance)
            matrix[out, min(max(i, 0), side_in - 1)] += weight   # beyond the border it goes on as at the border
    return matrix


def convolve(x_BCSS, weight, bias):
    """3 x 3, zeros around."""
    S = x_BCSS.shape[2]
    padded = np.pad(x_BCSS, ((0, 0), (0, 0), (1, 1), (1, 1)))
    out = np.zeros((len(x_BCSS), len(weight), S, S)) + bias[None, :, None, None]
    for y in range(3):
        for x in range(3):
            out += np.einsum("bchw,oc->bohw", padded[:, :, y:y + S, x:x + S], weight[:, :, y, x])
    return out


def running_latents(tokens, codebook_VC, phis, scales) -> list:
    """f_hat after each scale. tokens: [B, l] for each; phis: (weight, bias) of the convolution for each."""
    f_hats, f_hat = [], 0.0
    for tokens_Bl, (weight, bias), s in zip(tokens, phis, scales):
        up = bicubic(s, scales[-1])
        h = codebook_VC[tokens_Bl].swapaxes(1, 2).reshape(len(tokens_Bl), -1, s, s)
        h = up @ h @ up.T
        f_hat = f_hat + (h + convolve(h, weight, bias)) / 2
        f_hats.append(f_hat)
    return f_hats


def smoothed(tokens_Bl, logits_BlV, codebook_VC, share: float):
    """What is added in place of the codes: a share of it the mean code, as long as codes are."""
    p_BlV = np.exp(logits_BlV - logits_BlV.max(-1, keepdims=True))
    p_BlV = p_BlV / p_BlV.sum(-1, keepdims=True)
    mean_BlC = np.einsum("blv,vc->blc", p_BlV, codebook_VC)
    power_Bl = np.einsum("blv,vc->bl", p_BlV, codebook_VC ** 2)
    stretch_Bl = np.sqrt(power_Bl / (mean_BlC ** 2).sum(-1))
    return (1 - share) * codebook_VC[tokens_Bl] + share * stretch_Bl[..., None] * mean_BlC


def read(f_BCSS, s: int):
    """[B, s*s, C]: averages over areas, of which the side must be a multiple of s here."""
    B, C, S, _ = f_BCSS.shape
    return f_BCSS.reshape(B, C, s, S // s, s, S // s).mean(axis=(3, 5)).reshape(B, C, s * s).swapaxes(1, 2)


def slopes(function, x, step: float = 1e-3):
    """d function / d x by central differences, which are exact for a polynomial of degree 2."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ahead, behind = x.copy(), x.copy()
        ahead[place] += step
        behind[place] -= step
        gradient[place] = (function(ahead) - function(behind)) / (2 * step)
    return gradient
