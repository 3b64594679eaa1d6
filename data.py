"""Data sets of two views: one always seen ("visual"), one in training only ("privileged").

    load         arguments -> TwoView, which is all that train.py knows of a data set
    features     a .npz file of vectors: any two views of anything
    synthetic    the default: drawn faces and voices, valence and arousal
    affwild2     Aff-Wild2: faces and voices, valence and arousal
    biovid       BioVid: faces and a physiological signal, pain
    folds        TwoView -> rows to train on, to choose epochs by, and to score

What is wrong with the data raises DataError: one line that names the file and, if any, the row.
"""

import contextlib
import copy
import functools
import hashlib
import math
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.io import wavfile
from scipy.signal import resample_poly, spectrogram
from torch.utils.data import Dataset

AFFECT = ["valence", "arousal"]
BIOVID_LEVELS = ("BL1", "PA1", "PA2", "PA3", "PA4")
BIOVID_SIGNALS = ("gsr", "ecg", "emg_trapezius", "emg_corrugator", "emg_zygomaticus")
SAMPLE_RATE = 44_100  # of the sound that log_mel takes, in Hz
SIGNAL_RATE = 512  # of BioVid's signals, in Hz
FORMS = {  # of a key of a .npz file: in words, and as numpy's kinds with numbers of dimensions
    "label": ("(N,) integers (classes) or (N, K) floats (regression)", "b1 i1 u1 f2"),
    "group": ("(N,) integers or strings", "b1 i1 u1 S1 U1"),
    "split": ("(N,) strings", "S1 U1"),
}


class DataError(ValueError):
    """Something is wrong with the data; the message is one line for the person whose data it is."""


@contextlib.contextmanager
def reading(path, wrong):
    """Turn an error inside into a DataError: {path}: {wrong} ({reason})."""
    try:
        yield
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: {wrong} ({reason})") from None


class TwoView(NamedTuple):
    """N clips. Integer labels make a classification, float labels a regression.

    A view has `shape`, (N, ...). view[rows], for a list of B rows, is a batch: vectors (B, F)
    float32, frames (B, 3, T, H, W) uint8 or spectrograms (B, 1, H, W) float32.
    """

    visual: torch.Tensor | Dataset
    privileged: torch.Tensor | Dataset | None  # None where only a student is scored
    label: torch.Tensor | None  # (N,) int64 in 0 .. K - 1, or (N, K) float32; None if unknown
    names: list  # of the K classes or of the K regressed columns
    group: np.ndarray | None  # (N,) int, the person of each clip; None if unknown
    split: np.ndarray | None  # (N,) bool, True for training; None if the data set has no split

    @property
    def task(self):
        return "regression" if self.label.dtype.is_floating_point else "classification"


def load(args, need_privileged=True, need_label=True):
    """The TwoView of args.dataset. What is not needed may be missing there. Raises DataError."""
    needs, path = (need_privileged, need_label), args.data or f"data/{args.dataset}"
    if args.dataset == "synthetic":
        return synthetic(args.seed)
    if args.dataset == "affwild2":
        return affwild2(path, *needs, args.clip_stride)
    if args.dataset == "biovid":
        return biovid(path, *needs, args.levels, args.signal)
    if args.data is None:
        raise DataError("--dataset features needs --data FILE.npz of visual, privileged, label")
    return features(path, *needs)


# ---- data sets in memory ------------------------------------------------------------------------


