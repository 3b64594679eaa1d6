"""Data sets of two views: one seen always ("visual"), one in training only ("privileged").

    TwoView      the contract: what every data set below becomes, and all that train.py knows of it
    load         name and path -> TwoView
    features     a .npz file of feature vectors (any two views of anything)
    synthetic    the embedded default: people, clips in time, valence and arousal
    Frames, Sounds, Signals   views that are read from their files when a batch asks for them
    bad clips    refused in one line, or left out and counted
    affwild2     valence and arousal of faces, with the voice; as its holders ship it
    biovid       pain of faces, with a physiological signal; as its holders ship it
    folds        TwoView -> training and validation rows, by person where people are known

Whatever is wrong with a file raises DataError with one line that names the file and, where there is one,
the row.
"""

import functools
import hashlib
import math
import os
import signal as signals
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly, spectrogram
from torch.utils.data import DataLoader, Dataset

DEFAULT_FOLDS = 5
SAMPLE_RATE = 44_100  # of the sound that log_mel takes, in Hz
SIGNAL_RATE = 512  # of BioVid's signals, in Hz
QUIET = {"over": "ignore", "invalid": "ignore"}  # numpy's warnings where what is not finite is refused next
BIOVID_LEVELS = ("BL1", "PA1", "PA2", "PA3", "PA4")
BIOVID_SIGNALS = ("gsr", "ecg", "emg_trapezius", "emg_corrugator", "emg_zygomaticus")


class DataError(ValueError):
    """Something is wrong with the data; the message is one line for the person whose data it is."""


