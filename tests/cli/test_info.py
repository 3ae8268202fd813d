"""`fpdm info`: what it says is what a training would have and cost, and it says it without data."""

import contextlib
import io
import subprocess
import sys

import pytest

from fpdm.cli.info import print_samples
from fpdm.cli.main import main
from fpdm.fixedpoint import MultiStepJacobianFree, Solve
from fpdm.models import DiT, FixedPointDiT
from fpdm.recipes import recipe
from fpdm.recipes.forms import form
from fpdm.sampling import cost_of, make_plan, operations_of, total
from fpdm.training.memory import stand_in, training_memory
from tests.commands import refusal

SMALL = ["--hidden-size", 32, "--num-heads", 2, "--batch-size", 8]
IMAGES = ["images", *SMALL, "--model", "none", "--patch-size", 4, "--image-size", 16, "--device", "cpu"]


def info(capsys, *words):
    assert main(["info", *map(str, words)]) == 0
    return capsys.readouterr().out


def rows(said, head):
    """The lines of the table whose head starts so: name -> cells."""
    table = next(part for part in said.split("\n\n") if part.startswith(head)).splitlines()[1:]
    return {line[:28].strip(): line[28:].split() for line in table if len(line) > 60 and line[28] == " "}


@pytest.fixture(scope="module")
def digits():
    """What is said of the digits, small: told once, looked at by several tests."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        words = ["--form", "1+1+1", "--no-grad-max", "6", "--with-grad-max", "6"]
        assert main(["info", "digits", *map(str, SMALL), *words]) == 0
    return said.getvalue()


def test_the_network_is_the_one_that_would_be_trained(digits):
    model = FixedPointDiT(8, 2, 1, 32, 2, num_classes=10)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert f"FixedPointDiT, {parameters:.2f} M parameters: 1 + 1 + 1 blocks" in digits
    assert "8 x 8 x 1 in patches of 2: 16 tokens; 10 classes\n" in digits


def test_steps_cost_what_their_iterations_cost(digits):
    cost = operations_of(FixedPointDiT(8, 2, 1, 32, 2, num_classes=10))
    found = rows(digits, "a training step, per image")
    mean, most = 3 * cost.passes(4) + 3 * cost.per_iteration, 3 * cost.passes(6) + 6 * cost.per_iteration
    assert found == {
        "mean": ["3", "and", "4", "9", f"{mean:.3g}"],
        "most": ["6", "and", "6", "14", f"{most:.3g}"],
    }


def test_steps_that_start_warm_cost_the_passes_before_them_too(capsys):
    said = info(capsys, "digits", *SMALL, "--form", "0+3+0", "--warm-share", 1)
    found = rows(said, "a training step, per image")
    cost = operations_of(FixedPointDiT(8, 2, 1, 32, 2, num_pre=0, num_core=3, num_post=0, num_classes=10))
    assert found["most, cold"][-1] == f"{3 * cost.passes(1):.3g}"
    assert found["average, a share of 1 warm"] == [f"{4 * cost.passes(1):.3g}"]


def test_samples_are_those_that_would_be_drawn(digits):
    model = FixedPointDiT(8, 2, 1, 32, 2, num_classes=10)
    found = rows(digits, "a sample")
    assert list(found) == ["40 block passes", "80 block passes", "160 block passes", "560 block passes"]
    plan = make_plan(cost_of(model), budget=160)
    assert found["160 block passes"] == [str(plan.num_steps), "2", f"{total(operations_of(model), plan):.3g}"]


def test_memory_is_that_of_the_estimate(digits):
    found = rows(digits, "memory, 8 images")
    assert list(found) == ["mean", "mean, checkpointing", "most", "most, checkpointing"]
    formed = recipe("digits").with_fields(**form("1+1+1"))
    config = formed.with_fields(hidden_size=32, num_heads=2, batch_size=8, classes=10)
    memory = training_memory(config, stand_in(config.data), Solve(gradient=MultiStepJacobianFree(6, 6)))
    assert found["most"] == [f"{value / 1e6:.1f}" for value in vars(memory).values()]
    assert float(found["most, checkpointing"][4]) < float(found["mean"][4]) < float(found["most"][4])
    assert "in MB, float32" in digits


def test_an_explicit_network_has_one_row(capsys):
    said = info(capsys, *IMAGES, "--network", "dit", "--depth", 3, "--classes", 7, "--accumulation", 2)
    passes = operations_of(DiT(16, 4, 3, 32, 3, 2, num_classes=7)).fixed
    assert rows(said, "a training step, per image") == {"every": ["-", "3", f"{3 * passes:.3g}"]}
    assert list(rows(said, "a sample")) == [f"{n} block passes" for n in (39, 78, 159, 558)]
    assert list(rows(said, "memory, 8 images in 2 parts")) == ["every", "every, checkpointing"]
    assert "3 blocks" in said
    assert "7 classes" in said


def test_budgets_below_one_evaluation_are_left_out(capsys):
    print_samples(DiT(16, 4, 3, 32, 60, 2))
    assert list(rows(capsys.readouterr().out[1:], "a sample")) == [f"{n} block passes" for n in (60, 120, 540)]


def test_it_needs_no_data_and_says_what_it_does_not_know(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no classes\n--classes tells how many" in info(capsys, *IMAGES, "--data", "not/there", "--gradient", "jfb")
    assert "no classes\n\n" in info(capsys, *IMAGES, "--no-conditional", "--gradient", "jfb")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digit"], "unknown recipe 'digit'. Did you mean 'digits'?"),
        (["digits", "--patch-size", 3], "patch size 3 does not divide the image size 8"),
        (["digits", "--network", "dit"], "the size of the network is open"),
        (["digits", "--depth", 3], "depth belongs to an explicit DiT"),
        (["digits", "--batch-size", 9, "--accumulation", 2], "batch_size 9 cannot be shared"),
        (["digits", "--damping", 0.3], "damping has no effect with gradient sjfb"),
        (["digits", "--model", "XL/3"], "unknown preset 'XL/3'"),
        (["digits", "--channels", 3], "channels is 3, and these images have 1"),
        (["digits", "--classes", 3], "digits has 10 classes, and this recipe is for 3"),
    ],
    ids=lambda part: " ".join(map(str, part)) if isinstance(part, list) else "",
)
def test_what_training_would_refuse_is_refused(words, message, capsys):
    assert message in refusal(capsys, ["info", *words])


def test_the_options_are_those_of_training():
    outputs = [
        subprocess.run([sys.executable, "-m", "fpdm", command, "--help"], capture_output=True, text=True, check=True)
        for command in ("info", "train")
    ]
    ours, theirs = (output.stdout[output.stdout.index("positional arguments:") :] for output in outputs)
    assert ours == theirs


def test_all_settings_are_named_with_what_the_options_say(capsys):
    said = info(capsys, *IMAGES, "--lr", 0.25, "--warm-share", 0.5)
    settings = said.partition("settings, each an option of fpdm train\n")[2]
    assert [line.split()[0] for line in settings.splitlines() if line[0] != " "] == [
        "data", "diffusion", "gradient", "optimizer", "run",
    ]  # fmt: skip
    told = " ".join(settings.split())
    assert all(words in told for words in ("lr 0.25,", "warm-share 0.5,", "image-size 16,", "beta-schedule cosine,"))
    explicit = info(capsys, *IMAGES, "--network", "dit", "--depth", 2)
    assert "warm-share" not in explicit
    assert "checkpointing False" in explicit, "which a DiT has, too"
