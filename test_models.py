"""The networks against arithmetic written out in NumPy, and the properties that the method rests on."""

import numpy as np
import pytest
import torch

from models import R3D18, Adapter, Encoder, Fusion, Head, ResNet18, Student, Teachers, TNet, load_published


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def built(seed, build):
    torch.manual_seed(seed)
    return build().eval()


def linear(layer, x):
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def attention(module, queries, keys, heads=2):
    """Multi-head attention, a clip and a head at a time."""
    w, bias = module.in_proj_weight.detach().double().numpy(), module.in_proj_bias.detach().double().numpy()
    dim = w.shape[1]
    out = np.zeros_like(queries)
    for b in range(len(queries)):
        q, k, v = (x @ w[i * dim : (i + 1) * dim].T + bias[i * dim : (i + 1) * dim]
                   for i, x in enumerate((queries[b], keys[b], keys[b])))  # fmt: skip
        for h in range(heads):
            part = slice(h * dim // heads, (h + 1) * dim // heads)
            score = q[:, part] @ k[:, part].T / np.sqrt(dim / heads)
            weight = np.exp(score) / np.exp(score).sum(1, keepdims=True)
            out[b][:, part] = weight @ v[:, part]
    return linear(module.out_proj, out)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_fusion_is_its_formula():
    net = built(1, lambda: Fusion(dim=8, outputs=3))
    v, p = normal(1, 5, 4, 8), normal(2, 5, 4, 8)
    hidden = []
    for block, x in ((net.self_visual, v.double().numpy()), (net.self_privileged, p.double().numpy())):
        x = layer_norm(x + attention(block.attention, x, x))
        first, _, second = block.feed_forward
        hidden.append(layer_norm(x + linear(second, np.maximum(linear(first, x), 0))))
    c_v = attention(net.cross_visual, hidden[0], hidden[1])
    c_p = attention(net.cross_privileged, hidden[1], hidden[0])
    g = 1 / (1 + np.exp(-linear(net.gate, np.concatenate([c_v, c_p], axis=-1))))
    z = (g * c_v + (1 - g) * c_p).mean(1)
    got_z, got = net(v, p)
    assert got_z.shape == (5, 8) and got.shape == (5, 3)
    assert np.abs(got_z.detach().numpy() - z).max() < 1e-5
    assert np.abs(got.detach().numpy() - linear(net.head, z)).max() < 1e-5


def test_fusion_never_mixes_clips():
    net = built(1, lambda: Fusion(dim=8, outputs=2))
    v, p = normal(1, 6, 1, 8), normal(2, 6, 1, 8)
    whole = net(v, p)[0]
    other = v.clone()
    other[3] += 1
    changed = (net(other, p)[0] - whole).abs().sum(1).tolist()
    assert changed.pop(3) > 1e-3 and max(changed) < 1e-6
    torch.testing.assert_close(net(v[2:3], p[2:3])[0], whole[2:3])


def test_shapes_and_widths_of_the_method():
    assert [layer.weight.shape for layer in Adapter()] == [(256, 512), (512, 256)]
    widths = [512, 2048, 1024, 512, 256, 512, 1024, 2048, 512]
    assert [tuple(layer.weight.shape) for layer in TNet()] == list(zip(widths[1:], widths[:-1]))
    assert Head(512, 2)(torch.zeros(3, 512)).shape == (3, 2)


def test_linear_parts_have_no_activation():
    for net in (built(1, lambda: Adapter(16)), built(2, lambda: TNet(16))):
        x, y = normal(1, 4, 16), normal(2, 4, 16)
        torch.testing.assert_close(net(x) + net(y), net(x + y) + net(torch.zeros(4, 16)), rtol=1e-4, atol=1e-5)


def test_tnet_composed_is_tnet():
    net = built(1, lambda: TNet(16)).double()
    one = net.composed()
    x = normal(1, 9, 16).double().requires_grad_()
    torch.testing.assert_close(one(x), net(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (one, net)))
    assert not one.weight.requires_grad and net[0].weight.requires_grad


def test_encoder_standardises_with_the_training_rows():
    x = normal(1, 50, 3, 2) * 7 + 4
    x[:, 0, 0] = 2.5
    net = built(1, lambda: Encoder(6, dim=8))
    net.fit_standardisation(x)
    flat = x.flatten(1).double().numpy()
    std = np.where(flat.std(0) > 0, flat.std(0), 1)
    first, _, second = net.layers
    want = linear(second, np.maximum(linear(first, (flat - flat.mean(0)) / std), 0))
    assert np.abs(net(x).detach().numpy() - want).max() < 1e-5
    assert {"mean", "std"} <= set(net.state_dict())


def test_teachers_are_joint_and_adapted():
    net = built(1, lambda: Teachers(dim=8, outputs=3))
    z_v, z_p = normal(1, 5, 8), normal(2, 5, 8)
    out = net(z_v, z_p)
    torch.testing.assert_close(out["joint"], net.joint(z_v[:, None], z_p[:, None]))
    for name, z in (("visual", z_v), ("privileged", z_p)):
        adapted = net.adapters[name](z)
        torch.testing.assert_close(out[f"adapted_{name}"], (adapted, net.heads[name](adapted)))


def test_student_needs_the_visual_input_only():
    encoder, tnet, fusion = Encoder(6, 8), TNet(8), Fusion(8, 3)
    net = Student(encoder, tnet, fusion).eval()
    x = normal(1, 5, 6)
    z = encoder(x)
    torch.testing.assert_close(net(x), fusion(z[:, None], tnet(z)[:, None]))
    assert net(x)[0].shape == (5, 8) and net(x)[1].shape == (5, 3)


# ---- the two 18-layer networks ------------------------------------------------------------------------


def convolution(x, weight, stride, padding):
    """Cross-correlation in any number of dimensions, one kernel position at a time; (C, ...) -> (C', ...)."""
    x = np.pad(x, [(0, 0)] + [(p, p) for p in padding])
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:], weight.shape[2:], stride)]
    out = np.zeros((len(weight), *sizes))
    for position in np.ndindex(*weight.shape[2:]):
        window = x[(slice(None), *(slice(p, p + s * n, s) for p, s, n in zip(position, stride, sizes)))]
        out += np.tensordot(weight[(slice(None), slice(None), *position)], window, axes=1)
    return out


