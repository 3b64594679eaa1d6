"""What is stopped or killed goes on to the very results that it would have had; what is damaged, or
of another run, is refused. KILLS=200 python -m pytest test_resume.py kills more often."""

import os
import random
import shutil
import signal
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from test_train import RAW, SMALL, go, load, one_line, two_view

KILLS = int(os.environ.get("KILLS", 10))


def whole(folder, *argv):
    """A run that nothing stops. Its --out is relative, so that other folders hold the same."""
    argv = [*SMALL, *argv, "--method", "mtpkdot", "--out", "out"]
    done = go(*argv, folder=folder)
    assert done.code == 0, done
    return Namespace(argv=argv, folder=folder, seconds=done.seconds)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    argv = ["--dataset", "features", "--data", two_view(folder / "data.npz"), "--folds", 2]
    return whole(folder, *argv)


def stopped(whole, folder, number, after):
    """Run until it is stopped by a signal, after so many seconds or, if it was faster, earlier."""
    while True:
        folder.mkdir()
        done = go(*whole.argv, folder=folder, send=number, after=after)
        if done.code:
            return done
        shutil.rmtree(folder)
        after *= 0.8


def contents(folder, pattern="*.*"):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob(pattern)}


def assert_goes_on(whole, folder):
    """The same command ends with the same bytes, and with no file more or less."""
    assert go(*whole.argv, folder=folder).code == 0
    one, other = contents(whole.folder / "out"), contents(folder / "out")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name.suffix in (".json", ".csv"))


def test_killed_at_any_moment_it_goes_on_to_the_same_results(small, tmp_path):
    seed = random.randrange(2**32)
    print("seed", seed)

    def killed(i):
        """Killed once in the i-th part of the run, and perhaps once more while it goes on."""
        folder, chance = tmp_path / f"{i}", random.Random(seed + i)
        after = (i + chance.random()) / KILLS * small.seconds
        assert stopped(small, folder, signal.SIGKILL, after).code == -signal.SIGKILL
        files = len(contents(folder))
        go(*small.argv, folder=folder, after=chance.random() * small.seconds)
        assert_goes_on(small, folder)
        return files

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(killed, range(KILLS)))) > 1  # in one network and another


@pytest.mark.parametrize("workers, number", [(0, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_ends_the_run_and_tells_how_to_go_on(workers, number, small, tmp_path):
    if workers:
        pytest.importorskip("PIL")
        tree = __import__("test_raw").affwild2_tree(tmp_path / "tree")
        (tree / "annotations/Validation_Set/faceless.txt").unlink()  # warns
        small = whole(tmp_path, *RAW, "--dataset", "affwild2", "--data", tree, "--workers", 1)
    folder = tmp_path / "run"
    done = stopped(small, folder, number, 0.8 * small.seconds)
    assert "same command" in one_line(done, 1)
    files = contents(folder, "fold0/*.pt")
    finished = {name: files[name] for name in files if "scores" in load(folder / name)}
    assert_goes_on(small, folder)
    assert finished and contents(folder, "fold0/*.pt").items() >= finished.items()


def test_a_folder_of_other_arguments_or_data_is_refused(small, tmp_path):
    shutil.copytree(small.folder / "out", tmp_path / "out")
    before, other = contents(tmp_path), tmp_path.with_suffix(".npz")
    arrays = dict(np.load(small.folder / "data.npz"))
    arrays["privileged"][7, 0] += 1
    np.savez(other, **arrays)
    said = one_line(go(*small.argv, "--seed", 1, "--lr-joint", 0.25, folder=tmp_path))
    assert all(word in said for word in ("--seed", "--lr-joint", "0.25", "another --out"))
    assert "student_mtpkdot.pt" in one_line(go(*small.argv, "--w-ot", 2, folder=tmp_path))
    assert "another --out" in one_line(go(*small.argv, "--data", other, folder=tmp_path))
    assert contents(tmp_path) == before
    moved = shutil.copy(small.folder / "data.npz", other)  # the same data elsewhere
    assert go(*small.argv, "--data", moved, "--method", "task", folder=tmp_path).code == 0


def test_a_full_disk_or_a_damaged_file_is_one_line(small, tmp_path):
    largest = max(map(len, contents(small.folder, "*.pt").values()))
    for limit in (2000, largest // 3, largest - 1):
        assert "File too large" in one_line(go(*small.argv, folder=tmp_path, limit=limit))
    for path in tmp_path.rglob("*.tmp"):
        path.unlink()
    assert_goes_on(small, tmp_path)
    path = tmp_path / "out/fold1/teachers_joint.pt"
    good = path.read_bytes()
    for bad in (b"", good[:5000]):
        path.write_bytes(bad)
        assert "fold1/teachers_joint.pt" in one_line(go(*small.argv, folder=tmp_path))
        assert path.read_bytes() == bad
    path.unlink()
    assert_goes_on(small, tmp_path)
    path = tmp_path / "out/fold1/student_mtpkdot.pt"  # the report is of what is finished
    saved = load(path)
    torch.save({key: saved[key] for key in ("weights", "history", "origin")}, path)
    assert go(*small.argv, "--stage", "align", folder=tmp_path).code == 0
