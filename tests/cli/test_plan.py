"""`fpdm plan`: what it lists can be, is within the budget, and is what `fpdm sample` would do."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpdm.cli.main import main
from fpdm.sampling import TunedPlan, save_plans
from tests.experiments.sweeps import save_models

TUNED = TunedPlan(40, (3, 2, 2, 1, 1, 2, 1, 1, 3), "ddim", "linear", "anderson:2", {})  # 34 passes
FINE = TunedPlan(160, (2,) * 40, "unipc", "plain", "picard", {})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = save_models(tmp_path_factory.mktemp("models"))
    found["tuned"] = str(shutil.copytree(found["looped"], tmp_path_factory.mktemp("tuned") / "tuned"))
    save_plans(Path(found["tuned"]), [TUNED, FINE])
    return found


def plan(capsys, *options):
    """Name -> the rest of its line, and all that was said."""
    capsys.readouterr()
    assert main(["plan", "--batch-size", "2", *map(str, options)]) == 0
    said = capsys.readouterr().out
    head, *lines = said.splitlines()
    columns = len(head.replace("s / image", "seconds").split()) - 1
    rows = {}
    for line in lines:
        if line.startswith(("seconds as", "iterations from", "drawn")):
            break
        words = line.replace(" to ", "-to-").split()
        rows[" ".join(words[: len(words) - columns])] = words[len(words) - columns :]
    return rows, said


def refused(capsys, *options):
    """The message of a command that is refused with exit status 2, in one line and without a traceback."""
    capsys.readouterr()
    try:
        status = main(["plan", *map(str, options)])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2, captured.out
    assert "Traceback" not in captured.err
    (message,) = [line for line in captured.err.splitlines() if line.startswith("fpdm plan: ")]
    return message


def check(rows, budget, fixed=2, per_iteration=1):
    """Timesteps and iterations of each line make its passes, of which none are more than the budget."""
    for name, (steps, spread, passes, *_) in rows.items():
        low, _, high = spread.partition("-to-")
        least, most = (int(steps) * (fixed + per_iteration * int(n)) for n in (low, high or low))
        assert least <= int(passes) <= most, name
        assert budget - per_iteration < int(passes) <= budget, name


@pytest.mark.parametrize("budget", [3, 4, 5, 24, 41, 160, 999])
@pytest.mark.parametrize("scheduler", ["ddim", "heun"])
@pytest.mark.parametrize("label", [None, "looped"])
def test_every_plan_of_a_budget_is_within_it(budget, scheduler, label, models, capsys):
    model = [] if label is None else ["--model", models[label]]
    rows, _ = plan(capsys, "--budget", budget, "--scheduler", scheduler, *model)
    check(rows, budget)
    steps = [int(row[0]) for name, row in rows.items() if "each" in name]
    assert steps == sorted(steps, reverse=True), "from many timesteps to few"
    assert scheduler != "heun" or all(count % 2 for count in steps)
    assert {"linear:1", "linear:-1"} <= rows.keys()
    assert len(steps) == len(set(steps)), "each plan once"
    assert all(float(number) > 0 for row in rows.values() for number in row[3:])


def test_the_networks_blocks_decide_what_a_call_costs(capsys):
    rows, _ = plan(capsys, "--budget", 100, "--pre", 3, "--core", 4, "--post", 2)
    check(rows, 100, fixed=5, per_iteration=4)
    assert max(int(row[0]) for row in rows.values()) == 11


def test_a_network_may_have_no_explicit_blocks(capsys):
    rows, _ = plan(capsys, "--budget", 24, "--pre", 0, "--core", 3, "--post", 0)
    check(rows, 24, fixed=0, per_iteration=3)


def test_by_default_the_budget_is_160_and_a_ramp_shares_it_out(capsys):
    rows, said = plan(capsys)
    check(rows, 160)
    assert rows["2 each"] == ["40", "2", "160"]
    assert rows["linear:1"] == rows["linear:-1"] == ["20", "3-to-9", "160"]
    assert "seconds" not in said


def test_operations_and_seconds_are_those_of_the_model(models, capsys):
    rows, said = plan(capsys, "--budget", 40, "--model", models["looped"])
    operations = {name: float(row[3]) for name, row in rows.items()}
    assert len(set(operations.values())) > 4, "calls of one block pass cost more than others"
    assert "seconds as 2 images at a time take on this machine (cpu)" in said


@pytest.mark.parametrize(
    ("options", "line", "iterations"),
    [
        (["--steps", 4], ["4", "2", "16"], "2, 2, 2, 2"),
        (["--steps", 4, "--iterations", 3], ["4", "3", "20"], "3, 3, 3, 3"),
        (["--iterations", "3,1,2"], ["3", "1-to-3", "12"], "3, 1, 2"),
        (["--budget", 20, "--iterations", 3], ["4", "3", "20"], "3, 3, 3, 3"),
        (["--budget", 20, "--steps", 5], ["5", "2", "20"], "2, 2, 2, 2, 2"),
        (["--budget", 20, "--steps", 5, "--allocation", "linear:1"], ["5", "1-to-3", "20"], "1, 1, 2, 3, 3"),
        (["--budget", 20, "--steps", 5, "--allocation", "falling"], ["5", "1-to-3", "20"], "3, 3, 2, 1, 1"),
        (["--budget", 20, "--iterations", 3, "--scheduler", "heun"], ["3", "4-to-5", "20"], "4, 5, 5"),
    ],
    ids=lambda part: " ".join(map(str, part)) if isinstance(part, list) else "",
)
@pytest.mark.parametrize("label", [None, "looped"])
def test_one_plan_is_shown_timestep_by_timestep(options, line, iterations, label, models, capsys):
    rows, said = plan(capsys, *options, *([] if label is None else ["--model", models[label]]))
    assert [row[:3] for row in rows.values()] == [line]
    assert f"iterations from noise to image: {iterations}\n" in said


def test_an_explicit_network_has_one_plan(models, capsys):
    for options in (["--budget", 42], ["--steps", 8]):
        rows, _ = plan(capsys, *options, "--model", models["plain"])
        assert [row[:3] for row in rows.values()] == [["8", "-", "40"]]


def test_the_tuned_plan_that_a_sampling_would_take_is_listed(models, capsys):
    rows, _ = plan(capsys, "--budget", 40, "--model", models["tuned"])
    assert rows.pop("tuned: ddim, reuse linear, anderson:2")[:3] == ["9", "1-to-3", "34"]
    check(rows, 40)
    rows, _ = plan(capsys, "--model", models["tuned"])
    assert rows["tuned: unipc, reuse plain, picard"][:3] == ["40", "2", "160"]
    rows, _ = plan(capsys, "--budget", 41, "--model", models["tuned"])
    assert rows["tuned for 40: ddim, reuse linear, anderson:2"][2] == "41"
    rows, _ = plan(capsys, "--budget", 40, "--model", models["tuned"], "--scheduler", "ddim")
    assert not [name for name in rows if name.startswith("tuned")], "a sampling leaves it out"


@pytest.mark.parametrize(
    "options", [["--budget", 40], ["--budget", 40, "--allocation", "cosine:1"], ["--model", "plain"], ["--budget", 3]]
)
def test_a_plot_of_the_plans_opens(options, models, capsys, tmp_path):
    path = tmp_path / "folder/plan.png"
    _, said = plan(capsys, *(models.get(str(word), word) for word in options), "--plot", path)
    assert f"drawn: {path}" in said
    with Image.open(path) as plot:
        assert plot.format == "PNG"
        assert min(plot.size) > 400
        assert np.asarray(plot.convert("L")).std() > 5, "blank"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", 2], "a budget of 2 block passes is too small: one timestep with 1 iteration needs 3"),
        (["--budget", -5], "budget is -5; it must be an integer of at least 1"),
        (["--budget", "many"], "invalid int value: 'many'"),
        (["--budget", 40, "--steps", 40], "40 timesteps need at least 120"),
        (["--budget", 40, "--steps", 4, "--iterations", 2], "cost 16 block passes, not 40"),
        (["--budget", 40, "--iterations", "2,2"], "cost 8 block passes, not 40"),
        (["--steps", 0], "the number of timesteps is 0"),
        (["--steps", 1001], "1001 timesteps"),
        (["--steps", 3, "--iterations", "1,2"], "2 iteration counts for 3 timesteps"),
        (["--iterations", 0], "iterations is 0"),
        (["--iterations", "two"], "--iterations is 'two'"),
        (["--iterations", "2,2", "--allocation", "linear:1"], "leaves nothing to share out"),
        (["--allocation", "linera:1"], "unknown allocation 'linera:1'. Did you mean 'linear:SLOPE'?"),
        (["--allocation", "linear:2"], "between -2 and 2"),
        (["--core", 0], "--core"),
        (["--pre", -1], "--pre"),
        (["--batch-size", 0], "--batch-size"),
        (["--model", "{plain}", "--budget", 4], "a budget of 4 block passes is too small"),
        (["--model", "{plain}", "--iterations", 2], "an explicit DiT has no iterations"),
        (["--model", "{plain}", "--steps", 3, "--allocation", "linear:1"], "nothing to share out"),
        (["--model", "{looped}", "--scheduler", "dpm"], "unknown scheduler 'dpm'. Did you mean 'dpm++'?"),
        (["--model", "{looped}x"], "there is no folder"),
        (["--model", "{looped}", "--device", "cuda"], "device 'cuda' is not available here"),
        (["--model", "{looped}", "--dtype", "int4"], "dtype 'int4' is not one of"),
        (["--bugdet", 40], "unknown option '--bugdet'. Did you mean '--budget'?"),
    ],
    ids=lambda part: " ".join(map(str, part)) if isinstance(part, list) else "",
)
def test_what_cannot_be_is_one_clear_message(options, message, models, capsys):
    assert message in refused(capsys, *(str(word).format(**models) for word in options))


def test_a_plot_without_matplotlib_is_refused_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "fpdm[plots]" in refused(capsys, "--plot", tmp_path / "plan.png")
    assert not list(tmp_path.iterdir())


# Found to be wrong


def test_a_budget_of_zero_is_refused(capsys):
    assert "budget is 0" in refused(capsys, "--budget", 0)


def test_an_unknown_scheduler_is_refused_without_a_model_too(capsys):
    assert "unknown scheduler 'dpm'" in refused(capsys, "--budget", 40, "--scheduler", "dpm")


@pytest.mark.parametrize("options", [["--steps", 10], ["--iterations", "2,2"]])
def test_an_even_number_of_calls_of_heun_is_refused_as_a_sampling_would(options, models, capsys):
    assert "take" in refused(capsys, "--model", models["looped"], "--scheduler", "heun", *options)


def test_blocks_of_a_model_are_its_own(models, capsys):
    said = refused(capsys, "--budget", 100, "--model", models["looped"], "--pre", 3, "--post", 1)
    assert "has its blocks: leave --pre, --post out, or --model" in said


def test_tuned_plans_of_an_explicit_network_are_listed(models, capsys, tmp_path):
    folder = shutil.copytree(models["plain"], tmp_path / "plain")
    save_plans(folder, [TunedPlan(40, (None,) * 8, "ddim", "plain", "picard", {})])
    assert any("ddim" in name for name in plan(capsys, "--budget", 40, "--model", folder)[0])
