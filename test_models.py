"""The networks against arithmetic written out in NumPy and SciPy, by torchvision's names."""

import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter
from scipy.signal import correlate
from torch import nn

import models


def normal(*shape):
    return torch.randn(*shape, generator=torch.manual_seed(1))


def built(build, *arguments, **options):
    """The same network every time, with random statistics and weights in every batch norm."""
    torch.manual_seed(1)
    network = build(*arguments, **options).eval()
    for t in network.state_dict().values():
        if isinstance(network, models.Residual18) and t.dim() == 1:
            t.uniform_(0.5, 1.5)
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
    """Multi-head attention in each clip, a head at a time."""
    weights, biases = numbers(module.in_proj_weight), numbers(module.in_proj_bias)
    maps = zip((queries, keys, keys), np.split(weights, 3), np.split(biases, 3))
    q, k, v = (np.split(x @ weight.T + bias, heads, axis=-1) for x, weight, bias in maps)
    scores = [np.exp(q[i] @ k[i].swapaxes(1, 2) / q[i].shape[-1] ** 0.5) for i in range(heads)]
    mixed = [score / score.sum(-1, keepdims=True) @ x for score, x in zip(scores, v)]
    return linear(np.concatenate(mixed, axis=-1), module.out_proj)


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
    assert [m.in_features for m in models.TNet()] == [512, 2048, 1024, 512, 256, 512, 1024, 2048]
    assert [m.in_features for m in models.Adapter()] == [512, 256]
    net, x = built(models.TNet, 16).double(), normal(30, 16).double()
    composed, want = net.composed(), linear(numbers(x), *net)
    same(net(x), want, 1e-10)
    same(composed(x), want, 1e-10)
    assert not any(p.requires_grad for p in composed.parameters()) and net[0].weight.requires_grad


def test_encoder_standardises_with_the_training_rows():
    x = normal(50, 6) * torch.tensor([7, 7, 0, 7, 7, 7]) + 4  # the third is constant
    net, rows = built(models.Encoder, 6, dim=8, dropout=0.5), numbers(x)
    net.fit_standardisation(x)
    rows = (rows - rows.mean(0)) / np.where(np.arange(6) == 2, 1, rows.std(0))
    same(net(x), linear(np.maximum(linear(rows, net.layers[0]), 0), net.layers[3]))


@pytest.mark.parametrize("adapters", [True, False])
def test_teachers_are_joint_visual_and_privileged(adapters):
    net, z = built(models.Teachers, 8, 3, adapters=adapters), normal(5, 2, 8)
    embeddings, predictions = net(z)
    torch.testing.assert_close((embeddings[:, 0], predictions[:, 0]), net.joint(z))
    for i, view in enumerate(("visual", "privileged")):
        want = linear(numbers(z[:, i]), *(net.adapters[view] if adapters else ()))
        same(embeddings[:, i + 1], want)
        same(predictions[:, i + 1], linear(want, net.heads[view]))


SPECTROGRAMS, FLOATS = normal(2, 1, 37, 41), normal(1, 3, 5, 18, 22)
BYTES = (50 * FLOATS + 128).clamp(0, 255).byte()


