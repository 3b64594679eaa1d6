"""Raw data in the layouts of Aff-Wild2 and BioVid: small trees of real JPEG, wav and csv files."""

import io
import re
import shutil

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import spectrogram

from data import DataError, Frames, Sounds, affwild2, biovid, digest, folds, log_mel

Image = pytest.importorskip("PIL.Image")
COLUMNS = ["time", "gsr", "ecg", "emg_trapezius", "emg_corrugator", "emg_zygomaticus"]


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
    for i, name in enumerate(["1-30-1280x720", "video 2 (b)", "3_left", "3_right"]):
        video(root, "Train_Set", name, annotations(36, i), missing={5, 6, 7} if i == 1 else ())
    for i, name in enumerate(["été.v2", "9_right", "faceless"]):
        missing = range(1, 37) if name == "faceless" else ()
        video(root, "Validation_Set", name, annotations(36, 8 + i), missing)
    for name in ("1-30-1280x720", "video 2 (b)", "3", "9", "été.v2"):
        sound(root, name, 0.7 if name == "été.v2" else 1.2)
    return root


def signals(path, seed, columns=COLUMNS, rows=2816):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(size=(rows, len(columns)))
    np.savetxt(path, values, fmt="%.6f", delimiter="\t", header="\t".join(columns), comments="")


def biovid_tree(root, people=5, clips=2, levels=("BL1", "PA1", "PA4")):
    for p in range(people):
        subject = f"0713{p}9_{'wm'[p % 2]}_2{p}"
        for level in levels:
            for number in range(clips):
                clip = f"{subject}-{level}-{number:03d}"
                for n in range(1, 13 + p):
                    jpeg(root / "frames" / subject / clip / f"img_{n:05d}.jpg", 10 * n)
                signals(root / "biosignals_filtered" / subject / f"{clip}_bio.csv", p)
    return root


def shades(clip):
    return clip.float().mean((0, 2, 3))


def heard(path, *ends):
    """The spectrograms of the sound up to these fractions of a wav file."""
    sounds = Sounds([path], np.zeros(len(ends), int), np.array(ends))
    return sounds[list(range(len(ends)))]


def test_log_mel_by_loops():
    wave = np.random.default_rng(0).normal(scale=0.1, size=3000)
    padded = np.pad(wave, 512)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(882) / 882)
    window = np.pad(hann, (71, 71))  # 882 samples in the middle of 1024
    steps = 1 + len(wave) // 441
    spectra = [np.fft.rfft(window * padded[441 * i : 441 * i + 1024]) for i in range(steps)]
    edges = np.linspace(0, 2595 * np.log10(1 + 22_050 / 700), 66)
    edges, bins = 700 * (10 ** (edges / 2595) - 1), np.arange(513) * 44_100 / 1024
    triangles = [
        np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clip(min=0)
        for low, middle, high in zip(edges, edges[1:], edges[2:])
    ]
    want = np.maximum(triangles @ np.abs(spectra).T ** 2, 1e-10)
    got = log_mel(torch.from_numpy(wave))
    assert got.shape == (64, steps) and got.dtype == torch.float16
    np.testing.assert_allclose(got, (10 * np.log10(want) + 14.8) / 19.895, rtol=1e-3, atol=1e-3)


def test_a_tone_is_the_same_at_any_rate_and_in_any_format(tmp_path):
    def heard_as(dtype, rate, scale, channels, zero=0):
        tone = 0.4995 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
        wave = np.repeat(scale * tone[:, None] + zero, channels, axis=1)
        wavfile.write(tmp_path / "a.wav", rate, wave.astype(dtype).squeeze())
        return heard(tmp_path / "a.wav", 0.75)[0, 0, :, 50:90].mean(1)

    want = heard_as(np.float32, 44_100, 1, 1)
    loud = want > want.max() - 1  # 20 decibels
    others = [(np.int16, 8_000, 2**15, 2), (np.int32, 48_000, 2**31, 3)]
    for got in (heard_as(*how) for how in [*others, (np.uint8, 22_050, 2**7, 1, 128)]):
        assert got.argmax() == want.argmax()
        torch.testing.assert_close(got[loud], want[loud], rtol=0, atol=0.05)  # a decibel


def test_a_clip_is_the_sound_before_the_moment_as_if_it_were_computed_alone(tmp_path):
    rate = 44_100
    noise = np.random.default_rng(0).normal(scale=0.1, size=(3 * rate, 2)).astype(np.float32)
    before, moments = np.zeros(2 * rate), (0.004, 0.5, 2.0, 2.996)
    wavfile.write(tmp_path / "a.wav", rate, noise)
    for moment, got in zip(moments, heard(tmp_path / "a.wav", *(m / 3 for m in moments))):
        stop = 441 * round(100 * moment)  # the nearest step of 10 ms
        end = 2 * rate + stop
        alone = np.concatenate([before, noise.mean(1)])[end - 106 * 441 : end + 1]
        want = log_mel(torch.from_numpy(alone))
        assert got.shape == (1, 64, 107) and got.dtype == torch.float32
        inside = slice(2, 105)  # the windows of the others reach beyond the clip
        np.testing.assert_allclose(got[0, :, inside], want[:, inside], rtol=2e-3, atol=2e-3)