def _reason(error):
    """What another library says is wrong, short and on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class TwoView(NamedTuple):
    """N clips. Integer labels make a classification, float labels a regression.

    A view [i] is a vector (F,) float32, a clip of frames (3, T, H, W) uint8 or a spectrogram (1, H, W) float32; as a
    tensor it is in memory, as a Dataset in files.
    """

    visual: torch.Tensor | Dataset
    privileged: torch.Tensor | Dataset | None  # None where only a student is scored
    label: torch.Tensor | None  # (N,) int64 in 0 .. len(names) - 1, or (N, len(names)) float32; None where unknown
    names: list  # the class values as they stand in the file, or the names of the regressed columns
    group: np.ndarray | None  # (N,) int: the person of each clip; None where unknown
    split: np.ndarray | None  # (N,) bool: True for training, where the data set brings its own split
    skipped: tuple = ()  # of every bad clip that was left out, what is wrong with it

    @property
    def task(self):
        return "regression" if self.label.dtype.is_floating_point else "classification"

    def clip_name(self, i):
        """The name of clip i: its row, or, of raw video, VIDEO/FRAME (Aff-Wild2) or SUBJECT-LEVEL-NUMBER (BioVid)."""
        return self.visual.name(i) if isinstance(self.visual, Frames) else str(i)


def load(
    dataset,
    path=None,
    seed=0,
    need_privileged=True,
    need_label=True,
    stride=1,
    levels=("BL1", "PA4"),
    signal="emg_corrugator",
    skip_bad=False,
    workers=0,
):
    """The TwoView of a data set by name. path is its file or folder; seed makes the synthetic one.

    Without need_privileged or need_label that part need not be there, and of raw data is not looked for.
    skip_bad leaves out what is wrong with raw data, to which end every clip is read once, by `workers` processes.
    """
    skipped = [] if skip_bad else None
    if dataset == "synthetic":
        return synthetic(seed)
    if dataset == "affwild2":
        data = affwild2(path or "data/affwild2", need_privileged, stride, skipped, need_label)
        return _readable(data, skipped, workers)
    if dataset == "biovid":
        data = biovid(path or "data/biovid", need_privileged, levels, signal, skipped, need_label)
        return _readable(data, skipped, workers)
    if path is None:
        raise DataError("--dataset features needs --data FILE.npz with visual, privileged and label")
    return features(path, need_privileged, need_label)


# ---- feature files ----------------------------------------------------------------------------------


def features(path, need_privileged=True, need_label=True):
    """Read a .npz file with

        visual      (N, ...) numbers             group  (N,), optional: the person of each row
        privileged  (N, ...) numbers             split  (N,), optional: "train" or "val"
        label       (N,) integers: classes, or (N, K) floats: K regressed values

    need_privileged=False reads a file without `privileged`, and ignores it where it is there; need_label=False takes
    one without `label`, too.
    """
    needed = ["visual"] + ["label"] * need_label + ["privileged"] * need_privileged
    arrays = _read_npz(path, needed, ["label", "group", "split"])
    rows = {key: len(a) if a.ndim else 0 for key, a in arrays.items()}
    least = 2 if need_privileged else 1
    if len(set(rows.values())) > 1 or rows["visual"] < least:
        counts = ", ".join(f"{key} {n}" for key, n in rows.items())
        raise DataError(f"{path}: every key needs the same number of rows, at least {least}, but they have {counts}")
    label, names = _label(path, arrays["label"]) if "label" in arrays else (None, [])
    group = _group(path, arrays["group"]) if "group" in arrays else None
    split = _split(path, arrays["split"]) if "split" in arrays else None
    if group is not None and split is not None and set(group[split]) & set(group[~split]):
        shared = arrays["group"][np.isin(group, group[split]) & ~split][0]
        raise DataError(f"{path}: group {shared} is in both parts of split; mend one of the two keys, or leave it out")
    return TwoView(
        visual=_numbers(path, "visual", arrays["visual"]),
        privileged=_numbers(path, "privileged", arrays["privileged"]) if need_privileged else None,
        label=label,
        names=names,
        group=group,
        split=split,
    )


def _read_npz(path, needed, optional):
    """The arrays of these keys, those that are needed and the optional ones that are there."""
    if not Path(path).is_file():
        raise DataError(f"{path}: {'a folder, not a file' if Path(path).is_dir() else 'no such file'}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = sorted(archive.files)
            arrays = {key: archive[key] for key in dict.fromkeys((*needed, *optional)) if key in keys}
    except Exception as error:  # a damaged archive can raise anything; its reader needs the name
        raise DataError(f"{path}: not a .npz file of plain arrays ({_reason(error)})") from None
    missing = [key for key in needed if key not in keys]
    if missing:
        raise DataError(f"{path}: no key {' or '.join(missing)}; it has {', '.join(keys) or 'none'}")
    return arrays


def _numbers(path, key, array):
    if array.dtype.kind not in "biuf" or array.size == 0:
        raise DataError(f"{path}: {key} must hold numbers, not {array.dtype} of shape {array.shape}")
    with np.errstate(**QUIET):
        values = torch.from_numpy(array.astype(np.float32))
    values = values.flatten(1) if values.dim() > 1 else values.unsqueeze(1)
    bad = ~values.isfinite().all(1)
    if bool(bad.any()):
        raise DataError(f"{path}: {key} row {int(bad.nonzero()[0])} holds NaN, infinite or too large values")
    return values


def _label(path, array):
    if array.dtype.kind in "biu" and array.ndim == 1:
        names, label = np.unique(array, return_inverse=True)
        return torch.from_numpy(label), names.tolist()
    if array.dtype.kind == "f" and array.ndim == 2:
        label = _numbers(path, "label", array)
        names = ["valence", "arousal"] if label.shape[1] == 2 else [str(i) for i in range(label.shape[1])]
        return label, names
    raise DataError(
        f"{path}: label must be (N,) integers (classes) or (N, K) floats (regression), "
        f"not {array.dtype} of shape {array.shape}"
    )


def _group(path, array):
    if array.ndim != 1 or array.dtype.kind not in "biuSU":
        raise DataError(f"{path}: group must be (N,) integers or strings, not {array.dtype} of shape {array.shape}")
    return np.unique(array, return_inverse=True)[1]


def _split(path, array):
    if array.ndim != 1 or array.dtype.kind not in "SU":
        raise DataError(f"{path}: split must be (N,) strings, not {array.dtype} of shape {array.shape}")
    split = np.char.decode(array, "ascii", "replace") if array.dtype.kind == "S" else array
    for row, value in enumerate(split):
        if value not in ("train", "val"):
            raise DataError(f'{path}: split row {row} is "{value}"; it must be "train" or "val"')
    return split == "train"


# ---- the embedded default ---------------------------------------------------------------------------


def synthetic(seed=0, people=60, clips=24, size=32, frames=4):
    """An Aff-Wild2-like problem, rendered in memory: `people` faces filmed for `clips` clips each.

    Valence and arousal wander in time within [-1, 1]. A face, drawn in its person's proportions and tone, curves its
    mouth with valence and opens its eyes with arousal, unsteadily from frame to frame and in noise; in spells of
    several clips a hand hides its mouth or its eyes. The voice's harmonics lie by arousal and by speaker, and fall off
    by valence, with less noise and never hidden. Every third person is in the validation split. Source: ours; it
    exists to exercise the code, and says nothing about real faces.

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
    person = normal(people, 1, 1, 1, 1, 6)  # (people, clips, frames, size, size) in all that follows
    shown = label.view(people, clips, 1, 1, 1, 2) + 0.15 * normal(people, clips, frames, 1, 1, 2)
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")

    face = (0.6 + 0.08 * person[..., 0]) * ((x / 0.75) ** 2 + (y / (0.9 + 0.05 * person[..., 1])) ** 2 < 1)
    eyes = (x.abs() - 0.33 - 0.04 * person[..., 2]) ** 2 / 0.02 + (y + 0.25) ** 2 / (0.12 + 0.07 * shown[..., 1]) ** 2
    mouth = (y - 0.42 - 0.05 * person[..., 3] + 0.9 * shown[..., 0] * (x**2 - 0.12)) ** 2 / 0.008 + (x / 0.55) ** 4
    face = face - 0.4 * (-eyes).exp() - 0.4 * (-mouth).exp() + 0.08 * normal(people, clips, frames, size, size)
    spells = torch.nn.functional.max_pool1d((torch.rand(people, 2, clips, generator=g) < 0.03).float(), 5, 1, 2) > 0
    for part, hidden in zip((y < 0, y >= 0), spells.unbind(1)):
        face = torch.where(hidden.view(people, clips, 1, 1, 1) & part, 0.3, face)
    face = (255 * face.clamp(0, 1)).byte().flatten(0, 1).unsqueeze(1).expand(-1, 3, -1, -1, -1)

    heard, height = shown.mean(2), (torch.arange(size) / size).view(size, 1)  # height: frequency
    pitch, slope = 0.22 + 0.06 * heard[..., 1] + 0.01 * person[:, :, 0, ..., 4], 2 + 0.2 * person[:, :, 0, ..., 5]
    harmonics = (2 * math.pi * height / pitch).cos() * (-height * (slope - heard[..., 0])).exp()
    voice = (harmonics + 0.2 * normal(people, clips, size, size)).flatten(0, 1).unsqueeze(1)
    group = np.repeat(np.arange(people), clips)
    return TwoView(face, voice, label.flatten(0, 1), ["valence", "arousal"], group, split=group % 3 > 0)


