"""The networks against arithmetic written out in NumPy and SciPy, by torchvision's names."""

import io

import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter
from scipy.signal import correlate
from torch import nn

import models


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def built(build, *arguments, **options):
    """The same network every time, with random statistics and weights in every batch norm."""
    torch.manual_seed(1)
    network = build(*arguments, **options).eval()
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            for t in (module.weight, module.bias, module.running_mean, module.running_var):
                t.data.uniform_(0.5, 1.5)
    return network


def numbers(tensor):
    return tensor.detach().double().numpy()


def same(got, want, tolerance=1e-5):
    np.testing.assert_allclose(numbers(got), want, rtol=tolerance, atol=tolerance)


def linear(x, *layers):
    for layer in layers:
        x = x @ numbers(layer.weight).T + numbers(layer.bias)
    return x


def attention(module, queries, keys, heads=2):
    """Multi-head attention, a clip and a head at a time."""
    out = np.zeros_like(queries)
    weights, biases = numbers(module.in_proj_weight), numbers(module.in_proj_bias)
    for b in range(len(queries)):
        maps = zip((queries[b], keys[b], keys[b]), np.split(weights, 3), np.split(biases, 3))
        q, k, v = (x @ weight.T + bias for x, weight, bias in maps)
        for part in np.split(np.arange(q.shape[1]), heads):
            score = np.exp(q[:, part] @ k[:, part].T / np.sqrt(len(part)))
            out[b][:, part] = score / score.sum(1, keepdims=True) @ v[:, part]
    return linear(out, module.out_proj)


def self_attention(block, x):
    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    x = norm(x + attention(block.attention, x, x))
    first, _, second = block.feed_forward
    return norm(x + linear(np.maximum(linear(x, first), 0), second))


def test_attention_and_fusion_are_their_formulas_clip_by_clip():
    block, x = built(models.SelfAttention, 8, heads=2), normal(5, 4, 8)
    same(block(x), self_attention(block, numbers(x)))
    net, z = built(models.Fusion, dim=8, outputs=3), normal(5, 2, 8)
    v = self_attention(net.self_visual, numbers(z[:, :1]))
    p = self_attention(net.self_privileged, numbers(z[:, 1:]))
    c_v, c_p = attention(net.cross_visual, v, p)[:, 0], attention(net.cross_privileged, p, v)[:, 0]
    g = 1 / (1 + np.exp(-linear(np.concatenate([c_v, c_p], axis=1), net.gate)))
    z_j, prediction = net(z)
    same(z_j, g * c_v + (1 - g) * c_p)
    same(prediction, linear(g * c_v + (1 - g) * c_p, net.head))


def test_tnet_and_adapter_have_the_published_widths_and_composed_is_all_of_tnet():
    full = {models.TNet: [512, 2048, 1024, 512, 256, 512, 1024, 2048, 512]}
    for build, widths in {**full, models.Adapter: [512, 256, 512]}.items():
        layers = list(zip(widths, widths[1:]))
        assert [tuple(layer.weight.shape[::-1]) for layer in build()] == layers
    net, x = built(models.TNet, 16).double(), normal(30, 16).double()
    composed, want = net.composed(), linear(numbers(x), *net)
    same(net(x), want, 1e-10)
    same(composed(x), want, 1e-10)
    assert isinstance(composed, nn.Linear) and net[0].weight.requires_grad
    assert not composed.weight.requires_grad and not composed.bias.requires_grad


def test_encoder_standardises_with_the_training_rows():
    x = normal(50, 6) * 7 + 4
    x[:, 2] = 2.5  # a constant input
    net, rows = built(models.Encoder, 6, dim=8), numbers(x)
    net.fit_standardisation(x)
    rows = (rows - rows.mean(0)) / np.where(np.arange(6) == 2, 1, rows.std(0))
    same(net(x), linear(np.maximum(linear(rows, net.layers[0]), 0), net.layers[2]))


@pytest.mark.parametrize("adapters", [True, False])
def test_teachers_are_joint_visual_and_privileged(adapters):
    net, z = built(models.Teachers, 8, 3, adapters=adapters), normal(5, 2, 8)
    embeddings, predictions = net(z)
    torch.testing.assert_close((embeddings[:, 0], predictions[:, 0]), net.joint(z))
    for i, view in enumerate(("visual", "privileged")):
        want = linear(numbers(z[:, i]), *(net.adapters[view] if adapters else ()))
        same(embeddings[:, i + 1], want)
        same(predictions[:, i + 1], linear(want, net.heads[view]))


FLOATS, BYTES = normal(1, 3, 5, 18, 22), torch.randint(256, (1, 3, 5, 18, 22), dtype=torch.uint8)
SPECTROGRAMS = normal(2, 1, 37, 41)


