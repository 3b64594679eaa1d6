"""Data sets of two views: one seen always ("visual"), one in training only ("privileged").

    TwoView      the contract: what every data set below becomes, and all that train.py knows of it
    load         arguments -> TwoView
    features     a .npz file of feature vectors (any two views of anything)
    synthetic    the default: drawn faces and voices, valence and arousal
    Frames, Sounds, Signals   views that are read from their files when a batch asks for them
    affwild2     valence and arousal of faces, with the voice; as its holders ship it
    biovid       pain of faces, with a physiological signal; as its holders ship it
    folds        TwoView -> rows to train on, to choose by and to score, nobody in two of them
    digest       a fingerprint of data

Whatever is wrong with a file raises DataError: one line that names the file and the row.
"""

import copy
import functools
import hashlib
import math
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly, spectrogram
from torch.utils.data import Dataset

SAMPLE_RATE = 44_100  # of the sound that log_mel takes, in Hz
SIGNAL_RATE = 512  # of BioVid's signals, in Hz
QUIET = {"over": "ignore", "invalid": "ignore"}  # numpy, where what is not finite is refused next
BIOVID_LEVELS = ("BL1", "PA1", "PA2", "PA3", "PA4")
BIOVID_SIGNALS = ("gsr", "ecg", "emg_trapezius", "emg_corrugator", "emg_zygomaticus")


class DataError(ValueError):
    """Something is wrong with the data; the message is one line for the person whose data it is."""


