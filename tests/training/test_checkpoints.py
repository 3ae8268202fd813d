"""Checkpoints: damage is noticed, the last ones are kept, a full disk loses nothing that was there."""

import errno
import json
import os
import random
import shutil
import subprocess
from contextlib import nullcontext, suppress

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from fpdm.files import read_json, write_json
from fpdm.pipeline import FixedPointDiTPipeline
from fpdm.training import checkpoints, loop
from fpdm.training.loop import Trainer
from tests.commands import contents
from tests.training.runs import log_of, tensors_of, tiny

FILES = checkpoints.FILES


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(tiny(), path).run()
    return path


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << random.Random(place).randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_bit_anywhere_in_the_tensors_is_noticed(name, whole, tmp_path):
    folder = shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    file = folder / "step-00000010" / name
    before, size = file.read_bytes(), file.stat().st_size
    places = {0, 7, 8, 100, size - 1, *random.Random(0).sample(range(size), 20)}
    for place in places:
        flip(file, place)
        assert file.stat().st_size == size
        with pytest.raises(ValueError, match=name):
            checkpoints.read(folder, 10)
        file.write_bytes(before)
    checkpoints.read(folder, 10)


def test_a_flipped_bit_anywhere_in_the_state_is_noticed(whole, tmp_path):
    folder = shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    file = folder / "step-00000010/state.json"
    before = file.read_bytes()
    state = json.loads(before)
    for place in range(len(before)):
        data = bytearray(before)
        data[place] ^= 1
        file.write_bytes(data)
        with suppress(ValueError, OSError):
            assert checkpoints.read(folder, 10)[1] == state, f"byte {place}"


@pytest.mark.parametrize("name", FILES[:3])
def test_the_checkpoint_before_a_damaged_one_is_used(name, copied, capsys):
    flip(copied / "checkpoints/step-00000010" / name, 200)
    (copied / "log.jsonl").write_text((copied / "log.jsonl").read_text() + '{"step": 9}\n')
    before = log_of(copied)[:3]
    assert Trainer(tiny(), copied).run() == "finished"
    assert f"step-00000010 is damaged ({name} is not what was written)" in capsys.readouterr().out
    assert log_of(copied) == before
    checkpoints.read(copied / "checkpoints", 10)


def test_a_run_that_has_more_steps_than_are_asked_for_stays_as_it_is(copied):
    before = (copied / "config.json").read_bytes()
    assert Trainer(tiny(steps=5), copied).run() == "already finished"
    assert (copied / "config.json").read_bytes() == before


def test_checkpoints_of_versions_without_checksums_are_read(copied):
    (copied / "checkpoints/step-00000010/checksums.json").unlink()
    assert Trainer(tiny(), copied).run() == "already finished"


def before_guards(copied):
    """Make a run look as one of the first version does, stopped at step 5."""
    shutil.rmtree(copied / "checkpoints/step-00000010")
    file = copied / "checkpoints/step-00000005/state.json"
    write_json(file, {"step": 5, "sums": [1.0, 1.0, 1.0, 1.0], "summed": 1, "broken": []})
    (copied / "checkpoints/step-00000005/checksums.json").unlink()
    config = read_json(copied / "config.json")
    for group, names in (
        ("gradient", ("gradient", "damping", "tolerance", "exit_loss", "exit_weight", "warm_share", "checkpointing")),
        ("data", ("holdout", "vae", "classes")),
        ("optimizer", ("skips",)),
        ("run", ("tf32", "compile", "sharding", "on_divergence", "on_full_disk", "time_limit", "validate_every")),
    ):
        for name in names:
            del config[group][name]
    write_json(copied / "config.json", config)


def test_a_run_of_an_earlier_version_is_taken_for_the_same(copied):
    before_guards(copied)
    Trainer(tiny(), copied)
    config = read_json(copied / "config.json")
    assert config["gradient"]["exit_loss"] == "none"
    with pytest.raises(ValueError, match=r"another run: warm_share was 0\.0, is 0\.5"):
        Trainer(tiny(warm_share=0.5), copied)


