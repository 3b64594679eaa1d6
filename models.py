"""The networks of MT-PKDOT: backbones, then what is built on them. Nothing here knows of data sets, losses or files.

    Encoder   feature vector -> embedding z (B, D)
    ResNet18  one-channel spectrogram -> embedding z (B, D)    torchvision's resnet18, name by name
    R3D18     clip of frames -> embedding z (B, D)             torchvision's r3d_18, name by name
    Head      embedding -> prediction
    Adapter   single-modality embedding -> the space of the joint embedding
    TNet      visual embedding -> hallucinated privileged embedding
    Fusion    two sequences of embeddings -> joint embedding and prediction
    Teachers  both embeddings -> the three teachers a student may follow
    Student   visual input -> prediction: all that is left at test time
    load_student   a trained student, from what train.py saved

B batch, T steps of a sequence, D = 512 embedding size, K outputs (classes or regressed values).
Each docstring names its source: "released code" is what the authors' code does, "ours" our choice.
"""

import functools

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


# ---- backbones for raw input --------------------------------------------------------------------------


def shortcut(conv, norm, inputs, outputs, stride):
    """A residual block's way past its convolutions: nothing, or a convolution of one position where shapes differ."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride, bias=False), norm(outputs))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, (B, C, H, W) -> (B, C', H / stride, W / stride)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(nn.Conv2d, nn.BatchNorm2d, inputs, outputs, stride)

    def forward(self, x):
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.downsample(x)).relu()


class ResidualBlock3d(nn.Module):
    """Two 3 x 3 x 3 convolutions and a shortcut, (B, C, T, H, W) -> (B, C', T / stride, H / stride, W / stride)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        conv1 = nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False)
        conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.conv1 = nn.Sequential(conv1, nn.BatchNorm3d(outputs), nn.ReLU())
        self.conv2 = nn.Sequential(conv2, nn.BatchNorm3d(outputs))
        self.downsample = shortcut(nn.Conv3d, nn.BatchNorm3d, inputs, outputs, stride)

    def forward(self, x):
        return (self.conv2(self.conv1(x)) + self.downsample(x)).relu()


class Residual18(nn.Module):
    """What both 18-layer networks share: four stages of two blocks, the mean over all positions, a linear layer.

    `width` is that of the first stage, 64 at full size; each later stage doubles it and halves the resolution.
    Initial weights as torchvision's (He et al., fan out), so that a run from scratch starts alike.
    """

    def __init__(self, block, dim, width):
        super().__init__()
        for stage, stride in enumerate((1, 2, 2, 2)):
            inputs, outputs = width * 2 ** max(stage - 1, 0), width * 2**stage
            layer = nn.Sequential(block(inputs, outputs, stride), block(outputs, outputs, 1))
            self.add_module(f"layer{stage + 1}", layer)
        self.fc = nn.Linear(8 * width, dim)

    def initialise(self):
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem_of(x)))))
        return self.fc(x.flatten(2).mean(-1))


class ResNet18(Residual18):
    """Backbone of a spectrogram, (B, channels, H, W) -> (B, dim). Source: released code; He et al. (2016)."""

    def __init__(self, dim=DIM, width=64, channels=1):
        super().__init__(ResidualBlock, dim, width)
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.initialise()

    def stem_of(self, x):
        return nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)


class R3D18(Residual18):
    """Backbone of a video clip, (B, 3, T, H, W) -> (B, dim). Source: released code; Tran et al. (2018).

    Bytes (uint8) are scaled to 0..1 and normalised with ImageNet's mean and deviation; floats are taken as they are.
    """

    def __init__(self, dim=DIM, width=64):
        super().__init__(ResidualBlock3d, dim, width)
        conv = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), padding=(1, 3, 3), bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU())
        imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1, 1)
        self.register_buffer("imagenet", imagenet, persistent=False)  # the published files have no such key
        self.initialise()

    def stem_of(self, x):
        if x.dtype == torch.uint8:
            x = (x / 255 - self.imagenet[0]) / self.imagenet[1]
        return self.stem(x)


