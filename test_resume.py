"""What is stopped, killed or damaged: the same command goes on to the very results that it would have
had, or says in one line why not.

KILLS=200 python -m pytest test_resume.py kills more often.
"""

import os
import pickle
import random
import shutil
import signal
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from test_train import RAW, go, load, one_line, two_view

KILLS = int(os.environ.get("KILLS", 10))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run of all stages that nothing stopped: arguments, folder, seconds that it took. Its
    --out is relative, as results.json holds it: `go(*small.argv, folder=HERE)` is the run HERE/out."""
    folder = tmp_path_factory.mktemp("small")
    argv = ["--dataset", "features", "--data", two_view(folder / "data.npz"), "--folds", 2]
    argv += ["--method", "mtpkdot,pkdot", "--epochs", 3, "--batch-size", 16, "--dim", 8, "--out", "out"]
    argv += ["--device", "cpu"]
    done = go(*argv, folder=folder)
    assert done.code == 0 and not done.said, done
    return Namespace(argv=argv, folder=folder, seconds=done.seconds)


def assert_same(one, other):
    """Byte for byte, and no file more or less."""
    for name in ("results.json", "history.csv"):
        assert (one / "out" / name).read_bytes() == (other / "out" / name).read_bytes(), name
    files = [sorted(p.relative_to(f) for p in (f / "out").rglob("*.*")) for f in (one, other)]
    assert files[0] == files[1]


def stopped(argv, folder, number, after):
    """Run until it is stopped by a signal, after so many seconds or, if it was faster, earlier."""
    while True:
        folder.mkdir()
        done = go(*argv, folder=folder, send=number, after=after)
        if done.code:
            return done
        shutil.rmtree(folder)
        after *= 0.8


# ---- stopped ------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_goes_on_to_the_same_results(small, tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)

    def killed(i):
        """Killed once in the i-th part of the run, and perhaps once more while it goes on."""
        folder, chance = tmp_path / f"{i}", random.Random(seed + i)
        after = (i + chance.random()) / KILLS * small.seconds
        assert stopped(small.argv, folder, signal.SIGKILL, after).code == -signal.SIGKILL
        there = len(list(folder.rglob("*.pt")))
        after = chance.random() * small.seconds
        go(*small.argv, folder=folder, send=signal.SIGKILL, after=after)
        done = go(*small.argv, folder=folder)
        assert done.code == 0 and not done.said, done
        assert_same(small.folder, folder)
        shutil.rmtree(folder)
        return there

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(killed, range(KILLS)))) > 3  # in one network and another


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_and_tells_how_to_go_on(number, small, tmp_path):
    folder = tmp_path / "run"
    done = stopped(small.argv, folder, number, 0.6 * small.seconds)
    assert "same command" in one_line(done, 128 + number)
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("teachers_*.pt")}
    assert go(*small.argv, folder=folder).code == 0
    assert_same(small.folder, folder)
    finished = [path for path, time in made.items() if path.stat().st_mtime_ns == time]
    assert len(finished) >= len(made) - 1  # what was there was not made again


@pytest.mark.filterwarnings("ignore:.*faceless")
def test_a_stopped_run_with_reading_workers(tmp_path):
    pytest.importorskip("PIL")
    from test_raw import affwild2_tree

    argv = ["--dataset", "affwild2", "--data", affwild2_tree(tmp_path / "tree"), *RAW, "--workers", 1]
    argv += ["--method", "mtpkdot", "--out", "out", "--device", "cpu"]
    (tmp_path / "whole").mkdir()
    whole = go(*argv, folder=tmp_path / "whole")
    assert whole.code == 0, whole
    done = stopped(argv, tmp_path / "run", signal.SIGTERM, 0.5 * whole.seconds)
    said = [line for line in done.said.splitlines() if "faceless" not in line]  # a warning before
    assert done.code == 128 + signal.SIGTERM and len(said) == 1 and "same command" in said[0], done
    assert go(*argv, folder=tmp_path / "run").code == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


# ---- refused ------------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def test_a_folder_of_other_arguments_or_data_is_refused(small, tmp_path):
    shutil.copytree(small.folder / "out", tmp_path / "out")
    before = contents(tmp_path)
    said = one_line(go(*small.argv, "--seed", 1, "--lr-joint", 0.25, folder=tmp_path))
    assert "--seed" in said and "--lr-joint" in said and "0.25" in said and "--out" in said
    assert "student_mtpkdot.pt" in one_line(go(*small.argv, "--w-ot", 2, folder=tmp_path))
    other = two_view(tmp_path / "other.npz", n=90)
    assert "--out" in one_line(go(*small.argv, "--data", other, folder=tmp_path))
    other.unlink()
    assert contents(tmp_path) == before
    moved = shutil.copy(small.argv[3], tmp_path / "moved.npz")  # the same data, and one more method
    done = go(*small.argv, "--data", moved, "--method", "task", folder=tmp_path)
    assert done.code == 0 and (tmp_path / "out/fold0/student_task.pt").exists(), done


def test_a_full_disk_is_one_line_and_the_run_goes_on_after(small, tmp_path):
    largest = max(path.stat().st_size for path in small.folder.rglob("*.pt"))
    for limit in (2000, largest // 3, largest - 1):
        assert "File too large" in one_line(go(*small.argv, folder=tmp_path, limit=limit))
    for path in tmp_path.rglob("*.tmp"):
        path.unlink()
    assert go(*small.argv, folder=tmp_path).code == 0
    assert_same(small.folder, tmp_path)


class Payload:
    """What would make a folder if it were unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused(small, tmp_path):
    harm = tmp_path / "harm"
    pickle.loads(pickle.dumps(Payload(harm)))
    harm.rmdir()  # it would have worked
    shutil.copytree(small.folder / "out", tmp_path / "out")
    student = tmp_path / "out/fold0/student_mtpkdot.pt"
    saved = load(student)
    torch.save({**saved, "names": Payload(harm)}, student)
    evaluate = ["--stage", "eval", "--data", small.argv[3], "--student", student]
    for argv in (small.argv, evaluate):
        assert "student_mtpkdot.pt" in one_line(go(*argv, folder=tmp_path))
    arrays = dict(np.load(small.argv[3]))
    arrays["label"] = np.array([Payload(harm)] * 96, dtype=object)
    np.savez(tmp_path / "bad.npz", **arrays)
    done = go(*small.argv, "--data", tmp_path / "bad.npz", "--out", "new", folder=tmp_path)
    assert "bad.npz" in one_line(done) and not harm.exists()


def test_a_damaged_file_is_one_line_that_names_it(small, tmp_path):
    shutil.copytree(small.folder / "out", tmp_path / "out")
    path = tmp_path / "out/fold1/teachers_joint.pt"
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    for content in (b"", good[: 2 * middle // 3], flipped, b"not a checkpoint"):
        path.write_bytes(content)
        assert "fold1/teachers_joint.pt" in one_line(go(*small.argv, folder=tmp_path))
        assert path.read_bytes() == content
    path.unlink()
    assert go(*small.argv, folder=tmp_path).code == 0
    assert_same(small.folder, tmp_path)