@pytest.mark.parametrize("x", [normal(5, 6), SPECTROGRAMS, BYTES], ids=["1d", "2d", "3d"])
def test_student_is_its_parts_and_comes_back_from_its_file(x):
    encoder = built(models.backbone, x.shape[1:], dim=8, width=2)
    net = models.Student(encoder, models.TNet(8).composed(), models.Fusion(8, 3)).eval()
    single, z_v = models.Single(encoder, nn.Linear(8, 3)), encoder(x)
    torch.testing.assert_close(net(x), net.fusion(torch.stack([z_v, net.tnet(z_v)], dim=1)))
    torch.testing.assert_close(net(x), models.Student(nn.Identity(), net.tnet, net.fusion)(z_v))
    torch.testing.assert_close(single(x), (z_v, single.head(z_v)))

    saved = {"dim": 8, "width": 2, "input_shape": list(x.shape[1:]), "names": ["a", "b", "c"]}
    torch.save({**saved, "weights": net.state_dict()}, file := io.BytesIO())
    loaded = models.load_student(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    torch.testing.assert_close(loaded(x), net(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(KeyError):
        models.load_student({"weights": net.state_dict()})
    with pytest.raises(RuntimeError):
        models.load_student({**saved, "weights": single.state_dict()})


def layer(x, state, conv, norm, stride):
    """A convolution padded by half its kernel, and batch norm; their weights leave `state`."""
    kernels = numbers(state.pop(f"{conv}.weight"))
    x = np.pad(x, [(0, 0), *((size // 2, size // 2) for size in kernels.shape[2:])])
    where = (0, *(slice(None, None, step) for step in np.broadcast_to(stride, x.ndim - 1)))
    x = np.stack([correlate(x, kernel, "valid")[where] for kernel in kernels])
    parts = [state.pop(f"{norm}.{k}") for k in ("running_mean", "running_var", "weight", "bias")]
    mean, var, weight, bias = (numbers(t).reshape(-1, *[1] * (x.ndim - 1)) for t in parts)
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize("x", [SPECTROGRAMS, FLOATS, BYTES], ids=["2d", "3d", "3d bytes"])
def test_eighteen_layers_one_by_one_by_the_published_names(x):
    net = built(models.backbone, x.shape[1:], dim=5, width=3)
    out, state = numbers(x[0]), net.state_dict()
    if x.dim() == 4:
        conv1, bn1, conv2, bn2 = "conv1", "bn1", "conv2", "bn2"
        out = np.maximum(layer(out, state, "conv1", "bn1", 2), 0)
        out = maximum_filter(out, (1, 3, 3), mode="constant")[:, ::2, ::2]
    else:
        conv1, bn1, conv2, bn2 = "conv1.0", "conv1.1", "conv2.0", "conv2.1"
        mean, std = np.reshape([0.485, 0.456, 0.406, 0.229, 0.224, 0.225], (2, 3, 1, 1, 1))
        out = (out / 255 - mean) / std if x is BYTES else out
        out = np.maximum(layer(out, state, "stem.0", "stem.1", (1, 2, 2)), 0)
    for stage in range(1, 5):
        for name, stride in ((f"layer{stage}.0.", 1 + (stage > 1)), (f"layer{stage}.1.", 1)):
            hidden = np.maximum(layer(out, state, name + conv1, name + bn1, stride), 0)
            hidden = layer(hidden, state, name + conv2, name + bn2, 1)
            if stride == 2:
                out = layer(out, state, name + "downsample.0", name + "downsample.1", 2)
            out = np.maximum(hidden + out, 0)
    same(net(x)[0], linear(out.reshape(len(out), -1).mean(1), net.fc), 1e-4)
    left = {name for name in state if not name.endswith("num_batches_tracked")}
    assert left == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("x", [SPECTROGRAMS, BYTES], ids=["2d", "3d"])
def test_bfloat16_gives_nearly_the_same_in_float32(x):
    exact = built(models.backbone, x.shape[1:], dim=8, width=8)(x)
    near = built(models.backbone, x.shape[1:], dim=8, width=8, bfloat16=True)(x)
    assert near.dtype == exact.dtype == torch.float32
    assert 0 < (near - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("build, options, stem, shape, count", [
    (models.ResNet18, {"dim": 1000, "channels": 3}, "conv1.weight", (64, 3, 7, 7), 11_689_512),
    (models.R3D18, {"dim": 400}, "stem.0.weight", (64, 3, 3, 7, 7), 33_371_472),
])
def test_shapes_counts_and_initial_weights_are_published(build, options, stem, shape, count):
    net = build(**options)
    assert sum(p.numel() for p in net.parameters()) == count
    kernels = {name: p for name, p in net.named_parameters() if p.dim() > 2}
    for name, kernel in kernels.items():  # the initial weights by He et al., fan out
        size = {1 if "downsample" in name else 3}
        assert kernel.shape == shape if name == stem else set(kernel.shape[2:]) == size
        assert kernel.std().item() == pytest.approx((2 / kernel[:, 0].numel()) ** 0.5, rel=0.05)


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("build, options", [(models.ResNet18, {"channels": 3}), (models.R3D18, {})])
def test_published_weights_load_by_name_but_for_the_last_layer(build, options, counters):
    state = built(build, dim=1000, width=2, **options).state_dict()
    published = {name: t + 7 for name, t in state.items() if counters or t.dim()}
    net = build(dim=16, width=2)
    own = {name: t.clone() for name, t in net.state_dict().items()}
    models.load_published(net, published)
    for name, t in net.state_dict().items():
        want = own[name] if name.startswith("fc.") else published.get(name, own[name])
        assert t.equal(want.sum(1, keepdim=True) if want.shape[1:] == (3, 7, 7) else want)


def test_other_weights_are_refused_with_every_key():
    net, video = models.ResNet18(width=2), models.R3D18(width=2)
    other = video.state_dict()
    with pytest.raises(ValueError, match="not the published weights of ResNet18: ") as refused:
        models.load_published(net, other)
    assert {"missing bn1.weight", "unexpected stem.0.weight"} <= set(str(refused.value).split("; "))
    other["extra"] = other.pop("layer3.1.conv2.0.weight")
    with pytest.raises(ValueError, match="18: missing layer3.1.conv2.0.weight; unexpected extra$"):
        models.load_published(video, other)
    with pytest.raises(ValueError, match=r"; layer1.0.bn1.weight of shape \(4,\), not \(2,\); "):
        models.load_published(net, models.ResNet18(width=4).state_dict())
