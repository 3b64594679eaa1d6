"""Damaged input of every kind: success, or one clear line and exit code 2; never a trace, ten seconds
or 2 GiB. The inputs are the same every time; FUZZ=3000 python -m pytest test_fuzz.py feeds new ones."""

import io
import os
import random
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from test_train import go, two_view

COUNT = int(os.environ.get("FUZZ", 200))
BASE = ["--epochs", 1, "--dim", 4, "--width", 1, "--device", "cpu", "--workers", 0, "--fold", 0]
FOREIGN = [b"", b"\x89PNG\r\n", b"RIFF\xff\xff\xff\xffWAVE", b"PK\x03\x04", b"\x93NUMPY", b"a,b\n"]
AWKWARD = [np.nan, -np.inf, -1, 2**62, 1e300, "x", True, None, 1j]
CELLS = ["nan", "1e400", "-5", "", "x", "2", "\0", "é", "9" * 5000, "1\t1", "1,1", "\n"]
SHAPES = ["(9000000000,)", "(100000, 100000)", "(60, 99999999999999999999)", "(-1, 6)"]


def damaged(chance, good):
    """Bytes cut off, flipped, of another kind of file, or large where sizes stand."""
    start, size = chance.randrange(min(300, len(good) - 8)), chance.choice([4, 8])
    sizes = chance.choice([b"\xff", b"\x7f", b"\0"]) * size
    flipped = bytearray(good)
    for _ in range(chance.choice([1, 3, 30])):
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
    foreign = chance.choice(FOREIGN) + chance.randbytes(chance.randrange(5000))
    cut, grown = good[: chance.randrange(len(good))], good[:start] + sizes + good[start + size :]
    return chance.choice([cut, bytes(flipped), foreign, grown])


def text(chance, good):
    """A table with one awkward cell."""
    lines = good.decode().split("\n")
    row, tab = chance.randrange(len(lines)), "\t" if b"\t" in good else ","
    cells = lines[row].split(tab)
    cells[chance.randrange(len(cells))] = chance.choice(CELLS)
    lines[row] = tab.join(cells)
    return "\n".join(lines).encode()


def arrays(chance, good):
    """A .npz with an array gone, or of another type or shape, or with an awkward value."""
    found, file = dict(np.load(io.BytesIO(good))), io.BytesIO()
    name = chance.choice(list(found))
    array, kind = found.pop(name), chance.choice(["f2", "i1", "u8", "c8", "?", "O", ">f8", "S5"])
    shapes = [array[:-1], array.reshape(-1), array[None], array[..., None], array[0], array[..., :0]]
    awkward = np.array([chance.choice(AWKWARD)] * len(array), dtype=chance.choice([None, object]))
    one = array.astype(float)
    one.reshape(-1)[chance.randrange(one.size)] = chance.choice([np.nan, -np.inf, 1e300, 1e38])
    other = [None, array.astype(kind), chance.choice(shapes), awkward, one][chance.randrange(5)]
    np.savez(file, **found, **({} if other is None else {name: other}))
    return file.getvalue()


def huge(chance, good):
    """A .npz of an array whose header promises what is not there."""
    header = {"descr": "<f8", "fortran_order": False, "shape": 0}
    header = str(header).replace("0}", chance.choice(SHAPES) + "}").ljust(117) + "\n"
    content, file = b"\x93NUMPY\x01\0" + struct.pack("<H", 118) + header.encode() + bytes(5000), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == "visual.npy" else old.read(name))
    return file.getvalue()


def entries(chance, good):
    """A student's file with an entry gone, or of another type or shape."""
    saved, file = torch.load(io.BytesIO(good), weights_only=True), io.BytesIO()
    part = chance.choice([saved, saved, saved["weights"]])
    name = chance.choice(list(part))
    old, others = part.pop(name), [None, -1, "x", [], {}, [1, 2], torch.zeros(3), 10**30]
    if torch.is_tensor(old):
        others = [old.double(), old.flatten()[:-1], old[None], torch.zeros(1).expand(10**12)]
    part.update({name: chance.choice(others)} if chance.random() < 0.8 else {})
    torch.save(saved, file)
    return file.getvalue()