def _reason(error):
    """What another library says is wrong, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class TwoView(NamedTuple):
    """N clips. Integer labels make a classification, float labels a regression.

    view[rows], with a list of rows, is a batch: vectors (B, F) float32, clips of frames uint8
    (B, 3, T, H, W), or spectrograms (B, 1, H, W) float32. view.shape is that of all clips.
    """

    visual: torch.Tensor | Dataset
    privileged: torch.Tensor | Dataset | None  # None where only a student is scored
    label: torch.Tensor | None  # (N,) int64 in 0 .. K - 1, or (N, K) float32; None where unknown
    names: list  # the K classes as they stand in the file, or the names of the K regressed columns
    group: np.ndarray | None  # (N,) int: the person of each clip; None where unknown
    split: np.ndarray | None  # (N,) bool: True for training, where the data set brings a split

    @property
    def task(self):
        return "regression" if self.label.dtype.is_floating_point else "classification"


def load(args, need_privileged=True, need_label=True):
    """The TwoView of args.dataset. What is not needed need not be there."""
    if args.dataset == "synthetic":
        return synthetic(args.seed)
    needs = {"need_privileged": need_privileged, "need_label": need_label}
    if args.dataset == "affwild2":
        return affwild2(args.data or "data/affwild2", stride=args.clip_stride, **needs)
    if args.dataset == "biovid":
        how = {"levels": args.levels, "signal": args.signal, **needs}
        return biovid(args.data or "data/biovid", **how)
    if args.data is None:
        raise DataError("--dataset features needs --data FILE.npz of visual, privileged, label")
    return features(args.data, **needs)


# ---- feature files ------------------------------------------------------------------------------


def features(path, need_privileged=True, need_label=True):
    """Read a .npz file with

    visual      (N, ...) numbers             group  (N,), optional: the person of each row
    privileged  (N, ...) numbers             split  (N,), optional: "train" or "val"
    label       (N,) integers: classes, or (N, K) floats: K regressed values
    """
    needed = ["visual"] + ["label"] * need_label + ["privileged"] * need_privileged
    arrays = _read_npz(path, needed, ["label", "group", "split"])
    rows = {key: len(a) if a.ndim else 0 for key, a in arrays.items()}
    least = 2 if need_privileged else 1
    if len(set(rows.values())) > 1 or rows["visual"] < least:
        counts = ", ".join(f"{key} {n}" for key, n in rows.items())
        same = f"every key needs the same number of rows, at least {least}"
        raise DataError(f"{path}: {same}, but they have {counts}")
    label, names = _label(path, arrays["label"]) if "label" in arrays else (None, [])
    group = split = None
    if "group" in arrays:
        _check_kind(path, "group", arrays["group"], "biuSU", "integers or strings")
        group = np.unique(arrays["group"], return_inverse=True)[1]
    if "split" in arrays:
        _check_kind(path, "split", arrays["split"], "SU", "strings")
        split = arrays["split"]
        if split.dtype.kind == "S":
            split = np.char.decode(split, "ascii", "replace")
        for row in np.flatnonzero((split != "train") & (split != "val"))[:1]:
            must = 'it must be "train" or "val"'
            raise DataError(f'{path}: split row {row} is "{split[row]}"; {must}')
        split = split == "train"
    if group is not None and split is not None and set(group[split]) & set(group[~split]):
        shared = arrays["group"][np.isin(group, group[split]) & ~split][0]
        both = f"group {shared} is in both parts of split"
        raise DataError(f"{path}: {both}; mend one of the two keys, or leave it out")
    visual = _numbers(path, "visual", arrays["visual"])
    privileged = _numbers(path, "privileged", arrays["privileged"]) if need_privileged else None
    return TwoView(visual, privileged, label, names, group, split)


def _read_npz(path, needed, optional):
    """The arrays of these keys, those that are needed and the optional ones that are there."""
    if not Path(path).is_file():
        what = "a folder, not a file" if Path(path).is_dir() else "no such file"
        raise DataError(f"{path}: {what}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = sorted(archive.files)
            arrays = {key: archive[key] for key in (*needed, *optional) if key in keys}
    except Exception as error:  # a damaged archive can raise anything; its reader needs the name
        raise DataError(f"{path}: not a .npz file of plain arrays ({_reason(error)})") from None
    missing = [key for key in needed if key not in keys]
    if missing:
        has = ", ".join(keys) or "none"
        raise DataError(f"{path}: no key {' or '.join(missing)}; it has {has}")
    return arrays


def _check_kind(path, key, array, kinds, what):
    if array.ndim != 1 or array.dtype.kind not in kinds:
        found = f"{array.dtype} of shape {array.shape}"
        raise DataError(f"{path}: {key} must be (N,) {what}, not {found}")


def _numbers(path, key, array):
    if array.dtype.kind not in "biuf" or array.size == 0:
        found = f"{array.dtype} of shape {array.shape}"
        raise DataError(f"{path}: {key} must hold numbers, not {found}")
    with np.errstate(**QUIET):
        values = torch.from_numpy(array.reshape(len(array), -1).astype(np.float32))
    bad = ~values.isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise DataError(f"{path}: {key} row {row} holds NaN, infinite or too large values")
    return values


def _label(path, array):
    if array.dtype.kind in "biu" and array.ndim == 1:
        names, label = np.unique(array, return_inverse=True)
        return torch.from_numpy(label), names.tolist()
    if array.dtype.kind == "f" and array.ndim == 2:
        label, columns = _numbers(path, "label", array), array.shape[1]
        return label, ["valence", "arousal"] if columns == 2 else [str(i) for i in range(columns)]
    forms = "(N,) integers (classes) or (N, K) floats (regression)"
    raise DataError(f"{path}: label must be {forms}, not {array.dtype} of shape {array.shape}")


# ---- the default --------------------------------------------------------------------------------


def synthetic(seed=0, people=60, clips=24, size=32, frames=4):
    """An Aff-Wild2-like problem, rendered in memory: `people` faces filmed for `clips` clips each.

    Valence and arousal wander in time within [-1, 1]. A face, drawn in its person's proportions and
    tone, curves its mouth with valence and opens its eyes with arousal, unsteadily from frame to
    frame and in noise; in spells of several clips a hand hides its mouth or its eyes. The voice's
    harmonics lie by arousal and by speaker, and fall off by valence, with less noise and never
    hidden. Every third person is in the validation split. Source: ours; it exercises the code, and
    says nothing about real faces.

    visual (3, frames, size, size) uint8, privileged a spectrogram (1, size, size) float32.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    state, states = normal(people, 2), []
    for _ in range(clips):
        state = 0.95 * state + 0.3 * normal(people, 2)
        states.append(state)
    label = torch.stack(states, dim=1).tanh()  # (people, clips, 2)
    person = normal(people, 1, 1, 1, 1, 6)  # as all below: (people, clips, frames, size, size)
    shown = label.view(people, clips, 1, 1, 1, 2) + 0.15 * normal(people, clips, frames, 1, 1, 2)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")

    oval = (x / 0.75) ** 2 + (y / (0.9 + 0.05 * person[..., 1])) ** 2 < 1
    eyes_x = (x.abs() - 0.33 - 0.04 * person[..., 2]) ** 2 / 0.02
    eyes = eyes_x + (y + 0.25) ** 2 / (0.12 + 0.07 * shown[..., 1]) ** 2
    mouth_y = y - 0.42 - 0.05 * person[..., 3] + 0.9 * shown[..., 0] * (x**2 - 0.12)
    mouth = mouth_y**2 / 0.008 + (x / 0.55) ** 4
    noise = 0.08 * normal(people, clips, frames, size, size)
    face = (0.6 + 0.08 * person[..., 0]) * oval - 0.4 * (-eyes).exp() - 0.4 * (-mouth).exp() + noise
    starts = (torch.rand(people, 2, clips, generator=g) < 0.03).float()
    spells = torch.nn.functional.max_pool1d(starts, 5, 1, 2) > 0
    for part, hidden in zip((y < 0, y >= 0), spells.unbind(1)):
        face = torch.where(hidden.view(people, clips, 1, 1, 1) & part, 0.3, face)
    face = (255 * face.clamp(0, 1)).byte().flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1, -1)

    heard, height = shown.mean(2), (torch.arange(size) / size).view(size, 1)  # height: frequency
    pitch = 0.22 + 0.06 * heard[..., 1] + 0.01 * person[:, :, 0, ..., 4]
    slope = 2 + 0.2 * person[:, :, 0, ..., 5]
    harmonics = (2 * math.pi * height / pitch).cos() * (-height * (slope - heard[..., 0])).exp()
    voice = (harmonics + 0.2 * normal(people, clips, size, size)).flatten(0, 1).unsqueeze(1)
    group = np.repeat(np.arange(people), clips)
    label, names = label.flatten(0, 1), ["valence", "arousal"]
    return TwoView(face, voice, label, names, group, split=group % 3 > 0)


