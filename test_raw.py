"""Aff-Wild2 and BioVid: small trees of real JPEG, wav and csv files."""

import shutil

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import resample_poly, spectrogram

from data import Frames, Sounds, digest, folds, log_mel
from test_data import read, refused

Image = pytest.importorskip("PIL.Image")
COLUMNS = "time gsr ecg emg_trapezius emg_corrugator emg_zygomaticus".replace(" ", "\t")


def jpeg(path, shade, size=112):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade, shade, shade)).save(path, quality=95)


def annotations(n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, 2)).round(3)


def video(root, part, name, label, missing=(), size=112):
    """Annotation and frames: frame number n is as bright as n."""
    file = root / "annotations" / part / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("valence,arousal\n" + "".join(f"{v},{a}\n" for v, a in label))
    for number in range(1, len(label) + 1):
        if number not in missing:
            jpeg(root / "cropped_aligned" / name / f"{number:05d}.jpg", number, size)


def sound(root, name, seconds):
    (root / "audio").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).normal(scale=5_000, size=int(16_000 * seconds))
    wavfile.write(root / "audio" / f"{name}.wav", 16_000, noise.astype(np.int16))


def affwild2_tree(root):
    parts = {"Train_Set": ["1-30-1280x720", "video 2 (b)", "3_left", "3_right"]}
    parts["Validation_Set"] = ["été.v2", "9_right", "faceless"]
    missing = {"video 2 (b)": {5, 6, 7}, "faceless": range(1, 37)}
    for part, names in parts.items():
        for i, name in enumerate(names):
            video(root, part, name, annotations(36, i), missing.get(name, ()))
    for name in ("1-30-1280x720", "video 2 (b)", "3", "9", "été.v2"):
        sound(root, name, 0.7 if name == "été.v2" else 1.2)
    return root


def biovid_tree(root, people=5, clips=2, levels=("BL1", "PA1", "PA4")):
    for p in range(people):
        subject = f"0713{p}9_{'wm'[p % 2]}_2{p}"
        files = root / "biosignals_filtered" / subject
        files.mkdir(parents=True)
        table = np.random.default_rng(p).normal(size=(2816, 6))
        for clip in (f"{subject}-{level}-{n:03d}" for level in levels for n in range(clips)):
            for n in range(1, 13 + p):
                jpeg(root / "frames" / subject / clip / f"img_{n:05d}.jpg", 10 * n)
            file = files / f"{clip}_bio.csv"
            np.savetxt(file, table, "%.6f", delimiter="\t", header=COLUMNS, comments="")
    return root


def shades(clip):
    return clip.float().mean((0, 2, 3))


def test_log_mel_by_loops():
    wave = np.random.default_rng(0).normal(scale=0.1, size=3000)
    padded, window = np.pad(wave, 512), np.pad(np.hanning(883)[:-1], 71)  # in the middle of 1024
    spectra = [np.fft.rfft(window * padded[441 * i : 441 * i + 1024]) for i in range(7)]
    edges = np.linspace(0, 2595 * np.log10(1 + 22_050 / 700), 66)
    edges, bins = 700 * (10 ** (edges / 2595) - 1), np.arange(513) * 44_100 / 1024
    triangles = [
        np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
        for low, middle, high in zip(edges, edges[1:], edges[2:])
    ]
    want = np.maximum(triangles @ np.abs(spectra).T ** 2, 1e-10)
    got = log_mel(torch.from_numpy(wave))
    assert got.shape == (64, 7) and got.dtype == torch.float16
    np.testing.assert_allclose(got, (10 * np.log10(want) + 14.8) / 19.895, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rate", [44_100, 16_000])
def test_a_clip_is_the_sound_before_the_moment(rate, tmp_path):
    noise = np.random.default_rng(0).normal(scale=3000, size=(3 * rate, 2)).astype(np.int16)
    wavfile.write(tmp_path / "a.wav", rate, noise)
    alone = resample_poly(noise.mean(1) / 2**15, 44_100, rate)
    alone = torch.from_numpy(np.concatenate([np.zeros(2 * 44_100), alone]))
    moments = np.array([0.004, 0.5, 2.0, 2.996])
    heard = Sounds([tmp_path / "a.wav"] * 4, moments / 3, workers=0, progress=iter)[[0, 1, 2, 3]]
    for moment, got in zip(moments, heard):
        end = 2 * 44_100 + 441 * round(100 * moment)  # the nearest step of 10 ms
        want = log_mel(alone[end - 106 * 441 : end + 1])
        assert got.shape == (1, 64, 107) and got.dtype == torch.float32
        got, want = got[0, :, 2:105], want[:, 2:105]  # other windows reach beyond the clip
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3)


