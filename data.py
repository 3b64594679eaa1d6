"""Data sets of two views: one always seen ("visual"), one in training only ("privileged").

    load       arguments -> TwoView, which is all that train.py knows of a data set
    features   a .npz file of any two views; synthetic: drawn faces and voices
    Frames, Sounds, Signals   views in files
    affwild2, biovid   the paper's data, as their holders ship them
    folds      TwoView -> rows to train on, to choose epochs by, and to score
    batches    a view read ahead, batch by batch
"""

import contextlib
import copy
import functools
import hashlib
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly, spectrogram
from torch.utils.data import DataLoader, Dataset

AFFECT = ["valence", "arousal"]
BIOVID_LEVELS = ["BL1", "PA4"]  # the classes, of BL1, PA1 ... PA4
BIOVID_SIGNAL = "emg_corrugator"  # or gsr, ecg, emg_trapezius, emg_zygomaticus
KEYS = {  # of a .npz file: an array's dimensions and kind, as a pattern and in words
    "visual": ("[1-9][biuf]", "(N, ...) numbers"),
    "privileged": ("[1-9][biuf]", "(N, ...) numbers"),
    "label": ("1[biu]|2f", "(N,) integers or (N, K) floats"),
    "group": ("1[biuSU]", "(N,) integers or strings"),
    "split": ("1U", '(N,) strings, "train" or "val"'),
}


class DataError(ValueError):
    """One line that says what is wrong with the data, in which file and row."""


@contextlib.contextmanager
def reading(path, wrong):
    """Turn an error inside into a DataError."""
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: {wrong} ({reason})") from None


class TwoView(NamedTuple):
    """N clips. A view has `shape`; view[rows], for a list of B rows, is vectors (B, F) float32,
    frames (B, 3, T, H, W) uint8 or spectrograms (B, 1, H, W) float32."""

    visual: torch.Tensor | Dataset
    privileged: torch.Tensor | Dataset | None  # None for a student alone
    label: torch.Tensor | None  # (N,) int64 in 0 .. K - 1, or (N, K) float32; None if unknown
    names: list  # of the K classes or of the K regressed columns
    group: np.ndarray | None  # (N,) int, the person; None if unknown
    split: np.ndarray | None  # (N,) bool, True for training; None if there is none

    @property
    def task(self):
        return "regression" if self.label.is_floating_point() else "classification"


def load(args, need_privileged=True, need_label=True, progress=iter):
    """The TwoView of args.dataset. What is not needed may be missing there."""
    root, needs = Path(args.data or f"data/{args.dataset}"), (need_privileged, need_label)
    if args.dataset == "synthetic":
        if args.data:
            raise DataError("argument --data: synthetic data has no file; which --dataset is it?")
        return synthetic()
    if args.dataset == "features":
        return features(root, *needs)
    if args.dataset == "affwild2":
        return affwild2(root, *needs, args.clip_stride, args.workers, progress)
    return biovid(root, *needs)


@np.errstate(all="ignore")  # what becomes infinite is refused
def features(path, need_privileged, need_label):
    """Two views of anything, from a .npz file of KEYS, where group and split may be missing."""
    needed = ["visual"] + ["privileged"] * need_privileged + ["label"] * need_label
    with reading(path, f"must be a .npz file of plain arrays {', '.join(needed)}"):
        with np.load(path, allow_pickle=False) as file:
            extra = [key for key in ("group", "split") if key in file.files]
            arrays = {key: file[key] for key in [*needed, *extra]}
        count = len(arrays["visual"])

    # Check each array, and make vectors (N, F) of numbers.
    for key, array in arrays.items():
        pattern, words = KEYS[key]
        form = re.fullmatch(pattern, f"{array.ndim}{array.dtype.kind}")
        if not form or array.size == 0 or len(array) != count:
            wrong = f"not {array.dtype} {array.shape}"
            raise DataError(f"{path}: {key} must be {words}, N = {count}, {wrong}")
        if key in ("visual", "privileged") or array.ndim == 2:
            values = torch.from_numpy(array.astype(np.float32).reshape(count, -1))
            bad = ~values.isfinite().all(1)
            _refuse_rows(bad, f"{path}: {key}", "holds NaN or too large values")
            arrays[key] = values

    # Number the classes and the people.
    visual, privileged, label, group, split = map(arrays.get, KEYS)
    names = AFFECT
    if label is not None and label.ndim == 1:
        names, label = np.unique(label, return_inverse=True)
        names, label = names.tolist(), torch.from_numpy(label)
    elif label is not None and label.shape[1] != 2:
        names = [str(i) for i in range(label.shape[1])]
    if group is not None:
        group = np.unique(group, return_inverse=True)[1]
    if split is not None:
        bad = ~np.isin(split, ["train", "val"])
        _refuse_rows(bad, f"{path}: split", 'holds neither "train" nor "val"')
        split = split == "train"
    return TwoView(visual, privileged, label, names, group, split)


