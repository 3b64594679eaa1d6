"""200 damaged inputs, or DAMAGED times as many, end in success or one line and exit code 2."""

import io
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from test_train import go, two_view

BASE = ["--epochs", 1, "--dim", 4, "--width", 1, "--workers", 0, "--fold", 0]
FOREIGN = [b"", b"\x89PNG\r\n", b"RIFF\xff\xff\xff\xffWAVE", b"PK\x03\x04", b"\x93NUMPY", b"a,b\n"]
KINDS = "f2 i1 u8 c8 ? O >f8 S5 U5".split()
CELLS = ["nan", "1e400", "-5", "", "x", "2", "\0", "é", "9" * 5000, "1\t1", "1,1", "\n"]


def damaged(chance, good):
    """Bytes cut off, flipped, of another kind of file, or large where sizes stand."""
    start, cut = chance.randrange(min(300, len(good) - 8)), chance.randrange(len(good))
    large = good[:start] + chance.choice([b"\xff", b"\x7f", b"\0"]) * 8 + good[start + 8 :]
    flipped = bytearray(good)
    for _ in range(chance.choice([1, 3, 30])):
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
    foreign = chance.choice(FOREIGN) + chance.randbytes(chance.randrange(5000))
    return chance.choice([good[:cut], bytes(flipped), foreign, large])


def text(chance, good):
    """A table with one awkward cell."""
    cells = re.split(r"([,\t\n])", good.decode())
    cells[chance.randrange(0, len(cells), 2)] = chance.choice(CELLS)
    return "".join(cells).encode()


def arrays(chance, good):
    """A .npz with an array gone, or of another type or shape, or with an awkward value."""
    found, file = dict(np.load(io.BytesIO(good))), io.BytesIO()
    name = chance.choice(list(found))
    array = found.pop(name)
    shapes = [array[:-1], array.reshape(-1), array[None], array.T, array[0], array[..., :0]]
    one = array.astype(float)
    one.reshape(-1)[chance.randrange(one.size)] = chance.choice([np.nan, -np.inf, 1e300, 1e38])
    others = [array.astype(chance.choice(KINDS)), chance.choice(shapes), one]
    found.update({name: chance.choice(others)} if chance.random() < 0.8 else {})
    np.savez(file, **found)
    return file.getvalue()


def inputs(dataset, root):
    """Good input, and how it is damaged: [(how often, [(files, damage)], arguments)]"""
    argv, student = [*BASE, "--dataset", dataset, "--data"], "out/fold0/student_mtpkdot.pt"
    new = ["--stage", "teachers", "--out", "new"]
    if dataset == "features":
        root.mkdir()
        argv += [two_view(root / "data.npz", n=60).name, "--folds", 2]
        assert go(*argv, "--out", "out", folder=root).code == 0
        npz = [("data.npz", damage) for damage in (arrays, damaged)]
        evaluate = [*argv, "--stage", "eval", "--student", student, "--predictions", "p.csv"]
        return [
            (70, npz, [*argv, *new]),
            (40, [("out/fold0/*.pt", damaged)], [*argv, "--out", "out"]),
            (50, [(student, damaged), *npz[:2]], evaluate),
        ]
    pytest.importorskip("PIL")
    import test_raw

    if dataset == "affwild2":
        for part, name in (("Train_Set", "1"), ("Validation_Set", "é")):
            test_raw.video(root, part, name, test_raw.annotations(36))
            test_raw.sound(root, name, 1.2)
        binary, tables, more = ["**/*.jpg", "audio/*"], "annotations/*/*", ["--clip-stride", 9]
    else:
        test_raw.biovid_tree(root, people=2, clips=1, levels=("BL1", "PA4"))
        binary, tables, more = ["**/*.jpg"], "**/*.csv", ["--folds", 2]
    files = [*((pattern, damaged) for pattern in [*binary, tables]), (tables, text)]
    return [(20, files, [*argv, ".", *new, "--select", "val", *more])]


@pytest.mark.parametrize("dataset", ["features", "affwild2", "biovid"])
def test_damaged_input_is_success_or_one_line(dataset, tmp_path):
    kinds = inputs(dataset, tmp_path / "good")
    cases = [kind for kind in kinds for _ in range(kind[0] * int(os.environ.get("DAMAGED", 1)))]

    def fed(i):
        chance, (_, files, argv) = random.Random(i), cases[i]
        copy = shutil.copytree(tmp_path / "good", tmp_path / f"{i}")
        pattern, damage = chance.choice(files)
        path = chance.choice(sorted(copy.glob(pattern)))
        path.write_bytes(damage(chance, path.read_bytes()))
        done = go(*argv, folder=copy, after=10)
        shutil.rmtree(copy)
        line = re.fullmatch("(train.py: .{1,1000}\n)?", done.err)
        fine = line and done.code == (2 if done.err else 0)
        return done.code, None if fine else (i, path.name, damage.__name__, done)

    with ThreadPoolExecutor(2) as pool:
        codes, bad = zip(*pool.map(fed, range(len(cases))))
    assert not any(bad), "\n".join(str(case) for case in bad if case)
    assert set(codes) == {0, 2}  # the damage is seen, and is all that is wrong
