"""`fpdm sample` by several processes: the images and the report of one, whatever happened on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fpdm import drawing
from fpdm.cli.main import main
from tests.cli.test_latents import start, together
from tests.commands import refusal

COUNT = 7  # images, two at a time: of two processes, one has a batch more
OPTIONS = ["--budget", "40", "--num-images", str(COUNT), "--batch-size", "2", "--device", "cpu"]
TOLERANT = ["--iterations", "8", "--tolerance", "0.1", "--guidance-scale", "2"]


def command(model, out, *options):
    return ["sample", model, "--out", str(out), *OPTIONS, *options]


def images_in(out):
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def report_of(out):
    """The report, whose times and last digits depend on who drew what. Nothing else that was written is left."""
    kept = json.loads((out / "report.json").read_text())
    assert kept["request"] == json.loads((out / "request.json").read_text())
    assert kept["images"] == list(range(kept["report"]["images"]))
    assert not list(out.glob(".report-*"))
    return rounded({**kept["report"], "seconds": None})


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """Images and report of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert main(command(models["looped"], out)) == 0
    return images_in(out), report_of(out)


def test_a_launcher_s_processes_draw_what_one_does_and_tell_it_once(models, alone, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fpdm"]
    words = command(models["looped"], tmp_path / "out", "--npz")
    said = subprocess.run([*launch, *words], check=True, capture_output=True, text=True, timeout=240).stdout
    assert images_in(tmp_path / "out") == alone[0]
    assert report_of(tmp_path / "out") == alone[1]
    assert said.count("per image") == said.count(f"{COUNT} images in") == 1
    assert (tmp_path / "out/samples.npz").is_file()


def test_more_processes_than_images_are_of_no_harm(models, alone, tmp_path, capfd):
    assert together([*command(models["looped"], tmp_path), "--num-images", "2"], 3) == [0] * 3
    found = images_in(tmp_path)
    assert {name: found[name] for name in ("000000.png", "000001.png")}.items() <= alone[0].items()
    assert report_of(tmp_path)["images"] == 2
    said = capfd.readouterr().out
    assert said.count("per image") == said.count("2 images in") == 1


def test_a_process_that_comes_late_takes_the_same_share(models, alone, tmp_path):
    read = drawing._drawn

    def late(index):
        def reading(path):
            time.sleep(index)
            return read(path)

        drawing._drawn = reading

    assert together(command(models["looped"], tmp_path), 2, late) == [0, 0]
    assert images_in(tmp_path) == alone[0]
    assert report_of(tmp_path) == alone[1]


@pytest.mark.parametrize("label", ["looped", "plain"])
def test_guidance_tolerance_and_networks_without_iterations_are_shared_out_too(label, models, tmp_path):
    options = TOLERANT if label == "looped" else TOLERANT[-2:]
    assert main(command(models[label], tmp_path / "one", *options)) == 0
    assert together(command(models[label], tmp_path / "two", *options)) == [0, 0]
    one, two = (report_of(tmp_path / name) for name in ("one", "two"))
    assert images_in(tmp_path / "one") == images_in(tmp_path / "two")
    assert one == two
    assert one["images"] == COUNT
    assert (one["spent"] < one["planned"]) is (label == "looped")


# Interrupted


def killed_at(*places):
    """Have process i die, by SIGKILL, as it writes its image number places[i]; None for never."""
    write = drawing.write_aside

    def patch(index):
        left = places[index]

        def writing(path, *more):
            nonlocal left
            if left is not None and path.name[0] == "0":
                if left == 0:
                    path.with_name(f".{path.name}.{os.getpid()}.writing").write_bytes(b"half a fi")
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            write(path, *more)

        drawing.write_aside = writing

    return patch


@pytest.mark.parametrize(
    ("places", "count"),
    [((0, 0), 2), ((3, 2), 1), ((2, 1), 2), ((2, 2), 3), ((1, None), 1), ((None, 1), 2)],
    ids=str,
)
def test_killed_in_the_middle_and_gone_on_with_is_as_undisturbed(places, count, models, alone, tmp_path):
    words = command(models["looped"], tmp_path)
    assert -signal.SIGKILL in together(words, 2, killed_at(*places))
    assert len(images_in(tmp_path)) < COUNT
    assert together(words, count) == [0] * count
    assert images_in(tmp_path) == alone[0]
    assert report_of(tmp_path) == alone[1]


def test_killed_again_and_again_is_as_undisturbed(models, alone, tmp_path):
    words = command(models["looped"], tmp_path)
    for places in ((1, 1), (3, 0)):
        assert -signal.SIGKILL in together(words, 2, killed_at(*places))
    assert main(words) == 0
    assert images_in(tmp_path) == alone[0]
    assert report_of(tmp_path) == alone[1]


@pytest.fixture(scope="module")
def left(models, tmp_path_factory):
    """A folder as two processes left it that both were killed, with a part of a report in it."""
    out = tmp_path_factory.mktemp("left")
    for process in start(command(models["looped"], out), 2, killed_at(3, 2)):
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    return out


@pytest.fixture
def begun(left, tmp_path):
    return shutil.copytree(left, tmp_path / "begun")


def test_parts_of_a_report_are_collected_and_their_images_not_drawn_again(models, alone, begun):
    covered = [set(json.loads((begun / name).read_text())["images"]) for name in ("report.json", ".report-1.json")]
    assert all(covered)
    assert not covered[0] & covered[1]
    times = {i: (begun / f"{i:06d}.png").stat().st_mtime_ns for i in covered[0] | covered[1]}
    assert main(command(models["looped"], begun)) == 0
    assert times == {i: (begun / f"{i:06d}.png").stat().st_mtime_ns for i in times}
    assert report_of(begun) == alone[1]


def test_a_part_that_was_taken_before_its_file_was_removed_counts_once(models, alone, left, begun):
    assert main(command(models["looped"], begun)) == 0
    shutil.copy(left / ".report-1.json", begun)
    assert main(command(models["looped"], begun)) == 0
    assert report_of(begun) == alone[1]


def test_a_damaged_part_is_named(models, begun, capsys):
    (begun / ".report-1.json").write_text('{"images": [1]')
    assert str(begun / ".report-1.json") in refusal(capsys, command(models["looped"], begun))


# Gone on with on purpose


def test_what_is_there_is_left_alone_and_what_was_lost_is_drawn_again_by_whoever_comes(models, alone, tmp_path):
    words = command(models["looped"], tmp_path)
    assert main([*words, "--num-images", "4"]) == 0
    (tmp_path / "000001.png").unlink()
    times = {i: (tmp_path / f"{i:06d}.png").stat().st_mtime_ns for i in (0, 2, 3)}
    assert together(words) == [0, 0]
    assert times == {i: (tmp_path / f"{i:06d}.png").stat().st_mtime_ns for i in times}
    assert images_in(tmp_path) == alone[0]
    assert report_of(tmp_path) == alone[1]
    report = (tmp_path / "report.json").read_bytes()
    assert together(words, 3) == [0] * 3
    assert (tmp_path / "report.json").read_bytes() == report


def test_another_request_is_refused_to_all_with_one_message(models, tmp_path, capfd):
    words = command(models["looped"], tmp_path)
    assert main(words) == 0
    before, _ = images_in(tmp_path), capfd.readouterr()
    statuses = together([*words, "--seed", "1"])
    assert statuses[0] == 2
    said = capfd.readouterr()
    assert said.err.count("seed was 0, is 1") == 1
    assert images_in(tmp_path) == before
