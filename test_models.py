"""The networks against torch's functions, by torchvision's names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def over_one_step(attention, x):
    """Attention to a single key, whose weight is 1: a linear map of its value."""
    value = F.linear(x, attention.in_proj_weight[-8:], attention.in_proj_bias[-8:])
    return attention.out_proj(value)


def test_attention_and_fusion_are_their_formulas_clip_by_clip():
    block, x = built(models.SelfAttention, 8, heads=2), normal(5, 4, 8)
    reference = nn.TransformerEncoderLayer(8, 2, 8, dropout=0, batch_first=True).eval()
    reference.self_attn.load_state_dict(block.attention.state_dict())
    reference.linear1, _, reference.linear2 = block.feed_forward
    reference.norm1, reference.norm2 = block.norm_attention, block.norm_feed_forward
    close(block(x), reference(x))
    net, z = built(models.Fusion, dim=8, outputs=3), normal(5, 2, 8)
    v, p = net.self_visual(z[:, :1])[:, 0], net.self_privileged(z[:, 1:])[:, 0]
    c_v, c_p = over_one_step(net.cross_visual, p), over_one_step(net.cross_privileged, v)
    g = net.gate(torch.cat([c_v, c_p], dim=1)).sigmoid()
    z_j = g * c_v + (1 - g) * c_p
    close(net(z), (z_j, net.head(z_j)))


def test_tnet_and_adapter_have_the_published_widths_and_are_their_layers():
    assert [m.in_features for m in models.TNet()] == [512, 2048, 1024, 512, 256, 512, 1024, 2048]
    assert [m.in_features for m in models.Adapter()] == [512, 256]
    x, adapter = normal(30, 16), models.Adapter(16)
    adapter.start(x)  # the nearest matrix of rank 8
    u, s, v = np.linalg.svd(x.numpy(), full_matrices=False)
    close(adapter(x), torch.from_numpy(u[:, :8] * s[:8] @ v[:8]), 1e-5)
    tnet, out = built(models.TNet, 16), x
    for layer in tnet:
        out = F.linear(out, layer.weight, layer.bias)
    close(tnet(x), (out, out))


def test_encoder_standardises_with_the_training_rows():
    x = normal(50, 6) * torch.tensor([7, 7, 0, 7, 7, 7]) + 4  # the third is constant
    net = built(models.Encoder, 6, dim=8, dropout=0.5)
    net.fit_standardisation(x)
    rows = (x - x.mean(0)) / x.std(0, correction=0).where(torch.arange(6) != 2, 1)
    close(net(x), net.layers[3](net.layers[0](rows).relu()))


@pytest.mark.parametrize("adapters", [True, False])
def test_teachers_are_joint_visual_and_privileged(adapters):
    net, z = built(models.Teachers, 8, 3, adapters=adapters), normal(5, 2, 8)
    z_j, joint = net.joint(z)
    want, predictions = [z_j], [joint]
    for x, (view, head) in zip(z.unbind(1), net.heads.items()):
        want.append(net.adapters[view][1](net.adapters[view][0](x)) if adapters else x)
        predictions.append(head(want[-1]))
    assert list(net.heads) == ["visual", "privileged"]
    close(net(z), (torch.stack(want, dim=1), torch.stack(predictions, dim=1)))


SPECTROGRAMS, FLOATS = normal(2, 1, 37, 41), normal(1, 3, 5, 18, 22)
BYTES = (50 * FLOATS + 128).clamp(0, 255).byte()


@pytest.mark.parametrize("x", [normal(5, 6), SPECTROGRAMS, BYTES], ids=["1d", "2d", "3d"])
def test_student_is_its_parts_and_comes_back_from_its_file(x, tmp_path):
    encoder = built(models.backbone, x.shape[1:], dim=8, width=2)
    net = models.Student(encoder, models.TNet(8), models.Fusion(8, 3)).eval()
    single, z_v = models.Single(encoder, nn.Linear(8, 3)), encoder(x)
    close(net(x), net.fusion(torch.stack([z_v, net.tnet(z_v)[0]], dim=1)))
    close(single(x), (z_v, single.head(z_v)))
    for whole in (net, single):
        close(models.on_embeddings(whole)(z_v), whole(x))
    saved = {"origin": {"dim": 8, "width": 2}, "names": ["a", "b", "c"]}
    saved["input_shape"] = list(x.shape[1:])
    torch.save({**saved, "weights": net.state_dict()}, tmp_path / "student.pt")
    loaded = models.load_student(torch.load(tmp_path / "student.pt", weights_only=True))
    close(loaded(x), net(x))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for error, weights in ((KeyError, {}), (RuntimeError, {"weights": {}})):
        with pytest.raises(error):
            models.load_student({**saved, **weights})


def layer(x, state, conv, norm, stride):
    """A convolution padded by half its kernel, and batch norm; their weights leave `state`."""
    kernel = state.pop(f"{conv}.weight")
    convolve = F.conv2d if kernel.dim() == 4 else F.conv3d
    x = convolve(x, kernel, None, stride, [size // 2 for size in kernel.shape[2:]])
    parts = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state.pop(f"{norm}.{part}") for part in parts))


@pytest.mark.parametrize("x", [SPECTROGRAMS, FLOATS, BYTES], ids=["2d", "3d", "3d bytes"])
def test_eighteen_layers_one_by_one_by_the_published_names(x):
    net = built(models.backbone, x.shape[1:], 5, 3)
    out, state = x, net.state_dict()
    if x is BYTES:
        mean, std = torch.tensor([0.485, 0.456, 0.406, 0.229, 0.224, 0.225]).view(2, 3, 1, 1, 1)
        out = (x / 255 - mean) / std
    if x is SPECTROGRAMS:
        parts = "conv1", "bn1", "conv2", "bn2"
        out = F.max_pool2d(layer(out, state, "conv1", "bn1", 2).relu(), 3, 2, padding=1)
    else:
        parts = "conv1.0", "conv1.1", "conv2.0", "conv2.1"
        out = layer(out, state, "stem.0", "stem.1", (1, 2, 2)).relu()
    for stage, block in np.ndindex(4, 2):
        name, stride = f"layer{stage + 1}.{block}.", 2 if stage > 0 == block else 1
        conv1, bn1, conv2, bn2 = (name + part for part in parts)
        hidden = layer(out, state, conv1, bn1, stride).relu()
        if stride == 2:
            out = layer(out, state, name + "downsample.0", name + "downsample.1", 2)
        out = (layer(hidden, state, conv2, bn2, 1) + out).relu()
    close(net(x), net.fc(out.flatten(2).mean(2)), 1e-4)
    assert {name for name in state if "num_batches" not in name} == {"fc.weight", "fc.bias"}
    if torch.cuda.is_available():
        want = net.cuda()(x.cuda())
        net.training = True  # in bfloat16; its batch norms are not
        got = net(x.cuda())
        assert got.dtype == torch.float32 and 0 < (got - want).norm() < 0.03 * want.norm()


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
