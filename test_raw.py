"""Raw data in the layouts of Aff-Wild2 and BioVid: small trees of real JPEG, wav and csv files, made here."""

import shutil

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import spectrogram
from torch.utils.data import DataLoader

from data import (
    BIOVID_LEVELS,
    DataError,
    Frames,
    Signals,
    Sounds,
    affwild2,
    biovid,
    digest,
    folds,
    log_mel,
    mel_filters,
    read_wav,
)

Image = pytest.importorskip("PIL.Image")


def jpeg(path, shade, size=112):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (shade, shade, shade)).save(path, quality=95)


def video(root, part, name, labels, missing=(), size=112):
    """Annotation and frames: frame number n is as bright as n."""
    file = root / "annotations" / part / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("valence,arousal\n" + "".join(f"{v},{a}\n" for v, a in labels))
    for number in range(1, len(labels) + 1):
        if number not in missing:
            jpeg(root / "cropped_aligned" / name / f"{number:05d}.jpg", number % 256, size)


def sound(root, name, seconds, rate=16_000, channels=1, dtype=np.int16):
    (root / "audio").mkdir(parents=True, exist_ok=True)
    time = np.arange(int(seconds * rate)) / rate
    wave = np.repeat(0.5 * np.sin(2 * np.pi * (200 + 100 * time) * time)[:, None], channels, axis=1)
    wave = wave if dtype == np.float32 else np.round(wave * 32767)
    wavfile.write(root / "audio" / f"{name}.wav", rate, wave.astype(dtype).squeeze())


def walk(n, seed):
    """Labels of n frames that wander within [-1, 1]."""
    steps = np.random.default_rng(seed).normal(scale=0.2, size=(n, 2)).cumsum(axis=0)
    return np.round(np.sin(steps), 3)


def affwild2_tree(root):
    for i, name in enumerate(["1-30-1280x720", "video 2 (b)", "3_left", "3_right"]):
        video(root, "Train_Set", name, walk(36, i), missing={5, 6, 7} if i == 1 else ())
    video(root, "Validation_Set", "été.v2", walk(36, 8))
    video(root, "Validation_Set", "9_right", walk(36, 9))
    video(root, "Validation_Set", "faceless", walk(36, 10), missing=set(range(1, 37)))
    sound(root, "1-30-1280x720", 1.2)
    sound(root, "video 2 (b)", 1.2, rate=48_000, channels=2)
    sound(root, "3", 1.3, rate=22_050, dtype=np.float32)
    sound(root, "été.v2", 0.7, rate=44_100)
    sound(root, "9", 1.2, rate=8_000)
    return root


# ---- sound --------------------------------------------------------------------------------------------


def test_log_mel_by_loops():
    wave = np.random.default_rng(0).normal(scale=0.1, size=3000)
    padded = np.pad(wave, 512, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(882) / 882)
    window = np.pad(hann, (71, 71))  # 882 samples in the middle of 1024
    steps = 1 + len(wave) // 441
    power = (
        np.abs([np.fft.rfft(window * padded[441 * i : 441 * i + 1024]) for i in range(steps)]) ** 2
    )

    def mel(f):
        return 2595 * np.log10(1 + f / 700)

    edges = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, mel(22_050), 66)]
    filters = np.zeros((64, 513))
    for band in range(64):
        for bin in range(513):
            f = bin * 44_100 / 1024
            if edges[band] < f < edges[band + 2]:
                rise = (f - edges[band]) / (edges[band + 1] - edges[band])
                fall = (edges[band + 2] - f) / (edges[band + 2] - edges[band + 1])
                filters[band, bin] = min(rise, fall)
    np.testing.assert_allclose(mel_filters().numpy(), filters, atol=1e-10)
    want = np.full((64, 107), 1e-10)  # silence on the left
    want[:, 107 - steps :] = np.maximum(filters @ power.T, 1e-10)
    got = log_mel(torch.from_numpy(wave))
    assert got.shape == (1, 64, 107) and got.dtype == torch.float32
    np.testing.assert_allclose(got[0], (10 * np.log10(want) + 14.8) / 19.895, atol=1e-5)


