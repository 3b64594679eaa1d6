"""Raw data in the layouts of Aff-Wild2 and BioVid: small trees of real JPEG, wav and csv files, made here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import spectrogram

import data as data_module
from data import (
    DataError,
    Frames,
    Sounds,
    affwild2,
    augment,
    biovid,
    digest,
    folds,
    load,
    log_mel,
    mel_filters,
    read_wav,
    stream,
)
from test_train import run

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


SMALL = ["--width", 2, "--clip-stride", 6, "--workers", 0]


# ---- sound --------------------------------------------------------------------------------------------


def test_log_mel_by_loops():
    wave = np.random.default_rng(0).normal(scale=0.1, size=3000)
    padded = np.pad(wave, 512, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(882) / 882)
    window = np.pad(hann, (71, 71))  # 882 samples in the middle of 1024
    steps = 1 + len(wave) // 441
    power = np.abs([np.fft.rfft(window * padded[441 * i : 441 * i + 1024]) for i in range(steps)]) ** 2

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
        wavfile.write(tmp_path / f"{i}.wav", rate, np.repeat(tone[:, None], channels, axis=1).astype(dtype).squeeze())
        spectrum = Sounds([tmp_path / f"{i}.wav"], np.array([0]), np.array([0.75]))[0][0]
        middle = spectrum[:, 50:90].mean(1)
        centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 22_050 / 700), 66)[1:-1] / 2595) - 1)
        assert abs(int(middle.argmax()) - int(np.abs(centres - 1000).argmin())) <= 1
        levels.append(float(middle.max()))
    assert max(levels) - min(levels) < 0.05  # a decibel


def test_the_second_before_the_moment_padded_at_the_start(tmp_path):
    rate = 44_100
    wave = np.zeros(3 * rate, dtype=np.float32)
    wave[rate : rate + 2000] = 0.5  # something happens just after the first second
    wavfile.write(tmp_path / "a.wav", rate, wave)
    sounds = Sounds([tmp_path / "a.wav"], np.array([0, 0, 0]), np.array([0.33, 1.1 / 3, 0.1]))
    quiet, loud, early = sounds[0], sounds[1], sounds[2]
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
    assert len(data.label) == len(ends) + 33 and data.split.tolist() == [True] * len(ends) + [False] * 33
    np.testing.assert_allclose(data.label[: len(ends)], labels[np.array(ends) - 1], atol=1e-6)
    # Every 4th frame of the window of 32 that ends at 38 (10, 14, ..., 38), and at 32 (4, 8, ..., 32) with 4, 12, 20
    # missing: the nearest is taken, the earlier of two.
    assert data.visual.frames[ends.index(38)].tolist() == [10, 14, 18, 22, 26, 30, 34, 38]
    assert data.visual.frames[ends.index(32)].tolist() == [3, 8, 11, 16, 19, 24, 28, 32]
    assert data.visual.frames[ends.index(2)].tolist() == [1, 1, 1, 1, 1, 1, 1, 2]  # the start of the video
    clip = data.visual[ends.index(38)]
    assert clip.shape == (3, 8, 112, 112) and clip.dtype == torch.uint8  # 64 x 64 on disk
    assert (clip.float().mean((0, 2, 3)) - torch.tensor([10, 14, 18, 22, 26, 30, 34, 38.0])).abs().max() < 2
    assert data.privileged[0].shape == (1, 64, 107)
    np.testing.assert_allclose(data.privileged.end[: len(ends)], np.array(ends) / 40)  # 20 frames a second
    assert len(affwild2(tmp_path, stride=7).label) == -(-len(ends) // 7) + -(-33 // 7)


def test_affwild2_awkward_tree(tmp_path):
    root = affwild2_tree(tmp_path)
    with pytest.warns(UserWarning, match="no annotated frame with a face in faceless"):
        data = affwild2(root, stride=6)
    assert sorted({file.name for file in data.privileged.files}) == sorted(
        ["1-30-1280x720.wav", "video 2 (b).wav", "3.wav", "été.v2.wav", "9.wav"]
    )
    person = {folder.name: set(data.group[data.visual.of == i]) for i, folder in enumerate(data.visual.folders)}
    assert person["3_left"] == person["3_right"] and person["9_right"] != person["3_right"]  # a video stays together
    for i in range(len(data.label)):
        assert data.visual[i].shape == (3, 8, 112, 112) and bool(data.privileged[i].isfinite().all())
    ((train, val),) = folds(data)
    assert len(train) == 24 and len(val) == 12


def test_workers_read_the_same_and_pass_on_the_message(tmp_path):
    with pytest.warns(UserWarning):
        data = affwild2(affwild2_tree(tmp_path), stride=12)
    batches = torch.arange(len(data.label)).tensor_split(3)
    for alone, helped in zip(stream(data.visual, batches), stream(data.visual, batches, workers=2)):
        assert alone.equal(helped)
    broken = tmp_path / "cropped_aligned" / "3_left" / "00001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"00001.jpg: not a readable JPEG") as caught:
            list(stream(data.visual, batches, workers))
        assert "\n" not in str(caught.value)


def test_affwild2_from_files_to_the_table_and_without_sound(tmp_path, capsys):
    root, out = affwild2_tree(tmp_path / "tree"), tmp_path / "out"
    base = ["--dataset", "affwild2", *SMALL, "--out", out]
    with pytest.warns(UserWarning, match="faceless"):
        table = run(capsys, *base, "--data", root, "--method", "all")
        assert "\nmtpkdot " in table and "CCC of valence/arousal" in table
        results = json.loads((out / "results.json").read_text())
        shutil.copytree(root, tmp_path / "silent", ignore=shutil.ignore_patterns("audio"))
        said = run(capsys, *base, "--data", tmp_path / "silent", "--stage", "eval", "--method", "all")
        assert "12 validation rows of its own data" in said
        scored = json.loads((out / "eval.json").read_text())
        best = {m: s["best"] for m, s in results["mean"]["students"].items() if m != "visual"}  # which is no student
        assert scored["mean"]["students"] == best
        assert "no folder audio" in run(capsys, *base, "--data", tmp_path / "silent")


def test_embeddings_are_kept_until_data_or_backbones_change(tmp_path, capsys, monkeypatch):
    root, out = affwild2_tree(tmp_path / "tree"), tmp_path / "out"
    base = ["--dataset", "affwild2", *SMALL, "--data", root, "--out", out]
    reads = []
    image = Frames._image
    monkeypatch.setattr(Frames, "_image", lambda self, path: reads.append(path) or image(self, path))
    files = [out / f"fold0/embedding_{view}.pt" for view in ("visual", "privileged")]
    with pytest.warns(UserWarning, match="faceless"):
        run(capsys, *base, "--stage", "teachers")
        kept = [file.read_bytes() for file in files]
        reads.clear()
        run(capsys, *base, "--stage", "align")
        assert len(reads) < 100  # a look at one clip here and there, to see its shape
        for file in files:
            file.unlink()
        run(capsys, *base, "--stage", "align")  # without them: read again, the same again
        assert len(reads) > 36 * 8 and [file.read_bytes() for file in files] == kept
        reads.clear()
        jpeg(root / "cropped_aligned/3_left/99999.jpg", 1)  # beyond the labels, but a change of the folder
        run(capsys, *base, "--stage", "align")
        assert len(reads) > 36 * 8
        (out / "run.json").unlink()
        run(capsys, *base, "--stage", "teachers", "--seed", 1)
        assert all(file.read_bytes() != before for file, before in zip(files, kept))


def test_augment_moves_all_frames_of_a_clip_alike():
    torch.manual_seed(0)
    still = torch.randint(1, 255, (40, 3, 1, 20, 24), dtype=torch.uint8).expand(-1, -1, 4, -1, -1)
    moved = augment(still, torch.rand(40, 3), shift=3)
    assert moved.shape == still.shape and moved.dtype == torch.uint8
    assert moved.equal(moved[:, :, :1].expand_as(moved))  # no frame went elsewhere than the others
    kinds = set()
    for before, after in zip(still[:, :, 0], moved[:, :, 0]):
        found = [
            (mirror, y, x)
            for mirror in (False, True)
            for y in range(-3, 4)
            for x in range(-3, 4)
            if after.equal(shifted(before.flip(-1) if mirror else before, y, x))
        ]
        assert len(found) == 1
        kinds.add(found[0])
    assert len({k[0] for k in kinds}) == 2 and len({k[1] for k in kinds}) > 3 and len({k[2] for k in kinds}) > 3


def shifted(image, y, x):
    """The image moved up by y and left by x, black where nothing comes in."""
    out = torch.zeros_like(image)
    h, w = image.shape[-2:]
    out[:, max(-y, 0) : h - max(y, 0), max(-x, 0) : w - max(x, 0)] = image[
        :, max(y, 0) : h - max(-y, 0), max(x, 0) : w - max(-x, 0)
    ]
    return out


def test_published_weights_start_the_backbones(tmp_path, capsys):
    from models import R3D18

    root = affwild2_tree(tmp_path / "tree")
    base = ["--dataset", "affwild2", *SMALL, "--data", root, "--out", tmp_path / "out", "--stage", "teachers"]
    torch.manual_seed(0)
    torch.save(R3D18(dim=400, width=2).state_dict(), tmp_path / "r3d_18.pth")
    with pytest.warns(UserWarning, match="faceless"):
        run(capsys, *base, "--visual-weights", tmp_path / "r3d_18.pth", "--lr-backbone", 1e-12)
        started = torch.load(tmp_path / "out/fold0/teachers.pt", weights_only=True)["weights"]["visual"]
        published = torch.load(tmp_path / "r3d_18.pth", weights_only=True)
        torch.testing.assert_close(started["layer3.0.conv1.0.weight"], published["layer3.0.conv1.0.weight"])
        error = run(capsys, *base, "--privileged-weights", tmp_path / "r3d_18.pth")  # before anything is trained
        assert "not the published weights of ResNet18: missing" in error
        (tmp_path / "text.pth").write_text("weights")
        assert "text.pth: not a file of published weights" in run(
            capsys, *base, "--visual-weights", tmp_path / "text.pth"
        )


def broken(path, text):
    path.write_text(text)


AFFWILD2_MISTAKES = [
    (lambda r: shutil.rmtree(r / "annotations"), "no folder annotations/Train_Set or annotations/Validation_Set"),
    (lambda r: shutil.rmtree(r / "cropped_aligned"), "no folder cropped_aligned"),
    (lambda r: (r / "audio/3.wav").unlink(), "audio/3.wav is missing; make it with: ffmpeg -i 3.mp4 -vn .*audio/3.wav"),
    (lambda r: (r / "audio/3.wav").write_bytes(b""), "3.wav: not a readable wav file"),
    (lambda r: wavfile.write(r / "audio/3.wav", 16_000, np.zeros(0, np.int16)), "3.wav: holds no sound"),
    (lambda r: broken(r / "annotations/Train_Set/3_left.txt", ""), "3_left.txt: empty"),
    (lambda r: broken(r / "annotations/Train_Set/3_left.txt", "v,a\n0,0\n"), '3_left.txt: line 1 must be "valence,ar'),
    (
        lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,0\n0\n"),
        "line 3 must be two numbers",
    ),
    (lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,x\n"), 'two numbers, not "0,x"'),
    (lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,1.5\n"), "line 2 holds a value"),
    (lambda r: broken(r / "annotations/Train_Set/3_left.txt", "valence,arousal\n0,nan\n"), "line 2 holds a value"),
]


@pytest.mark.filterwarnings("ignore:.*faceless")
@pytest.mark.parametrize("mistake, message", AFFWILD2_MISTAKES)
def test_affwild2_mistakes_are_named(tmp_path, mistake, message):
    mistake(affwild2_tree(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        affwild2(tmp_path)
    assert "\n" not in str(caught.value)


def test_affwild2_wrong_root(tmp_path):
    with pytest.raises(DataError, match="nowhere: no folder annotations/Train_Set or .*; Aff-Wild2 needs"):
        affwild2(tmp_path / "nowhere")


def spoil(root):
    """Damage to four videos of affwild2_tree; two of them, without sound and with a bad header, go altogether."""
    lines = (root / "annotations/Train_Set/3_left.txt").read_text().splitlines()
    lines[5], lines[8] = "0,x", "0.5,2"  # of frames 5 and 8
    broken(root / "annotations/Train_Set/3_left.txt", "\n".join(lines))
    frame = root / "cropped_aligned/3_right/00020.jpg"
    frame.write_bytes(frame.read_bytes()[:300])
    broken(root / "annotations/Train_Set/video 2 (b).txt", "arousal\n0\n")
    (root / "audio/9.wav").unlink()


@pytest.mark.filterwarnings("ignore:.*faceless")
@pytest.mark.parametrize("workers", [0, 2])
def test_skip_bad_leaves_out_the_bad_clips_and_no_other(tmp_path, workers):
    def clips(data):
        names = [data.visual.folders[video].name for video in data.visual.of]
        return list(zip(names, data.visual.frames[:, -1].tolist())), data.visual.frames

    before, frames = clips(affwild2(affwild2_tree(tmp_path)))
    spoil(tmp_path)
    with pytest.raises(DataError, match='3_left.txt: line 6 must be two numbers, not "0,x"'):
        load("affwild2", tmp_path, workers=workers)
    data = load("affwild2", tmp_path, skip_bad=True, workers=workers)
    gone = {clip for clip in before if clip[0] in ("video 2 (b)", "9_right")} | {("3_left", 5), ("3_left", 8)}
    gone |= {clip for clip, used in zip(before, frames) if clip[0] == "3_right" and 20 in used}
    assert clips(data)[0] == [clip for clip in before if clip not in gone] and len(gone) == len(data.skipped) > 70
    assert len({len(part) for part in (data.visual, data.privileged, data.label, data.group, data.split)}) == 1
    assert [message.split(": ")[0].split("/")[-1] for message in dict.fromkeys(data.skipped)] == [
        "3_left.txt", "3_left.txt", "video 2 (b).txt", "9.wav is missing; make it with", "00020.jpg",
    ]  # fmt: skip
    silent = load("affwild2", tmp_path, need_privileged=False, skip_bad=True, workers=workers)
    assert len(silent.label) == len(data.label) + 36  # what lacks sound alone


@pytest.mark.filterwarnings("ignore:.*faceless")
def test_skip_bad_counts_in_the_footer(tmp_path, capsys):
    root = affwild2_tree(tmp_path / "tree")
    base = ["--dataset", "affwild2", *SMALL, "--data", root, "--out", tmp_path / "out"]
    frame = root / "cropped_aligned/3_right/00019.jpg"
    frame.write_bytes(frame.read_bytes()[:300])
    assert "3_right/00019.jpg: not a readable JPEG" in run(capsys, *base)
    assert "Left out as bad: 2 clips, 34 remain." in run(capsys, *base, "--skip-bad")
    assert (
        json.loads((tmp_path / "out/results.json").read_text())["skipped"] == 2
    )  # of those that end at 1, 7, 13 ..., the ones at 19 and 31 hold frame 19
    assert "Left out as bad: 2 clips, 34 remain." in run(capsys, *base, "--skip-bad", "--stage", "eval")
    for frame in (root / "cropped_aligned").rglob("*.jpg"):
        frame.write_bytes(b"")
    assert "not one clip can be read; the first: " in run(capsys, *base, "--skip-bad")


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
    assert data.label.tolist() == [0, 0, 1, 1] * 3 and data.group.tolist() == np.repeat([0, 1, 2], 4).tolist()
    assert data.visual.frames[0].tolist() == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    assert data.visual[0].shape == (3, 10, 112, 112)
    table = np.loadtxt(root / "biosignals_filtered/071309_w_20/071309_w_20-BL1-000_bio.csv", skiprows=1, delimiter="\t")
    want = spectrogram(table[1024:2560, 4], 512, nperseg=16, noverlap=4, nfft=128)[2]
    np.testing.assert_allclose(data.privileged[0][0], want, rtol=1e-4)
    other = biovid(root, levels=["PA4", "PA1", "BL1"], signal="ecg")
    assert other.names == ["PA4", "PA1", "BL1"] and len(other.label) == 18
    want = spectrogram(table[1024:2560, 2], 512, nperseg=16, noverlap=4, nfft=128)[2]
    np.testing.assert_allclose(other.privileged[0][0], want, rtol=1e-4)
    for train, val in folds(data, 3):
        assert not set(data.group[train]) & set(data.group[val])


def test_biovid_from_files_to_the_table_and_without_signals(tmp_path, capsys):
    root, out = biovid_tree(tmp_path / "tree"), tmp_path / "out"
    base = ["--dataset", "biovid", "--width", 2, "--workers", 0, "--out", out]
    assert "accuracy in %" in run(capsys, *base, "--data", root, "--levels", "BL1,PA1,PA4")
    results = json.loads((out / "results.json").read_text())
    assert len(results["folds"]) == 5 and results["metric"] == "accuracy"
    shutil.rmtree(root / "biosignals_filtered")
    run(capsys, *base, "--data", root, "--levels", "BL1,PA1,PA4", "--stage", "eval")
    scored = json.loads((out / "eval.json").read_text())
    assert scored["mean"]["students"]["mtpkdot"] == results["mean"]["students"]["mtpkdot"]["best"]
    assert "no folder biosignals_filtered" in run(capsys, *base, "--data", root)


def test_biovid_folds_by_clip_share_people_and_say_so(tmp_path, capsys):
    root = biovid_tree(tmp_path, people=2, clips=5, levels=("BL1", "PA4"))
    base = ["--dataset", "biovid", "--data", root, "--width", 2, "--workers", 0, "--out", tmp_path / "o"]
    assert "2 people, too few for 5 folds" in run(capsys, *base)
    run(capsys, *base, "--folds-by", "clip", "--stage", "teachers", "--fold", 0)
    assert json.loads((tmp_path / "o/results.json").read_text())["arguments"]["folds_by"] == "clip"


BIOVID_MISTAKES = [
    (lambda r: shutil.rmtree(r / "frames"), {}, "no folder frames; BioVid needs frames, biosignals_filtered"),
    (lambda r: None, {"levels": ["BL1", "PA3"]}, "no clip SUBJECT/SUBJECT-PA3-NUMBER"),
    (lambda r: next(r.glob("bio*/*/*BL1-000_bio.csv")).unlink(), {}, "_bio.csv is missing"),
    (lambda r: [f.unlink() for f in next(r.glob("frames/*/*BL1-001")).iterdir()], {}, "BL1-001: no img_00001.jpg"),
    (
        lambda r: [signals(f, 1, COLUMNS[:4]) for f in r.glob("bio*/*/*.csv")],
        {},
        "no column emg_corrugator; it has time",
    ),
    (lambda r: [signals(f, 1, rows=2000) for f in r.glob("bio*/*/*.csv")], {}, "needs 2560 numbers"),
    (lambda r: [broken(f, "") for f in r.glob("bio*/*/*.csv")], {}, "no column emg_corrugator; it has none"),
    (
        lambda r: [broken(f, "\t".join(COLUMNS) + "\n1\t2\tx\t4\t?\t6\n") for f in r.glob("bio*/*/*.csv")],
        {},
        "_bio.csv: ",
    ),
]


def test_biovid_skip_bad(tmp_path):
    clips = len(biovid(biovid_tree(tmp_path, people=3)).label)
    next(tmp_path.glob("bio*/*/*BL1-000_bio.csv")).unlink()
    [frame.unlink() for frame in next(tmp_path.glob("frames/*/*PA4-001")).iterdir()]
    signals(next(tmp_path.glob("bio*/*/*PA4-000_bio.csv")), 1, rows=2000)
    data = load("biovid", tmp_path, skip_bad=True)
    assert len(data.label) == len(data.visual) == len(data.privileged) == len(data.group) == clips - 3
    assert len(data.skipped) == 3 and bool(torch.stack([data.privileged[i] for i in range(clips - 3)]).isfinite().all())


@pytest.mark.parametrize("mistake, arguments, message", BIOVID_MISTAKES)
def test_biovid_mistakes_are_named(tmp_path, mistake, arguments, message):
    mistake(biovid_tree(tmp_path, people=1))
    with pytest.raises(DataError, match=message) as caught:
        list(stream(biovid(tmp_path, **arguments).privileged, [torch.arange(4)]))
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
    frames = (np.array([0, 2**22, -(2**22)] * 100, dtype="<i4")[:, None].view(np.uint8).reshape(-1, 4)[:, :3]).tobytes()
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
    assert data_module.SAMPLE_RATE == 44_100


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
            data_module.Sounds([tmp_path / "a.wav"], np.array([0]), np.array([1.0]))[0]
    for value in ("1e308", "1e200", "1e30"):
        lines = [f"{i}\t{'-' if i % 2 else ''}{value}" for i in range(2_816)]
        (tmp_path / "a.csv").write_text("\n".join(["time\tgsr", *lines]))
        with pytest.raises(DataError, match="a.csv: holds NaN, infinite or too large"):
            data_module.Signals([tmp_path / "a.csv"], "gsr")[0]


# ---- memory -------------------------------------------------------------------------------------------


def many_videos(root, videos, frames=40):
    """A tree in the layout of Aff-Wild2 whose frames are links to one JPEG a video, and whose sounds are real."""
    for i in range(videos):
        part, name = ("Validation_Set" if i % 4 == 0 else "Train_Set"), f"{i}"
        video(root, part, name, walk(frames, i), missing=range(2, frames + 1))
        for number in range(2, frames + 1):
            os.link(
                root / "cropped_aligned" / name / "00001.jpg", root / "cropped_aligned" / name / f"{number:05d}.jpg"
            )
        sound(root, name, 30)
    return root


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_memory_stays_flat_however_many_videos(tmp_path):
    """Peak memory of the whole run, its reading processes included, with 20 and with 200 videos."""
    peaks = []
    for videos in (20, 200):
        root = many_videos(tmp_path / f"{videos}", videos)
        code = (
            "import resource, sys, train; train.main(sys.argv[1:]);"
            "own = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0];"
            "print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        argv = ["--dataset", "affwild2", "--data", root, "--out", root / "out", "--epochs", 1, "--dim", 16,
                "--width", 2, "--clip-stride", 20, "--batch-size", 16, "--workers", 1, "--device", "cpu"]  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True,
                              cwd=Path(data_module.__file__).parent)  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks.append(max(map(int, done.stdout.split()[-2:])))
    print(peaks)
    assert peaks[1] < 1.3 * peaks[0]
