"""Feature files, synthetic data and folds."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from data import DataError, folds, load


def read(dataset, path, *needs, **more):
    """What load gives for these options of train.py; the others are at their defaults."""
    defaults = {"seed": 0, "clip_stride": 1, "workers": 0}
    return load(Namespace(dataset=dataset, data=path, **{**defaults, **more}), *needs)


def features(path, *needs):
    return read("features", path, *needs)


def refused(message, call, *given, **more):
    """The call raises a DataError of one line, with this message."""
    with pytest.raises(DataError, match=message) as caught:
        call(*given, **more)
    assert "\n" not in str(caught.value)


def written(tmp_path, n=40, **keys):
    """A file of two views of n rows and four classes, and of other keys; None leaves one out."""
    normal = np.random.default_rng(0).normal
    views = {"visual": normal(size=(n, 5)), "privileged": normal(size=(n, 2, 3))}
    keys = {**views, "label": np.arange(n) % 4, **keys}
    np.savez(tmp_path / "f.npz", **{key: array for key, array in keys.items() if array is not None})
    return tmp_path / "f.npz"


def test_features_are_what_was_written(tmp_path):
    people, parts = np.repeat(list("abcd"), 10), np.repeat(["train", "val"], [30, 10])
    path = written(tmp_path, label=np.array([7, -2] * 20), group=people, split=parts)
    data, given = features(path), np.load(path)
    for view, key in ((data.visual, "visual"), (data.privileged, "privileged")):
        assert view.equal(torch.tensor(given[key].reshape(40, -1), dtype=torch.float32))
    assert data.names == [-2, 7] and data.label.tolist() == [1, 0] * 20
    assert data.group.tolist() == np.repeat(range(4), 10).tolist()
    assert data.split.tolist() == (parts == "train").tolist()
    data = features(written(tmp_path, visual=np.arange(40)))
    assert data.visual.tolist() == [[i] for i in range(40)] and data.names == [0, 1, 2, 3]
    for names in (["0"], ["valence", "arousal"], ["0", "1", "2"]):
        label = np.random.default_rng(1).uniform(-1, 1, (40, len(names)))
        data = features(written(tmp_path, label=label))
        assert data.task == "regression" and data.names == names
        assert data.label.equal(torch.tensor(label, dtype=torch.float32))
    data = features(written(tmp_path, privileged=None, label=None, notes=BAD_KIND), False, False)
    assert data.visual.shape == (40, 5) and data.privileged is None and data.label is None


BAD_KIND = np.array([{}] * 40)
NAN, INF = np.ones((40, 5)), np.ones((40, 5))
NAN[17, 3], INF[4, 0] = np.nan, 1e300  # infinite as a float32
BAD = [
    ({"visual": None}, "must be .* plain arrays visual, privileged, label .'visual is not a file"),
    ({"visual": BAD_KIND}, "must be a .npz file of plain arrays"),
    ({"visual": NAN}, "visual row 17 holds NaN"),
    ({"privileged": INF}, "privileged row 4 holds"),
    ({"label": np.ones(40)}, r"label must be \(N,\) integers"),
    ({"group": np.arange(3)}, "group must be .*N = 40, not int64 .3,"),
    ({"split": np.array(["train"] * 39 + ["test"])}, "split row 39 holds"),
]


@pytest.mark.filterwarnings("error", "ignore:overflow")
def test_mistakes_are_named(tmp_path):
    for keys, message in BAD:
        refused(f"f.npz: {message}", features, written(tmp_path, **keys))
    refused("--data: synthetic data has no file", read, "synthetic", "a.npz")


def test_synthetic_voices_rise_with_arousal():
    data = read("synthetic", None)
    assert data.visual.shape == (1440, 3, 2, 24, 24) and data.visual.dtype == torch.uint8
    assert data.privileged.shape == (1440, 1, 24, 24) and data.privileged.dtype == torch.float32
    assert data.names == ["valence", "arousal"] and float(data.label.abs().max()) <= 1
    assert not set(data.group[data.split]) & set(data.group[~data.split])
    assert read("synthetic", None, seed=1).visual.equal(data.visual)
    first = data.privileged[:, 0, 3:9].mean(2).argmax(1)  # the first harmonic
    assert np.corrcoef(first, data.label[:, 1])[0, 1] > 0.7


def check_partition(parts, n):
    assert sorted(np.concatenate([val for _, _, val in parts])) == list(range(n))
    for train, choose, val in parts:
        assert choose.equal(val)  # the paper's protocol
        assert train.tolist() == sorted(set(range(n)) - set(val.tolist()))


def test_folds_share_nobody_and_set_a_fifth_aside(tmp_path):
    group, label = np.arange(120) // 6, np.random.default_rng(0).normal(size=(120, 2))
    data = features(written(tmp_path, n=120, label=label, group=group))
    parts, aside = (folds(data, 4, seed=1, set_aside=wanted) for wanted in (False, True))
    check_partition(parts, 120)
    for (train, choose, val), (everything, _, same) in zip(aside, parts):
        assert val.equal(same) and sorted([*train, *choose]) == everything.tolist()
        people = [set(group[rows]) for rows in (train, choose, val)]
        assert [len(part) for part in people] == [12, 3, 5] and len(set.union(*people)) == 20
    assert parts[0][2].tolist() != folds(data, 4, seed=2)[0][2].tolist()
    uneven = data._replace(group=np.repeat(np.arange(15), np.arange(1, 16)))
    assert sorted(len(val) for _, _, val in folds(uneven, 4)) == [24, 28, 32, 36]  # largest first
    refused("fold 20 has .* 0 scored rows: use more data or fewer", folds, data, 21)


def test_folds_without_people_and_train_rows(tmp_path):
    label = np.repeat([0, 1, 2], [23, 11, 6])
    data = features(written(tmp_path, label=label))
    parts, drawn = folds(data), folds(data, train_rows=20, set_aside=True)
    check_partition(parts, 40)
    for (everything, _, val), (train, choose, same) in zip(parts, drawn):
        assert val.equal(same) and (len(train), len(choose), len(val)) == (16, 4, 8)
        assert all(abs((label[val] == c).sum() - (label == c).sum() / 5) < 1 for c in range(3))
        both = {*train.tolist(), *choose.tolist()}
        assert len(both) == 20 and both <= set(everything.tolist())
    refused("--train-rows: fold 0 has only 32", folds, data, train_rows=33)


def test_the_data_sets_own_split(tmp_path):
    split = np.array(["train", "val"] * 20)
    data = features(written(tmp_path, split=split, group=np.arange(40) // 5))
    refused("group row 1 is of a person in both parts", folds, data)
    check_partition(folds(data, 4), 40)
    ((train, _, val),) = folds(features(written(tmp_path, split=split)))
    assert set(split[train]) == {"train"} and set(split[val]) == {"val"}
    alone = features(written(tmp_path, split=np.repeat("train", 40)))
    refused("fold 0 has 40 training, 0 choosing", folds, alone)