def _refuse_rows(bad, place, what):
    for row in np.flatnonzero(bad):
        raise DataError(f"{place} row {row} {what}")


def synthetic(people=60, clips=24, size=24):
    """A problem like Aff-Wild2, drawn in memory. Source: ours; it says nothing about real faces.

    Valence and arousal wander from clip to clip. Faces are (N, 3, 2, size, size) uint8; voices,
    with less noise, (N, 1, size, size) float32.
    """
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    group, count = np.repeat(np.arange(people), clips), people * clips
    label = (0.3 * normal(people, clips, 2)).cumsum(1).tanh().flatten(0, 1)
    x = torch.linspace(-1, 1, size)
    y = x.view(size, 1)

    # A face is an oval less eyes, which open with arousal, and a mouth, which curves with valence.
    valence, arousal = label.T.view(2, count, 1, 1, 1) + 0.3 * normal(2, count, 2, 1, 1)
    oval = (x / 0.75) ** 2 + (y / 0.9) ** 2 < 1
    eyes = (x.abs() - 0.35) ** 2 / 0.02 + (y + 0.25) ** 2 / (0.15 + 0.07 * arousal) ** 2
    mouth = (y - 0.42 + 0.9 * valence * (x**2 - 0.12)) ** 2 / 0.008 + (x / 0.55) ** 4
    face = 0.6 * oval - 0.4 * (-eyes).exp() - 0.4 * (-mouth).exp()
    face = face + 0.1 * normal(count, 2, size, size)
    face = (255 * face.clamp(0, 1)).byte().unsqueeze(1).expand(-1, 3, -1, -1, -1)

    # A voice has harmonics, which lie by arousal and fall off by valence.
    valence, arousal = (label + 0.1 * normal(count, 2)).T.view(2, count, 1, 1, 1)
    height = (y + 1) / 2
    harmonics = (2 * math.pi * height / (0.22 + 0.06 * arousal)).cos()
    voice = harmonics * (height * (valence - 2)).exp() + 0.1 * normal(count, 1, size, size)
    return TwoView(face, voice, label, AFFECT, group, split=group % 3 > 0)


class RawView(Dataset):
    """A view (N, *size) that reads clip(files[i], i) for each row i of a batch."""

    def __init__(self, files, size, **about):
        self.files, self.shape = files, (len(files), *size)
        names = np.array([file.name for file in files])
        self.digest = digest(names, *about.values())  # the same wherever the files lie
        vars(self).update(about)  # what clip needs

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        return torch.stack([self.clip(self.files[row], row) for row in rows])


