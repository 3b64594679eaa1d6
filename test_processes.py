"""Two processes on the CPU (torchrun, gloo) do what one does. Run as a script by its own test."""

import copy
import re
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch import distributed, nn

import mtpkdot
import train
from test_train import SMALL, go, results, table, two_view


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def the_same_gradients_as_one_process():
    """A step on 7 clips, of which each process sees 4, of a loss that needs all of them."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    ours, sizes = copy.deepcopy(alone), []
    ours.register_forward_hook(lambda network, x, outputs: sizes.append(len(outputs)))
    x, label = torch.randn(7, 1, 1, 5).double(), torch.rand(7, 2).double()
    run = Namespace(device="cpu", workers=0)
    both, rows = nn.parallel.DistributedDataParallel(ours), torch.arange(7)
    [(_, (outputs,))] = train.forward(run, both, x, [rows])
    for prediction in (alone(x), outputs):
        mtpkdot.task_loss(prediction, label).backward()
    for one, two in zip(alone.parameters(), ours.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-14)
    assert sizes == [4]


def test_gradients_and_all_stages_on_clips(tmp_path):
    argv = ["--epochs", 1, "--width", 1, "--train-rows", 60, "--method", "mtpkdot"]
    said = torchrun(__file__, *SMALL, *argv, "--out", tmp_path)
    assert said.count("as one") == said.count("\nstudent") == 1
    assert table(tmp_path / "history.csv")[-1]["model"] == "student_mtpkdot"


def test_the_same_scores_as_one_process(tmp_path):
    argv = ["--dataset", "features", "--data", two_view(tmp_path / "data.npz"), "--folds", 2]
    argv = [*SMALL, *argv, "--fold", 0, "--method", "mtpkdot", "--out"]
    said = torchrun(train.__file__, *argv, tmp_path / "two")
    assert said.count("  epoch ") == go(*argv, tmp_path / "one").out.count("  epoch ") == 12
    one, two = (results(tmp_path / name)["folds"][0] for name in ("one", "two"))
    for part in (one, two):
        part.update(part.pop("students"), picks=part.pop("teacher_picks")["joint"])
    assert one == pytest.approx(two, abs=5e-3)


def test_more_processes_than_rows_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "COUNT", 40)
    monkeypatch.setattr(distributed, "init_process_group", lambda backend: None)
    with pytest.raises(SystemExit):
        train.main(["--dataset", "features", "--data", str(two_view(tmp_path / "data.npz"))])
    assert re.fullmatch("train.py: .*40 processes.*\n", capsys.readouterr().err)


if __name__ == "__main__":
    leave, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    train.main(sys.argv[1:])
    the_same_gradients_as_one_process()
    print("as one")  # the first process alone prints
    leave()
