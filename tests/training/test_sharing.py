"""Two processes (gloo): replicated or sharded, they learn what one does, and their checkpoints are one process's."""

import shutil

import pytest
import torch

from fpdm.files import read_json
from fpdm.models import DiT, FixedPointDiT
from fpdm.training.loop import Trainer
from tests.commands import refusal
from tests.networks import SIZES
from tests.processes import command, together
from tests.training.runs import log_of, tensors_of, tiny

# Without clipping and with small steps, so that a difference in rounding stays one.
QUIET = {"lr": 1e-4, "grad_clip": 0.0, "steps": 6, "log_every": 2, "warmup": 0, "lr_schedule": "constant"}
NETWORKS = {
    "fpdm": {"exit_loss": "final", "warm_share": 0.5},
    "implicit": {"gradient": "implicit", "tolerance": 1e-6},
    "dit": {"network": "dit", "depth": 2},
    "parts": {"accumulation": 2, "exit_loss": "target"},
    "parts-dit": {"network": "dit", "depth": 2, "accumulation": 2},
}
RUNS = [
    ("fpdm", "none"), ("fpdm", "fsdp"), ("dit", "none"), ("dit", "fsdp"), ("parts", "none"), ("parts", "fsdp"),
    ("parts-dit", "fsdp"), ("implicit", "fsdp"),
]  # fmt: skip


def settings_of(name, **more):
    return {**QUIET, **NETWORKS[name], **more}