def test_affwild2_clips_are_the_frames_and_labels_they_should_be(tmp_path):
    label = annotations(40)
    label[[34, 35]] = -5
    label[36, 1] = -5  # half annotated is not annotated
    video(tmp_path, "Train_Set", "a", label, missing={4, 12, 13, 20, 40}, size=64)
    video(tmp_path, "Validation_Set", "b", annotations(33))
    sound(tmp_path, "a", 2)
    sound(tmp_path, "b", 1)
    data = affwild2(tmp_path)
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
    assert data.visual.drawn(3)[[5]].equal(data.visual[[5]])  # it takes no frames at random
    np.testing.assert_allclose(data.privileged.end[:count], np.array(ends) / 40)  # 20 a second
    assert len(affwild2(tmp_path, stride=7).label) == -(-count // 7) + -(-33 // 7)
    shutil.rmtree(tmp_path / "annotations")
    shutil.rmtree(tmp_path / "audio")
    data = affwild2(tmp_path, need_privileged=False, need_label=False)
    faces = [f"a/{n:05d}" for n in range(1, 40) if n not in (4, 12, 13, 20)]
    names = [data.visual.name(i) for i in range(len(data.visual))]
    assert names == faces + [f"b/{n:05d}" for n in range(1, 34)]
    assert data.privileged is None and data.label is None


def test_affwild2_awkward_tree(tmp_path):
    with pytest.warns(UserWarning, match="faceless: no annotated frame with a face"):
        data = affwild2(affwild2_tree(tmp_path), stride=6)
    videos = [data.visual.name(row).split("/")[0] for row in range(36)]
    assert len(set(zip(videos, data.group))) == 6 and len(set(data.group)) == 5
    group = dict(zip(videos, data.group))
    assert group["3_left"] == group["3_right"] != group["9_right"]  # a video stays together
    assert [len(rows) for rows in folds(data)[0]] == [24, 12, 12]
    assert data.privileged[list(range(36))].shape == data.privileged.shape == (36, 1, 64, 107)
    assert data.visual[list(range(36))].shape == data.visual.shape == (36, 3, 8, 112, 112)


def loud(wav):
    file = io.BytesIO()
    wavfile.write(file, 8_000, np.full((8_000, 2), 1e308))
    return file.getvalue()


NOTES, SOUND, SIGNAL = "annotations/Train_Set/3_left.txt", "audio/3.wav", "bio*/*/*BL1*.csv"
MISTAKES = [  # files or folders, what they are made to hold, and the message; None removes them
    ("annotations", None, "no folder annotations/Train_Set; it needs annotations/Train_Set"),
    (SOUND, None, "audio/3.wav: must be a wav file.*No such file"),
    (SOUND, lambda wav: b"", "3.wav: must be a wav file"),
    (SOUND, lambda wav: wav[:500], "3.wav: must be a wav file.*mmap length"),
    (SOUND, lambda wav: wav[:40] + bytes(4), "3.wav: must be a .*0 samples|cannot mmap|empty"),
    (SOUND, loud, "3.wav: holds NaN or too large values"),
    (NOTES, lambda text: b"", '3_left.txt: must be "valence,arousal", then two numbers a line'),
    (NOTES, lambda text: b"\xff\xfe", "3_left.txt: must be"),
    (NOTES, lambda text: text + b"0\n", "3_left.txt: must be .*row 4"),
    (NOTES, lambda text: text + b"\n0,0\n", "3_left.txt: must be .*row 4"),
    (NOTES, lambda text: text + b"#0,0\n", "3_left.txt: must be .*'#0'"),
    (NOTES, lambda text: text + b"0,x\n", "3_left.txt: must be .*'x'"),
    (NOTES, lambda text: text + b"0,1.5\n", r"3_left.txt: must be .*\(line 5\)"),
    (NOTES, lambda text: text + b"0,nan\n", r"3_left.txt: must be .*\(line 5\)"),
    ("frames", None, "no folder frames; it needs frames, biosignals_filtered"),
    ("frames/*/*-PA4-*", None, "frames: no clip SUBJECT/SUBJECT-PA4-NUMBER"),
    ("frames/*/*-BL1-000/*.jpg", None, "000: no img_00001.jpg"),
    (SIGNAL, None, "_bio.csv: needs .*No such file"),
    (SIGNAL, lambda table: table.replace(b"emg_", b""), "needs a column emg_corrugator"),
    (SIGNAL, lambda table: b"\n".join(table.split(b"\n")[:2001]), "2560 numbers .* .it has 2000"),
    (SIGNAL, lambda table: b"", "_bio.csv: needs a column emg_corrugator"),
    (SIGNAL, lambda table: table.replace(b".", b"x"), "needs a column"),
    (SIGNAL, lambda table: re.sub(rb"\.\d*", b"e200", table), "csv: holds NaN or too large values"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("pattern, content, message", MISTAKES)
def test_mistakes_are_named(tmp_path, pattern, content, message):
    video(tmp_path, "Train_Set", "3_left", annotations(3))
    (tmp_path / "annotations/Validation_Set").mkdir()
    sound(tmp_path, "3", 1)
    biovid_tree(tmp_path, people=1, clips=1, levels=("BL1", "PA4"))
    read = biovid if pattern.startswith(("frames", "bio")) else affwild2
    for path in sorted(tmp_path.glob(pattern)):
        if content:
            path.write_bytes(content(path.read_bytes()))
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path).privileged[[0, 1]]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("level", ["PA9", "BL1", "PA*"])  # unknown, twice there, a pattern
def test_a_wrong_level_is_named(tmp_path, level):
    with pytest.raises(DataError, match=f"--levels: {re.escape(level)} .*BL1,PA1,PA2,PA3,PA4$"):
        biovid(biovid_tree(tmp_path, people=1, clips=1), levels=["BL1", level])


def test_biovid_is_classes_people_and_evenly_spread_frames(tmp_path):
    root = biovid_tree(tmp_path, people=3)
    data = biovid(root)
    assert data.privileged[[0]].shape[1:] == data.privileged.shape[1:]
    assert data.names == ["BL1", "PA4"] and data.task == "classification"
    assert data.label.tolist() == [0, 0, 1, 1] * 3
    assert data.group.tolist() == np.repeat([0, 1, 2], 4).tolist()
    evenly = torch.tensor([1, 2, 3, 5, 6, 7, 8, 10, 11, 12])  # of 12
    assert (shades(data.visual[[0]][0]) - 10 * evenly).abs().max() < 2
    assert data.visual[[0, 5]].shape == (2, 3, 10, 112, 112) and len(data.visual) == 12
    assert data.visual.name(0) == "071309_w_20-BL1-000"
    assert data.privileged.shape == (12, 1, 65, 127)
    file = root / "biosignals_filtered/071309_w_20/071309_w_20-BL1-000_bio.csv"
    table = np.loadtxt(file, skiprows=1, delimiter="\t")
    other = biovid(root, levels=["PA4", "PA1", "BL1"], signal="ecg")
    assert other.names == ["PA4", "PA1", "BL1"] and other.label.tolist() == [2, 2, 1, 1, 0, 0] * 3
    for view, column in [(data.privileged, 4), (other.privileged, 2)]:
        want = spectrogram(table[1024:2560, column], 512, nperseg=16, noverlap=4, nfft=128)[2]
        np.testing.assert_allclose(view[[0]][0, 0], want, rtol=1e-4)
    for train, _, val in folds(data, 3):
        assert not set(data.group[train]) & set(data.group[val])
    assert len(biovid(root, need_privileged=False, need_label=False).visual) == 18


def test_training_takes_neighbours_from_a_random_place_of_each_segment(tmp_path):
    for n in range(1, 101):
        jpeg(tmp_path / "clip" / f"img_{n:05d}.jpg", 2 * n)
    frames = [np.arange(1, end) for end in (101, 4, 101)]
    about = {"prefix": "img_", "frames": frames, "whole": True}
    view = Frames([tmp_path / "clip"], np.zeros(3, int), (3, 10, 112, 112), **about)

    def numbers(view, rows=(0,)):
        return (shades(view[list(rows)][-1]) / 2).round().long().tolist()

    seen = [numbers(view.drawn(seed)) for seed in range(8)]
    for taken in seen:
        for segment, (first, second) in enumerate(zip(taken[::2], taken[1::2])):
            assert second == first + 1 and 20 * segment <= first <= 20 * segment + 21
    assert len({tuple(taken) for taken in seen}) == 8  # anew every time
    assert numbers(view.drawn(3)) == numbers(view.drawn(3), [1, 0]) == seen[3]
    assert numbers(view.drawn(3), [2]) != seen[3]  # nor are two clips alike
    assert numbers(view) == [1, 12, 23, 34, 45, 56, 67, 78, 89, 100]  # evenly spread
    assert set(numbers(view.drawn(1), [1])) <= {1, 2, 3}  # fewer frames than are taken


def test_digest_of_raw_views_is_of_what_they_read_not_of_where_it_lies(tmp_path):
    a = biovid(biovid_tree(tmp_path / "a", people=2, clips=1))
    b = biovid(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    assert digest(a.visual, a.privileged) == digest(b.visual, b.privileged)
    assert digest(a.privileged) != digest(biovid(tmp_path / "a", signal="ecg").privileged)
