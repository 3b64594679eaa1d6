"""Two processes on the CPU (torchrun, gloo) do what one does. Run as a script by its own test."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import mtpkdot
import train
from test_train import SMALL, go, history, one_line, results, two_view

HERE = Path(__file__).resolve()
TINY = ["--epochs", 1, "--dim", 8, "--width", 1, "--train-rows", 60, "--batch-size", 24]


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*command, *map(str, argv)], capture_output=True, text=True, timeout=300)


def the_same_gradients_as_one_process():
    """A step on 7 rows, 4 here and 3 there, of a loss that needs all of them."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    ours = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    ours.load_state_dict(alone.state_dict())
    both = nn.parallel.DistributedDataParallel(ours)
    x, label = torch.randn(7, 5).double(), torch.rand(7, 2).double()
    mtpkdot.task_loss(alone(x), label).backward()
    run = Namespace(data=Namespace(visual=x, privileged=None), device="cpu", workers=0, place="")
    [(_, (outputs,))] = train.forward(run, both, x, [torch.arange(7)])
    torch.testing.assert_close(outputs, alone(x), rtol=1e-12, atol=0)
    mtpkdot.task_loss(outputs, label).backward()
    for one, two in zip(alone.parameters(), ours.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-14)


def test_gradients_and_raw_data_shared_out(tmp_path):
    done = torchrun(HERE, *TINY, "--device", "cpu", "--method", "mtpkdot", "--out", tmp_path)
    assert done.returncode == 0 and done.stdout.count("as one") == 1, done.stderr
    assert [row["model"] for row in history(tmp_path)][-1] == "student_mtpkdot"
    assert done.stdout.count("student mtpkdot") + done.stdout.count("student: mtpkdot") == 1


def test_the_same_scores_as_one_process(tmp_path):
    data = two_view(tmp_path / "data.npz")
    argv = ["--dataset", "features", "--data", data, "--folds", 2, "--fold", 0, *SMALL]
    argv += ["--method", "mtpkdot", "--epochs", 1]
    done = torchrun(train.__file__, *argv, "--out", tmp_path / "two")
    assert done.returncode == 0 and not done.stderr.count("train.py"), done.stderr
    alone = go(*argv, "--out", tmp_path / "one", stdout=True)
    assert done.stdout.count("  epoch ") == alone.said.count("  epoch ") == len(history(tmp_path / "two"))
    one, two = (history(tmp_path / name) for name in ("one", "two"))
    assert [row["model"] for row in one] == [row["model"] for row in two]
    for a, b in zip(one, two):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=5e-3)
    one, two = (results(tmp_path / name)["mean"] for name in ("one", "two"))
    for part in (lambda mean: mean["students"], lambda mean: {"joint": mean["joint"]}):
        assert part(one) == pytest.approx(part(two), abs=5e-3)


def test_more_processes_than_rows_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "processes", lambda: (0, 7))
    data = two_view(tmp_path / "data.npz")
    with pytest.raises(SystemExit) as stop:
        train.main(["--dataset", "features", "--data", str(data), "--batch-size", "6", "--device", "cpu"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "7 processes" in said


if __name__ == "__main__":
    leave, distributed.destroy_process_group = distributed.destroy_process_group, lambda: None
    train.main(sys.argv[1:])
    the_same_gradients_as_one_process()
    print("as one")  # the first process alone prints
    leave()
