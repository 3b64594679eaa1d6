"""Two processes on the CPU (torchrun, gloo) do what one does. Run as a script by its own tests."""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed, nn

import mtpkdot
import train
from models import R3D18, Head, ResNet18, synchronise_batch_norm


def command(*argv):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, argv)]


def torchrun(*argv, cwd):
    return subprocess.run(command(*argv), cwd=cwd, capture_output=True, text=True, timeout=300)


def same_gradients_as_one_process(backbone, shape):
    """A step on 7 clips, 4 here and 3 there, in float64; then validation."""
    torch.manual_seed(0)
    alone = nn.Sequential(backbone(dim=6, width=2), Head(6, 2)).double()
    torch.manual_seed(0)
    ours = nn.Sequential(backbone(dim=6, width=2), Head(6, 2)).double()
    synchronise_batch_norm(ours, lambda row: train.whole(row, 2))
    both = nn.parallel.DistributedDataParallel(ours)
    x, label = torch.randn(7, *shape, dtype=torch.float64), torch.rand(7, 2, dtype=torch.float64)
    mtpkdot.task_loss(alone(x), label).backward()
    mtpkdot.task_loss(train.whole(both(train.share(x)), 7), label).backward()
    for one, two in zip(alone.parameters(), ours.parameters()):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-12)
    for one, two in zip(alone.buffers(), ours.buffers()):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alone.eval()(x), ours.eval()(x), rtol=1e-8, atol=1e-12)


def every_clip_once():
    """Embedding in shares looks at each row once, and puts the rows back in their order."""
    args = train.options(["--device", "cpu", "--batch-size", "3"])
    seen = []
    rows = torch.tensor([9, 4, 0, 7, 2, 3, 8])
    z = train.embed(args, lambda x: seen.extend(x[:, 0].tolist()) or 2 * x, torch.arange(10.0).view(-1, 1), rows, True)
    assert z.tolist() == [[2.0 * row] for row in rows]
    everywhere = [None, None]
    distributed.all_gather_object(everywhere, seen)
    assert sorted(everywhere[0] + everywhere[1]) == sorted(rows.tolist()) and everywhere[0] and everywhere[1]


def test_gradients_statistics_and_shares(tmp_path):
    done = torchrun(Path(__file__).resolve(), cwd=Path(__file__).resolve().parent)
    assert done.returncode == 0 and done.stdout.count("as one") == 2, done.stderr


def test_the_same_scores_as_one_process_and_as_when_stopped(tmp_path):
    argv = ["--epochs", 1, "--dim", 16, "--device", "cpu", "--augment"]
    done = torchrun(Path(train.__file__).resolve(), *argv, "--out", tmp_path / "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nmtpkdot ") == 2 and "Warning" not in done.stderr  # one table, of two such rows
    train.main([str(a) for a in (*argv, "--out", tmp_path / "one")])
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["arguments"] == two["arguments"] and one["folds"][0].keys() == two["folds"][0].keys()
    stopped = subprocess.Popen(
        command(Path(train.__file__).resolve(), *argv, "--out", tmp_path / "three"), cwd=tmp_path, stderr=-1, text=True
    )
    while not list((tmp_path / "three").rglob("unfinished_teachers_visual.pt")):
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.terminate()
    said = stopped.communicate()[1]
    assert stopped.returncode and said.count("train.py: stopped; what was done is saved.") == 1
    assert 'train.py", line' not in said, said
    done = torchrun(Path(train.__file__).resolve(), *argv, "--out", tmp_path / "three", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "three/results.json").read_bytes() == (tmp_path / "two/results.json").read_bytes()
    for name in train.LABELS:
        assert one["mean"][name] == pytest.approx(two["mean"][name], abs=5e-3)
    assert one["mean"]["students"]["mtpkdot"]["best"] == pytest.approx(
        two["mean"]["students"]["mtpkdot"]["best"], abs=5e-3
    )


def test_more_processes_than_clips_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "processes", lambda: (0, 5))
    with pytest.raises(SystemExit):
        train.main(["--batch-size", "8", "--out", str(tmp_path)])
    assert "5 processes cannot share 4 clips of a batch" in capsys.readouterr().err


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    same_gradients_as_one_process(ResNet18, (1, 20, 24))
    same_gradients_as_one_process(R3D18, (3, 4, 20, 16))
    every_clip_once()
    print("as one")
    gc.collect()  # as train.main does
    distributed.destroy_process_group()
