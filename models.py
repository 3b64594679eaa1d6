"""The networks of MT-PKDOT. Nothing here knows of data sets or losses.

    Encoder   feature vector -> embedding
    ResNet18  one-channel spectrogram -> embedding    torchvision's resnet18, name by name
    R3D18     clip of frames -> embedding             torchvision's r3d_18, name by name
    Single    one view -> embedding and prediction: stage 1, and the visual-only baseline
    Adapter   single-modality embedding -> the space of the joint embedding
    TNet      visual embedding -> hallucinated privileged embedding
    Fusion    both embeddings -> joint embedding and prediction
    Teachers  both embeddings -> the three teachers a student may follow
    Student   visual input -> embedding and prediction: all that is left at test time
    on_embeddings  a Single or Student without its backbone
    gathered  outputs for a batch that several processes share
    load_student   a trained student, from what train.py saved

B batch, T steps or frames, D = 512 embedding size, K outputs: classes or regressed values.
Docstrings name the source: "released code" is what the authors' code does, "ours" our choice.
"""

import torch
from torch import distributed, nn

DIM = 512


class Encoder(nn.Module):
    """Feature vector (B, inputs) -> (B, dim): standardise, then Linear-ReLU-Linear. Source: ours.
    Mean and standard deviation are saved with the weights: a student takes raw vectors."""

    def __init__(self, inputs, dim=DIM, dropout=0.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))
        first, last = nn.Linear(inputs, dim), nn.Linear(dim, dim)
        self.layers = nn.Sequential(first, nn.ReLU(), nn.Dropout(dropout), last)

    def fit_standardisation(self, x):
        """Take both from the training rows x (N, inputs); a constant input is only centred."""
        std, mean = torch.std_mean(x.double(), 0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1))

    def forward(self, x):
        return self.layers((x - self.mean) / self.std)


def shortcut(conv, norm, inputs, outputs, stride):
    """The way past a block's convolutions: the identity, or, where shapes differ, a projection."""
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
    """The same over time too, (B, C, T, H, W) -> (B, C', T / stride, H / stride, W / stride)."""

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
    """Both 18-layer networks: four stages of two blocks, the mean over positions, a linear layer.
    The first stage is `width` wide, 64 at full size; each later one doubles that and halves the
    resolution. Initial weights are torchvision's (He et al., fan out). It trains in bfloat16 by
    autocast on a GPU that has it, and gives float32."""

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
        on = self.training and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=on):
            x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem_of(x)))))
            return self.fc(x.flatten(2).mean(-1)).to(self.fc.weight.dtype)


class ResNet18(Residual18):
    """Spectrogram (B, channels, H, W) -> (B, dim). Source: released code; He et al. (2016)."""

    def __init__(self, dim=DIM, width=64, channels=1):
        super().__init__(ResidualBlock, dim, width)
        self.conv1 = nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.initialise()

    def stem_of(self, x):
        return nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, padding=1)


class R3D18(Residual18):
    """Clip of T frames (B, 3, T, H, W) -> (B, dim). Source: released code; Tran et al. (2018).
    Bytes are scaled to 0..1 and normalised as ImageNet's images; floats are taken as they are."""

    def __init__(self, dim=DIM, width=64):
        super().__init__(ResidualBlock3d, dim, width)
        conv = nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), padding=(1, 3, 3), bias=False)
        self.stem = nn.Sequential(conv, nn.BatchNorm3d(width), nn.ReLU())
        imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1, 1)
        self.register_buffer("imagenet", imagenet, persistent=False)  # published files lack it
        self.initialise()
        self.to(memory_format=torch.channels_last_3d)  # 1.4 to 1.6 times as fast, on a GPU too

    def stem_of(self, x):
        if x.dtype == torch.uint8:
            x = (x / 255 - self.imagenet[0]) / self.imagenet[1]
        return self.stem(x)


def load_published(network, published):
    """Load torchvision's state dict of resnet18 or r3d_18 into ours, all but the last layer.

    A first layer of three channels is summed to one where ours has one. Counters of batches, which
    old files lack, may be missing. Raises RuntimeError that lists all else that does not fit.
    """
    own = network.state_dict()
    last = {name: t for name, t in own.items() if name.startswith("fc.")}
    stem, published = published.get("conv1.weight"), {**published, **last}
    if stem is not None and own.get("conv1.weight", stem).shape[1] == 1:
        published["conv1.weight"] = stem.sum(1, keepdim=True)
    network.load_state_dict(published)


def backbone(shape, dim=DIM, width=64, dropout=0.0):
    """An untrained backbone for a vector (F,), a clip (3, T, H, W) or a spectrogram (1, H, W)."""
    if len(shape) == 1:
        return Encoder(shape[0], dim, dropout)
    return R3D18(dim, width) if len(shape) == 4 else ResNet18(dim, width)