def kinds_of_input(root):
    """[(how many, folder, [(files, damage)], arguments)]; HERE is a copy of the folder."""
    (root / "run").mkdir()
    two_view(root / "run/data.npz", n=60)
    data = ["--data", "HERE/data.npz", "--device", "cpu"]
    new = ["--stage", "teachers", "--out", "HERE/new"]
    features = ["--dataset", "features", *data, "--folds", 2, *BASE, "--out", "HERE/out"]
    done = go(*(str(a).replace("HERE", str(root / "run")) for a in features))
    assert done.code == 0, done
    student, npz = "out/fold0/student_mtpkdot.pt", [("data.npz", how) for how in (damaged, arrays, huge)]
    evaluate = [*data, "--stage", "eval", "--student", f"HERE/{student}", "--predictions", "HERE/p.csv"]
    kinds = [
        (70, root / "run", [*npz, npz[1]], [*features, *new]),
        (40, root / "run", [("out/fold0/*.pt", damaged)], features),
        (50, root / "run", [(student, damaged), (student, entries), *npz[:2]], evaluate),
    ]
    try:
        from test_raw import affwild2_tree, biovid_tree
    except BaseException:  # a skip, without Pillow
        return kinds
    raw, train = [*BASE, "--select", "val", *new, "--data", "HERE"], "annotations/Train_Set/1*.txt"
    affwild2_tree(root / "affwild2")
    for path in (root / "affwild2/annotations").glob("*/*.txt"):
        if path.name[0] not in "1é":  # one video to train on, one to score
            path.unlink()
    files = [("cropped_aligned/[1é]*/*.jpg", damaged), ("audio/[1é]*", damaged)]
    files += [(train, damaged), (train, text)]
    argv = [*raw, "--dataset", "affwild2", "--clip-stride", 9]
    kinds.append((20, root / "affwild2", files, argv))
    biovid_tree(root / "biovid", people=2, clips=1, levels=("BL1", "PA4"))
    files = [("**/*.jpg", damaged), ("**/*.csv", damaged), ("**/*.csv", text)]
    return [*kinds, (20, root / "biovid", files, [*raw, "--dataset", "biovid", "--folds", 2])]


def test_damaged_input_is_success_or_one_line(tmp_path):
    seed = random.randrange(2**32) if "FUZZ" in os.environ else 0
    print("seed", seed)
    kinds = kinds_of_input(tmp_path)
    cases = [kind for kind in kinds for _ in range(kind[0] * COUNT // 200)]

    def fed(i):
        chance, (_, folder, files, argv) = random.Random(seed + i), cases[i]
        copy = shutil.copytree(folder, tmp_path / f"{i}")
        pattern, damage = chance.choice(files)
        path = chance.choice(sorted(copy.glob(pattern)))
        path.write_bytes(damage(chance, path.read_bytes()))
        done = go(*(str(a).replace("HERE", str(copy)) for a in argv), after=20)
        shutil.rmtree(copy)
        done.case, lines = (i, folder.name, path.name, damage.__name__), done.said.splitlines()
        done.good = done.code == 0 or (done.code == 2 and len(lines) == 1)
        done.good &= all(line.startswith("train.py: ") and len(line) < 1000 for line in lines)
        done.good &= done.seconds < 10
        return done

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(fed, range(len(cases))))
    bad = [(done.case, done.code, done.said[-500:]) for done in answers if not done.good]
    assert not bad, "\n".join(map(str, bad[:10]))
    for name in ("run", "affwild2", "biovid"):  # the damage is seen, and is all that is wrong
        codes = {done.code for done in answers if done.case[1] == name}
        assert codes == {0, 2} or COUNT < 200 or not codes