class Frames(RawView):
    """Clips of T face frames, (N, 3, T, 112, 112) uint8, from files FOLDER/prefix00001.jpg ...

    T of the numbers frames[i] are taken, evenly spread. `whole`: each folder is one clip.
    """

    def name(self, row):
        """FOLDER, where it is one clip, or FOLDER/NUMBER of the last frame."""
        folder = self.files[row].name
        return folder if self.whole else f"{folder}/{self.frames[row][-1]:05d}"

    def sampled(self, seed):
        """The view for an epoch of training: where a folder is one clip, two neighbours from a
        random place in each of T / 2 equal segments. Source: released code."""
        if not self.whole:
            return self
        view, pairs, random = copy.copy(self), self.shape[2] // 2, np.random.default_rng(seed)
        view.frames = []
        for numbers in self.frames:
            places = (np.arange(pairs) + random.random(pairs)) * (len(numbers) - 1) / pairs
            places = places.astype(int).repeat(2) + np.tile([0, 1], pairs)
            view.frames.append(numbers[places.clip(max=len(numbers) - 1)])
        return view

    def clip(self, folder, row):
        numbers, images = self.frames[row], []
        for place in np.linspace(0, len(numbers) - 1, self.shape[2]).round().astype(int):
            path = folder / f"{self.prefix}{numbers[place]:05d}.jpg"
            with reading(path, "not a JPEG that Pillow (pip install pillow) can read"):
                from PIL import Image

                image = Image.open(path).convert("RGB").resize((112, 112))
            images.append(np.asarray(image))
        return torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)


class Sounds(RawView):
    """Log-mel spectrograms (N, 1, 64, 107) float32 of the sound before a moment, in steps of 10 ms.

    That of a file is computed once; clip i is a slice of it, up to the fraction end[i].
    """

    def __init__(self, files, end, workers, progress):
        super().__init__(files, (1, 64, 107), end=end)
        paths = list(dict.fromkeys(files))
        mels = DataLoader(paths, batch_size=None, num_workers=workers, collate_fn=_log_mel_of)
        self.mels = dict(zip(paths, progress(mels)))

    def clip(self, path, row):
        mel = self.mels[path]
        start = round(self.end[row] * (mel.shape[1] - 107))
        return torch.from_numpy(mel[None, :, start : start + 107]).float()


def _log_mel_of(path):
    """The log_mel of a wav file, with a clip of silence before it, (64, steps) float16."""
    with reading(path, "must be a wav file of 16 bits, made as README says"):
        rate, samples = wavfile.read(path, mmap=True)  # which refuses a file cut short
        if samples.dtype != np.int16 or not 1_000 <= rate <= 400_000:
            raise ValueError(f"{samples.dtype} at {rate} Hz")
        mono = samples.reshape(len(samples), -1).mean(axis=1, dtype=np.float32) / 2**15
        sound = np.pad(resample_poly(mono, 44_100, rate), (106 * 441, 0))
    return log_mel(torch.from_numpy(sound)).numpy()


def log_mel(sound):
    """Log-mel spectrogram of sound at 44.1 kHz, (n,) in [-1, 1] -> (64, 1 + n // 441) float16.

    Window of 20 ms, hop of 10 ms, 64 mel bands, decibels, (x + 14.8) / 19.895. Source: the lab's
    Aff-Wild2 code; float16 is ours.
    """
    # Triangles (64, 513), evenly spaced on the mel scale 2595 log10(1 + f / 700).
    corners = 700 * (10 ** np.linspace(0, math.log10(1 + 22_050 / 700), 66) - 1)
    frequencies = np.linspace(0, 22_050, 513)
    filters = [np.interp(frequencies, corners, peak) for peak in np.eye(66)[1:-1]]

    how = {"window": torch.hann_window(882), "return_complex": True, "pad_mode": "constant"}
    power = torch.stft(sound.float(), 1024, 441, 882, **how).abs() ** 2
    mel = torch.from_numpy(np.stack(filters)).float() @ power
    return ((10 * mel.clamp_min(1e-10).log10() + 14.8) / 19.895).half()