# ---- raw views: read when asked for -------------------------------------------------------------


class Frames(Dataset):
    """Clips of face frames, (N, 3, T, 112, 112) uint8.

    Clip i is the files folders[of[i]] / pattern.format(number) of the T numbers frames[i]. naming
    makes its name from the folder's and the last number. present[i], where known, are the numbers
    of all its frames. Only numbers are kept, so that memory does not grow with the videos.
    """

    def __init__(self, folders, pattern, of, frames, naming="{}/{:05d}", present=None):
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise DataError("reading JPEG files needs Pillow: pip install pillow") from None
        self.folders, self.pattern, self.of, self.frames = folders, pattern, of, frames
        self.naming, self.present, self.seed = naming, present, None
        self.shape = (*frames.shape[:1], 3, frames.shape[1], 112, 112)

    def __len__(self):
        return len(self.of)

    def __getitem__(self, rows):
        return torch.from_numpy(np.stack([self._clip(row) for row in rows]))

    def drawn(self, seed):
        """The view for an epoch of training: where all frames of a clip are known, two neighbours
        from a random place in each of T / 2 segments. Source: released code."""
        view = copy.copy(self)
        view.seed = None if self.present is None else seed
        return view

    def name(self, row):
        return self.naming.format(self.folders[self.of[row]].name, self.frames[row][-1])

    def key(self):
        return [np.array([folder.name for folder in self.folders]), self.of, self.frames]

    def _clip(self, row):
        numbers = self.frames[row]
        if self.seed is not None:
            present, pairs = self.present[row], len(numbers) // 2
            place = np.arange(pairs) + np.random.default_rng([self.seed, row]).random(pairs)
            first = (place * (len(present) - 1) / pairs).astype(int)
            both = np.stack([first, first + 1], axis=1).ravel()
            numbers = present[np.minimum(both, len(present) - 1)]
        folder = self.folders[self.of[row]]
        return np.stack([_image(folder / self.pattern.format(n)) for n in numbers], axis=1)


