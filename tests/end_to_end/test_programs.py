"""Whole programs in processes of their own: interrupted, resumed, opened elsewhere."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from tests.commands import wait_for
from tests.processes import done
from tests.training.runs import log_of, tensors_of

PYTHON = [sys.executable, "-m", "fpdm"]
TRAIN = [
    "train", "digits", "--hidden-size", "16", "--num-heads", "2", "--patch-size", "4",
    "--batch-size", "8", "--log-every", "5", "--checkpoint-every", "50", "--sample-every", "10000",
    "--lr-schedule", "constant", "--no-grad-max", "2", "--with-grad-max", "2",
]  # fmt: skip


def train(folder, *more):
    return [*TRAIN, "--runs-dir", str(folder), *more]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, number):
    log = tmp_path / "a/digits/log.jsonl"
    words = train(tmp_path / "a", "--steps", "100000")
    process = subprocess.Popen([*PYTHON, *words], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 3)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on" in said
    stopped = max(int(path.name[5:]) for path in (tmp_path / "a/digits/checkpoints").iterdir())

    steps = ["--steps", str(stopped + 20)]
    for name in "ab":
        done(train(tmp_path / name, *steps), tmp_path / "said")
    resumed, whole = (tensors_of(tmp_path / name / "digits", stopped + 20) for name in "ab")
    assert resumed.keys() == whole.keys()
    assert all(resumed[key].equal(whole[key]) for key in whole)
    assert log_of(tmp_path / "a/digits") == log_of(tmp_path / "b/digits")


def test_train_sample_and_open_elsewhere(tmp_path):
    done(train(tmp_path, "--steps", "5"), tmp_path / "said")
    sample = [*PYTHON, "sample", str(tmp_path / "digits"), "--budget", "12", "--num-images", "3"]
    subprocess.run([*sample, "--out", str(tmp_path / "out")], check=True, capture_output=True, timeout=120)
    assert json.loads((tmp_path / "out/report.json").read_text())["report"]["spent"] == 12

    code = (
        "import sys, numpy\n"
        "from PIL import Image\n"
        "from fpdm import FixedPointDiTPipeline\n"
        "pipe = FixedPointDiTPipeline.from_pretrained(sys.argv[1])\n"
        "image = pipe(2, budget=12, seed=0, image_indices=[2]).images[0]\n"
        "assert numpy.array_equal(numpy.asarray(image), numpy.asarray(Image.open(sys.argv[2])))\n"
    )
    arguments = [str(tmp_path / "digits/pipeline"), str(tmp_path / "out/000002.png")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=120)


def test_the_demo_makes_its_table_and_picture(tmp_path):
    demo = [sys.executable, "-m", "fpdm", "demo", "--out", str(tmp_path), "--steps", "3"]
    said = subprocess.run(demo, check=True, capture_output=True, timeout=120, text=True).stdout
    spent = [line.split() for line in said.splitlines() if " x " in line and line.strip()[0].isdigit()]
    assert [(row[0], row[-3]) for row in spent] == [("12", "12"), ("48", "48"), ("192", "192")]
    assert (tmp_path / "demo.png").stat().st_size > 10_000


def test_two_processes_learn_what_one_does_and_one_goes_on_alone(tmp_path):
    """The gradients of the halves of a batch, averaged over processes (gloo), are those of the whole."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fpdm"]
    quick = ["--log-every", "2", "--lr", "1e-4", "--grad-clip", "0", "--device", "cpu"]
    process = subprocess.Popen([*launch, *train(tmp_path / "two", "--steps", "100000", *quick)])
    log = tmp_path / "two/digits/log.jsonl"
    wait_for(lambda: log.is_file() and log.read_text().count("\n") >= 2)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    steps = max(int(path.name[5:]) for path in (tmp_path / "two/digits/checkpoints").iterdir()) + 3
    for name in ("one", "two"):
        done(train(tmp_path / name, "--steps", str(steps), *quick), tmp_path / "said")
    one, two = (tensors_of(tmp_path / name / "digits", steps) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    assert (tmp_path / "two/digits/pipeline/model_index.json").is_file()
