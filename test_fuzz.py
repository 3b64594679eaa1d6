"""Damaged input of every kind: success, or one clear line and exit code 2; never a trace, 10 seconds or 2 GiB.

The 300 inputs are the same every time; FUZZ=3000 python -m pytest test_fuzz.py feeds as many new ones.
"""

import io
import os
import random
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import train
from test_resume import Forks
from test_train import two_view

COUNT = int(os.environ.get("FUZZ", 300))
BASE = ["--epochs", 1, "--dim", 4, "--width", 1, "--device", "cpu", "--workers", 0]


# ---- damage -------------------------------------------------------------------------------------------


def truncated(chance, good):
    return good[: chance.randrange(len(good))]


def flipped(chance, good):
    bad = bytearray(good)
    for _ in range(chance.choice([1, 3, 30])):
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
    return bytes(bad)


def emptied(chance, good):
    return b""


def header_made_huge(chance, good):
    """Four or eight of the first bytes, where sizes and shapes stand, as large as they go, or zero."""
    size = chance.choice([4, 8])
    at = chance.randrange(min(300, max(1, len(good) - size)))
    return good[:at] + chance.choice([b"\xff", b"\x7f", b"\0"]) * size + good[at + size :]


def foreign(chance, good):
    return chance.choice(
        [b"\x89PNG\r\n", b"RIFF\xff\xff\xff\xffWAVE", b"PK\x03\x04", b"\x93NUMPY", b"valence,arousal\n"]
    ) + (chance.randbytes(chance.randrange(5000)))


def overwritten(chance, good):
    at, size = chance.randrange(len(good)), chance.randrange(1, 2000)
    return good[:at] + chance.randbytes(size) + good[at + size :]


BYTES = [truncated, flipped, emptied, header_made_huge, foreign, overwritten]
AWKWARD = [np.nan, np.inf, -1, 0, 2**62, 1e300, "x", b"x", True, None, 1j]


def another_array(chance, array):
    """An array of another type or shape, or with an awkward value."""
    if array.size == 0 or array.ndim == 0:  # by damage before
        return array
    how = chance.randrange(5)
    if how == 0:
        kinds = ["f2", "f4", "i1", "u8", "c8", "?", "O", ">f8"] if array.dtype.kind in "if" else ["S5", "O"]
        return array.astype(chance.choice(kinds))
    if how == 1:
        return array[: chance.randrange(len(array) + 1)]
    if how == 2:
        return chance.choice([array.reshape(-1), array[None], array[..., None], array.T, array[0], array[..., :0]])
    if how == 3 and array.dtype.kind in "if":
        array = array.astype(float)
        array.reshape(-1)[chance.randrange(array.size)] = chance.choice([np.nan, np.inf, -np.inf, 1e300, 1e38])
        return array
    return np.array([chance.choice(AWKWARD)] * len(array), dtype=chance.choice([None, object]))


def npz(chance, good):
    arrays = dict(np.load(io.BytesIO(good)))
    for _ in range(chance.choice([1, 1, 2])):
        name = chance.choice(list(arrays))
        if chance.random() < 0.15:
            del arrays[name]
        else:
            arrays[name] = another_array(chance, arrays[name])
        if not arrays:
            break
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npz_of_huge_header(chance, good):
    """A whole archive, of an array whose header promises what is not there."""
    file = io.BytesIO()
    shape = chance.choice(["(9000000000,)", "(100000, 100000)", "(60, 99999999999999999999)", "(-1, 6)", "(3, 0)"])
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "visual.npy":
                content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(5000)
            new.writestr(name, content)
    return file.getvalue()


def checkpoint(chance, good):
    """A file of torch.save with something in it gone, or of another type or shape."""
    saved = torch.load(io.BytesIO(good), weights_only=True)
    parent, name = saved, chance.choice(list(saved))
    while isinstance(parent[name], dict) and parent[name] and chance.random() < 0.8:
        parent, name = parent[name], chance.choice(list(parent[name]))
    value = parent[name]
    if isinstance(value, torch.Tensor) and chance.random() < 0.8:
        kinds = [
            value.double(),
            value.half(),
            value.bool(),
            value.flatten()[:-1],
            value[None],
            value.to(torch.complex64),
        ]
        parent[name] = chance.choice([*kinds, torch.zeros(1).expand(10**12), torch.zeros(1).expand(2**30, 4)])
    elif chance.random() < 0.3:
        del parent[name]
    else:
        parent[name] = chance.choice([None, 1, -1, "x", [], {}, [1, 2], torch.zeros(3), float("nan"), 10**30])
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def text(chance, good):
    """A table of numbers with one awkward entry, line or column."""
    lines = good.decode().split("\n")
    at = chance.randrange(len(lines))
    cells = lines[at].replace("\t", ",").split(",")
    tab = "\t" if "\t" in lines[at] else ","
    cells[chance.randrange(len(cells))] = chance.choice(
        ["nan", "1e400", "-5", "", "x", "2", "\0", "1e200", "é", "9" * 5000]
    )
    lines[at] = chance.choice([tab.join(cells), "", tab.join(cells * 2)])
    return "\n".join(lines).encode()