class Signals(RawView):
    """A physiological signal from second 2 to 5, spectrograms (N, 1, 65, 127) of power, float32.

    It is the column `signal` of a file, tab separated, 512 Hz. Source: released code.
    """

    def clip(self, path, row):
        with reading(path, f"needs a column {self.signal} of 2560 finite numbers (5 s)"):
            header, *lines = path.read_text().splitlines()
            column = header.split().index(self.signal)
            values = [float(line.split("\t")[column]) for line in lines[1024:2560]]
            power = spectrogram(np.array(values), 512, nperseg=16, noverlap=4, nfft=128)[2]
            power = torch.from_numpy(power[None]).float()
            if power.shape != self.shape[1:] or not power.isfinite().all():
                raise ValueError(f"it has {len(lines)} rows")
        return power


def affwild2(root, need_privileged, need_label, stride, workers, progress):
    """Aff-Wild2's valence-arousal challenge, with its own split, in the folders that README shows.

    A clip for every `stride`-th annotated frame with a face: 8 frames, every 4th of the 32 that end
    there, and the 1.07 s of sound before. Source: the lab's Aff-Wild2 code. A frame without a face
    has no file: the last before it that has one takes its place, or the first there is (ours).
    """
    videos = []
    files = [] if need_label else _found(root, "cropped_aligned/*/")
    for part in ["Train_Set", "Validation_Set"] * need_label:
        files += _found(root, f"annotations/{part}/*.txt")
    for file in files:
        name = file.name.removesuffix(".txt")
        folder = root / "cropped_aligned" / name
        sound = root / "audio" / f"{re.sub('_(left|right)$', '', name)}.wav"
        present = _frame_numbers(folder, "")
        label = _valence_arousal(file) if need_label else np.zeros((max(present, default=0), 2))
        present = present[(present >= 1) & (present <= len(label))]
        ends = present[(label[present - 1] != -5).all(axis=1)][::stride]
        if len(ends) == 0:
            warnings.warn(f"{folder}: no annotated frame with a face")
            continue
        before = np.searchsorted(present, ends[:, None] - np.arange(28, -1, -4), side="right") - 1
        frames, training = present[before.clip(min=0)], file.parent.name == "Train_Set"
        same = [[value] * len(ends) for value in (folder, sound, training)]
        videos.append((*same, frames, ends / len(label), label[ends - 1]))
    if not videos:
        raise DataError(f"{root}: no annotated frame with a face in any video")

    folders, sounds, split, frames, ends, label = map(np.concatenate, zip(*videos))
    group = np.unique([path.name for path in sounds], return_inverse=True)[1]  # _left with _right
    visual = Frames(folders, (3, 8, 112, 112), prefix="", frames=frames, whole=False)
    privileged = Sounds(sounds, ends, workers, progress) if need_privileged else None
    label = torch.from_numpy(label).float() if need_label else None
    return TwoView(visual, privileged, label, AFFECT, group, split)


def _found(root, pattern):
    """The paths below root that match, sorted. There must be one."""
    paths = sorted(root.glob(pattern))
    if not paths:
        raise DataError(f"{root}: no {pattern} in it")
    return paths


def _frame_numbers(folder, prefix):
    """Sorted numbers of the files prefix00001.jpg ... in a folder."""
    paths = folder.glob(f"{prefix}{5 * '[0-9]'}.jpg")
    return np.array(sorted(int(path.stem[-5:]) for path in paths), dtype=int)


def _valence_arousal(path):
    """(frames, 2) of an annotation file."""
    with reading(path, 'must be "valence,arousal", then two numbers a line in [-1, 1], or -5'):
        header, *lines = path.read_text().rstrip().splitlines()
        lines = [line or "-" for line in lines]  # numpy would leave out empty ones
        values = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
        bad = ~((abs(values) <= 1) | (values == -5)).all(axis=1)
        if header != "valence,arousal" or values.shape[1] != 2 or bad.any():
            raise ValueError(f"line {2 + bad.argmax() if bad.any() else 1}")
    return values