def features(path, need_privileged=True, need_label=True):
    """Read a .npz file with these keys:

    visual, privileged   (N, ...) numbers
    label                (N,) integers, which are classes, or (N, K) floats, which are regressed
    group, optional      (N,) integers or strings, the person of each row
    split, optional      (N,) "train" or "val"; nobody may be in both
    """
    needed = ["visual"] + ["label"] * need_label + ["privileged"] * need_privileged
    if not Path(path).is_file():
        what = "a folder, not a file" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {what}")
    with reading(path, "not a .npz file of plain arrays"):
        with np.load(path, allow_pickle=False) as archive:
            keys = sorted(archive.files)
            arrays = {key: archive[key] for key in (*needed, *FORMS) if key in keys}
    missing = " or ".join(key for key in needed if key not in keys)
    if missing:
        raise DataError(f"{path}: no key {missing}; it has {', '.join(keys) or 'none'}")
    rows = {key: len(array) if array.ndim else 0 for key, array in arrays.items()}
    least = 2 if need_privileged else 1
    if len(set(rows.values())) > 1 or rows["visual"] < least:
        counts = ", ".join(f"{key} {count}" for key, count in rows.items())
        same = f"every key needs the same number of rows, at least {least}"
        raise DataError(f"{path}: {same}, but they have {counts}")
    for key, (form, kinds) in FORMS.items():
        if key in arrays and f"{arrays[key].dtype.kind}{arrays[key].ndim}" not in kinds:
            raise _unlike(path, f"{key} must be {form}", arrays[key])

    visual = _numbers(path, "visual", arrays["visual"])
    privileged = _numbers(path, "privileged", arrays["privileged"]) if need_privileged else None
    label, names, group, split = None, [], None, None
    if "label" in arrays and arrays["label"].ndim == 2:
        label = _numbers(path, "label", arrays["label"])
        names = AFFECT if label.shape[1] == 2 else [str(i) for i in range(label.shape[1])]
    elif "label" in arrays:
        names, label = np.unique(arrays["label"], return_inverse=True)
        names, label = names.tolist(), torch.from_numpy(label)
    if "group" in arrays:
        group = np.unique(arrays["group"], return_inverse=True)[1]
    if "split" in arrays:
        words = arrays["split"]
        words = np.char.decode(words, "ascii", "replace") if words.dtype.kind == "S" else words
        split = words == "train"
        for row in np.flatnonzero(~split & (words != "val")):
            must = 'it must be "train" or "val"'
            raise DataError(f'{path}: split row {row} is "{words[row]}"; {must}')
    if group is not None and split is not None:
        for person in arrays["group"][np.isin(group, group[split]) & ~split]:
            both = f"group {person} is in both parts of split"
            raise DataError(f"{path}: {both}; mend one of the two keys, or leave it out")
    return TwoView(visual, privileged, label, names, group, split)


def _unlike(path, must, array):
    return DataError(f"{path}: {must}, not {array.dtype} of shape {array.shape}")


@np.errstate(all="ignore")
def _numbers(path, key, array):
    """(N, ...) numbers -> (N, F) float32, all finite."""
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise _unlike(path, f"{key} must hold numbers", array)
    values = torch.from_numpy(array.reshape(len(array), -1).astype(np.float32))
    for row in np.flatnonzero(~values.isfinite().all(1)):
        raise DataError(f"{path}: {key} row {row} holds NaN, infinite or too large values")
    return values


