"""Feature files, the synthetic data and folds: what is read is what was written, nobody is on both
sides, mistakes are named."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from data import DataError, digest, features, folds, load, synthetic


def arrays(n=40, **more):
    rng = np.random.default_rng(0)
    views = {"visual": rng.normal(size=(n, 5)), "privileged": rng.normal(size=(n, 2, 3))}
    return {**views, "label": np.arange(n) % 4, **more}


def written(tmp_path, **keys):
    kept = {name: value for name, value in arrays(**keys).items() if value is not None}
    np.savez(tmp_path / "f.npz", **kept)
    return tmp_path / "f.npz"


def test_features_are_what_was_written(tmp_path):
    people, parts = np.repeat(list("abcd"), 10), np.repeat(["train", "val"], [30, 10])
    given = arrays(group=people, split=parts)
    data = features(written(tmp_path, group=people, split=parts))
    assert np.array_equal(data.visual.numpy(), given["visual"].astype(np.float32))
    assert np.array_equal(data.privileged.numpy(), given["privileged"].reshape(40, 6).astype("f4"))
    assert data.label.tolist() == given["label"].tolist() and data.names == [0, 1, 2, 3]
    assert data.group.tolist() == np.repeat([0, 1, 2, 3], 10).tolist()
    assert data.split.tolist() == [True] * 30 + [False] * 10
    data = features(written(tmp_path, label=np.array([7, -2] * 20), visual=np.arange(40)))
    assert data.names == [-2, 7] and data.label.tolist() == [1, 0] * 20
    assert data.visual.shape == (40, 1) and data.visual.dtype == torch.float32


@pytest.mark.parametrize("names", [["0"], ["valence", "arousal"], ["0", "1", "2"]])
def test_float_labels_make_a_regression(tmp_path, names):
    label = np.random.default_rng(1).uniform(-1, 1, (40, len(names)))
    data = features(written(tmp_path, label=label))
    assert data.task == "regression" and data.names == names
    assert np.array_equal(data.label.numpy(), label.astype(np.float32))
    with pytest.warns(UserWarning, match="f.npz: label: scale it"):
        features(written(tmp_path, label=10 * label + 70))


def test_what_is_not_needed_may_be_missing_or_anything(tmp_path):
    path = written(tmp_path, privileged=None, label=None)
    data = features(path, need_privileged=False, need_label=False)
    assert data.privileged is None and data.label is None
    with pytest.raises(DataError, match="arrays visual, privileged, label"):
        features(path)
    objects = np.array([{}] * 40, dtype=object)
    path = written(tmp_path, privileged=objects, notes=objects[:1])
    assert features(path, need_privileged=False).visual.shape == (40, 5)


NAN, INF = np.ones((40, 5)), np.ones((40, 5))
NAN[17, 3], INF[4, 0] = np.nan, 1e300  # infinite as a float32
BAD = [
    ({"visual": None}, "'visual is not a file"),
    ({"group": np.arange(3)}, "group must be .*N = 40, not int64 .3,"),
    ({"visual": np.float64(3)}, "visual must be"),
    ({"visual": NAN}, "visual row 17 holds NaN"),
    ({"privileged": INF}, "privileged row 4 holds"),
    ({"visual": np.ones((40, 0))}, "visual must be"),
    ({"visual": np.ones((40, 5), dtype=complex)}, "visual must be"),
    ({"visual": np.array([{}] * 40, dtype=object)}, "must be a .npz file of plain arrays"),
    ({"label": np.ones(40)}, r"label must be \(N,\) integers"),
    ({"label": np.full((40, 2), np.nan)}, "label row 0 holds NaN"),
    ({"group": np.ones(40)}, r"group must be \(N,\) integers or strings"),
    ({"split": np.array(["train"] * 39 + ["test"])}, "split row 39 holds"),
    ({"split": np.ones((40, 2))}, r"split must be \(N,\)"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("keys, message", BAD)
def test_mistakes_in_a_file_are_named(tmp_path, keys, message):
    with pytest.raises(DataError, match=message) as caught:
        features(written(tmp_path, **keys))
    assert "f.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_load_by_name():
    how = {"seed": 3, "clip_stride": 1, "levels": ["BL1", "PA4"], "signal": "gsr", "workers": 0}
    assert load(Namespace(dataset="synthetic", data=None, **how)).visual.equal(synthetic(3).visual)
    for name, path, message in [
        ("features", None, "--data: none: must be"),
        ("affwild2", None, "data/affwild2: no"),
        ("synthetic", "a.npz", "--data: synthetic data has no file"),
    ]:
        with pytest.raises(DataError, match=message):
            load(Namespace(dataset=name, data=path, **how))


def test_synthetic_faces_smile_with_valence_and_the_voice_rises_with_arousal():
    data = synthetic(0)
    assert data.visual.shape == (1440, 3, 2, 24, 24) and data.visual.dtype == torch.uint8
    assert data.privileged.shape == (1440, 1, 24, 24) and data.privileged.dtype == torch.float32
    assert data.names == ["valence", "arousal"] and float(data.label.abs().max()) <= 1
    assert not set(data.group[data.split]) & set(data.group[~data.split])
    assert synthetic(0).visual.equal(data.visual) and not synthetic(1).visual.equal(data.visual)
    mouth = data.visual[:, 0].float().mean(1)[:, 13:21].argmin(1).float()  # its row, by column
    smile = mouth[:, 10:14].mean(1) - mouth[:, [7, 8, 15, 16]].mean(1)
    first = data.privileged[:, 0, 3:9].mean(2).argmax(1)  # the first harmonic
    for seen, column in ((smile, 0), (first, 1)):
        assert np.corrcoef(seen, data.label[:, column])[0, 1] > 0.7


def check_partition(parts, n):
    assert sorted(np.concatenate([val for _, _, val in parts])) == list(range(n))
    for train, choose, val in parts:
        assert choose.equal(val)  # the paper's protocol
        assert train.tolist() == sorted(set(range(n)) - set(val.tolist()))


def test_folds_by_person_share_nobody(tmp_path):
    group = np.repeat(np.arange(10), np.arange(1, 11))
    label = np.random.default_rng(0).normal(size=(55, 2))
    data = features(written(tmp_path, n=55, label=label, group=group))
    parts = folds(data, 5, seed=1)
    check_partition(parts, 55)
    for train, _, val in parts:
        assert not set(group[train]) & set(group[val])
        assert 7 <= len(val) <= 15
    even = data._replace(group=np.arange(55) // 5)
    assert folds(even, 5, seed=1)[0][2].tolist() != folds(even, 5, seed=2)[0][2].tolist()
    with pytest.raises(DataError, match="10 people or rows are too few for 11 folds"):
        folds(data, 11)


def test_a_fifth_is_set_aside_of_people_or_of_rows(tmp_path):
    group, label = np.arange(120) // 6, np.random.default_rng(0).normal(size=(120, 2))
    data = features(written(tmp_path, n=120, label=label, group=group))
    aside = folds(data, 4, seed=1, set_aside=True)
    for (train, choose, val), (everything, _, same) in zip(aside, folds(data, 4, seed=1)):
        assert val.equal(same) and sorted([*train, *choose]) == everything.tolist()
        parts = [set(group[rows]) for rows in (train, choose, val)]
        assert [len(people) for people in parts] == [12, 3, 5] and len(set.union(*parts)) == 20
    train, choose, val = folds(data._replace(group=None), 4, set_aside=True)[0]
    assert (len(train), len(choose), len(val)) == (72, 18, 30)
    assert len({*train.tolist(), *choose.tolist(), *val.tolist()}) == 120


def test_train_rows_are_drawn_from_the_training_part(tmp_path):
    data = features(written(tmp_path))
    drawn = folds(data, 4, train_rows=20, set_aside=True)
    for (train, choose, val), (everything, *_) in zip(drawn, folds(data, 4)):
        assert len(train) == 16 and len(choose) == 4 and len(val) == 10
        assert {*train.tolist(), *choose.tolist()} <= set(everything.tolist())
    with pytest.raises(DataError, match="--train-rows: fold 0 has only 30"):
        folds(data, 4, train_rows=31)


def test_folds_without_people_are_stratified(tmp_path):
    label = np.repeat([0, 1, 2], [23, 11, 6])
    data = features(written(tmp_path, label=label))
    parts = folds(data)
    check_partition(parts, 40)
    for _, _, val in parts:
        assert len(val) == 8
        assert all(abs((label[val] == c).sum() - (label == c).sum() / 5) < 1 for c in range(3))


def test_the_data_sets_own_split_stands_unless_folds_are_asked_for(tmp_path):
    split = np.array(["train", "val"] * 20)
    data = features(written(tmp_path, split=split, label=np.arange(40) // 20))
    ((train, _, val),) = folds(data)
    assert set(split[train]) == {"train"} and set(split[val]) == {"val"}
    assert len(folds(data, 3)) == 3
    check_partition(folds(synthetic(0), 3), 1440)


def test_folds_that_cannot_be_trained_on_are_named(tmp_path):
    label, split = np.array([0, 1] * 19 + [5, 5]), np.repeat(["train", "val"], [38, 2])
    with pytest.raises(DataError, match="fold 0 has no training row of class 5"):
        folds(features(written(tmp_path, label=label, split=split)))
    with pytest.raises(DataError, match="fold 0 has 40 training, 0 choosing"):
        folds(features(written(tmp_path, split=np.array(["train"] * 40))))
    both = written(tmp_path, split=np.repeat(["train", "val"], [36, 4]), group=np.arange(40) % 7)
    with pytest.raises(DataError, match="row 36 is of a person in both parts"):
        folds(features(both))
    assert len(folds(features(both)._replace(group=None))) == 1 and len(folds(features(both), 3)) == 3
    with pytest.raises(DataError, match="single class"):
        folds(features(written(tmp_path, label=np.zeros(40, dtype=int))))


def test_digest_tells_values_shape_and_type_apart():
    a = torch.arange(6.0)
    others = (a + 1, a.view(2, 3), a.double(), a.flip(0), None)
    assert digest(a) == digest(a.clone()) and len({digest(x) for x in (a, *others)}) == 6
    assert digest(a[::2]) == digest(a[::2].contiguous()) and digest(a, a + 1) != digest(a + 1, a)
