"""The networks against arithmetic written out in NumPy, and the properties that the method rests on."""

import numpy as np
import torch

from models import Adapter, Encoder, Fusion, Head, Student, Teachers, TNet


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