def test_affwild2_clips_are_the_frames_and_labels_they_should_be(tmp_path):
    label = annotations(40)
    label[[34, 35]] = -5
    label[36, 1] = -5  # half annotated is not annotated
    video(tmp_path, "Train_Set", "a", label, missing={4, 12, 13, 20, 40}, size=64)
    video(tmp_path, "Validation_Set", "b", annotations(33))
    sound(tmp_path, "a", 2)
    sound(tmp_path, "b", 1)
    data = read("affwild2", tmp_path)
    ends = [n for n in range(1, 40) if n not in (4, 12, 13, 20, 35, 36, 37)]
    count = len(ends)
    assert data.split.tolist() == [True] * count + [False] * 33 and len(data.label) == count + 33
    np.testing.assert_allclose(data.label[:count], label[np.array(ends) - 1], atol=1e-6)
    # Every 4th frame of the 32 that end at 38, and at 32 (4, 8, ...) with 4, 12, 20 missing.
    want = {38: [10, 14, 18, 22, 26, 30, 34, 38], 32: [3, 8, 11, 16, 19, 24, 28, 32]}
    for end, numbers in {**want, 2: [1, 1, 1, 1, 1, 1, 1, 2]}.items():
        clip = data.visual[[ends.index(end)]][0]
        assert clip.shape == (3, 8, 112, 112) and clip.dtype == torch.uint8  # 64 x 64 on disk
        assert (shades(clip) - torch.tensor(numbers)).abs().max() < 2
    assert data.visual.sampled(3)[[5]].equal(data.visual[[5]])  # it takes no frames at random
    np.testing.assert_allclose(data.privileged.end[:count], np.array(ends) / 40)  # 20 a second
    assert len(read("affwild2", tmp_path, clip_stride=7).label) == -(-count // 7) + -(-33 // 7)
    for folder in ("annotations", "audio"):
        shutil.rmtree(tmp_path / folder)
    data = read("affwild2", tmp_path, False, False)
    faces = [f"a/{n:05d}" for n in range(1, 40) if n not in (4, 12, 13, 20)]
    names = [data.visual.name(i) for i in range(len(data.visual))]
    assert names == faces + [f"b/{n:05d}" for n in range(1, 34)]
    assert data.privileged is None and data.label is None


def test_affwild2_awkward_tree(tmp_path):
    with pytest.warns(UserWarning, match="faceless: no annotated frame with a face"):
        data = read("affwild2", affwild2_tree(tmp_path), clip_stride=6)
    group = {(data.visual.name(row).split("/")[0], data.group[row]) for row in range(36)}
    assert len(group) == 6 and len(set(data.group)) == 5
    assert dict(group)["3_left"] == dict(group)["3_right"]  # of one video
    assert [len(rows) for rows in folds(data)[0]] == [24, 12, 12]
    for view, size in ((data.visual, (3, 8, 112, 112)), (data.privileged, (1, 64, 107))):
        assert view[list(range(36))].shape == view.shape == (36, *size)


NOTES, SOUND, SIGNAL = "annotations/Train_Set/3_left.txt", "audio/3.wav", "bio*/*/*BL1*.csv"
EIGHT_BITS = b"\x80\x3e\0\0\1\0\x08\0"  # in a wav file's header
MISTAKES = [  # files or folders; how they are damaged, None to remove them; the message
    ("annotations", None, "no annotations/Train_Set/[*].txt in it"),
    (SOUND, None, "3.wav: must be a wav file.*No such file"),
    (SOUND, lambda wav: wav[:500], "3.wav: must be a wav file.*mmap length"),
    (SOUND, lambda wav: wav[:28] + EIGHT_BITS + wav[36:], "wav file of 16 bits.*uint8 at 16000"),
    (NOTES, lambda text: text[16:], r'left.txt: must be "valence,arousal", then .*\(line 1\)'),
    (NOTES, lambda text: text + b"0\n", "left.txt: must be .*row 4"),
    (NOTES, lambda text: text + b"\n0,0\n", "left.txt: must be .*row 4"),
    (NOTES, lambda text: text + b"0,1.5\n", r"left.txt: must be .*\(line 5\)"),
    ("frames/*/*-PA4-*", None, "no frames/[*]/[*]-PA4-[*] in it"),
    ("frames/*/*-BL1-000/*.jpg", None, "000: no img_00001.jpg"),
    (SIGNAL, lambda table: table.replace(b"emg_", b""), "needs a column emg_corrugator"),
    (SIGNAL, lambda table: b"\n".join(table.split(b"\n")[:2001]), "2560 finite .*has 2000"),
]


@pytest.mark.filterwarnings("error")
def test_mistakes_are_named(tmp_path):
    good = tmp_path / "good"
    for part in ("Train_Set", "Validation_Set"):
        video(good, part, "3_left", annotations(3))
    sound(good, "3", 1)
    biovid_tree(good, people=1, clips=1, levels=("BL1", "PA4"))
    for i, (pattern, damage, message) in enumerate(MISTAKES):
        tree = shutil.copytree(good, tmp_path / str(i))
        for path in sorted(tree.glob(pattern)):
            if damage:
                path.write_bytes(damage(path.read_bytes()))
            else:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        dataset = "biovid" if pattern.startswith(("frames", "bio")) else "affwild2"
        refused(message, lambda: read(dataset, tree).privileged[[0, 1]])


def test_biovid_is_classes_people_and_evenly_spread_frames(tmp_path):
    root = biovid_tree(tmp_path / "a", people=3)
    data = read("biovid", root)
    assert data.names == ["BL1", "PA4"] and data.task == "classification"
    assert data.label.tolist() == [0, 0, 1, 1] * 3
    assert data.group.tolist() == np.repeat([0, 1, 2], 4).tolist()
    evenly = torch.tensor([1, 2, 3, 5, 6, 7, 8, 10, 11, 12])  # of 12
    assert (shades(data.visual[[0]][0]) - 10 * evenly).abs().max() < 2
    assert data.visual[[0, 5]].shape == (2, 3, 10, 112, 112) and len(data.visual) == 12
    assert data.visual.name(0) == "071309_w_20-BL1-000"
    assert data.privileged.shape == (12, 1, 65, 127) == (12, *data.privileged[[0]].shape[1:])
    file = root / "biosignals_filtered/071309_w_20/071309_w_20-BL1-000_bio.csv"
    table = np.loadtxt(file, skiprows=1, delimiter="\t")
    want = spectrogram(table[1024:2560, 4], 512, nperseg=16, noverlap=4, nfft=128)[2]
    np.testing.assert_allclose(data.privileged[[0]][0, 0], want, rtol=1e-4)
    assert len(read("biovid", root, False, False).visual) == 18
    moved = read("biovid", root.rename(tmp_path / "b"))
    assert digest(moved.visual, moved.privileged) == digest(data.visual, data.privileged)


def test_training_takes_neighbours_from_a_random_place_of_each_segment(tmp_path):
    for n in range(1, 101):
        jpeg(tmp_path / "clip" / f"img_{n:05d}.jpg", 2 * n)
    frames = [np.arange(1, end) for end in (101, 4, 101)]
    about = {"prefix": "img_", "frames": frames, "whole": True}
    view = Frames(3 * [tmp_path / "clip"], (3, 10, 112, 112), **about)

    def numbers(view, row=0):
        return (shades(view[[1, row]][1]) / 2).round().long().tolist()

    seen = [numbers(view.sampled(seed)) for seed in range(8)]
    for taken in seen:
        for segment, (first, second) in enumerate(zip(taken[::2], taken[1::2])):
            assert second == first + 1 and 20 * segment <= first <= 20 * segment + 21
    assert len(set(map(tuple, seen))) == 8  # anew every time
    assert numbers(view.sampled(3)) == seen[3] != numbers(view.sampled(3), 2)  # nor are clips alike
    assert numbers(view) == [1, 12, 23, 34, 45, 56, 67, 78, 89, 100]  # evenly spread
    assert set(numbers(view.sampled(1), 1)) <= {1, 2, 3}  # fewer frames than are taken