# ---- what is damaged ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: (share, folder, [(pattern of files, damages)], arguments)}; {} among these is a copy of the folder."""
    root = tmp_path_factory.mktemp("fuzz")
    two_view(root / "features.npz", n=60, group=np.arange(60) // 3, split=np.array(["train", "val"])[
        (np.arange(60) // 3 % 4 == 0).astype(int)])  # fmt: skip
    (root / "features").mkdir()
    shutil.move(root / "features.npz", root / "features/data.npz")
    features = ["--dataset", "features", "--data", "{}/data.npz", *BASE]
    whole = root / "run"
    shutil.copytree(root / "features", whole)
    argv = [str(a).replace("{}", str(whole)) for a in (*features, "--out", whole / "out")]
    train.main(argv)
    stopped = shutil.copytree(whole, root / "stopped")
    for name in ("align.pt", "student_mtpkdot.pt"):
        (stopped / "out/fold0" / name).unlink()
    calls = []

    def stop(args, shared=False):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt

    before, train.stop_if_asked = train.stop_if_asked, stop
    try:
        with pytest.raises(SystemExit):
            train.main([str(a).replace("{}", str(stopped)) for a in (*features, "--out", stopped / "out", "--resume")])
    finally:
        train.stop_if_asked = before
    synthetic = root / "synthetic"
    train.main([str(a) for a in ("--out", synthetic / "out", "--stage", "teachers", *BASE)])

    damages = [*BYTES, checkpoint, checkpoint, checkpoint]
    made = {
        "features": (60, root / "features", [("data.npz", [*BYTES, npz, npz, npz, npz_of_huge_header])],
                     [*features, "--stage", "teachers", "--out", "{}/out"]),
        "synthetic": (25, synthetic, [("out/fold0/*.pt", damages)], ["--stage", "align", "--out", "{}/out", *BASE]),
        "resumed": (65, stopped, [("out/fold0/*.pt", damages), ("out/run.json", BYTES)],
                    [*features, "--out", "{}/out", "--resume"]),
        "evaluated": (30, whole, [("out/fold0/student*.pt", damages), ("out/results.json", [*BYTES, text])],
                      [*features, "--out", "{}/out", "--stage", "eval"]),
        "student": (30, whole, [("out/fold0/student*.pt", damages), ("data.npz", [*BYTES, npz])],
                    ["--stage", "eval", "--student", "{}/out/fold0/student_mtpkdot.pt", "--data", "{}/data.npz",
                     "--predictions", "{}/p.csv", "--device", "cpu"]),
    }  # fmt: skip
    try:
        from test_raw import biovid_tree, sound, video, walk
    except pytest.skip.Exception:
        return made  # without Pillow
    for i, part in enumerate(["Train_Set", "Train_Set", "Validation_Set"]):
        video(root / "affwild2", part, f"{i}", walk(12, i))
        sound(root / "affwild2", f"{i}", 1.1, dtype=[np.int16, np.float32, np.uint8][i])
    biovid_tree(root / "biovid", people=3, clips=1, levels=("BL1", "PA4"))
    trees = (
        [("**/*.jpg", BYTES), ("**/*.wav", [*BYTES, header_made_huge])],
        [("**/*.jpg", BYTES), ("**/*.csv", [*BYTES, text])],
    )
    raw = ["--stage", "teachers", "--out", "{}/out", "--data", "{}", *BASE]
    made["affwild2"] = (45, root / "affwild2", [*trees[0], ("annotations/*/*.txt", [*BYTES, text, text])],
                        ["--dataset", "affwild2", "--clip-stride", 6, *raw])  # fmt: skip
    made["biovid"] = (45, root / "biovid", trees[1], ["--dataset", "biovid", "--folds", 2, "--fold", 0, *raw])
    return made


def test_damaged_input_is_success_or_one_line(kinds, tmp_path):
    seed = random.randrange(2**32) if "FUZZ" in os.environ else 0
    print("seed", seed)
    cases = [kind for kind, (share, *_) in kinds.items() for _ in range(round(share * COUNT / 300))]
    idle = [Forks(), Forks()]

    def fed(i):
        chance, server = random.Random(seed + i), idle.pop()
        _, folder, files, argv = kinds[cases[i]]
        copy = tmp_path / f"{i}"
        shutil.copytree(folder, copy)
        pattern, damages = chance.choice(files)
        path = chance.choice(sorted(copy.glob(pattern)))
        damage = chance.choice(damages)
        path.write_bytes(damage(chance, path.read_bytes()))
        answer = server(*(str(a).replace("{}", str(copy)) for a in argv))
        shutil.rmtree(copy)
        idle.append(server)
        lines = answer["err"].splitlines()
        good = answer["code"] == 0 or (answer["code"] == 2 and len(lines) == 1)
        good = good and all(line.startswith("train.py: ") and len(line) < 1000 for line in lines)
        good = good and answer["seconds"] < 10 and answer["peak"] < 2048
        return {"good": good, "kind": cases[i], "file": path.name, "damage": damage.__name__, "case": i, **answer}

    with ThreadPoolExecutor(len(idle)) as pool:
        answers = list(pool.map(fed, range(len(cases))))
    for server in idle:
        server.close()
    for kind in kinds:
        some = [answer for answer in answers if answer["kind"] == kind]
        refused, longest = sum(a["code"] == 2 for a in some), max(a["seconds"] for a in some)
        print(
            f"{kind}: {len(some)}, {refused} refused, {longest:.1f} s, {max(a['peak'] for a in some):.0f} MiB at most"
        )
    bad = [answer for answer in answers if not answer["good"]]
    assert not bad, "\n".join(map(str, bad[:10]))
    for kind in kinds:  # the damage is done, and is seen
        assert any(answer["code"] == 2 for answer in answers if answer["kind"] == kind)