def synchronise_batch_norm(network, whole):
    """Have the batch norms of a network take mean and variance over the batches of all processes, of any sizes.

    whole: a row (1, n) of each process -> all rows (processes, n), with gradients. Does what nn.SyncBatchNorm does on
    CUDA only. Source: ours; variance of parts by Chan's formula.
    """
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            module.forward = functools.partial(_synchronised, module, whole)


def _synchronised(self, whole, x):
    if not self.training:
        return type(self).forward(self, x)
    channels, spread = x.shape[1], (1, -1) + (1,) * (x.dim() - 2)
    var, mean = torch.var_mean(x.to(self.weight.dtype), [0, *range(2, x.dim())], correction=0)
    parts = whole(torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)]).unsqueeze(0))
    count, n = parts[:, -1:], parts[:, -1].sum()
    means, vars = parts[:, :channels], parts[:, channels:-1]
    mean = (count * means).sum(0) / n
    var = (count * (vars + (means - mean) ** 2)).sum(0) / n
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * n / (n - 1), self.momentum)
    scale = self.weight * (var + self.eps).rsqrt()
    return (x * scale.view(spread) + (self.bias - mean * scale).view(spread)).to(x.dtype)


def load_published(network, published):
    """Load torchvision's state dict of resnet18 or r3d_18 into ours, all but the last layer, which stays ours.

    A first layer of three channels is summed to one where ours has one. Counters of batches, which old files lack,
    may be missing. Raises ValueError that lists every other missing, unexpected or ill-shaped key.
    """
    published = {name: t for name, t in published.items() if not name.startswith("fc.")}
    own = {name: t for name, t in network.state_dict().items() if not name.startswith("fc.")}
    stem = published.get("conv1.weight")
    if stem is not None and stem.dim() == 4 and own.get("conv1.weight", stem).shape[1] == 1:
        published["conv1.weight"] = stem.sum(1, keepdim=True)
    wrong = [f"missing {name}" for name in own if name not in published and not name.endswith("num_batches_tracked")]
    wrong += [f"unexpected {name}" for name in published if name not in own]
    shapes = [(name, tuple(published[name].shape), tuple(own[name].shape)) for name in own if name in published]
    wrong += [f"{name} of shape {theirs}, not {ours}" for name, theirs, ours in shapes if theirs != ours]
    if wrong:
        raise ValueError(f"not the published weights of {type(network).__name__}: {'; '.join(wrong)}")
    network.load_state_dict(published, strict=False)


def backbone(shape, dim=DIM, width=64):
    """An untrained network that embeds inputs of this shape: vectors (F,), clips (3, T, H, W), spectrograms (1, H, W).

    width: of the first stage of an 18-layer network. Source: released code, but for vectors (ours).
    """
    if len(shape) == 1:
        return Encoder(shape[0], dim)
    return R3D18(dim, width) if len(shape) == 4 else ResNet18(dim, width)


# ---- parts of teachers and student --------------------------------------------------------------------


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

    @torch.no_grad()
    def composed(self):
        """The same map as one linear layer, for where T-Net is frozen: without activations its layers are one."""
        one = nn.Linear(self[0].in_features, self[-1].out_features).to(self[0].weight)
        weight, bias = torch.eye(one.in_features).to(one.weight), torch.zeros_like(one.bias)
        for layer in self:
            weight, bias = layer.weight @ weight, layer(bias)
        one.weight.copy_(weight)
        one.bias.copy_(bias)
        return one.requires_grad_(False)


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
        return self.from_embedding(self.encoder(visual))

    def from_embedding(self, z_v):
        return self.fusion(z_v.unsqueeze(1), self.tnet(z_v).unsqueeze(1))


def load_student(saved):
    """The trained student of a file of train.py's, torch.load(FILE, weights_only=True) -> Student, ready to use.

    It takes input (B, *saved["input_shape"]) as the data set has it (vectors unstandardised, frames as bytes), and
    gives z_s (B, D) and predictions (B, K): one of saved["names"] a column, logits of classes or the values themselves.
    """
    dim, outputs = saved["dim"], len(saved["names"])
    network = Student(backbone(saved["input_shape"], dim, saved["width"]), TNet(dim), Fusion(dim, outputs))
    network.load_state_dict(saved["weights"])
    network.tnet = network.tnet.composed()  # as it was trained
    return network.eval().requires_grad_(False)