def test_a_tone_lands_in_its_band_at_any_rate_and_in_any_format(tmp_path):
    """1 kHz, whatever the file: same band, same level."""
    levels = []
    for i, (rate, dtype, channels) in enumerate(
        [(8000, np.int16, 1), (44_100, np.float32, 2), (48_000, np.int32, 1), (22_050, np.uint8, 1)]
    ):
        tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate)
        scale = {np.int16: 2**15, np.int32: 2**31, np.uint8: 2**7, np.float32: 1}[dtype]
        tone = tone * scale * 0.999 + (128 if dtype == np.uint8 else 0)
        wavfile.write(
            tmp_path / f"{i}.wav",
            rate,
            np.repeat(tone[:, None], channels, axis=1).astype(dtype).squeeze(),
        )
        spectrum = Sounds([tmp_path / f"{i}.wav"], np.array([0]), np.array([0.75]))[[0]][0, 0]
        middle = spectrum[:, 50:90].mean(1)
        centres = 700 * (
            10 ** (np.linspace(0, 2595 * np.log10(1 + 22_050 / 700), 66)[1:-1] / 2595) - 1
        )
        assert abs(int(middle.argmax()) - int(np.abs(centres - 1000).argmin())) <= 1
        levels.append(float(middle.max()))
    assert max(levels) - min(levels) < 0.05  # a decibel


def test_the_second_before_the_moment_padded_at_the_start(tmp_path):
    rate = 44_100
    wave = np.zeros(3 * rate, dtype=np.float32)
    wave[rate : rate + 2000] = 0.5  # something happens just after the first second
    wavfile.write(tmp_path / "a.wav", rate, wave)
    sounds = Sounds([tmp_path / "a.wav"], np.array([0, 0, 0]), np.array([0.33, 1.1 / 3, 0.1]))
    quiet, loud, early = sounds[[0, 1, 2]]
    assert float(quiet.max()) == float(early.max()) < float(loud.max())
    assert int(loud[0].max(0).values.argmax()) >= 90  # near the right end: a tenth of a second ago


# ---- Aff-Wild2 ----------------------------------------------------------------------------------------