def test_a_run_of_an_earlier_version_goes_on(whole, copied):
    before_guards(copied)
    assert Trainer(tiny(), copied).run() == "finished"
    one, other = tensors_of(whole, 10), tensors_of(copied, 10)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_ones_are_kept(keep, tmp_path):
    Trainer(tiny(checkpoint_every=1, keep_checkpoints=keep, steps=5), tmp_path / "run").run()
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in range(6 - keep, 6)]
    for step in range(6 - keep, 6):
        assert checkpoints.read(tmp_path / "run/checkpoints", step)[1]["step"] == step


# --- a full disk ----------------------------------------------------------------------------------------------------


def full(monkeypatch, what, when):
    """Have the disk be full while files whose path `when` accepts are written, or synced."""
    error = OSError(errno.ENOSPC, "No space left on device")
    if what == "written":
        real = checkpoints.save_file

        def save_file(tensors, path):
            if when(str(path)):
                path.write_bytes(b"half")
                raise error
            real(tensors, path)

        monkeypatch.setattr(checkpoints, "save_file", save_file)
        return
    fsync = os.fsync

    def synced(descriptor):
        if when(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)


WHEN = {
    "written": lambda path: "step-00000005" in path and "optimizer" in path,
    "synced": lambda path: "step-00000005" in path and "weights" in path,
    "state": lambda path: "step-00000005" in path and "state.json" in path,
}


@pytest.mark.parametrize("what", WHEN)
def test_a_full_disk_stops_a_run_with_one_message_and_earlier_checkpoints(what, tmp_path, monkeypatch, whole):
    path = tmp_path / "run"
    Trainer(tiny(steps=3, lr_schedule="constant", checkpoint_every=3), path).run()
    config = tiny(lr_schedule="constant")
    kept = contents(path / "checkpoints/step-00000003")
    with monkeypatch.context() as patch:
        full(patch, what, WHEN[what])
        with pytest.raises(OSError, match="No space left on device"):
            Trainer(config, path).run()
    assert contents(path / "checkpoints/step-00000003") == kept
    assert checkpoints.all_steps(path / "checkpoints") == [3]
    assert Trainer(config, path).run() == "finished"


@pytest.mark.parametrize("what", WHEN)
def test_a_full_disk_costs_a_run_that_goes_on_nothing_but_the_checkpoint(what, whole, tmp_path, monkeypatch, capsys):
    full(monkeypatch, what, WHEN[what])
    path = tmp_path / "run"
    assert Trainer(tiny(on_full_disk="continue"), path).run() == "finished"
    assert capsys.readouterr().out.count("at step 5, a checkpoint was lost") == 1
    one, other = tensors_of(whole, 10), tensors_of(path, 10)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert log_of(whole) == log_of(path)
    assert checkpoints.all_steps(path / "checkpoints") == [10]


@pytest.mark.parametrize(
    "what",
    ["written", pytest.param("synced")],
)
def test_what_was_begun_on_a_full_disk_is_removed(what, tmp_path, monkeypatch):
    full(monkeypatch, what, WHEN[what])
    path = tmp_path / "run"
    Trainer(tiny(on_full_disk="continue"), path).run()
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_a_log_that_cannot_be_written(on_full_disk, tmp_path, monkeypatch, whole):
    def refuse(self, entry):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.RunDir, "append_log", refuse)
    config, path = tiny(on_full_disk=on_full_disk), tmp_path / "run"
    if on_full_disk == "stop":
        with pytest.raises(OSError, match="No space left"):
            Trainer(config, path).run()
        return
    assert Trainer(config, path).run() == "finished"
    one, other = tensors_of(whole, 10), tensors_of(path, 10)
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    except OSError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(folder, leave):
    usage = shutil.disk_usage(folder)
    (folder / "filler").write_bytes(b"\0" * (usage.free - leave))