def synthetic(seed=0, people=60, clips=24, size=32, frames=4):
    """A problem like Aff-Wild2, drawn in memory. Source: ours; it says nothing about real faces.

    Valence and arousal wander from clip to clip. A face has the proportions and tone of its person.
    Its mouth curves with valence and its eyes open with arousal, in noise. The voice's harmonics
    lie by arousal and speaker, and fall off by valence. Every third person is for validation.
    visual (N, 3, frames, size, size) uint8, privileged (N, 1, size, size) float32.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    state, states = normal(people, 2), []
    for _ in range(clips):
        state = 0.95 * state + 0.3 * normal(people, 2)
        states.append(state)
    label = torch.stack(states, dim=1).tanh()  # (people, clips, 2)

    # The face, (people, clips, frames, size, size) by broadcasting.
    person = normal(people, 1, 1, 1, 1, 6)
    shown = label.view(people, clips, 1, 1, 1, 2) + 0.15 * normal(people, clips, frames, 1, 1, 2)
    line = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    oval = (x / 0.75) ** 2 + (y / (0.9 + 0.05 * person[..., 1])) ** 2 < 1
    eyes = (x.abs() - 0.33 - 0.04 * person[..., 2]) ** 2 / 0.02
    eyes = eyes + (y + 0.25) ** 2 / (0.12 + 0.07 * shown[..., 1]) ** 2
    mouth = y - 0.42 - 0.05 * person[..., 3] + 0.9 * shown[..., 0] * (x**2 - 0.12)
    mouth = mouth**2 / 0.008 + (x / 0.55) ** 4
    face = (0.6 + 0.08 * person[..., 0]) * oval - 0.4 * (-eyes).exp() - 0.4 * (-mouth).exp()
    face = face + 0.08 * normal(people, clips, frames, size, size)

    # In spells of five clips a hand hides the upper or the lower half.
    spells = (torch.rand(people, 2, clips, generator=g) < 0.03).float()
    spells = F.max_pool1d(spells, 5, stride=1, padding=2) > 0
    for half, hidden in zip((y < 0, y >= 0), spells.unbind(1)):
        face = torch.where(hidden.view(people, clips, 1, 1, 1) & half, 0.3, face)
    face = (255 * face.clamp(0, 1)).byte().flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1, -1)

    # The voice, (people, clips, frequency, time), which nothing hides.
    heard, height = shown.mean(2), (torch.arange(size) / size).view(size, 1)
    pitch = 0.22 + 0.06 * heard[..., 1] + 0.01 * person[:, :, 0, ..., 4]
    slope = 2 + 0.2 * person[:, :, 0, ..., 5]
    voice = (2 * math.pi * height / pitch).cos() * (-height * (slope - heard[..., 0])).exp()
    voice = (voice + 0.2 * normal(people, clips, size, size)).flatten(0, 1).unsqueeze(1)
    group = np.repeat(np.arange(people), clips)
    return TwoView(face, voice, label.flatten(0, 1), AFFECT, group, split=group % 3 > 0)


# ---- views in files -----------------------------------------------------------------------------


class RawView(Dataset):
    """A view of shape (N, ...) that reads clip(row) from its files when a batch asks for it.

    `places` are arrays that say what it reads, for digest. A damaged file raises DataError.
    """

    def __init__(self, files, shape, *places):
        self.files, self.shape = files, shape
        self.places = [np.array([file.name for file in files]), *places]

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        return torch.stack([self.clip(row) for row in rows])


class Frames(RawView):
    """Clips of T face frames, (N, 3, T, 112, 112) uint8.

    Clip i is the files folders[of[i]] / pattern.format(number) for the T numbers frames[i]. If a
    folder is a clip, present[i] holds all its numbers; otherwise present is empty.
    """

    def __init__(self, folders, pattern, of, frames, present=()):
        super().__init__(folders, (len(of), 3, frames.shape[1], 112, 112), of, frames, *present)
        self.pattern, self.of, self.frames = pattern, of, frames
        self.present, self.seed = present, None

    def name(self, row):
        """FOLDER, where it is a clip, or FOLDER/NUMBER of the last frame."""
        folder = self.files[self.of[row]].name
        return folder if self.present else f"{folder}/{self.frames[row][-1]:05d}"

    def drawn(self, seed):
        """The view for an epoch of training. If a folder is a clip, it takes two neighbours from a
        random place in each of T / 2 equal segments. Source: released code."""
        view = copy.copy(self)
        view.seed = seed if self.present else None
        return view

    def clip(self, row):
        folder, numbers = self.files[self.of[row]], self.frames[row]
        if self.seed is not None:
            present, pairs = self.present[row], len(numbers) // 2
            places = np.arange(pairs) + np.random.default_rng([self.seed, row]).random(pairs)
            first = (places * (len(present) - 1) / pairs).astype(int)
            both = np.stack([first, first + 1], axis=1).ravel()
            numbers = present[both.clip(max=len(present) - 1)]
        images = [_image(folder / self.pattern.format(number)) for number in numbers]
        return torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)


def _image(path):
    """(112, 112, 3) uint8 of a JPEG file."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading JPEG files needs Pillow: pip install pillow") from None
    with reading(path, "not a readable JPEG"), Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((112, 112)))