def _image(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            image = image if image.size == (112, 112) else image.resize((112, 112))
            return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # a damaged image can raise anything; its reader needs the name
        raise DataError(f"{path}: not a readable JPEG ({_reason(error)})") from None


class Sounds(Dataset):
    """The second of sound before a moment of a video, as log-mel spectrograms (N, 1, 64, 107).

    Clip i ends at the fraction end[i], in 0 .. 1, of the wav file files[of[i]].
    """

    def __init__(self, files, of, end):
        self.files, self.of, self.end, self.shape = files, of, end, (len(of), 1, 64, 107)

    def __len__(self):
        return len(self.of)

    def __getitem__(self, rows):
        return torch.stack([self._spectrogram(row) for row in rows])

    def key(self):
        return [np.array([file.name for file in self.files]), self.of, self.end]

    def _spectrogram(self, row):
        path = self.files[self.of[row]]
        rate, samples = read_wav(path)
        stop = round(self.end[row] * len(samples))
        sound, kind = samples[max(stop - rate, 0) : stop], samples.dtype
        with np.errstate(**QUIET):
            sound = sound.reshape(len(sound), -1).mean(axis=1, dtype=np.float64)
        if kind.kind in "iu":  # to [-1, 1]; 8 bit is unsigned around 128
            sound = (sound - (128 if kind == np.uint8 else 0)) / 2.0 ** (8 * kind.itemsize - 1)
        sound = np.pad(sound, (rate - len(sound), 0))
        common = math.gcd(rate, SAMPLE_RATE)
        sound = resample_poly(sound, SAMPLE_RATE // common, rate // common)
        return _finite(log_mel(torch.from_numpy(sound)), path)


class Signals(Dataset):
    """Spectrograms of a physiological signal between its seconds 2 and 5, power (N, 1, 65, 128).

    Clip i is the column `signal` of the tab-separated file files[i], 512 Hz. Source: released code.
    """

    def __init__(self, files, signal):
        self.files, self.signal, self.shape = files, signal, (len(files), 1, 65, 128)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, rows):
        return torch.stack([self._spectrogram(self.files[row]) for row in rows])

    def key(self):
        return [np.array([file.name for file in self.files]), np.array(self.signal)]

    def _spectrogram(self, path):
        try:
            header, *rows = path.read_text().splitlines() or [""]
            columns = header.split()
            if self.signal not in columns:
                raise ValueError(f"no column {self.signal}; it has {' '.join(columns) or 'none'}")
            values = np.loadtxt(rows, delimiter="\t", usecols=columns.index(self.signal), ndmin=1)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({_reason(error)})") from None
        least = 5 * SIGNAL_RATE
        if len(values) < least or not np.isfinite(values).all():
            has = f"it has {len(values)} or holds NaN"
            raise DataError(f"{path}: {self.signal} needs {least} numbers (5 s); {has}")
        values = values[2 * SIGNAL_RATE : least]
        with np.errstate(**QUIET):
            power = spectrogram(values, SIGNAL_RATE, nperseg=16, noverlap=4, nfft=128)[2]
        return _finite(torch.from_numpy(power).float().unsqueeze(0), path)


def _finite(values, path):
    if not values.isfinite().all():
        raise DataError(f"{path}: holds NaN, infinite or too large values")
    return values


def read_wav(path):
    """(samples a second, samples (n,) or (n, channels)) of a wav file, mapped if possible."""
    try:
        with open(path, "rb") as file:
            promised = int.from_bytes(file.read(8)[4:], "little") + 8
            if os.fstat(file.fileno()).st_size < promised < 2**32:  # more: a stream of unknown end
                raise ValueError("cut off")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of ffmpeg's metadata
            try:
                rate, samples = wavfile.read(path, mmap=True)
            except ValueError:  # 24-bit samples cannot be mapped
                rate, samples = wavfile.read(path)
    except FileNotFoundError:
        make = f"ffmpeg -i {Path(path).stem}.mp4 -vn {path}"
        raise DataError(f"{path} is missing; make it with: {make}") from None
    except Exception as error:  # a damaged file can raise anything; its reader needs the name
        raise DataError(f"{path}: not a readable wav file ({_reason(error)})") from None
    if len(samples) == 0 or not 1_000 <= rate <= 400_000:
        found = f"{len(samples)} samples at {rate} Hz"
        raise DataError(f"{path}: holds no sound, or none of 1 to 400 kHz ({found})")
    return rate, samples


@functools.cache  # every clip needs them
def mel_filters(bands=64, n_fft=1024, rate=SAMPLE_RATE):
    """Triangular filters (bands, n_fft / 2 + 1), even on the mel scale 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    width = corners.diff().unsqueeze(1)
    rising = (frequency - corners[:-2].unsqueeze(1)) / width[:-1]
    falling = (corners[2:].unsqueeze(1) - frequency) / width[1:]
    return torch.minimum(rising, falling).clamp_min(0)


def log_mel(sound, steps=107):
    """Log-mel spectrogram of sound at 44.1 kHz, (n,) in [-1, 1] -> (1, 64, steps) float32.

    n_fft 1024, window of 20 ms, hop of 10 ms, 64 bands, decibels, then (x + 14.8) / 19.895; the
    last `steps` steps, silence on the left where there are fewer. Source: the lab's Aff-Wild2 code;
    the silence ours.
    """
    window = torch.hann_window(SAMPLE_RATE // 50, dtype=torch.float64)
    how = {"window": window, "center": True, "pad_mode": "reflect", "return_complex": True}
    spectrum = torch.stft(sound.double(), 1024, SAMPLE_RATE // 100, len(window), **how)
    power = (mel_filters() @ spectrum.abs() ** 2)[:, -steps:]
    power = torch.nn.functional.pad(power, (steps - power.shape[1], 0))
    return ((10 * power.clamp_min(1e-10).log10() + 14.8) / 19.895).float().unsqueeze(0)

# ---- Aff-Wild2 ----------------------------------------------------------------------------------


def affwild2(root, need_privileged=True, need_label=True, stride=1):
    """Aff-Wild2's valence-arousal challenge, in its own training and validation split. Below root:

    annotations/Train_Set/VIDEO.txt, annotations/Validation_Set/VIDEO.txt   valence,arousal a frame
    cropped_aligned/VIDEO/00001.jpg ...                       frames without a face are missing
    audio/VIDEO.wav                                           without a _left or _right

    A clip for every `stride`-th frame that is annotated and has a face: the 8 frames that end
    there, every 4th of a window of 32, and the second of sound that ends there. For a frame without
    a face stands the nearest one that has one and is no later than the clip (ours). A video without
    any is named in a warning. Without need_label every frame counts as annotated. Source: the lab's
    Aff-Wild2 code.
    """
    root, parts = Path(root), ("Train_Set", "Validation_Set")
    wanted = [f"annotations/{part}" for part in parts if need_label] + ["cropped_aligned"]
    _check_root(root, wanted + ["audio"] * need_privileged, "Aff-Wild2")
    files = []
    for part in parts:
        texts = sorted((root / "annotations" / part).glob("*.txt"))
        files += [(file, part) for file in texts]
    if not need_label:
        folders = sorted(path for path in (root / "cropped_aligned").iterdir() if path.is_dir())
        files = [(Path(f"{folder.name}.txt"), "") for folder in folders]
    folders, sounds, of, frames, ends, labels, split, empty = [], [], [], [], [], [], [], []
    for file, part in files:
        folder = root / "cropped_aligned" / file.stem
        present = _frame_numbers(folder, prefix="")
        last = max(present, default=0)
        label = _valence_arousal(file) if need_label else np.broadcast_to(0.0, (last, 2))
        present = present[(present >= 1) & (present <= len(label))]
        usable = present[(label[present - 1] != -5).all(axis=1)][::stride]
        if len(usable) == 0:
            empty.append(file.stem)
            continue
        video = file.stem.removesuffix("_left").removesuffix("_right")
        sounds.append(root / "audio" / f"{video}.wav")
        if need_privileged:
            read_wav(sounds[-1])
        of.append(np.full(len(usable), len(folders)))
        folders.append(folder)
        frames.append(_nearest(present, usable[:, None] - np.arange(28, -1, -4), usable))
        ends.append(usable / len(label))
        labels.append(label[usable - 1])
        split.append(np.full(len(usable), part == "Train_Set"))
    kind = f"{'annotated ' * need_label}frame with a face"
    if not folders:
        raise DataError(f"{root}: no {kind} in any video")
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        warnings.warn(f"{root}: no {kind} in {', '.join(empty[:5])}{more}", stacklevel=2)
    of, names = np.concatenate(of), [path.name for path in sounds]
    return TwoView(
        visual=Frames(folders, "{:05d}.jpg", of, np.concatenate(frames)),
        privileged=Sounds(sounds, of, np.concatenate(ends)) if need_privileged else None,
        label=torch.from_numpy(np.concatenate(labels)).float() if need_label else None,
        names=["valence", "arousal"],
        group=np.unique(names, return_inverse=True)[1][of],  # both people of a video together
        split=np.concatenate(split),
    )


def _check_root(root, wanted, name):
    missing = [folder for folder in wanted if not (root / folder).is_dir()]
    if missing:
        needs = f"{name} needs {', '.join(wanted)} there"
        raise DataError(f"{root}: no folder {' or '.join(missing)}; {needs}")


def _valence_arousal(path):
    """(frames, 2) of an annotation file, -5 where a frame is not annotated."""
    try:
        header, *rows = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError, ValueError):
        raise DataError(f"{path}: empty or not a text file") from None
    if header.replace(" ", "").lower() != "valence,arousal":
        raise DataError(f'{path}: line 1 must be "valence,arousal", not "{header[:40]}"')
    values = np.empty((len(rows), 2))
    for i, row in enumerate(rows):
        try:
            values[i] = valence, arousal = [float(text) for text in row.split(",")]
        except ValueError:
            text = f'must be two numbers, not "{row[:40]}"'
            raise DataError(f"{path}: line {i + 2} {text}") from None
        if not all(v == -5 or -1 <= v <= 1 for v in (valence, arousal)):
            text = f"holds a value that is neither within [-1, 1] nor -5: {row[:40]}"
            raise DataError(f"{path}: line {i + 2} {text}")
    return values


def _frame_numbers(folder, prefix):
    """Sorted numbers of the files prefix00001.jpg ... in a folder; empty where there is none."""
    names = os.listdir(folder) if folder.is_dir() else []
    texts = (n[len(prefix) : -4] for n in names if n.startswith(prefix) and n.endswith(".jpg"))
    numbers = [int(text) for text in texts if text.isdecimal() and len(text) < 10]
    return np.array(sorted(numbers), np.int64)


def _nearest(present, wanted, last):
    """For each wanted frame (N, T) the nearest present one no later than last (N,); of two, the
    earlier."""
    right = np.searchsorted(present, wanted)
    before, after = present[np.maximum(right - 1, 0)], present[np.minimum(right, len(present) - 1)]
    nearer = (right == 0) | (after - wanted < wanted - before)
    return np.where((after <= last[:, None]) & nearer, after, before).astype(np.int32)


# ---- BioVid -------------------------------------------------------------------------------------


def biovid(
    root, need_privileged=True, need_label=True, levels=("BL1", "PA4"), signal="emg_corrugator"
):
    """BioVid Part A, a class for each of `levels`, a group for each person. Below root:

    frames/SUBJECT/CLIP/img_00001.jpg ...         10 are taken, evenly spread over the clip
    biosignals_filtered/SUBJECT/CLIP_bio.csv      tab separated, 512 Hz, a column for each signal

    Clips are named SUBJECT-LEVEL-NUMBER; without need_label every folder is a clip. Training takes
    frames from random places, see Frames.drawn. Source: released code.
    """
    root, levels = Path(root), list(levels)
    if not set(levels) <= set(BIOVID_LEVELS) or len(set(levels)) < max(2, len(levels)):
        known = ",".join(BIOVID_LEVELS)
        raise DataError(f"argument --levels: name two or more different ones of {known}")
    _check_root(root, ["frames"] + ["biosignals_filtered"] * need_privileged, "BioVid")
    folders, files, labels, frames, present = [], [], [], [], []
    for clip in sorted(path for path in (root / "frames").glob("*/*") if path.is_dir()):
        level = clip.name.partition("-")[2].partition("-")[0]
        if need_label and level not in levels:
            continue
        numbers = _frame_numbers(clip, prefix="img_")
        if len(numbers) == 0:
            what = "no img_00001.jpg ... in it; extract its frames or remove the folder"
            raise DataError(f"{clip}: {what}")
        file = root / "biosignals_filtered" / clip.parent.name / f"{clip.name}_bio.csv"
        if need_privileged and not file.is_file():
            raise DataError(f"{file} is missing, the signals of a clip that has frames")
        folders.append(clip)
        files.append(file)
        labels.append(level)
        frames.append(numbers[np.linspace(0, len(numbers) - 1, 10).round().astype(int)])
        present.append(numbers)
    absent = [level for level in levels if level not in labels] if need_label else []
    if absent or not folders:
        name = f"SUBJECT/SUBJECT-{(absent or ['LEVEL'])[0]}-NUMBER"
        raise DataError(f"{root}/frames: no clip {name} in it")
    of, frames = np.arange(len(folders)), np.array(frames, dtype=np.int32)
    return TwoView(
        visual=Frames(folders, "img_{:05d}.jpg", of, frames, "{}", present),
        privileged=Signals(files, signal) if need_privileged else None,
        label=torch.tensor([levels.index(level) for level in labels]) if need_label else None,
        names=levels,
        group=np.unique([clip.parent.name for clip in folders], return_inverse=True)[1],
        split=None,
    )


# ---- folds --------------------------------------------------------------------------------------


def folds(data, k=None, seed=0, train_rows=None, set_aside=False):
    """List of (rows to train on, to choose epochs by, to score), LongTensors in increasing order.

    The data set's own split where it has one and k is None; else k (default 5) folds: by person
    where groups are known, so that nobody is on both sides (ours; the released code splits by
    clip), and otherwise stratified by class, or at random for a regression. train_rows are drawn
    from each fold's training rows. set_aside takes a fifth of them, of the people where groups are
    known, to choose by; without it the scored rows choose, the paper's protocol.
    """
    if data.task == "classification" and len(data.names) < 2:
        raise DataError(f"label holds a single class, {data.names[0]}; there is nothing to learn")
    rng, draw = np.random.default_rng(seed), np.random.default_rng(seed).permutation
    if data.split is not None and k is None:
        scored = [~data.split]
    else:
        fold_of = _fold_of(data, k or 5, rng)
        scored = [fold_of == i for i in range(k or 5)]
    result = []
    for i, val in enumerate(scored):
        train, val = np.flatnonzero(~val), np.flatnonzero(val)
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
        # The CCC of one row is always 0.
        if min(len(train), 2 * len(val), 2 * len(choose)) < 2 + 2 * (data.task == "regression"):
            counts = f"{len(train)} training and {len(val)} validation rows"
            raise DataError(f"fold {i} has {counts}, too few to go on")
        if data.task == "classification":
            absent = np.setdiff1d(np.arange(len(data.names)), data.label[train].numpy())
            if len(absent):
                what = f"no training row of class {data.names[absent[0]]}"
                raise DataError(f"fold {i} has {what}: try other --folds or --seed")
        result.append(tuple(torch.from_numpy(rows) for rows in (train, choose, val)))
    return result


def _fold_of(data, k, rng):
    """The fold of each row. People go, largest first, to the fold that has the fewest rows so far;
    classes are dealt out evenly, each going on where the one before it stopped."""
    if data.group is not None:
        sizes = np.bincount(data.group)
        if len(sizes) < k:
            few = f"the data has {len(sizes)} people, too few for {k} folds"
            raise DataError(f"{few}: use fewer --folds, at least 2")
        shuffled = rng.permutation(len(sizes))
        fold_of_person, rows = np.empty(len(sizes), dtype=int), np.zeros(k)
        for person in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
            fold_of_person[person] = rows.argmin()
            rows[rows.argmin()] += sizes[person]
        return fold_of_person[data.group]
    if data.task == "regression":
        return rng.permutation(np.arange(len(data.label)) % k)
    label = data.label.numpy()
    counts = np.bincount(label)
    if counts.min() < k:
        few = f"class {data.names[counts.argmin()]} has {counts.min()} rows, too few for {k} folds"
        raise DataError(f"{few}: use fewer --folds, at least 2")
    fold_of = np.empty(len(label), dtype=int)
    order = [rng.permutation(np.flatnonzero(label == c)) for c in range(len(counts))]
    fold_of[np.concatenate(order)] = np.arange(len(label)) % k
    return fold_of


def digest(*values):
    """A short fingerprint of tensors, arrays, raw views and None: same values, same string.

    A raw view counts by the names and places that it reads, not by bytes or by where they lie.
    """
    sha = hashlib.sha256()
    for value in values:
        for array in value.key() if isinstance(value, Dataset) else [value]:
            array = np.ascontiguousarray(array if array is not None else [])
            sha.update(f"{array.dtype} {array.shape}".encode())
            sha.update(array.view(np.uint8) if array.dtype.kind == "U" else array)
    return sha.hexdigest()[:16]