@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_a_disk_that_is_really_full(on_full_disk, small_disk, whole, monkeypatch):
    path, one_step = small_disk / "run", Trainer._one_step
    size = sum(file.stat().st_size for file in (whole / "checkpoints/step-00000005").iterdir())

    def filling(self, batches):
        one_step(self, batches)
        if self.step == 6:
            fill(small_disk, size // 2)
        if self.step == 9:
            (small_disk / "filler").unlink()

    monkeypatch.setattr(Trainer, "_one_step", filling)
    config = tiny(checkpoint_every=4, keep_checkpoints=2, on_full_disk=on_full_disk)
    if on_full_disk == "stop":
        with pytest.raises(OSError, match=r"the checkpoint of step 8 cannot be written.*Earlier ones are kept"):
            Trainer(config, path).run()
        assert checkpoints.all_steps(path / "checkpoints") == [4]
        checkpoints.read(path / "checkpoints", 4)
        (small_disk / "filler").unlink()
        monkeypatch.undo()
    assert Trainer(config, path).run() == "finished"
    one, other = tensors_of(whole, 10), tensors_of(path, 10)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert log_of(path) == log_of(whole)


def test_a_checkpoint_that_lacks_a_file_is_named_and_a_run_of_such_alone_is_not_begun_anew(copied, capsys):
    (copied / "checkpoints/step-00000010/optimizer.safetensors").unlink()
    assert Trainer(tiny(), copied).run() == "finished"
    assert "step-00000010 is damaged" in capsys.readouterr().out
    for folder in (copied / "checkpoints").iterdir():
        (folder / "optimizer.safetensors").unlink()
    before = log_of(copied)
    with pytest.raises(ValueError, match="none of the checkpoints"):
        Trainer(tiny(), copied).run()
    assert log_of(copied) == before


def test_a_run_is_gone_on_with_on_the_disk_that_it_filled(copied, monkeypatch):
    free = shutil.disk_usage(copied)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(OSError, match="make room"):
        Trainer(tiny(), copied.with_name("another"))
    extra = copied / "checkpoints/step-00000010"
    for name in ("a", "b"):  # as many as are kept, and the one that is being written
        shutil.copytree(extra, copied / f"checkpoints/step-0000000{name}")
    assert Trainer(tiny(keep_checkpoints=2), copied)
    for name in ("a", "b"):
        shutil.rmtree(copied / f"checkpoints/step-0000000{name}")


def test_a_torn_line_takes_no_other_with_it(copied):
    lines = (copied / "log.jsonl").read_text().splitlines(keepends=True)
    (copied / "log.jsonl").write_text(lines[0] + '{"step": 5, "lo' + "\n" + "".join(lines[1:]))
    assert Trainer(tiny(), copied).run() == "already finished"
    assert (copied / "log.jsonl").read_text() == "".join(lines)


def test_a_line_that_does_not_fit_leaves_nothing_of_itself(copied, monkeypatch):
    run = Trainer(tiny(), copied).dir
    before = run.log.read_bytes()
    opened = type(run.log).open

    def full(path, *how, **more):
        file = opened(path, *how, **more)
        write = file.write

        def torn(text):
            write(text[:5])
            file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        file.write = torn
        return file

    monkeypatch.setattr(type(run.log), "open", full)
    with pytest.raises(OSError, match="No space"):
        run.append_log({"step": 11, "loss": 1.0})
    assert run.log.read_bytes() == before


def test_a_rollback_goes_to_before_the_trouble_and_further_each_time(copied):
    def state(step, in_a_row):
        file = copied / f"checkpoints/step-{step:08d}/state.json"
        values = read_json(file)
        values["guard"][2] = in_a_row
        write_json(file, values)

    assert checkpoints.sound(copied / "checkpoints") == [5, 10]
    state(10, 3)
    assert checkpoints.sound(copied / "checkpoints") == [5]
    state(5, 1)
    assert checkpoints.sound(copied / "checkpoints") == []


def saved_again(folder, step, keep, useless=0):
    """The last checkpoint of a folder saved as that of another step, after so many useless ones."""
    tensors, state = checkpoints.read(folder, 10)
    state["guard"][2] = useless
    checkpoints.save(folder, step, tensors, {key: value for key, value in state.items() if key != "step"}, keep)


def test_what_is_saved_after_going_back_is_the_newest(copied):
    folder = copied / "checkpoints"
    saved_again(folder, 7, keep=9)
    assert checkpoints.all_steps(folder) == [5, 7]
    found = checkpoints.newest(folder, pytest.fail)
    assert found is not None
    assert found[1]["step"] == 7


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
@pytest.mark.parametrize("there", [True, False], ids=["empty", "missing"])
def test_a_damaged_checkpoint_pushes_out_no_other(name, there, copied):
    folder = copied / "checkpoints"
    tensors, state = checkpoints.read(folder, 5)
    damaged = folder / "step-00000010" / name
    damaged.write_bytes(b"") if there else damaged.unlink()
    checkpoints.save(folder, 6, tensors, {key: value for key, value in state.items() if key != "step"}, keep=1)
    assert [path.name for path in folder.iterdir()] == ["step-00000006"]
    found = checkpoints.newest(folder, pytest.fail)
    assert found is not None
    assert found[1]["step"] == 6


def test_the_last_sound_checkpoint_is_kept_through_trouble(copied):
    folder = copied / "checkpoints"
    for step in (11, 12, 13):
        saved_again(folder, step, keep=2, useless=step - 10)
    assert checkpoints.all_steps(folder) == [10, 12, 13]
    assert checkpoints.sound(folder) == [10]
    saved_again(folder, 14, keep=2)
    assert checkpoints.all_steps(folder) == [13, 14]


@pytest.mark.parametrize("name", ["step-00000010.bak", "step-backup", "step-10", "step-00000010.tar"])
def test_a_copy_beside_the_checkpoints_is_none(name, copied, capsys):
    folder = copied / "checkpoints"
    (folder / "step-00000010").rename(folder / name)
    before = contents(folder / name)
    assert Trainer(tiny(), copied).run() == "finished"
    assert checkpoints.all_steps(folder) == [5, 10]
    assert "damaged" not in capsys.readouterr().out
    assert contents(folder / name) == before


def test_a_log_that_was_damaged_keeps_no_run_from_going_on(copied):
    with (copied / "log.jsonl").open("ab") as file:
        file.write(b"\xff\xfe")
    shutil.rmtree(copied / "checkpoints/step-00000010")
    assert Trainer(tiny(), copied).run() == "finished"
    assert [line["step"] for line in log_of(copied)] == [4, 8, 10]


@pytest.mark.parametrize("how", ["stop", "continue"])
def test_a_disk_that_is_full_at_the_end_is_named_and_the_same_command_exports(how, tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FixedPointDiTPipeline, "save_pretrained", full)
        with pytest.raises(OSError, match=r"the model cannot be written: .*make room, and the same command goes on"):
            Trainer(tiny(on_full_disk=how), path).run()
    assert checkpoints.all_steps(path / "checkpoints") == [5, 10]
    assert not (path / "pipeline").exists()
    assert Trainer(tiny(on_full_disk=how), path).run() == "already finished"
    assert (path / "pipeline/model_index.json").is_file()


def test_a_tracker_without_room_loses_its_lines_only(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.Trainer, "_tracker", lambda self: nullcontext())
    monkeypatch.setattr(Accelerator, "log", full)
    with pytest.raises(OSError, match="No space"):
        Trainer(tiny(), tmp_path / "stopped").run()
    assert Trainer(tiny(on_full_disk="continue"), tmp_path / "run").run() == "finished"
    assert "a line for the tracker was lost" in capsys.readouterr().out
    assert [line["step"] for line in log_of(tmp_path / "run")] == [4, 8, 10]