class Single(nn.Module):
    """A backbone with a head, (B, ...) -> z (B, D), prediction (B, K). Source: released code."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x):
        z = self.encoder(x)
        return z, self.head(z)


def on_embeddings(network):
    """A Single or Student that takes z_v (B, D): the same network, without its backbone."""
    _, *others = network.children()
    return type(network)(nn.Identity(), *others)


class Adapter(nn.Sequential):
    """Embedding (..., D) -> D / 2 -> (..., D), without activation. Source: released code."""

    def __init__(self, dim=DIM):
        super().__init__(nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim))

    @torch.no_grad()
    def start(self, z):
        """Become the projection to rank D / 2 that loses least of z (N, D). Source: ours."""
        main = torch.linalg.eigh(z.mT @ z).eigenvectors[:, -self[0].out_features :]
        for layer, weight in zip(self, (main.mT, main)):
            layer.weight.copy_(weight)
            layer.bias.zero_()


class TNet(nn.Sequential):
    """Visual embedding z_v (..., D) -> hallucinated privileged embedding (..., D): twice, as other
    networks give embedding and prediction. Source: released code.

    An autoencoder without activations, at D = 512 of 512-2048-1024-512-256-512-1024-2048-512.
    """

    def __init__(self, dim=DIM):
        widths = [dim, 4 * dim, 2 * dim, dim, dim // 2, dim, 2 * dim, 4 * dim, dim]
        super().__init__(*(nn.Linear(before, after) for before, after in zip(widths, widths[1:])))

    def forward(self, z_v):
        hallucinated = super().forward(z_v)
        return hallucinated, hallucinated


class SelfAttention(nn.Module):
    """Post-norm transformer block, (B, T, D) -> (B, T, D): attention, then a ReLU network."""

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
    """Joint embedding of two modalities: the joint teacher, and, on T-Net's output, the student's.

    z_v and z_p as (B, 2, D) -> joint embedding z_j (B, D), prediction (B, K). Self-attention runs
    in each modality, then cross-attention both ways, queries from one, keys and values from the
    other; a gate mixes the two. Source: released code. Each modality is a sequence of one step, and
    attention stays within a clip (ours: the released self-attention, with batch_first at its
    default, mixes the clips of a batch). Over one step every attention weight is 1: c_v is a linear
    map of p alone, and c_p of v.
    """

    def __init__(self, dim, outputs, dropout=0.0, heads=2):
        super().__init__()
        self.dropout = nn.Dropout1d(dropout)  # of the whole embedding of a modality
        self.self_visual = SelfAttention(dim, heads)
        self.self_privileged = SelfAttention(dim, heads)
        self.cross_visual = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross_privileged = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.gate = nn.Linear(2 * dim, 1)
        self.head = nn.Linear(dim, outputs)

    def forward(self, z):
        z = self.dropout(z)
        v, p = self.self_visual(z[:, :1]), self.self_privileged(z[:, 1:])
        c_v = self.cross_visual(v, p, p, need_weights=False)[0].squeeze(1)
        c_p = self.cross_privileged(p, v, v, need_weights=False)[0].squeeze(1)
        g = self.gate(torch.cat([c_v, c_p], dim=1)).sigmoid()
        z_j = g * c_v + (1 - g) * c_p
        return z_j, self.head(z_j)


class Teachers(nn.Module):
    """The three teachers of a student: joint, adapted visual, adapted privileged, in this order.
    z_v and z_p as (B, 2, D) -> embeddings (B, 3, D), predictions (B, 3, K). Without adapters each
    single teacher is a head on its embedding, as in stage 1. Source: released code."""

    def __init__(self, dim, outputs, dropout=0.0, adapters=True):
        super().__init__()
        self.joint = Fusion(dim, outputs, dropout)
        kind = Adapter if adapters else nn.Identity
        self.adapters = nn.ModuleDict({"visual": kind(dim), "privileged": kind(dim)})
        self.heads = nn.ModuleDict({view: nn.Linear(dim, outputs) for view in self.adapters})

    def forward(self, z):
        z_j, joint = self.joint(z)
        a_v, a_p = self.adapters["visual"](z[:, 0]), self.adapters["privileged"](z[:, 1])
        predictions = [joint, self.heads["visual"](a_v), self.heads["privileged"](a_p)]
        return torch.stack([z_j, a_v, a_p], dim=1), torch.stack(predictions, dim=1)


class Student(nn.Module):
    """All that inference needs: visual backbone, T-Net for the missing modality, its own fusion.
    Visual input (B, ...) -> embedding z_s (B, D), prediction (B, K). Source: released code."""

    def __init__(self, encoder, tnet, fusion):
        super().__init__()
        self.encoder, self.tnet, self.fusion = encoder, tnet, fusion

    def forward(self, visual):
        z_v = self.encoder(visual)
        return self.fusion(torch.stack([z_v, self.tnet(z_v)[0]], dim=1))


def gathered(part, count):
    """Outputs (count, ...) for a batch, of which each process of torchrun has computed a part. Its
    own alone gets gradients, times the processes: DistributedDataParallel takes the mean."""
    if not distributed.is_initialized():
        return part
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    mine = torch.arange(count, device=part.device).tensor_split(processes)[rank]
    whole = part.new_zeros(count, *part.shape[1:]).index_copy(0, mine, part.detach())
    distributed.all_reduce(whole)
    return whole.index_copy(0, mine, part + (processes - 1) * (part - part.detach()))


def load_student(saved):
    """The trained student, frozen, from saved = torch.load("student_METHOD.pt", weights_only=True).

    It takes input (B, *saved["input_shape"]) as the data set has it: vectors unstandardised, frames
    as bytes. It gives z_s (B, D) and predictions (B, K): logits of the classes saved["names"], or
    values of the columns of those names. It computes in float32. Raises KeyError or RuntimeError
    on a file that does not fit; teachers_visual.pt fits too.
    """
    dim, outputs = saved["origin"]["dim"], len(saved["names"])
    encoder = backbone(saved["input_shape"], dim, saved["origin"]["width"])
    network = Student(encoder, TNet(dim), Fusion(dim, outputs))
    if "head.weight" in saved["weights"]:  # of the student that is the visual network alone
        network = Single(encoder, nn.Linear(dim, outputs))
    network.load_state_dict(saved["weights"])
    return network.eval().requires_grad_(False)