def biovid(root, need_privileged, need_label):
    """BioVid Part A: a class for each of BIOVID_LEVELS, a group for each person.

    In README's folders a CLIP, which is named SUBJECT-LEVEL-NUMBER, has frames, of which 10 are
    taken, and a signal. Source: released code.
    """
    clips = []
    for label, level in enumerate(BIOVID_LEVELS) if need_label else [(None, "*")]:
        clips += [(clip, label) for clip in _found(root, f"frames/*/*-{level}-*")]
    clips, label = zip(*sorted(clips))
    frames = [_frame_numbers(clip, "img_") for clip in clips]
    for clip, numbers in zip(clips, frames):
        if len(numbers) == 0:
            raise DataError(f"{clip}: no img_00001.jpg; extract its frames or remove it")
    visual = Frames(clips, (3, 10, 112, 112), prefix="img_", frames=frames, whole=True)
    files = [root / f"biosignals_filtered/{clip.parent.name}/{clip.name}_bio.csv" for clip in clips]
    privileged = Signals(files, (1, 65, 127), signal=BIOVID_SIGNAL) if need_privileged else None
    label = torch.tensor(label) if need_label else None
    group = np.unique([clip.parent.name for clip in clips], return_inverse=True)[1]
    return TwoView(visual, privileged, label, BIOVID_LEVELS, group, split=None)


def folds(data, k=0, seed=0, train_rows=0, set_aside=False):
    """List of (rows to train on, to choose epochs by, to score), LongTensors in increasing order.

    k folds, or of 0 the data's own split, or 5 if it has none. Nobody is both trained on and scored
    (ours; the released code splits by clip). train_rows, or of 0 all, are drawn from the training
    part. set_aside takes a fifth of its people to choose by; else scored rows do (released code).
    """
    person = np.arange(len(data.label)) if data.group is None else data.group
    if k or data.split is None:
        k = k or 5
        fold_of = _fold_of(data, person, k, seed)
    else:
        k, fold_of = 1, data.split.astype(int)
        bad = np.isin(person, person[data.split]) & ~data.split
        _refuse_rows(bad, "group", "is of a person in both parts of split: mend group or split")
    draw, result = np.random.default_rng(seed).permutation, []
    for i in range(k):
        train, val = np.flatnonzero(fold_of != i), np.flatnonzero(fold_of == i)
        if train_rows > len(train):
            raise DataError(f"argument --train-rows: fold {i} has only {len(train)}")
        train, choose = np.sort(draw(train)[: train_rows or None]), val
        if set_aside:
            people = draw(np.unique(person[train]))
            aside = np.isin(person[train], people[: max(1, len(people) // 5)])
            train, choose = train[~aside], train[aside]
        if min(len(train), len(choose), len(val)) < 2:
            counts = f"{len(train)} training, {len(choose)} choosing and {len(val)} scored rows"
            raise DataError(f"fold {i} has {counts}: use more data or fewer --folds")
        result.append(tuple(torch.from_numpy(rows) for rows in (train, choose, val)))
    return result


def _fold_of(data, person, k, seed):
    """The fold of each row: people, largest first, or rows, class by class, are dealt in turn."""
    key = -np.bincount(person)
    if data.group is None and data.task == "classification":
        key = data.label.numpy()
    shuffled = np.random.default_rng(seed).permutation(len(key))
    fold_of = np.empty(len(key), dtype=int)
    fold_of[shuffled[np.argsort(key[shuffled], kind="stable")]] = np.arange(len(key)) % k
    return fold_of[person]


def batches(view, order, workers, pin_memory):
    """view[rows] for each batch of rows in `order`; workers read raw views."""
    how = {"generator": torch.Generator()}  # so that torch's own is left alone
    if not torch.is_tensor(view):
        how.update(num_workers=workers, pin_memory=pin_memory)
    return DataLoader(view, batch_size=None, sampler=[rows.tolist() for rows in order], **how)


def digest(*values):
    """A short fingerprint of tensors, arrays, lists, None, and the names that raw views read."""
    sha = hashlib.sha256()
    for value in values:
        value = getattr(value, "digest", [] if value is None else value)
        array = np.asarray(digest(*value) if isinstance(value, list) else value)
        sha.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
    return sha.hexdigest()[:16]