def test_affwild2_clips_are_the_frames_and_labels_they_should_be(tmp_path):
    labels = walk(40, 1)
    labels[[34, 35]] = -5
    labels[36, 1] = -5  # half annotated is not annotated
    video(tmp_path, "Train_Set", "a", labels, missing={4, 12, 13, 20, 40}, size=64)
    video(tmp_path, "Validation_Set", "b", walk(33, 2))
    sound(tmp_path, "a", 2)
    sound(tmp_path, "b", 1)
    data = affwild2(tmp_path)
    ends = [n for n in range(1, 40) if n not in (4, 12, 13, 20, 35, 36, 37)]
    assert (
        len(data.label) == len(ends) + 33
        and data.split.tolist() == [True] * len(ends) + [False] * 33
    )
    np.testing.assert_allclose(data.label[: len(ends)], labels[np.array(ends) - 1], atol=1e-6)
    # Every 4th frame of the window of 32 that ends at 38 (10, 14, ..., 38), and at 32 (4, 8, ..., 32) with 4, 12, 20
    # missing: the nearest is taken, the earlier of two.
    assert data.visual.frames[ends.index(38)].tolist() == [10, 14, 18, 22, 26, 30, 34, 38]
    assert data.visual.frames[ends.index(32)].tolist() == [3, 8, 11, 16, 19, 24, 28, 32]
    assert data.visual.frames[ends.index(2)].tolist() == [
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        2,
    ]  # the start of the video
    clip = data.visual[[ends.index(38)]][0]
    assert clip.shape == (3, 8, 112, 112) and clip.dtype == torch.uint8  # 64 x 64 on disk
    assert (
        clip.float().mean((0, 2, 3)) - torch.tensor([10, 14, 18, 22, 26, 30, 34, 38.0])
    ).abs().max() < 2
    assert data.privileged[[0, 1]].shape == (2, 1, 64, 107)
    assert data.visual.drawn(3)[[5]].equal(data.visual[[5]])  # it takes no frames at random
    np.testing.assert_allclose(
        data.privileged.end[: len(ends)], np.array(ends) / 40
    )  # 20 frames a second
    assert len(affwild2(tmp_path, stride=7).label) == -(-len(ends) // 7) + -(-33 // 7)


def test_affwild2_awkward_tree(tmp_path):
    root = affwild2_tree(tmp_path)
    with pytest.warns(UserWarning, match="no annotated frame with a face in faceless"):
        data = affwild2(root, stride=6)
    assert sorted({file.name for file in data.privileged.files}) == sorted(
        ["1-30-1280x720.wav", "video 2 (b).wav", "3.wav", "été.v2.wav", "9.wav"]
    )
    person = {
        folder.name: set(data.group[data.visual.of == i])
        for i, folder in enumerate(data.visual.folders)
    }
    assert (
        person["3_left"] == person["3_right"] and person["9_right"] != person["3_right"]
    )  # a video stays together
    rows = list(range(len(data.label)))
    assert data.visual[rows].shape == data.visual.shape == (36, 3, 8, 112, 112)
    assert data.privileged[rows].shape == data.privileged.shape
    assert bool(data.privileged[rows].isfinite().all())
    ((train, _, val),) = folds(data)
    assert len(train) == 24 and len(val) == 12


def test_workers_read_the_same_and_pass_on_the_message(tmp_path):
    with pytest.warns(UserWarning):
        data = affwild2(affwild2_tree(tmp_path), stride=12)
    batches = [rows.tolist() for rows in torch.arange(len(data.label)).tensor_split(3)]

    def read(workers):
        return list(DataLoader(data.visual, batch_size=None, sampler=batches, num_workers=workers))

    for alone, helped in zip(read(0), read(2)):
        assert alone.equal(helped)
    broken = tmp_path / "cropped_aligned" / "3_left" / "00001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"00001.jpg: not a readable JPEG") as caught:
            read(workers)
        assert "00001.jpg: not a readable JPEG" in str(caught.value).rstrip().split("\n")[-1]


def broken(path, text):
    path.write_text(text)


AFFWILD2_MISTAKES = [
    (
        lambda r: shutil.rmtree(r / "annotations"),
        "no folder annotations/Train_Set or annotations/Validation_Set",
    ),
    (lambda r: shutil.rmtree(r / "cropped_aligned"), "no folder cropped_aligned"),
    (
        lambda r: (r / "audio/3.wav").unlink(),
        "audio/3.wav is missing; make it with: ffmpeg -i 3.mp4 -vn .*audio/3.wav",
    ),
    (lambda r: (r / "audio/3.wav").write_bytes(b""), "3.wav: not a readable wav file"),
    (
        lambda r: wavfile.write(r / "audio/3.wav", 16_000, np.zeros(0, np.int16)),
        "3.wav: holds no sound",
    ),
    (lambda r: broken(r / "annotations/Train_Set/3_left.txt", ""), "3_left.txt: empty"),
    (
        lambda r: broken(r / "annotations/Train_Set/3_left.txt", "v,a\n0,0\n"),
        '3_left.txt: line 1 must be "valence,ar',
    ),
    (
        lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,0\n0\n"),
        "line 3 must be two numbers",
    ),
    (
        lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,x\n"),
        'two numbers, not "0,x"',
    ),
    (
        lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,1.5\n"),
        "line 2 holds a value",
    ),
    (
        lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,nan\n"),
        "line 2 holds a value",
    ),
]


@pytest.mark.filterwarnings("ignore:.*faceless")
@pytest.mark.parametrize("mistake, message", AFFWILD2_MISTAKES)
def test_affwild2_mistakes_are_named(tmp_path, mistake, message):
    mistake(affwild2_tree(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        affwild2(tmp_path)
    assert "\n" not in str(caught.value)


def test_affwild2_wrong_root(tmp_path):
    with pytest.raises(
        DataError, match="nowhere: no folder annotations/Train_Set or .*; Aff-Wild2 needs"
    ):
        affwild2(tmp_path / "nowhere")


# ---- BioVid -------------------------------------------------------------------------------------------

COLUMNS = ["time", "gsr", "ecg", "emg_trapezius", "emg_corrugator", "emg_zygomaticus"]


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


def test_biovid_is_classes_people_and_evenly_spread_frames(tmp_path):
    root = biovid_tree(tmp_path, people=3)
    data = biovid(root)
    assert data.names == ["BL1", "PA4"] and data.task == "classification"
    assert (
        data.label.tolist() == [0, 0, 1, 1] * 3
        and data.group.tolist() == np.repeat([0, 1, 2], 4).tolist()
    )
    assert data.visual.frames[0].tolist() == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    assert data.visual[[0]].shape == (1, 3, 10, 112, 112)
    table = np.loadtxt(
        root / "biosignals_filtered/071309_w_20/071309_w_20-BL1-000_bio.csv",
        skiprows=1,
        delimiter="\t",
    )
    want = spectrogram(table[1024:2560, 4], 512, nperseg=16, noverlap=4, nfft=128)[2]
    np.testing.assert_allclose(data.privileged[[0]][0, 0], want, rtol=1e-4)
    other = biovid(root, levels=["PA4", "PA1", "BL1"], signal="ecg")
    assert other.names == ["PA4", "PA1", "BL1"] and len(other.label) == 18
    want = spectrogram(table[1024:2560, 2], 512, nperseg=16, noverlap=4, nfft=128)[2]
    np.testing.assert_allclose(other.privileged[[0]][0, 0], want, rtol=1e-4)
    for train, _, val in folds(data, 3):
        assert not set(data.group[train]) & set(data.group[val])


def test_training_takes_neighbours_from_a_random_place_of_each_segment(tmp_path):
    frames = np.arange(1, 101)
    for n in frames:
        jpeg(tmp_path / "clip" / f"img_{n:05d}.jpg", 2 * n)
    few = frames[:3]
    even = frames[np.linspace(0, 99, 10).round().astype(int)]
    view = Frames([tmp_path / "clip"] * 2, "img_{:05d}.jpg", np.array([0, 1]),
                  np.stack([even, few[np.linspace(0, 2, 10).round().astype(int)]]), "{}", [frames, few])  # fmt: skip

    def numbers(view, row):
        return (view[[row]][0].float().mean((0, 2, 3)) / 2).round().long().tolist()

    seen = [numbers(view.drawn(seed), 0) for seed in range(8)]
    for taken in seen:
        for segment, (first, second) in enumerate(zip(taken[::2], taken[1::2])):
            assert second == first + 1 and 20 * segment <= first <= 20 * segment + 21
    assert len({tuple(taken) for taken in seen}) == 8  # anew every time
    assert numbers(view.drawn(3), 0) == seen[3] and numbers(view, 0) == even.tolist()
    assert set(numbers(view.drawn(1), 1)) <= {1, 2, 3}  # fewer frames than are taken


BIOVID_MISTAKES = [
    (
        lambda r: shutil.rmtree(r / "frames"),
        {},
        "no folder frames; BioVid needs frames, biosignals_filtered",
    ),
    (lambda r: None, {"levels": ["BL1", "PA3"]}, "no clip SUBJECT/SUBJECT-PA3-NUMBER"),
    (
        lambda r: None,
        {"levels": ["BL1", "BL1"]},
        "--levels: name two or more different ones of BL1",
    ),
    (lambda r: None, {"levels": ["BL1", "PA9"]}, ",".join(BIOVID_LEVELS)),
    (lambda r: next(r.glob("bio*/*/*BL1-000_bio.csv")).unlink(), {}, "_bio.csv is missing"),
    (
        lambda r: [f.unlink() for f in next(r.glob("frames/*/*BL1-001")).iterdir()],
        {},
        "BL1-001: no img_00001.jpg",
    ),
    (
        lambda r: [signals(f, 1, COLUMNS[:4]) for f in r.glob("bio*/*/*.csv")],
        {},
        "no column emg_corrugator; it has time",
    ),
    (
        lambda r: [signals(f, 1, rows=2000) for f in r.glob("bio*/*/*.csv")],
        {},
        "needs 2560 numbers",
    ),
    (
        lambda r: [broken(f, "") for f in r.glob("bio*/*/*.csv")],
        {},
        "no column emg_corrugator; it has none",
    ),
    (
        lambda r: [
            broken(f, "\t".join(COLUMNS) + "\n1\t2\tx\t4\t?\t6\n") for f in r.glob("bio*/*/*.csv")
        ],
        {},
        "_bio.csv: ",
    ),
]


@pytest.mark.parametrize("mistake, arguments, message", BIOVID_MISTAKES)
def test_biovid_mistakes_are_named(tmp_path, mistake, arguments, message):
    mistake(biovid_tree(tmp_path, people=1))
    with pytest.raises(DataError, match=message) as caught:
        biovid(tmp_path, **arguments).privileged[[0, 1, 2, 3]]
    assert "\n" not in str(caught.value)


# ---- both ---------------------------------------------------------------------------------------------


def test_pillow_is_asked_for_by_name(tmp_path, monkeypatch):
    jpeg(tmp_path / "v" / "00001.jpg", 3)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(DataError, match="pip install pillow"):
        Frames([tmp_path / "v"], "{:05d}.jpg", np.array([0]), np.array([[1]]))


def test_digest_of_raw_views_is_of_names_and_places_not_of_where_they_lie(tmp_path):
    a = biovid(biovid_tree(tmp_path / "a", people=2))
    b = biovid(biovid_tree(tmp_path / "b", people=2))
    assert digest(a.visual, a.privileged) == digest(b.visual, b.privileged)
    assert digest(a.privileged) != digest(biovid(tmp_path / "a", signal="ecg").privileged)
    shutil.rmtree(next((tmp_path / "b/frames").iterdir()))
    assert digest(biovid(tmp_path / "b").visual) != digest(a.visual)


def test_wav_with_24_bits_and_metadata(tmp_path):
    """What ffmpeg may write: 24-bit samples and a LIST chunk before the data."""
    frames = (
        np.array([0, 2**22, -(2**22)] * 100, dtype="<i4")[:, None]
        .view(np.uint8)
        .reshape(-1, 4)[:, :3]
    ).tobytes()
    fmt = b"fmt " + (16).to_bytes(4, "little") + np.array([1, 1], "<u2").tobytes()
    fmt += np.array([16_000, 48_000], "<u4").tobytes() + np.array([3, 24], "<u2").tobytes()
    body = (
        b"WAVE"
        + fmt
        + b"LIST"
        + (4).to_bytes(4, "little")
        + b"INFO"
        + b"data"
        + len(frames).to_bytes(4, "little")
        + frames
    )
    (tmp_path / "a.wav").write_bytes(b"RIFF" + len(body).to_bytes(4, "little") + body)
    rate, samples = read_wav(tmp_path / "a.wav")
    assert rate == 16_000 and len(samples) == 300
    assert (samples[:3] / 2.0**31).tolist() == [0, 0.5, -0.5]


@pytest.mark.filterwarnings("error")
def test_numbers_too_large_are_refused_in_one_line(tmp_path):
    """Float samples and signals whose mean, cast or power is not finite are refused, without a warning of numpy's."""
    bits = np.random.default_rng(0).integers(0, 256, 128_000, dtype=np.uint8)
    for samples in (
        bits.view("<f4"),
        bits.view("<f4").reshape(-1, 2),
        bits.view("<f8"),
        bits.view("<f8").reshape(-1, 2),
    ):
        wavfile.write(tmp_path / "a.wav", 8_000, samples)
        with pytest.raises(DataError, match="a.wav: holds NaN, infinite or too large"):
            Sounds([tmp_path / "a.wav"], np.array([0]), np.array([1.0]))[[0]]
    for value in ("1e308", "1e200", "1e30"):
        lines = [f"{i}\t{'-' if i % 2 else ''}{value}" for i in range(2_816)]
        (tmp_path / "a.csv").write_text("\n".join(["time\tgsr", *lines]))
        with pytest.raises(DataError, match="a.csv: holds NaN, infinite or too large"):
            Signals([tmp_path / "a.csv"], "gsr")[[0]]
