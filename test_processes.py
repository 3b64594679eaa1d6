"""Two processes on the CPU (torchrun, gloo) do what one does. Run as a script by its own test."""

import subprocess
import sys
from argparse import Namespace

import pytest
import torch
from torch import distributed, nn

import mtpkdot
import train
from test_train import SMALL, go, results, run, table, two_view


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def the_same_gradients_as_one_process():
    """A step on 7 rows, 4 here and 3 there, of a loss that needs all of them."""
    torch.manual_seed(0)
    alone, ours = (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double() for _ in "12")
    ours.load_state_dict(alone.state_dict())
    x, label = torch.randn(7, 5).double(), torch.rand(7, 2).double()
    run = Namespace(data=Namespace(visual=x, privileged=None), device="cpu", workers=0, place="")
    both, rows = nn.parallel.DistributedDataParallel(ours), torch.arange(7)
    [(_, (outputs,))] = train.forward(run, both, x, [rows])
    for network, prediction in ((alone, alone(x)), (ours, outputs)):
        mtpkdot.task_loss(prediction, label).backward()
    for one, two in zip(alone.parameters(), ours.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-14)


def test_gradients_and_all_stages_on_clips(tmp_path):
    argv = [*SMALL, "--epochs", 1, "--width", 1, "--train-rows", 60, "--method", "mtpkdot"]
    said = torchrun(__file__, *argv, "--out", tmp_path)
    assert said.count("as one") == 1 and said.count("\nstudent") == 1
    assert table(tmp_path / "history.csv")[-1]["model"] == "student_mtpkdot"


def test_the_same_scores_as_one_process(tmp_path):
    argv = ["--dataset", "features", "--data", two_view(tmp_path / "data.npz"), "--folds", 2]
    argv = [*SMALL, *argv, "--fold", 0, "--method", "mtpkdot"]
    said = torchrun(train.__file__, *argv, "--out", tmp_path / "two")
    alone = go(*argv, "--out", tmp_path / "one", stdout=True).said
    assert said.count("  epoch ") == alone.count("  epoch ") == 12
    one, two = (results(tmp_path / name)["folds"][0] for name in ("one", "two"))
    assert one.pop("students") == pytest.approx(two.pop("students"), abs=5e-3)
    assert one.pop("teacher_picks") == two.pop("teacher_picks")
    assert one == pytest.approx(two, abs=5e-3)


def test_more_processes_than_rows_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "processes", lambda: (0, 40))
    argv = ["--dataset", "features", "--data", two_view(tmp_path / "data.npz")]
    assert "40 processes" in run(capsys, *argv, "--out", tmp_path)


if __name__ == "__main__":
    leave, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    train.main(sys.argv[1:])
    the_same_gradients_as_one_process()
    print("as one")  # the first process alone prints
    leave()