# ---- raw views: read when asked for -------------------------------------------------------------------


class Frames(Dataset):
    """Clips of face frames. [i] -> (3, T, size, size) uint8.

    Clip i is the files folders[of[i]] / pattern.format(number) for the T numbers of frames[i], and named by
    naming.format(folder, last number). Only numbers are kept, so that memory does not grow with the videos.
    """

    def __init__(self, folders, pattern, of, frames, naming="{}/{:05d}", size=112):
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise DataError("reading JPEG files needs Pillow: pip install pillow") from None
        self.folders, self.pattern, self.of, self.frames = folders, pattern, of, frames
        self.naming, self.size = naming, size

    def __len__(self):
        return len(self.of)

    def __getitem__(self, i):
        folder = self.folders[self.of[i]]
        images = [self._image(folder / self.pattern.format(number)) for number in self.frames[i]]
        return torch.from_numpy(np.stack(images, axis=1))

    def name(self, i):
        return self.naming.format(self.folders[self.of[i]].name, self.frames[i][-1])

    def key(self):
        return [np.array([folder.name for folder in self.folders]), self.of, self.frames]

    def only(self, rows):
        return Frames(self.folders, self.pattern, self.of[rows], self.frames[rows], self.naming, self.size)

    def _image(self, path):
        from PIL import Image

        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
                if image.size != (self.size, self.size):
                    image = image.resize((self.size, self.size))
                return np.asarray(image).transpose(2, 0, 1)
        except Exception as error:  # a damaged image can raise anything; its reader needs the name
            raise DataError(f"{path}: not a readable JPEG ({_reason(error)})") from None