@pytest.mark.parametrize("x", [normal(5, 6), SPECTROGRAMS, BYTES], ids=["1d", "2d", "3d"])
def test_student_is_its_parts_and_comes_back_from_its_file(x, tmp_path):
    encoder = built(models.backbone, x.shape[1:], dim=8, width=2)
    net = models.Student(encoder, models.TNet(8).composed(), models.Fusion(8, 3)).eval()
    single, z_v = models.Single(encoder, nn.Linear(8, 3)), encoder(x)
    torch.testing.assert_close(net(x), net.fusion(torch.stack([z_v, net.tnet(z_v)], dim=1)))
    torch.testing.assert_close(net(x), models.Student(nn.Identity(), net.tnet, net.fusion)(z_v))
    torch.testing.assert_close(single(x), (z_v, single.head(z_v)))
    saved = {"dim": 8, "width": 2, "input_shape": list(x.shape[1:]), "names": ["a", "b", "c"]}
    torch.save({**saved, "weights": net.state_dict()}, tmp_path / "student.pt")
    loaded = models.load_student(torch.load(tmp_path / "student.pt", weights_only=True))
    torch.testing.assert_close(loaded(x), net(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for error, weights in ((KeyError, {}), (RuntimeError, {"weights": {}})):
        with pytest.raises(error):
            models.load_student({**saved, **weights})


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
def test_eighteen_layers_one_by_one_by_the_published_names_and_in_bfloat16(x):
    net, half = (built(models.backbone, x.shape[1:], 5, 3, bfloat16) for bfloat16 in (False, True))
    out, state = numbers(x[0]), net.state_dict()
    if x is BYTES:
        mean, std = np.reshape([0.485, 0.456, 0.406, 0.229, 0.224, 0.225], (2, 3, 1, 1, 1))
        out = (out / 255 - mean) / std
    if x is SPECTROGRAMS:
        parts = "conv1", "bn1", "conv2", "bn2"
        out = np.maximum(layer(out, state, "conv1", "bn1", 2), 0)
        out = maximum_filter(out, (1, 3, 3), mode="constant")[:, ::2, ::2]
    else:
        parts = "conv1.0", "conv1.1", "conv2.0", "conv2.1"
        out = np.maximum(layer(out, state, "stem.0", "stem.1", (1, 2, 2)), 0)
    for stage, block in np.ndindex(4, 2):
        name, stride = f"layer{stage + 1}.{block}.", 2 if stage > 0 == block else 1
        conv1, bn1, conv2, bn2 = (name + part for part in parts)
        hidden = np.maximum(layer(out, state, conv1, bn1, stride), 0)
        if stride == 2:
            out = layer(out, state, name + "downsample.0", name + "downsample.1", 2)
        out = np.maximum(layer(hidden, state, conv2, bn2, 1) + out, 0)
    same(net(x)[0], linear(out.reshape(len(out), -1).mean(1), net.fc), 1e-4)
    assert {name for name in state if "num_batches" not in name} == {"fc.weight", "fc.bias"}
    assert half(x).dtype == torch.float32 and 0 < (half(x) - net(x)).norm() < 0.03 * net(x).norm()


@pytest.mark.parametrize("build, options, stem, shape, count", [
    (models.ResNet18, {"dim": 1000, "channels": 3}, "conv1.weight", (64, 3, 7, 7), 11_689_512),
    (models.R3D18, {"dim": 400}, "stem.0.weight", (64, 3, 3, 7, 7), 33_371_472),
])
def test_shapes_and_counts_are_published_and_such_files_load(build, options, stem, shape, count):
    published = built(build, **options)
    weights = dict(published.named_parameters())
    assert sum(p.numel() for p in weights.values()) == count and weights[stem].shape == shape
    for name, kernel in weights.items():
        if kernel.dim() > 2:  # He et al., fan out
            assert name == stem or set(kernel.shape[2:]) == {1 if "downsample" in name else 3}
            assert kernel.std().item() == pytest.approx((2 / kernel[:, 0].numel()) ** 0.5, rel=0.05)
    for counters in (True, False):
        file = {name: t + 7 for name, t in published.state_dict().items() if counters or t.dim()}
        net, own = built(build, dim=16), built(build, dim=16).state_dict()
        models.load_published(net, file)
        for name, t in net.state_dict().items():
            want = own[name] if name.startswith("fc.") else file.get(name, own[name])
            assert t.equal(want.sum(1, keepdim=True) if want.shape[1:] == (3, 7, 7) else want)


def test_other_weights_are_refused_with_every_key():
    video, wide = models.R3D18(width=2).state_dict(), models.ResNet18(width=4).state_dict()
    video["extra"] = video.pop("layer3.1.conv2.0.weight")
    for build, other, *why in (
        (models.R3D18, video, "R3D18:", "Missing.*layer3.1.conv2.0.weight.*Unexpected.*extra"),
        (models.ResNet18, video, "ResNet18:", "Missing.*bn1.weight.*Unexpected.*stem.0.weight"),
        (models.ResNet18, wide, "ResNet18:", r"layer1.0.bn1.weight: .*\[4\].*\[2\]"),
    ):
        with pytest.raises(RuntimeError, match="(?s)" + ".*".join(why)):
            models.load_published(build(width=2), other)