def train_all(jobs):
    """Train runs one after the other, in this process of a group: (settings, path) each."""
    import os

    import torch
    from accelerate import Accelerator

    from fpdm.training.loop import Trainer
    from tests.training.runs import tiny

    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # which would end the group
    for settings, path in jobs:
        trainer = Trainer(tiny(**settings), path)
        trainer.run()
        assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
        found = getattr(trainer.model, "find_unused_parameters", False)
        assert not found
        if settings.get("sharding") == "fsdp":
            most = max(p.to_local().numel() / p.numel() for p in trainer.net.parameters() if p.numel() > 100)
            assert most < 0.6, "nothing is shared"
    print("all done", flush=True)
    os._exit(0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of runs: NAME of one process, NAME-none and NAME-fsdp of two; begun-X, three steps of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = [(settings_of(name, sharding=kind), folder / f"{name}-{kind}") for name, kind in RUNS]
    for name in NETWORKS:
        Trainer(tiny(**settings_of(name)), folder / name).run()
    Trainer(tiny(**settings_of("fpdm", steps=3, checkpoint_every=3)), folder / "begun-alone").run()
    shutil.copytree(folder / "begun-alone", folder / "from-alone")
    jobs.append((settings_of("fpdm", steps=3, checkpoint_every=3, sharding="fsdp"), folder / "begun-shared"))
    jobs.append((settings_of("fpdm", sharding="fsdp", checkpoint_every=3), folder / "from-alone"))
    look = {"steps": 2, "holdout": 20, "validate_every": 2, "sample_every": 2, "sample_budget": 12, "log_every": 1}
    jobs.append((settings_of("fpdm", sharding="fsdp", **look), folder / "looks"))
    Trainer(tiny(**settings_of("fpdm", **look)), folder / "looks-alone").run()
    statuses = together(train_all, jobs, said=folder / "said")
    assert statuses == [0, 0], (folder / "said.0").read_text() + (folder / "said.1").read_text()
    return folder


def assert_close(one, other, step=6):
    """Alike to rounding; moments by their size, which tells more of the gradients than weights that hardly move."""
    first, second = tensors_of(one, step), tensors_of(other, step)
    assert first.keys() == second.keys()
    for name in first:
        least = 1e-2 * float(first[name].abs().max()) if "/exp_avg" in name else 1e-4
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=least, msg=lambda m, n=name: f"{n}: {m}")
    assert any(value.abs().max() > 0 for name, value in first.items() if "blocks" in name and name.endswith("/exp_avg"))


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_two_processes_learn_what_one_does(name, kind, runs):
    assert_close(runs / name, runs / f"{name}-{kind}")
    for one, two in zip(log_of(runs / name), log_of(runs / f"{name}-{kind}"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.parametrize("sharing", ["none", "fsdp"])
def test_a_sharded_run_goes_on_alone_and_the_other_way_round(sharing, runs, tmp_path):
    if sharing == "none":
        path = shutil.copytree(runs / "begun-shared", tmp_path / "run")
        assert read_json(path / "config.json")["run"]["sharding"] == "fsdp"
        assert Trainer(tiny(**settings_of("fpdm")), path).run() == "finished"
    else:
        path = runs / "from-alone"
        assert log_of(path)[0] == log_of(runs / "begun-alone")[0]
    assert_close(runs / "fpdm", path)


def test_what_a_sharded_run_saves_and_draws_is_a_whole_networks(runs):
    model = FixedPointDiT.from_pretrained(runs / "looks/pipeline/transformer")
    averaged = {k.removeprefix("ema/"): v for k, v in tensors_of(runs / "looks", 2).items() if k.startswith("ema/")}
    assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters())
    assert (runs / "looks/samples/step-00000002.png").is_file()
    one, two = (log_of(runs / name)[-1]["validation"] for name in ("looks-alone", "looks"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert one["residuals"] == pytest.approx(two["residuals"], rel=1e-2)


def test_sharding_needs_several_processes(tmp_path, capsys):
    words = ["train", "digits", "--sharding", "fsdp", "--runs-dir", tmp_path]
    assert "there is one" in refusal(capsys, words)
    assert not list(tmp_path.iterdir())


def test_a_launch_whose_processes_are_not_in_use_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # but no rank, as under a launcher that is not torch's
    said = refusal(capsys, ["train", "digits", "--device", "cpu", "--runs-dir", tmp_path])
    assert "2 processes were launched and this one would train with 1" in said
    assert not list(tmp_path.iterdir())


# --- fully_shard itself ---------------------------------------------------------------------------------------------


def shard_and_step(folder):
    """A step of a sharded network, here with the half of the batch that is this process's."""
    import os

    import torch
    import torch.distributed as dist

    from fpdm.training.devices import clip, gradients_shared, like, shard, whole

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in ("FixedPointDiT", "DiT"):
        kept = torch.load(f"{folder}/{name}.pt", weights_only=False)
        model = kept["model"]
        shard(model)
        mine = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
        solve = {"solve": kept["solve"]} if kept["solve"] else {}
        for part in (0, 2):
            rows = slice(mine.start + part, mine.start + part + 2)
            gradients_shared(model, part == 2)
            with torch.no_grad():  # as a warm start does
                model(kept["x"][rows], kept["t"][rows], **solve)
            output = model(kept["x"][rows], kept["t"][rows], **solve)
            losses = output.sample.square().mean() + sum(exit.square().mean() for exit in output.exits.values())
            (losses / 2).backward()
        norm = clip(model.parameters(), 0.5)
        found = {name: whole(p.grad) for name, p in model.named_parameters()}
        back = {name: whole(like(whole(p.detach()), p)) for name, p in model.named_parameters()}
        assert all(torch.equal(back[name], whole(p.detach())) for name, p in model.named_parameters())
        if dist.get_rank() == 0:
            torch.save({"norm": norm, "gradients": found}, f"{folder}/{name}-found.pt")
    dist.barrier()
    os._exit(0)


def test_gradients_of_shards_in_parts_are_those_of_the_whole(tmp_path):
    from fpdm.fixedpoint import FixedIterations, MultiStepJacobianFree, Solve
    from tests.networks import randomised

    solve = Solve(stopping=FixedIterations(1), gradient=MultiStepJacobianFree(1, 2), exits=(2,))
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(8, 1, 8, 8, generator=g), torch.arange(8) * 100
    models = {"FixedPointDiT": (FixedPointDiT(**SIZES), solve), "DiT": (DiT(depth=2, **SIZES), None)}
    wanted = {}
    for name, (model, how) in models.items():
        randomised(model).train()
        torch.save({"model": model, "solve": how, "x": x, "t": t}, tmp_path / f"{name}.pt")
        output = model(x, t, **({"solve": how} if how else {}))
        (output.sample.square().mean() + sum(e.square().mean() for e in output.exits.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        wanted[name] = {"norm": norm, "gradients": {name: p.grad for name, p in model.named_parameters()}}
    statuses = together(shard_and_step, str(tmp_path), said=tmp_path / "said")
    assert statuses == [0, 0], (tmp_path / "said.0").read_text()
    for name in models:
        found = torch.load(tmp_path / f"{name}-found.pt")
        torch.testing.assert_close(found["norm"], wanted[name]["norm"], rtol=1e-4, atol=1e-6)
        for key, gradient in wanted[name]["gradients"].items():
            torch.testing.assert_close(found["gradients"][key], gradient, rtol=1e-3, atol=1e-5)


def test_a_command_of_two_processes_ends_as_one_does(tmp_path):
    words = ["train", "digits", "--hidden-size", "16", "--num-heads", "2", "--patch-size", "4", "--batch-size", "8"]
    more = ["--steps", "2", "--device", "cpu", "--sharding", "fsdp", "--runs-dir", str(tmp_path / "runs")]
    assert together(command, [*words, *more], said=tmp_path / "said") == [0, 0], (tmp_path / "said.0").read_text()
    assert "The model is in" in (tmp_path / "said.0").read_text()
    assert "The model is in" not in (tmp_path / "said.1").read_text()