class Sounds(Dataset):
    """The second of sound before a moment of a video. [i] -> (1, 64, 107) log-mel spectrogram, float32.

    Clip i ends at the fraction end[i], in 0 .. 1, of the wav file files[of[i]].
    """

    def __init__(self, files, of, end):
        self.files, self.of, self.end = files, of, end

    def __len__(self):
        return len(self.of)

    def __getitem__(self, i):
        rate, samples = read_wav(self.files[self.of[i]])
        stop = round(self.end[i] * len(samples))
        sound = samples[max(stop - rate, 0) : stop]
        with np.errstate(**QUIET):
            sound = sound.mean(axis=1, dtype=np.float64) if sound.ndim > 1 else sound.astype(np.float64)
        kind = samples.dtype
        if kind.kind in "iu":  # to [-1, 1]; 8 bit is unsigned around 128
            sound = (sound - (128 if kind == np.uint8 else 0)) / 2.0 ** (8 * kind.itemsize - 1)
        sound = np.pad(sound, (rate - len(sound), 0))
        common = math.gcd(rate, SAMPLE_RATE)
        mel = log_mel(torch.from_numpy(resample_poly(sound, SAMPLE_RATE // common, rate // common)))
        return _finite(mel, self.files[self.of[i]])

    def key(self):
        return [np.array([file.name for file in self.files]), self.of, self.end]

    def only(self, rows):
        return Sounds(self.files, self.of[rows], self.end[rows])


class Signals(Dataset):
    """Spectrogram of a physiological signal between its seconds 2 and 5. [i] -> (1, 65, 128) power, float32.

    Clip i is the column `signal` of the tab-separated file files[i], 512 Hz. Source: released code.
    """

    def __init__(self, files, signal):
        self.files, self.signal = files, signal

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path = self.files[i]
        try:
            header, *rows = path.read_text().splitlines() or [""]
            columns = header.split()
            if self.signal not in columns:
                raise ValueError(f"no column {self.signal}; it has {' '.join(columns) or 'none'}")
            values = np.loadtxt(rows, delimiter="\t", usecols=columns.index(self.signal), ndmin=1)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({_reason(error)})") from None
        if len(values) < 5 * SIGNAL_RATE or not np.isfinite(values).all():
            raise DataError(
                f"{path}: {self.signal} needs {5 * SIGNAL_RATE} numbers (5 s); it has {len(values)} or holds NaN"
            )
        values = values[2 * SIGNAL_RATE : 5 * SIGNAL_RATE]
        with np.errstate(**QUIET):
            power = spectrogram(values, SIGNAL_RATE, nperseg=16, noverlap=4, nfft=128)[2]
        return _finite(torch.from_numpy(power).float().unsqueeze(0), path)

    def key(self):
        return [np.array([file.name for file in self.files]), np.array(self.signal)]

    def only(self, rows):
        return Signals([self.files[row] for row in rows], self.signal)


def _finite(values, path):
    if not values.isfinite().all():
        raise DataError(f"{path}: holds NaN, infinite or too large values")
    return values


def read_wav(path):
    """(samples a second, samples (n,) or (n, channels)) of a wav file, memory-mapped where its format allows."""
    try:
        with open(path, "rb") as file:
            promised = int.from_bytes(file.read(8)[4:], "little") + 8
            if os.fstat(file.fileno()).st_size < promised < 2**32:  # beyond: of a stream, whose end was not known
                raise ValueError("cut off")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks of metadata, which ffmpeg writes
            try:
                rate, samples = wavfile.read(path, mmap=True)
            except ValueError:  # 24-bit samples cannot be mapped
                rate, samples = wavfile.read(path)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; make it with: ffmpeg -i {Path(path).stem}.mp4 -vn {path}") from None
    except Exception as error:  # a damaged file can raise anything; its reader needs the name
        raise DataError(f"{path}: not a readable wav file ({_reason(error)})") from None
    if len(samples) == 0 or not 1_000 <= rate <= 400_000:
        raise DataError(f"{path}: holds no sound, or none of 1 to 400 kHz ({len(samples)} samples at {rate} Hz)")
    return rate, samples


@functools.cache  # every clip needs them
def mel_filters(bands=64, n_fft=1024, rate=SAMPLE_RATE):
    """Triangular filters (bands, n_fft / 2 + 1), evenly spaced on the mel scale 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    width = corners.diff().unsqueeze(1)
    rising = (frequency - corners[:-2].unsqueeze(1)) / width[:-1]
    falling = (corners[2:].unsqueeze(1) - frequency) / width[1:]
    return torch.minimum(rising, falling).clamp_min(0)


def log_mel(sound, steps=107):
    """Log-mel spectrogram of sound at 44.1 kHz, (n,) in [-1, 1] -> (1, 64, steps) float32.

    n_fft 1024, window of 20 ms, hop of 10 ms, 64 bands, decibels, then (x + 14.8) / 19.895; the last `steps`
    steps, silence on the left where there are fewer. Source: the lab's Aff-Wild2 code; the silence ours.
    """
    window = torch.hann_window(SAMPLE_RATE // 50, dtype=torch.float64)
    spectrum = torch.stft(
        sound.double(),
        1024,
        SAMPLE_RATE // 100,
        len(window),
        window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = (mel_filters() @ spectrum.abs() ** 2)[:, -steps:]
    power = torch.nn.functional.pad(power, (steps - power.shape[1], 0))
    return ((10 * power.clamp_min(1e-10).log10() + 14.8) / 19.895).float().unsqueeze(0)


def augment(clips, chance, shift=8):
    """Training video made more varied: each clip mirrored or not, and moved by up to `shift` pixels.

    (B, 3, T, H, W) -> the same shape, all frames of a clip alike; what moves in is black. chance (B, 3) holds
    uniform random numbers in [0, 1), on the CPU. Source: ours.
    """
    mirrored = (chance[:, 0] < 0.5).view(-1, 1, 1, 1, 1)
    clips = torch.where(mirrored.to(clips.device), clips.flip(-1), clips)
    height, width = clips.shape[-2:]
    padded = torch.nn.functional.pad(clips, (shift,) * 4)
    corners = (chance[:, 1:] * (2 * shift + 1)).long().tolist()
    return torch.stack([clip[..., y : y + height, x : x + width] for clip, (y, x) in zip(padded, corners)])


def stream(view, batches, workers=0, pin=False):
    """view[rows] for each rows (a LongTensor) of batches, in order; raw views by `workers` reading processes."""
    if isinstance(view, torch.Tensor):
        yield from (view[rows] for rows in batches)
        return
    order = [rows.tolist() for rows in batches]
    settings = {"num_workers": workers, "worker_init_fn": _leave_signals, "generator": torch.Generator()}
    loader = DataLoader(view, batch_sampler=order, pin_memory=pin, **settings)
    try:
        yield from loader
    except DataError as error:  # a worker's comes wrapped in its stack trace; the last line is the message
        raise DataError(str(error).rstrip().split("\n")[-1].split("DataError: ")[-1]) from None


def _leave_signals(worker):
    """A reading process leaves Ctrl-C and SIGTERM to the one that it reads for, and obeys the SIGTERM of that only."""
    if not hasattr(signals, "sigwaitinfo"):  # macOS
        return
    signals.signal(signals.SIGINT, signals.SIG_IGN)
    signals.pthread_sigmask(signals.SIG_BLOCK, {signals.SIGTERM})

    def wait():
        while signals.sigwaitinfo({signals.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


# ---- bad clips ----------------------------------------------------------------------------------------


def _mistake(skipped, message, clips=1):
    """Raise DataError; or note that `clips` of them are left out, where there is a list of those."""
    if skipped is None:
        raise DataError(message)
    skipped.extend([message] * clips)


class _Checked(Dataset):
    """[i] -> what is wrong with clip i of any of the views, or ""."""

    def __init__(self, views):
        self.views = views

    def __len__(self):
        return len(self.views[0])

    def __getitem__(self, i):
        try:
            for view in self.views:
                view[i]
        except DataError as error:
            return str(error)
        return ""


def _readable(data, skipped, workers):
    """The data as it is (skipped None), or without the clips that cannot be read."""
    if skipped is None:
        return data
    views = _Checked([data.visual] if data.privileged is None else [data.visual, data.privileged])
    loader = DataLoader(views, 64, num_workers=workers, collate_fn=list, worker_init_fn=_leave_signals)
    wrong = [message for batch in loader for message in batch]
    rows = np.flatnonzero([not message for message in wrong])
    if len(rows) == 0:
        raise DataError(f"not one clip can be read; the first: {wrong[0]}")
    return TwoView(
        visual=data.visual.only(rows),
        privileged=data.privileged and data.privileged.only(rows),
        label=None if data.label is None else data.label[rows],
        names=data.names,
        group=data.group[rows],
        split=None if data.split is None else data.split[rows],
        skipped=(*skipped, *filter(None, wrong)),
    )


# ---- Aff-Wild2 --------------------------------------------------------------------------------------


def affwild2(root="data/affwild2", need_privileged=True, stride=1, skipped=None, need_label=True):
    """Aff-Wild2's valence-arousal challenge, in its own training and validation split. Below root:

        annotations/Train_Set/VIDEO.txt, annotations/Validation_Set/VIDEO.txt   valence,arousal a frame
        cropped_aligned/VIDEO/00001.jpg ...                                     frames without a face are missing
        audio/VIDEO.wav                                                         without a _left or _right

    A clip for every `stride`-th frame that is annotated and has a face: the 8 frames that end there, every 4th of a
    window of 32, and the second of sound that ends there. A frame without a face is replaced by the nearest one of
    the video that has one and is no later than the clip (ours). A video with no such frame is named in a warning.
    Source: the lab's Aff-Wild2 code.

    skipped: None, where a mistake raises DataError; or a list, to which the message is appended for each clip that is
    left out for it. Without need_label annotations are not looked for: a clip for every `stride`-th frame with a face.
    """
    root, parts = Path(root), ("Train_Set", "Validation_Set")
    wanted = [f"annotations/{part}" for part in parts if need_label] + ["cropped_aligned"] + ["audio"] * need_privileged
    _check_root(root, wanted, "Aff-Wild2")
    if need_label:
        files = [(file, part) for part in parts for file in sorted((root / "annotations" / part).glob("*.txt"))]
    else:
        videos = sorted(path.name for path in (root / "cropped_aligned").iterdir() if path.is_dir())
        files = [(Path(f"{video}.txt"), "") for video in videos]
    folders, sounds, of, frames, ends, labels, split, empty = [], [], [], [], [], [], [], []
    for file, part in files:
        folder = root / "cropped_aligned" / file.stem
        present = _frame_numbers(folder, prefix="")
        try:
            label = (
                _valence_arousal(file, skipped) if need_label else np.broadcast_to(0.0, (max(present, default=0), 2))
            )
        except DataError as error:
            _mistake(skipped, str(error), len(present[::stride]))
            continue
        present = present[(present >= 1) & (present <= len(label))]
        usable = present[(label[present - 1] != -5).all(axis=1)][::stride]
        if len(usable) == 0:
            empty.append(file.stem)
            continue
        sound = root / "audio" / f"{file.stem.removesuffix('_left').removesuffix('_right')}.wav"
        try:
            if need_privileged:
                read_wav(sound)
        except DataError as error:
            _mistake(skipped, str(error), len(usable))
            continue
        of.append(np.full(len(usable), len(folders)))
        folders.append(folder)
        sounds.append(sound)
        frames.append(_nearest(present, usable[:, None] - np.arange(28, -1, -4), usable))
        ends.append(usable / len(label))
        labels.append(label[usable - 1])
        split.append(np.full(len(usable), part == "Train_Set"))
    kind = "annotated frame with a face" if need_label else "frame with a face"
    if empty:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        warnings.warn(f"{root}: no {kind} in {', '.join(empty[:5])}{more}", UserWarning, stacklevel=2)
    if not folders:
        raise DataError(skipped[0] if skipped else f"{root}: no {kind} in any video")
    of = np.concatenate(of)
    return TwoView(
        visual=Frames(folders, "{:05d}.jpg", of, np.concatenate(frames)),
        privileged=Sounds(sounds, of, np.concatenate(ends)) if need_privileged else None,
        label=torch.from_numpy(np.concatenate(labels)).float() if need_label else None,
        names=["valence", "arousal"],
        group=np.unique([path.name for path in sounds], return_inverse=True)[1][of],  # both people of a video together
        split=np.concatenate(split),
    )


def _check_root(root, wanted, name):
    missing = [folder for folder in wanted if not (root / folder).is_dir()]
    if missing:
        raise DataError(f"{root}: no folder {' or '.join(missing)}; {name} needs {', '.join(wanted)} there")


def _valence_arousal(path, skipped):
    """(frames, 2) of an annotation file, -5 where a frame is not annotated, or its line is bad and to be skipped."""
    try:
        header, *rows = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError, ValueError):
        raise DataError(f"{path}: empty or not a text file") from None
    if header.replace(" ", "").lower() != "valence,arousal":
        raise DataError(f'{path}: line 1 must be "valence,arousal", not "{header[:40]}"')
    values = np.empty((len(rows), 2))
    for line, row in enumerate(rows):
        try:
            values[line] = _pair(row)
        except ValueError as error:
            _mistake(skipped, f"{path}: line {line + 2} {error}")
            values[line] = -5
    return values


def _pair(row):
    try:
        valence, arousal = map(float, row.split(","))
    except ValueError:
        raise ValueError(f'must be two numbers, not "{row[:40]}"') from None
    if not all(v == -5 or -1 <= v <= 1 for v in (valence, arousal)):
        raise ValueError(f"holds a value that is neither within [-1, 1] nor -5: {row[:40]}")
    return valence, arousal


def _frame_numbers(folder, prefix):
    """Sorted numbers of the JPEG files prefix00001.jpg ... in a folder; empty where there is no such folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    numbers = (name[len(prefix) : -4] for name in names if name.startswith(prefix) and name.endswith(".jpg"))
    return np.array(sorted(int(number) for number in numbers if number.isdecimal() and len(number) < 10), np.int64)


def _nearest(present, wanted, last):
    """For each wanted frame (N, T) the nearest present one that is no later than last (N,); of two, the earlier."""
    right = np.searchsorted(present, wanted)
    before, after = present[np.maximum(right - 1, 0)], present[np.minimum(right, len(present) - 1)]
    take_after = (after <= last[:, None]) & ((right == 0) | (after - wanted < wanted - before))
    return np.where(take_after, after, before).astype(np.int32)


# ---- BioVid -----------------------------------------------------------------------------------------


def biovid(
    root="data/biovid",
    need_privileged=True,
    levels=("BL1", "PA4"),
    signal="emg_corrugator",
    skipped=None,
    need_label=True,
):
    """BioVid Part A, a class for each of `levels`, a group for each person. Below root:

        frames/SUBJECT/CLIP/img_00001.jpg ...             10 are taken, evenly spread over the clip
        biosignals_filtered/SUBJECT/CLIP_bio.csv          tab separated, 512 Hz, a column for each signal

    with clips named SUBJECT-LEVEL-NUMBER; without need_label every folder is a clip. Source: released code. skipped as
    for affwild2.
    """
    root = Path(root)
    _check_root(root, ["frames"] + ["biosignals_filtered"] * need_privileged, "BioVid")
    folders, files, frames, labels, people = [], [], [], [], []
    for person in sorted(path for path in (root / "frames").iterdir() if path.is_dir()):
        for clip in sorted(path for path in person.iterdir() if path.is_dir()):
            level = clip.name.partition("-")[2].partition("-")[0]
            if need_label and level not in levels:
                continue
            present = _frame_numbers(clip, prefix="img_")
            if len(present) == 0:
                _mistake(skipped, f"{clip}: no img_00001.jpg ... in it; extract its frames or remove the folder")
                continue
            file = root / "biosignals_filtered" / person.name / f"{clip.name}_bio.csv"
            if need_privileged and not file.is_file():
                _mistake(skipped, f"{file} is missing, the signals of a clip that has frames")
                continue
            folders.append(clip)
            files.append(file)
            frames.append(present[np.linspace(0, len(present) - 1, 10).round().astype(int)])
            labels.append(level)
            people.append(person.name)
    absent = [level for level in levels if level not in labels] if need_label else []
    if absent or not folders:
        raise DataError(f"{root}/frames: no clip SUBJECT/SUBJECT-{(absent or ['LEVEL'])[0]}-NUMBER in it")
    return TwoView(
        visual=Frames(folders, "img_{:05d}.jpg", np.arange(len(folders)), np.array(frames, dtype=np.int32), "{}"),
        privileged=Signals(files, signal) if need_privileged else None,
        label=torch.tensor([levels.index(level) for level in labels]) if need_label else None,
        names=list(levels),
        group=np.unique(people, return_inverse=True)[1],
        split=None,
    )


# ---- folds ------------------------------------------------------------------------------------------


def folds(data, k=None, seed=0):
    """List of (training rows, validation rows), int64 arrays in increasing order.

    The data set's own split where it has one and k is None; else k (default 5) folds: by person where
    groups are known, so that nobody is on both sides (ours; the released code splits by clip), and
    otherwise stratified by class, or at random for a regression.
    """
    if len(data.names) < 2 and data.task == "classification":
        raise DataError(f"label holds a single class, {data.names[0]}; there is nothing to learn")
    if data.split is not None and k is None:
        parts = [~data.split]
    else:
        k = k or DEFAULT_FOLDS
        rng = np.random.default_rng(seed)
        if data.group is not None:
            fold_of = _grouped(data.group, k, rng)
        elif data.task == "classification":
            fold_of = _stratified(data.label.cpu().numpy(), data.names, k, rng)
        else:
            fold_of = rng.permutation(np.arange(len(data.label)) % k)
        parts = [fold_of == i for i in range(k)]
    return [_checked_fold(data, i, held_out) for i, held_out in enumerate(parts)]


def _grouped(group, k, rng):
    """Fold of each row: people go, largest first, to the fold that has the fewest rows so far."""
    sizes = np.bincount(group)
    if len(sizes) < k:
        raise DataError(f"the data has {len(sizes)} people, too few for {k} folds: use fewer --folds, at least 2")
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
        raise DataError(f"class {name} has {least} rows, too few for {k} folds: use fewer --folds, at least 2")
    fold_of = np.empty(len(label), dtype=int)
    order = np.concatenate([rng.permutation(np.flatnonzero(label == c)) for c in range(len(counts))])
    fold_of[order] = np.arange(len(label)) % k
    return fold_of


def _checked_fold(data, i, held_out):
    train, val = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if len(train) < 2 or len(val) < 1 + (data.task == "regression"):  # the CCC of one row is always 0
        raise DataError(f"fold {i} has {len(train)} training and {len(val)} validation rows, too few to go on")
    if data.task == "classification":
        absent = np.setdiff1d(np.arange(len(data.names)), data.label[train].cpu().numpy())
        if len(absent):
            absent = data.names[absent[0]]
            raise DataError(f"fold {i} has no training row of class {absent}: try other --folds or --seed")
    return train, val


def digest(*values):
    """A short fingerprint of tensors, arrays and raw views: same values, shapes and types, same string.

    A raw view counts by the names in it and the places it reads, not by the bytes of its files or where they lie.
    """
    sha = hashlib.sha256()
    for value in values:
        for array in value.key() if isinstance(value, Dataset) else [value]:
            array = np.ascontiguousarray(array.cpu() if isinstance(array, torch.Tensor) else array)
            sha.update(f"{array.dtype} {array.shape}".encode())
            sha.update(array.view(np.uint8) if array.dtype.kind == "U" else array)
    return sha.hexdigest()[:16]


def stamp(view):
    """A fingerprint of a view; of files by time and size too (of a folder of frames, not of each frame)."""
    if isinstance(view, torch.Tensor):
        return digest(view)
    found = [path.stat() for path in (view.folders if isinstance(view, Frames) else view.files)]
    return digest(view, np.array([(status.st_mtime_ns, status.st_size) for status in found]))