class Sounds(RawView):
    """The second of sound before a moment, log-mel spectrograms (N, 1, 64, 107) float32.

    Clip i ends at the fraction end[i], in 0 .. 1, of the wav file files[of[i]].
    """

    def __init__(self, files, of, end):
        super().__init__(files, (len(of), 1, 64, 107), of, end)
        self.of, self.end = of, end

    @np.errstate(all="ignore")
    def clip(self, row):
        path = self.files[self.of[row]]
        rate, samples = read_wav(path)
        stop = round(self.end[row] * len(samples))
        sound, dtype = samples[max(stop - rate, 0) : stop], samples.dtype
        sound = sound.reshape(len(sound), -1).mean(axis=1, dtype=np.float64)  # of all channels
        if dtype.kind in "iu":  # to [-1, 1]; 8 bits are unsigned, around 128
            sound = (sound - 128 * (dtype == np.uint8)) / 2.0 ** (8 * dtype.itemsize - 1)
        sound = np.pad(sound, (rate - len(sound), 0))
        common = math.gcd(rate, SAMPLE_RATE)
        sound = resample_poly(sound, SAMPLE_RATE // common, rate // common)
        return _finite(path, log_mel(torch.from_numpy(sound)))


class Signals(RawView):
    """A physiological signal from second 2 to 5, spectrograms (N, 1, 65, 128) of power, float32.

    Clip i is the column `signal` of files[i], tab separated, 512 Hz. Source: released code.
    """

    def __init__(self, files, signal):
        super().__init__(files, (len(files), 1, 65, 128), np.array(signal))
        self.signal = signal

    @np.errstate(all="ignore")
    def clip(self, row):
        path, least = self.files[row], 5 * SIGNAL_RATE
        with reading(path, "cannot be read"):
            header, *lines = path.read_text().rstrip().splitlines() or [""]
            columns = header.split()
            if self.signal not in columns:
                raise ValueError(f"no column {self.signal}; it has {' '.join(columns) or 'none'}")
            use = columns.index(self.signal)
            values = np.loadtxt(lines or ["-"], delimiter="\t", usecols=use, ndmin=1)
        if len(values) < least or not np.isfinite(values).all():
            has = f"it has {len(values)} or holds NaN"
            raise DataError(f"{path}: {self.signal} needs {least} numbers (5 s); {has}")
        part = values[2 * SIGNAL_RATE : least]
        power = spectrogram(part, SIGNAL_RATE, nperseg=16, noverlap=4, nfft=128)[2]
        return _finite(path, torch.from_numpy(power).float().unsqueeze(0))


def _finite(path, values):
    if not values.isfinite().all():
        raise DataError(f"{path}: holds NaN, infinite or too large values")
    return values


def read_wav(path):
    """(rate in Hz, samples (n,) or (n, channels)) of a wav file, mapped to memory if it can be."""
    if not path.is_file():
        raise DataError(f"{path} is missing; make it with: ffmpeg -i {path.stem}.mp4 -vn {path}")
    with reading(path, "not a readable wav file"), warnings.catch_warnings():
        with open(path, "rb") as file:
            promised = int.from_bytes(file.read(8)[4:], "little") + 8
        if os.path.getsize(path) < promised < 2**32:  # more: a stream of unknown length
            raise ValueError("cut off")
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # metadata, which ffmpeg writes
        try:
            rate, samples = wavfile.read(path, mmap=True)
        except ValueError:  # 24-bit samples cannot be mapped
            rate, samples = wavfile.read(path)
    if len(samples) == 0 or not 1_000 <= rate <= 400_000:
        found = f"{len(samples)} samples at {rate} Hz"
        raise DataError(f"{path}: holds no sound, or none of 1 to 400 kHz ({found})")
    return rate, samples


@functools.cache  # every clip needs them
def mel_filters():
    """Triangular filters (64, 513), evenly spaced on the mel scale 2595 log10(1 + f / 700)."""
    nyquist = SAMPLE_RATE / 2
    corners = 700 * (10 ** np.linspace(0, math.log10(1 + nyquist / 700), 66) - 1)
    frequencies = np.linspace(0, nyquist, 513)
    triangles = [np.interp(frequencies, corners, peak) for peak in np.eye(66)[1:-1]]
    return torch.from_numpy(np.stack(triangles))


def log_mel(sound):
    """Log-mel spectrogram of sound at 44.1 kHz, (n,) in [-1, 1] -> (1, 64, 107) float32.

    Window of 20 ms, hop of 10 ms, decibels, then (x + 14.8) / 19.895; the last 107 steps. Source:
    the lab's Aff-Wild2 code; silence on the left, where there are fewer, is ours.
    """
    window = torch.hann_window(SAMPLE_RATE // 50, dtype=torch.float64)
    how = {"window": window, "return_complex": True}
    spectrum = torch.stft(sound.double(), 1024, SAMPLE_RATE // 100, len(window), **how)
    power = mel_filters() @ spectrum.abs() ** 2
    power = F.pad(power, (107 - power.shape[1], 0)).clamp_min(1e-10)  # a negative pad cuts
    return ((10 * power.log10() + 14.8) / 19.895).float().unsqueeze(0)


# ---- Aff-Wild2 and BioVid as their holders ship them --------------------------------------------


def affwild2(root, need_privileged=True, need_label=True, stride=1):
    """Aff-Wild2's valence-arousal challenge, with its own split. Below root:

    annotations/Train_Set/VIDEO.txt, annotations/Validation_Set/VIDEO.txt   valence,arousal a frame
    cropped_aligned/VIDEO/00001.jpg ...    frames without a face are missing
    audio/VIDEO.wav                        VIDEO without _left or _right

    A clip for every `stride`-th frame that is annotated and has a face: 8 frames, every 4th of the
    32 that end there, and the second of sound that ends there. For a frame without a face stands
    the nearest that has one (ours). A warning names videos without a clip.
    Without need_label every frame counts as annotated. Source: the lab's Aff-Wild2 code.
    """
    root = Path(root)
    parts = ["annotations/Train_Set", "annotations/Validation_Set"] * need_label
    _check_root(root, [*parts, "cropped_aligned"] + ["audio"] * need_privileged, "Aff-Wild2")
    files = [file for part in parts for file in sorted((root / part).glob("*.txt"))]
    if not need_label:
        files = sorted(path for path in (root / "cropped_aligned").iterdir() if path.is_dir())
    videos, empty = [], []
    for file in files:
        name = file.name.removesuffix(".txt")
        folder = root / "cropped_aligned" / name
        sound = root / "audio" / f"{name.removesuffix('_left').removesuffix('_right')}.wav"
        present = _frame_numbers(folder, prefix="")
        unknown = np.broadcast_to(0.0, (max(present, default=0), 2))
        label = _valence_arousal(file) if need_label else unknown
        present = present[(present >= 1) & (present <= len(label))]
        ends = present[(label[present - 1] != -5).all(axis=1)][::stride]
        if len(ends) == 0:
            empty.append(name)
            continue
        if need_privileged:
            read_wav(sound)
        frames = _nearest(present, ends[:, None] - np.arange(28, -1, -4))
        training = file.parent.name == "Train_Set"
        videos.append((folder, sound, training, frames, ends / len(label), label[ends - 1]))
    kind = f"{'annotated ' * need_label}frame with a face"
    if not videos:
        raise DataError(f"{root}: no {kind} in any video")
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        warnings.warn(f"{root}: no {kind} in {', '.join(empty[:5])}{more}", stacklevel=2)

    folders, sounds, training, *arrays = zip(*videos)
    of = np.repeat(np.arange(len(videos)), [len(frames) for frames in arrays[0]])
    frames, ends, label = map(np.concatenate, arrays)
    people = np.unique([path.name for path in sounds], return_inverse=True)[1]  # _left with _right
    return TwoView(
        visual=Frames(folders, "{:05d}.jpg", of, frames),
        privileged=Sounds(sounds, of, ends) if need_privileged else None,
        label=torch.from_numpy(label).float() if need_label else None,
        names=AFFECT,
        group=people[of],
        split=np.array(training)[of],
    )


def _check_root(root, wanted, name):
    missing = " or ".join(folder for folder in wanted if not (root / folder).is_dir())
    if missing:
        needs = ", ".join(wanted)
        raise DataError(f"{root}: no folder {missing}; {name} needs {needs} there")


def _valence_arousal(path):
    """(frames, 2) of an annotation file; -5 is not annotated."""
    with reading(path, "empty or not a text file"):
        header, *lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    if header.replace(" ", "").lower() != "valence,arousal":
        raise DataError(f'{path}: line 1 must be "valence,arousal", not "{header[:40]}"')
    values = np.empty((len(lines), 2))
    for row, line in enumerate(lines):
        with reading(path, f"line {row + 2} must be two numbers within [-1, 1], or -5"):
            valence, arousal = values[row] = [float(text) for text in line.split(",")]
            if not all(value == -5 or -1 <= value <= 1 for value in (valence, arousal)):
                raise ValueError(line)
    return values


def _frame_numbers(folder, prefix):
    """Sorted numbers of the files prefix00001.jpg ... in a folder, which need not exist."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = [re.fullmatch(prefix + "([0-9]{5,9})[.]jpg", name) for name in names]
    return np.array(sorted(int(match[1]) for match in found if match), np.int64)


def _nearest(present, wanted):
    """For each wanted frame, an array, the nearest present one; of two, the earlier."""
    right = np.searchsorted(present, wanted)
    before, after = present[np.maximum(right - 1, 0)], present[np.minimum(right, len(present) - 1)]
    take_after = (right == 0) | (after - wanted < wanted - before)
    return np.where(take_after, after, before).astype(np.int32)


def biovid(
    root, need_privileged=True, need_label=True, levels=("BL1", "PA4"), signal="emg_corrugator"
):
    """BioVid Part A: a class for each of `levels`, a group for each person. Below root:

    frames/SUBJECT/CLIP/img_00001.jpg ...       10 are taken, evenly spread
    biosignals_filtered/SUBJECT/CLIP_bio.csv    for each CLIP, which is SUBJECT-LEVEL-NUMBER

    Without need_label every folder is a clip. Source: released code.
    """
    root, levels = Path(root), list(levels)
    if len(levels) < 2 or len(set(levels) & set(BIOVID_LEVELS)) < len(levels):
        known = ",".join(BIOVID_LEVELS)
        raise DataError(f"argument --levels: name two or more different ones of {known}")
    _check_root(root, ["frames"] + ["biosignals_filtered"] * need_privileged, "BioVid")
    clips = [path for path in sorted((root / "frames").glob("*/*")) if path.is_dir()]
    if need_label:
        clips = [clip for clip in clips if _level(clip) in levels]
    absent = [level for level in levels if level not in map(_level, clips)] if need_label else []
    if absent or not clips:
        name = f"SUBJECT/SUBJECT-{(absent or ['LEVEL'])[0]}-NUMBER"
        raise DataError(f"{root}/frames: no clip {name} in it")
    files, frames, present = [], [], []
    for clip in clips:
        numbers = _frame_numbers(clip, prefix="img_")
        if len(numbers) == 0:
            what = "no img_00001.jpg ... in it; extract its frames or remove the folder"
            raise DataError(f"{clip}: {what}")
        file = root / "biosignals_filtered" / clip.parent.name / f"{clip.name}_bio.csv"
        if need_privileged and not file.is_file():
            raise DataError(f"{file} is missing, the signals of a clip that has frames")
        files.append(file)
        frames.append(numbers[np.linspace(0, len(numbers) - 1, 10).round().astype(int)])
        present.append(numbers)
    return TwoView(
        visual=Frames(clips, "img_{:05d}.jpg", np.arange(len(clips)), np.array(frames), present),
        privileged=Signals(files, signal) if need_privileged else None,
        label=torch.tensor([levels.index(_level(clip)) for clip in clips]) if need_label else None,
        names=levels,
        group=np.unique([clip.parent.name for clip in clips], return_inverse=True)[1],
        split=None,
    )


def _level(clip):
    """LEVEL of a folder that is named SUBJECT-LEVEL-NUMBER."""
    return clip.name.partition("-")[2].partition("-")[0]


# ---- folds --------------------------------------------------------------------------------------


def folds(data, k=None, seed=0, train_rows=None, set_aside=False):
    """List of (rows to train on, to choose epochs by, to score), LongTensors in increasing order.

    The data's own split, if it has one and k is None; else k folds, 5 by default. Nobody is both
    trained on and scored (ours; the released code splits by clip). Where people are unknown, every
    fold gets as much of each class. train_rows is how many training rows are drawn. set_aside takes
    a fifth of the training people to choose by; else the scored rows do, the paper's protocol.
    Raises DataError where people, a class or rows are too few.
    """
    if data.task == "classification" and len(data.names) < 2:
        raise DataError(f"label holds a single class, {data.names[0]}; there is nothing to learn")
    draw = np.random.default_rng(seed).permutation
    own = data.split is not None and k is None
    fold_of = data.split.astype(int) if own else _fold_of(data, k or 5, seed)
    result = []
    for i in range(1 if own else k or 5):
        train, val = np.flatnonzero(fold_of != i), np.flatnonzero(fold_of == i)
        if train_rows is not None:
            if train_rows > len(train):
                raise DataError(f"argument --train-rows: fold {i} has only {len(train)}")
            train = np.sort(draw(train)[:train_rows])
        choose = val
        if set_aside:
            group = train if data.group is None else data.group[train]
            people = np.random.default_rng(seed).permutation(np.unique(group))
            aside = np.isin(group, people[: max(1, len(people) // 5)])
            train, choose = train[~aside], train[aside]
        least = 1 + (data.task == "regression")  # the CCC of one row is always 0
        if len(train) < 2 or min(len(choose), len(val)) < least:
            counts = f"{len(train)} training and {len(val)} validation rows"
            raise DataError(f"fold {i} has {counts}, too few to go on")
        if data.task == "classification":
            for label in set(range(len(data.names))) - set(data.label[train].tolist()):
                what = f"no training row of class {data.names[label]}"
                raise DataError(f"fold {i} has {what}: try other --folds or --seed")
        result.append(tuple(torch.from_numpy(rows) for rows in (train, choose, val)))
    return result


def _fold_of(data, k, seed):
    """The fold of each row, (N,) in 0 .. k - 1."""
    rng = np.random.default_rng(seed)
    few = f"too few for {k} folds: use fewer --folds, at least 2"
    if data.group is not None:
        # People go, largest first, to the fold that has the fewest rows so far.
        sizes = np.bincount(data.group)
        if len(sizes) < k:
            raise DataError(f"the data has {len(sizes)} people, {few}")
        shuffled = rng.permutation(len(sizes))
        fold_of_person, rows = np.empty(len(sizes), dtype=int), np.zeros(k)
        for person in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            fold_of_person[person] = rows.argmin()
            rows[rows.argmin()] += sizes[person]
        return fold_of_person[data.group]
    if data.task == "regression":
        return rng.permutation(np.arange(len(data.label)) % k)
    # Each class is dealt out evenly, and goes on where the one before it stopped.
    label = data.label.numpy()
    counts = np.bincount(label)
    if counts.min() < k:
        name = data.names[counts.argmin()]
        raise DataError(f"class {name} has {counts.min()} rows, {few}")
    order = [rng.permutation(np.flatnonzero(label == c)) for c in range(len(counts))]
    fold_of = np.empty(len(label), dtype=int)
    fold_of[np.concatenate(order)] = np.arange(len(label)) % k
    return fold_of


def digest(*values):
    """A short fingerprint of tensors, arrays, raw views and None.

    A raw view counts by the names and places that it reads, not by bytes or by where they lie.
    """
    sha = hashlib.sha256()
    for value in values:
        for array in value.places if isinstance(value, RawView) else [value]:
            array = array.numpy() if torch.is_tensor(array) else array
            array = np.ascontiguousarray([] if array is None else array)
            sha.update(f"{array.dtype} {array.shape}".encode())
            sha.update(array.view(np.uint8) if array.dtype.kind == "U" else array)
    return sha.hexdigest()[:16]
