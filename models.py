"""The networks of MT-PKDOT, smallest first. Nothing here knows of data sets, losses or files.

    Encoder   input of one modality -> embedding z (B, D)      the backbone of a feature-vector data set
    Head      embedding -> prediction
    Adapter   single-modality embedding -> the space of the joint embedding
    TNet      visual embedding -> hallucinated privileged embedding
    Fusion    two sequences of embeddings -> joint embedding and prediction
    Teachers  both embeddings -> the three teachers a student may follow
    Student   visual input -> prediction: all that is left at test time

B batch, T steps of a sequence, D = 512 embedding size, K outputs (classes or regressed values).
Sources as METHOD in the docstrings: "released code" is what the authors' code does, "ours" our choice.
"""

import torch
from torch import nn

DIM = 512


class Encoder(nn.Module):
    """Backbone for feature vectors: standardise, then Linear-ReLU-Linear. Source: ours.

    (B, ...) with `inputs` numbers a row -> (B, dim). The mean and standard deviation of the training
    rows are kept with the weights, so that a saved student takes raw input.
    """

    def __init__(self, inputs, dim=DIM):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        self.layers = nn.Sequential(nn.Linear(inputs, dim), nn.ReLU(), nn.Linear(dim, dim))

    def fit_standardisation(self, x):
        """Take mean and standard deviation from training rows x (N, ...); a constant input stays as it is."""
        x = x.flatten(1).double()
        std = x.std(0, correction=0)
        self.mean.copy_(x.mean(0))
        self.std.copy_(torch.where(std > 0, std, 1))

    def forward(self, x):
        return self.layers((x.flatten(1) - self.mean) / self.std)


class Head(nn.Linear):
    """Embedding (..., D) -> prediction (..., K). Source: released code."""

    def __init__(self, dim, outputs):
        super().__init__(dim, outputs)


class Adapter(nn.Sequential):
    """Embedding (..., D) -> (..., D) through a bottleneck of half the width, no activation. Source: released code."""

    def __init__(self, dim=DIM):
        super().__init__(nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim))


class TNet(nn.Sequential):
    """Visual embedding (..., D) -> hallucinated privileged embedding (..., D).

    An autoencoder D-4D-2D-D-D/2-D-2D-4D-D without activations, 512-2048-1024-512-256-512-1024-2048-512
    at D = 512. Source: released code.
    """

    def __init__(self, dim=DIM):
        widths = [dim, 4 * dim, 2 * dim, dim, dim // 2, dim, 2 * dim, 4 * dim, dim]
        super().__init__(*(nn.Linear(before, after) for before, after in zip(widths, widths[1:])))


class SelfAttention(nn.Module):
    """Post-norm transformer block, (B, T, D) -> (B, T, D): attention, then a ReLU layer as wide as the embedding."""

    def __init__(self, dim, heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm_attention = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.norm_feed_forward = nn.LayerNorm(dim)

    def forward(self, x):
        x = self.norm_attention(x + self.attention(x, x, x, need_weights=False)[0])
        return self.norm_feed_forward(x + self.feed_forward(x))


class Fusion(nn.Module):
    """Joint embedding of two modalities; the teacher's and, on T-Net's output, the student's.

    Self-attention in each modality, cross-attention both ways (queries of one, keys and values of the
    other), then a gate a step: z = g c_v + (1 - g) c_p with g = sigmoid(Linear([c_v, c_p])), and a linear
    head on z. Source: released code, but attention runs within a clip, never across the batch (ours; with
    batch_first at its default the released self-attention mixes the clips), and a sequence longer than the
    paper's T = 1 is averaged over its steps (ours).

    visual, privileged (B, T, D) -> joint embedding (B, D), prediction (B, K).
    """

    def __init__(self, dim, outputs, heads=2):
        super().__init__()
        self.self_visual = SelfAttention(dim, heads)
        self.self_privileged = SelfAttention(dim, heads)
        self.cross_visual = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_privileged = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.gate = nn.Linear(2 * dim, 1)
        self.head = Head(dim, outputs)

    def forward(self, visual, privileged):
        v, p = self.self_visual(visual), self.self_privileged(privileged)
        c_v = self.cross_visual(v, p, p, need_weights=False)[0]
        c_p = self.cross_privileged(p, v, v, need_weights=False)[0]
        g = self.gate(torch.cat([c_v, c_p], dim=-1)).sigmoid()
        z = (g * c_v + (1 - g) * c_p).mean(dim=1)
        return z, self.head(z)


class Teachers(nn.Module):
    """The joint teacher and both single-modality teachers, adapted to it. Source: released code.

    z_v, z_p (B, D) -> {name: (embedding (B, D), prediction (B, K))} for joint, adapted_visual, adapted_privileged.
    """

    def __init__(self, dim, outputs):
        super().__init__()
        self.joint = Fusion(dim, outputs)
        self.adapters = nn.ModuleDict({view: Adapter(dim) for view in ("visual", "privileged")})
        self.heads = nn.ModuleDict({view: Head(dim, outputs) for view in ("visual", "privileged")})

    def forward(self, z_v, z_p):
        a_v, a_p = self.adapters["visual"](z_v), self.adapters["privileged"](z_p)
        return {
            "joint": self.joint(z_v.unsqueeze(1), z_p.unsqueeze(1)),
            "adapted_visual": (a_v, self.heads["visual"](a_v)),
            "adapted_privileged": (a_p, self.heads["privileged"](a_p)),
        }


class Student(nn.Module):
    """All that inference needs: visual backbone, T-Net in the place of the missing modality, own fusion.

    visual input (B, ...) -> student embedding z_s (B, D), prediction (B, K).
    """

    def __init__(self, encoder, tnet, fusion):
        super().__init__()
        self.encoder, self.tnet, self.fusion = encoder, tnet, fusion

    def forward(self, visual):
        z_v = self.encoder(visual)
        return self.fusion(z_v.unsqueeze(1), self.tnet(z_v).unsqueeze(1))