def batch_norm(x, state, name):
    parts = [
        state[f"{name}.{part}"].reshape(-1, *[1] * (x.ndim - 1))
        for part in ("running_mean", "running_var", "weight", "bias")
    ]
    return (x - parts[0]) / np.sqrt(parts[1] + 1e-5) * parts[2] + parts[3]


def eighteen_layers(x, state, names):
    """The residual stages and the last layer by the published names; `names` maps a block's parts to their keys."""

    def conv(x, name, stride):
        weight = state[f"{name}.weight"]
        return convolution(x, weight, [stride] * (x.ndim - 1), [weight.shape[-1] // 2] * (x.ndim - 1))

    for stage in range(1, 5):
        for block in range(2):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            out = np.maximum(batch_norm(conv(x, f"{at}.{names[0]}", stride), state, f"{at}.{names[1]}"), 0)
            out = batch_norm(conv(out, f"{at}.{names[2]}", 1), state, f"{at}.{names[3]}")
            if f"{at}.downsample.0.weight" in state:
                x = batch_norm(conv(x, f"{at}.downsample.0", stride), state, f"{at}.downsample.1")
            x = np.maximum(out + x, 0)
    return state["fc.weight"] @ x.reshape(len(x), -1).mean(1) + state["fc.bias"]


def shaken(network):
    """Random statistics and affine weights in every batch norm; the state as NumPy float64."""
    for name, t in network.state_dict().items():
        if t.dim() == 1 and not name.startswith("fc."):
            t.copy_(torch.rand(t.shape) + 0.5)
    return {name: t.double().numpy() for name, t in network.state_dict().items()}


def test_resnet18_layer_by_layer():
    net = built(1, lambda: ResNet18(dim=5, width=3))
    state, x = shaken(net), normal(1, 1, 1, 37, 41)
    h = convolution(x[0].double().numpy(), state["conv1.weight"], (2, 2), (3, 3))
    h = np.maximum(batch_norm(h, state, "bn1"), 0)
    h = np.pad(h, [(0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    rows, columns = (h.shape[1] - 3) // 2 + 1, (h.shape[2] - 3) // 2 + 1
    h = np.array(
        [[[c[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max() for j in range(columns)] for i in range(rows)] for c in h]
    )
    want = eighteen_layers(h, state, ("conv1", "bn1", "conv2", "bn2"))
    np.testing.assert_allclose(net(x)[0].detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_r3d18_layer_by_layer():
    net = built(1, lambda: R3D18(dim=5, width=3))
    state, x = shaken(net), normal(1, 1, 3, 5, 18, 22)
    h = convolution(x[0].double().numpy(), state["stem.0.weight"], (1, 2, 2), (1, 3, 3))
    h = np.maximum(batch_norm(h, state, "stem.1"), 0)
    want = eighteen_layers(h, state, ("conv1.0", "conv1.1", "conv2.0", "conv2.1"))
    np.testing.assert_allclose(net(x)[0].detach().numpy(), want, rtol=1e-4, atol=1e-5)


def published_shapes(kernel, stem, conv, bn, channels, classes):
    """Every key and shape of the published files, written out: stem, then (stage, block) by name."""

    def norm(name, n):
        return {f"{name}.{part}": (n,) for part in ("weight", "bias", "running_mean", "running_var")} | {
            f"{name}.num_batches_tracked": ()
        }

    shapes = {f"{stem[0]}.weight": channels} | norm(stem[1], 64)
    for stage, (inputs, outputs) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], 1):
        for block in range(2):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.{conv[0]}.weight": (outputs, outputs if block else inputs, *kernel)} | norm(
                f"{at}.{bn[0]}", outputs
            )
            shapes |= {f"{at}.{conv[1]}.weight": (outputs, outputs, *kernel)} | norm(f"{at}.{bn[1]}", outputs)
        if stage > 1:
            shapes |= {f"layer{stage}.0.downsample.0.weight": (outputs, inputs, *[1] * len(kernel))}
            shapes |= norm(f"layer{stage}.0.downsample.1", outputs)
    return shapes | {"fc.weight": (classes, 512), "fc.bias": (classes,)}


RESNET18 = published_shapes((3, 3), ("conv1", "bn1"), ("conv1", "conv2"), ("bn1", "bn2"), (64, 3, 7, 7), 1000)
R3D_18 = published_shapes(
    (3, 3, 3), ("stem.0", "stem.1"), ("conv1.0", "conv2.0"), ("conv1.1", "conv2.1"), (64, 3, 3, 7, 7), 400
)


@pytest.mark.parametrize("build, shapes, count", [
    (lambda: ResNet18(dim=1000, channels=3), RESNET18, 11_689_512),
    (lambda: R3D18(dim=400), R3D_18, 33_371_472),
])  # fmt: skip
def test_names_shapes_and_counts_are_the_published_ones(build, shapes, count):
    net = build()
    assert {name: tuple(t.shape) for name, t in net.state_dict().items()} == shapes
    assert sum(p.numel() for p in net.parameters()) == count


def published_file(shapes, counters=True):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(shape, generator=generator) if shape else torch.tensor(7)
            for name, shape in shapes.items() if counters or shape}  # fmt: skip


@pytest.mark.parametrize("counters", [True, False])
def test_published_weights_load_by_name_and_the_stem_is_summed(counters):
    published = published_file(RESNET18, counters)
    net = ResNet18(dim=16)
    last = net.fc.weight.clone()
    load_published(net, published)
    torch.testing.assert_close(net.conv1.weight, published["conv1.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(net.layer4[0].downsample[0].weight, published["layer4.0.downsample.0.weight"])
    assert net.fc.weight.equal(last) and published["conv1.weight"].shape == (64, 3, 7, 7)
    video = R3D18(dim=16)
    load_published(video, published_file(R3D_18, counters))
    torch.testing.assert_close(video.stem[0].weight, published_file(R3D_18, counters)["stem.0.weight"])


def test_other_weights_are_refused_with_every_key():
    published = published_file(R3D_18)
    with pytest.raises(
        ValueError, match="not the published weights of ResNet18: missing .*conv1.weight.*unexpected stem.0.weight"
    ):
        load_published(ResNet18(), published)
    published["extra"] = published.pop("layer3.1.conv2.0.weight")
    with pytest.raises(ValueError, match="R3D18: missing layer3.1.conv2.0.weight; unexpected extra$"):
        load_published(R3D18(), published)
    with pytest.raises(ValueError, match=r"layer1.0.conv1.weight of shape \(64, 64, 3, 3\), not \(8, 8, 3, 3\)"):
        load_published(ResNet18(width=8), published_file(RESNET18))


def test_against_torchvision():
    models = pytest.importorskip("torchvision").models
    pairs = [
        (models.resnet18(), ResNet18(channels=3), (2, 3, 64, 64)),
        (models.video.r3d_18(), R3D18(), (1, 3, 8, 32, 32)),
    ]
    for theirs, ours, shape in pairs:
        shaken(theirs)
        load_published(ours, theirs.state_dict())
        theirs.fc, x = ours.fc, normal(1, *shape)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
