"""Data sets of two views: one seen always ("visual"), one in training only ("privileged").

    TwoView      the contract: what every data set below becomes, and all that train.py knows of it
    load         name and path -> TwoView
    features     a .npz file of feature vectors (any two views of anything)
    synthetic    the embedded default: people, clips in time, valence and arousal
    folds        TwoView -> training and validation rows, by person where people are known

Whatever is wrong with a file raises ValueError with one line that names the file and, where there is one,
the row.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

DEFAULT_FOLDS = 5
RAW = {
    "affwild2": "data/affwild2 (annotations/, cropped_aligned/, audio/)",
    "biovid": "data/biovid (frames/, biosignals_filtered/)",
}


class TwoView(NamedTuple):
    """N clips in memory. Integer labels make a classification, float labels a regression."""

    visual: torch.Tensor  # (N, ...) float32
    privileged: torch.Tensor | None  # (N, ...) float32; None where only a student will be scored
    label: torch.Tensor  # (N,) int64 in 0 .. len(names) - 1, or (N, len(names)) float32
    names: list  # the class values as they stand in the file, or the names of the regressed columns
    group: np.ndarray | None  # (N,) int: the person of each clip; None where unknown
    split: np.ndarray | None  # (N,) bool: True for training, where the data set brings its own split

    @property
    def task(self):
        return "regression" if self.label.dtype.is_floating_point else "classification"


def load(dataset, path=None, seed=0, need_privileged=True):
    """The TwoView of a data set by name. path is its file; seed makes the synthetic one."""
    if dataset == "synthetic":
        return synthetic(seed)
    if dataset == "features":
        if path is None:
            raise ValueError("--dataset features needs --data FILE.npz with visual, privileged and label")
        return features(path, need_privileged)
    raise ValueError(f"{dataset} cannot be read yet; its data will go to {RAW[dataset]}")


# ---- feature files ----------------------------------------------------------------------------------


def features(path, need_privileged=True):
    """Read a .npz file with

        visual      (N, ...) numbers             group  (N,), optional: the person of each row
        privileged  (N, ...) numbers             split  (N,), optional: "train" or "val"
        label       (N,) integers: classes, or (N, K) floats: K regressed values

    need_privileged=False reads a file without `privileged`, and ignores it where it is there.
    """
    arrays = _read_npz(path)
    wanted = ["visual", "label"] + ["privileged"] * need_privileged
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise ValueError(f"{path}: no key {' or '.join(missing)}; it has {', '.join(sorted(arrays)) or 'none'}")
    rows = {key: len(a) if a.ndim else 0 for key, a in arrays.items() if key in (*wanted, "group", "split")}
    if len(set(rows.values())) > 1 or rows["visual"] < 2:
        counts = ", ".join(f"{key} {n}" for key, n in rows.items())
        raise ValueError(f"{path}: every key needs the same number of rows, at least 2, but they have {counts}")
    label, names = _label(path, arrays["label"])
    return TwoView(
        visual=_numbers(path, "visual", arrays["visual"]),
        privileged=_numbers(path, "privileged", arrays["privileged"]) if need_privileged else None,
        label=label,
        names=names,
        group=_group(path, arrays["group"]) if "group" in arrays else None,
        split=_split(path, arrays["split"]) if "split" in arrays else None,
    )


def _read_npz(path):
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # a damaged archive can raise anything; its reader needs the name
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a .npz file of plain arrays ({reason})") from None


def _numbers(path, key, array):
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise ValueError(f"{path}: {key} must hold numbers, not {array.dtype} of shape {array.shape}")
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is refused below
        values = torch.from_numpy(array.astype(np.float32))
    values = values if values.dim() > 1 else values.unsqueeze(1)
    bad = ~values.flatten(1).isfinite().all(1)
    if bool(bad.any()):
        raise ValueError(f"{path}: {key} row {int(bad.nonzero()[0])} holds NaN, infinite or too large values")
    return values


def _label(path, array):
    if array.dtype.kind in "biu" and array.ndim == 1:
        names, label = np.unique(array, return_inverse=True)
        return torch.from_numpy(label), names.tolist()
    if array.dtype.kind == "f" and array.ndim == 2:
        label = _numbers(path, "label", array)
        names = ["valence", "arousal"] if label.shape[1] == 2 else [str(i) for i in range(label.shape[1])]
        return label, names
    raise ValueError(
        f"{path}: label must be (N,) integers (classes) or (N, K) floats (regression), "
        f"not {array.dtype} of shape {array.shape}"
    )


def _group(path, array):
    if array.ndim != 1 or array.dtype.kind not in "biuSU":
        raise ValueError(f"{path}: group must be (N,) integers or strings, not {array.dtype} of shape {array.shape}")
    return np.unique(array, return_inverse=True)[1]


def _split(path, array):
    if array.ndim != 1:
        raise ValueError(f"{path}: split must be (N,), not of shape {array.shape}")
    split = array.astype(str)
    for row, value in enumerate(split):
        if value not in ("train", "val"):
            raise ValueError(f'{path}: split row {row} is "{value}"; it must be "train" or "val"')
    return split == "train"


# ---- the embedded default ---------------------------------------------------------------------------


def synthetic(seed=0, people=24, clips=60, size=32):
    """An Aff-Wild2-like problem, made in memory: `people` faces filmed for `clips` clips each.

    Valence and arousal wander in time within [-1, 1]. The face shows them through a fixed random
    nonlinear map, next to who the person is (another map), with noise; in spells of several clips half of
    it is occluded (zero). The voice shows them in its own way, with less of the person, less noise and no
    occlusion. People are numbered, and every third is in the validation split. Source: ours; it exists to
    exercise the code, and says nothing about real faces.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    state, states = normal(people, 2), []
    for _ in range(clips):
        state = 0.95 * state + 0.3 * normal(people, 2)
        states.append(state)
    label = torch.stack(states, dim=1).tanh()  # (people, clips, 2)
    identity = normal(people, 1, 8)

    def view(identity_scale, noise):
        hidden = torch.cat([2 * label, identity_scale * identity.expand(-1, clips, -1)], dim=-1) @ normal(10, size)
        return (hidden / 2).tanh() + noise * normal(people, clips, size)

    face, voice = view(identity_scale=1.0, noise=0.5), view(identity_scale=0.5, noise=0.25)
    occluded = torch.nn.functional.max_pool1d((torch.rand(people, 1, clips, generator=g) < 0.05).float(), 7, 1, 3)
    face[..., : size // 2] *= 1 - occluded.transpose(1, 2)
    group = np.repeat(np.arange(people), clips)
    face, voice, label = (t.flatten(0, 1) for t in (face, voice, label))
    return TwoView(face, voice, label, ["valence", "arousal"], group, split=group % 3 > 0)


# ---- folds ------------------------------------------------------------------------------------------


def folds(data, k=None, seed=0):
    """List of (training rows, validation rows), int64 arrays in increasing order.

    The data set's own split where it has one and k is None; else k (default 5) folds: by person where
    groups are known, so that nobody is on both sides (ours; the released code splits by clip), and
    otherwise stratified by class, or at random for a regression.
    """
    if len(data.names) < 2 and data.task == "classification":
        raise ValueError(f"label holds a single class, {data.names[0]}; there is nothing to learn")
    if data.split is not None and k is None:
        parts = [~data.split]
    else:
        k = k or DEFAULT_FOLDS
        rng = np.random.default_rng(seed)
        if data.group is not None:
            fold_of = _grouped(data.group, k, rng)
        elif data.task == "classification":
            fold_of = _stratified(data.label.numpy(), data.names, k, rng)
        else:
            fold_of = rng.permutation(np.arange(len(data.label)) % k)
        parts = [fold_of == i for i in range(k)]
    return [_checked_fold(data, i, held_out) for i, held_out in enumerate(parts)]


def _grouped(group, k, rng):
    """Fold of each row: people go, largest first, to the fold that has the fewest rows so far."""
    sizes = np.bincount(group)
    if len(sizes) < k:
        raise ValueError(f"the data has {len(sizes)} people, too few for {k} folds: use fewer --folds, at least 2")
    shuffled = rng.permutation(len(sizes))
    fold_of_person, rows = np.empty(len(sizes), dtype=int), np.zeros(k)
    for person in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        fold_of_person[person] = rows.argmin()
        rows[rows.argmin()] += sizes[person]
    return fold_of_person[group]


def _stratified(label, names, k, rng):
    """Fold of each row: every class is dealt out evenly, going on where the class before it stopped."""
    counts = np.bincount(label)
    if counts.min() < k:
        name, least = names[counts.argmin()], counts.min()
        raise ValueError(f"class {name} has {least} rows, too few for {k} folds: use fewer --folds, at least 2")
    fold_of = np.empty(len(label), dtype=int)
    order = np.concatenate([rng.permutation(np.flatnonzero(label == c)) for c in range(len(counts))])
    fold_of[order] = np.arange(len(label)) % k
    return fold_of


def _checked_fold(data, i, held_out):
    train, val = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if len(train) < 2 or len(val) < 1:
        raise ValueError(f"fold {i} has {len(train)} training and {len(val)} validation rows, too few to go on")
    if data.task == "classification":
        absent = np.setdiff1d(np.arange(len(data.names)), data.label[train].numpy())
        if len(absent):
            absent = data.names[absent[0]]
            raise ValueError(f"fold {i} has no training row of class {absent}: try other --folds or --seed")
    return train, val


def digest(*arrays):
    """A short fingerprint of tensors or arrays: same values, shape and type, same string."""
    sha = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array.cpu() if isinstance(array, torch.Tensor) else array)
        sha.update(f"{array.dtype} {array.shape}".encode())
        sha.update(array)
    return sha.hexdigest()[:16]
