"""A VAR that draws a scale's clusters first, and then its codes: the model of clusters.py.

The first pass is VAR's: a cluster is as likely as its codes are together. The second reads, beside
f_hat, the clusters of all places of the scale, and chooses among the codes of each place's own,

    x  =  embed(f_hat at s_k)  +  embed'(cluster)        p(code | cluster) ~ exp(logit), in it

embed' starts at zero: it begins as the VAR that it is tuned from, to the last digit. One set of
weights serves both passes, but they do not see each other's keys and values.
"""
from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kernels import nearest_code
from papers import Trained
from papers.masked import ReadAndKnown
from papers.tuning import Tuning
from tokenizer import Tokenizer
from var import VAR


@torch.no_grad()
def k_means(codebook_VC: Tensor, clusters: int, rounds: int = 100) -> Tensor:
    """The cluster of each code: int64 [V], from 0 to `clusters` - 1. It starts at random codes."""
    first_G = torch.randperm(len(codebook_VC))[:clusters].to(codebook_VC.device)
    centre_GC = codebook_VC[first_G]
    for _ in range(rounds):
        cluster_V = nearest_code(codebook_VC, centre_GC)
        own_VG = F.one_hot(cluster_V, clusters).float()
        count_G1 = own_VG.sum(dim=0)[:, None]
        mean_GC = own_VG.T @ codebook_VC / count_G1
        centre_GC = torch.where(count_G1 > 0, mean_GC, centre_GC)
    return cluster_V


def of_clusters(logits_BlV: Tensor, cluster_V: Tensor) -> Tensor:
    """Logits of clusters [B, l, clusters]: the logarithm of what their codes add up to."""
    own_VG = F.one_hot(cluster_V).float()
    chance_BlG = logits_BlV.float().softmax(dim=2) @ own_VG
    return chance_BlG.clamp(min=1e-30).log()


