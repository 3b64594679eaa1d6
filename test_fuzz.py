"""Damaged input of every kind: success, or one clear line and exit code 2; never a trace, ten seconds
or 2 GiB. The inputs are the same every time; FUZZ=3000 python -m pytest test_fuzz.py feeds new ones.
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

from test_train import go, two_view

COUNT = int(os.environ.get("FUZZ", 200))
BASE = ["--epochs", 1, "--dim", 4, "--width", 1, "--device", "cpu", "--workers", 0]
FOREIGN = [b"\x89PNG\r\n", b"RIFF\xff\xff\xff\xffWAVE", b"PK\x03\x04", b"\x93NUMPY", b"a,b\n"]
AWKWARD = [np.nan, np.inf, -1, 0, 2**62, 1e300, "x", True, None, 1j]
CELLS = ["nan", "1e400", "-5", "", "x", "2", "\0", "1e200", "é", "9" * 5000]


# ---- damage: (chance, content) -> content -------------------------------------------------------


def truncated(chance, good):
    return good[: chance.randrange(len(good))]


def flipped(chance, good):
    bad = bytearray(good)
    for _ in range(chance.choice([1, 3, 30])):
        bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
    return bytes(bad)


def foreign(chance, good):
    return chance.choice([b"", *FOREIGN]) + chance.randbytes(chance.randrange(5000))


def sizes(chance, good):
    """Bytes at the start, where sizes and shapes stand, as large as they go, or zero."""
    start, size = chance.randrange(min(300, len(good) - 8)), chance.choice([4, 8])
    return good[:start] + chance.choice([b"\xff", b"\x7f", b"\0"]) * size + good[start + size :]


def text(chance, good):
    """A table with one awkward cell, or a line that is gone or twice as long."""
    lines = good.decode().split("\n")
    row = chance.randrange(len(lines))
    tab = "\t" if "\t" in lines[row] else ","
    cells = lines[row].split(tab)
    cells[chance.randrange(len(cells))] = chance.choice(CELLS)
    lines[row] = chance.choice([tab.join(cells), tab.join(cells), "", tab.join(cells * 2)])
    return "\n".join(lines).encode()


def arrays(chance, good):
    """A .npz with an array gone, or of another type or shape, or with an awkward value."""
    found = dict(np.load(io.BytesIO(good)))
    name = chance.choice(list(found))
    array, kind = found.pop(name), chance.choice(["f2", "i1", "u8", "c8", "?", "O", ">f8", "S5"])
    shapes = [array[:-1], array.reshape(-1), array[None], array[..., None], array[0], array[..., :0]]
    awkward = np.array([chance.choice(AWKWARD)] * len(array), dtype=chance.choice([None, object]))
    one = array.astype(float)
    one.reshape(-1)[chance.randrange(one.size)] = chance.choice([np.nan, -np.inf, 1e300, 1e38])
    with np.errstate(all="ignore"):
        others = [None, array.astype(kind), chance.choice(shapes), awkward, one]
    other, file = others[chance.randrange(5)], io.BytesIO()
    np.savez(file, **found, **({} if other is None else {name: other}))
    return file.getvalue()


def huge(chance, good):
    """A .npz of an array whose header promises what is not there."""
    shape = chance.choice(["(9000000000,)", "(100000, 100000)", "(60, 99999999999999999999)", "(-1, 6)"])
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(5000)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == "visual.npy" else old.read(name))
    return file.getvalue()


def entries(chance, good):
    """A file of torch.save with an entry gone, or of another type or shape."""
    saved = torch.load(io.BytesIO(good), weights_only=True)
    parent, name = saved, chance.choice(list(saved))
    while isinstance(parent[name], dict) and parent[name] and chance.random() < 0.8:
        parent, name = parent[name], chance.choice(list(parent[name]))
    old = parent.pop(name)
    others = [None, 1, -1, "x", [], {}, [1, 2], torch.zeros(3), float("nan"), 10**30]
    if torch.is_tensor(old):
        others = [old.double(), old.bool(), old.flatten()[:-1], old[None], old.to(torch.complex64)]
        others += [torch.zeros(1).expand(10**12), torch.zeros(1).expand(2**30, 4)]
    if chance.random() < 0.8:
        parent[name] = chance.choice(others)
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


BYTES = [truncated, flipped, foreign, sizes]


# ---- what is damaged ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """{kind: (share, folder, [(files, damages)], arguments)}; HERE is a copy of the folder."""
    root = tmp_path_factory.mktemp("fuzz")
    (root / "run").mkdir()
    two_view(root / "run/data.npz", n=60)
    features = ["--dataset", "features", "--data", "HERE/data.npz", "--folds", 2, "--fold", 0]
    features += [*BASE, "--method", "mtpkdot", "--out", "HERE/out"]
    done = go(*(str(a).replace("HERE", str(root / "run")) for a in features))
    assert done.code == 0, done
    evaluate = ["--stage", "eval", "--student", "HERE/out/fold0/student_mtpkdot.pt", "--device", "cpu"]
    evaluate += ["--data", "HERE/data.npz", "--predictions", "HERE/p.csv"]
    npz = ("data.npz", [*BYTES, arrays, arrays, arrays, huge])
    made = {
        "features": (70, root / "run", [npz], [*features, "--stage", "teachers", "--out", "HERE/new"]),
        "run": (45, root / "run", [("out/fold0/*.pt", BYTES)], features),
        "student": (45, root / "run", [("out/*/student*", [*BYTES, *[entries] * 4]), npz], evaluate),
    }
    try:
        from test_raw import affwild2_tree, biovid_tree
    except pytest.skip.Exception:
        return made  # without Pillow
    affwild2_tree(root / "affwild2")
    for path in (root / "affwild2/annotations").glob("*/*.txt"):
        if path.stem not in ("1-30-1280x720", "été.v2"):
            path.unlink()
    biovid_tree(root / "biovid", people=2, clips=1, levels=("BL1", "PA4"))
    raw = [*BASE, "--select", "val", "--stage", "teachers", "--out", "HERE/new", "--data", "HERE"]
    trees = [("cropped_aligned/[1é]*/*.jpg", BYTES), ("audio/[1é]*.wav", BYTES)]
    trees += [("annotations/*/*.txt", [*BYTES, text, text])]
    argv = [*raw, "--dataset", "affwild2", "--clip-stride", 9]
    made["affwild2"] = (20, root / "affwild2", trees, argv)
    trees = [("frames/**/*.jpg", BYTES), ("**/*.csv", [*BYTES, text, text])]
    argv = [*raw, "--dataset", "biovid", "--folds", 2, "--fold", 0]
    made["biovid"] = (20, root / "biovid", trees, argv)
    return made


def test_damaged_input_is_success_or_one_line(kinds, tmp_path):
    seed = random.randrange(2**32) if "FUZZ" in os.environ else 0
    print("seed", seed)
    cases = [kind for kind, made in kinds.items() for _ in range(made[0] * COUNT // 200)]

    def fed(i):
        chance, (_, folder, files, argv) = random.Random(seed + i), kinds[cases[i]]
        copy = shutil.copytree(folder, tmp_path / f"{i}")
        pattern, damages = chance.choice(files)
        path, damage = chance.choice(sorted(copy.glob(pattern))), chance.choice(damages)
        path.write_bytes(damage(chance, path.read_bytes()))
        done = go(*(str(a).replace("HERE", str(copy)) for a in argv))
        shutil.rmtree(copy)
        lines = done.said.splitlines()
        done.good = done.code == 0 or (done.code == 2 and len(lines) == 1)
        done.good &= all(line.startswith("train.py: ") and len(line) < 1000 for line in lines)
        done.good &= done.seconds < 10
        done.case = (i, cases[i], path.name, damage.__name__)
        return done

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(fed, range(len(cases))))
    for kind in kinds:
        some = [done for done in answers if done.case[1] == kind]
        refused, seconds = sum(done.code == 2 for done in some), sum(done.seconds for done in some)
        print(f"{kind}: {len(some)}, {refused} refused, {seconds / len(some):.2f} s each")
        assert refused > 0  # the damage is seen
    bad = [(done.case, done.said[-600:]) for done in answers if not done.good]
    assert not bad, "\n".join(map(str, bad[:10]))