class ClusteredVAR(VAR):
    """A VAR, with its weights, that may be told clusters. cluster_V: that of each code."""

    def __init__(self, plain: VAR, cluster_V: Tensor):
        super().__init__(plain.config)
        self.load_state_dict(plain.state_dict())
        self.clusters = int(cluster_V.max()) + 1
        self.code_embedding = ReadAndKnown(self.code_embedding, self.clusters)
        self.register_buffer("cluster_V", cluster_V)
        self.to(plain.level_L.device)

    def told(self, read_BlC: Tensor, cluster_Bl: Tensor) -> Tensor:
        """What the second pass reads: [B, l, C + clusters]."""
        return torch.cat([read_BlC, F.one_hot(cluster_Bl, self.clusters)], dim=2)

    def of_codes(self, logits_BlV: Tensor, cluster_Bl: Tensor) -> Tensor:
        """Logits of codes of the given clusters. (The others' are finite, for guidance.)"""
        return logits_BlV.float().masked_fill(self.cluster_V != cluster_Bl[..., None], -1e4)

    def nats(self, tokenizer: Tokenizer, tokens_BL: Tensor, labels_B: Tensor) -> Tensor:
        """[2, B, L]: of each token's cluster, and of its code, given those of the whole scale."""
        read_BlC = tokenizer.teacher_inputs(tokens_BL)
        cluster_BL = self.cluster_V[tokens_BL]
        first_BLV = self(labels_B, read_BlC)
        second_BLV = self(labels_B, self.told(read_BlC, cluster_BL[:, 1:]))   # the first is alone
        asked = ((of_clusters(first_BLV, self.cluster_V), cluster_BL),
                 (self.of_codes(second_BLV, cluster_BL), tokens_BL))
        return torch.stack([F.cross_entropy(logits.mT, x, reduction="none") for logits, x in asked])

    @torch.no_grad()
    def generate(
        self, tokenizer: Tokenizer, labels_B: Tensor, cfg: float, top_k: int, top_p: float,
        generator: Generator, known: None = None, growth: float = 1.0,
    ) -> Tensor:
        """Tokens [B, L], as of `VAR.generate`, but that it completes nothing. Guidance and filters
        are of both passes."""
        quantizer = tokenizer.quantizer
        f_hat_BCSS = quantizer.initial(len(labels_B))
        times = 1
        if cfg:
            times = 2
            null_B = torch.full_like(labels_B, self.config.classes)
            labels_B = torch.cat([labels_B, null_B])                        # [2 B]
        class_BW = self.class_embedding(labels_B)                           # [B or 2 B, W]
        modulations, head_B2W = self.modulations(class_BW)
        filters = cfg, top_k, top_p, generator, growth
        caches = self.new_caches(), self.new_caches()
        tokens = []

        def logits(k: int, x_BlW: Tensor, second: bool) -> Tensor:
            span = self.config.spans[k]
            ranges = self.ranges.rows(span.start, span.stop)
            stream = self.through_layers(
                x_BlW, self.positions()[:, span], modulations, ranges, caches[second])
            return self.logits(stream, head_B2W)                            # [B or 2 B, l, V]

        for k in range(len(self.config.scales)):
            x_BlW = told_BlW = self.start(class_BW)
            if k:
                read_BlC = quantizer.read(f_hat_BCSS, k)
                x_BlW = self.code_embedding(read_BlC).repeat(times, 1, 1)
            clusters_BlG = of_clusters(logits(k, x_BlW, False), self.cluster_V)
            cluster_Bl = self.draw(clusters_BlG, k, *filters)               # [B, l]
            if k:
                told_BlX = self.told(read_BlC, cluster_Bl)                  # [B, l, C + clusters]
                told_BlW = self.code_embedding(told_BlX).repeat(times, 1, 1)
            logits_BlV = self.of_codes(logits(k, told_BlW, True), cluster_Bl.repeat(times, 1))
            tokens_Bl = self.draw(logits_BlV, k, *filters)                  # [B, l]
            tokens.append(tokens_Bl)
            f_hat_BCSS = quantizer.accumulate(f_hat_BCSS, tokens_Bl, k)
        return torch.cat(tokens, dim=1)


class TwoPasses(Tuning):
    """Half of the images are told their clusters: nats of clusters, and of codes, given them."""

    def loss(self, model: ClusteredVAR, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        cluster_BL = model.cluster_V[tokens_BL]
        told_BlX = model.told(self.tokenizer.teacher_inputs(tokens_BL), cluster_BL[:, 1:])
        told_BlX[::2, :, model.config.code_channels:] = 0
        logits_BLV = model(labels_B, told_BlX)
        first_bLG = of_clusters(logits_BLV[::2], model.cluster_V)
        second_bLV = model.of_codes(logits_BLV[1::2], cluster_BL[1::2])
        first = F.cross_entropy(first_bLG.mT, cluster_BL[::2])
        return first + F.cross_entropy(second_bLV.mT, tokens_BL[1::2]), dict


class ClusterLoss(Tuning):
    """IAR's loss. It tunes a copy of the run's model."""

    def __init__(self, run: Trained, cluster_V: Tensor, steps: int, lr: float):
        super().__init__(run, copy.deepcopy(run.model), "clusters-iar", steps, lr)
        self.cluster_V = cluster_V
        self.made_with["clusters"] = cluster_V.tolist()

    def loss(self, model: VAR, tokens_BL: Tensor, labels_B: Tensor):
        tokens_BL, labels_B = self.on_device(tokens_BL, labels_B)
        logits_BLV = model(labels_B, self.tokenizer.teacher_inputs(tokens_BL)).float()
        cluster_BLG = of_clusters(logits_BLV, self.cluster_V)
        loss = F.cross_entropy(cluster_BLG.mT, self.cluster_V[tokens_BL])
        return loss + F.cross_entropy(logits_BLV.mT, tokens_BL), dict
