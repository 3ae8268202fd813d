"""What a trace draws is what the report says, and an interruption leaves nothing half done."""

from math import log10

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fpdm.cli.quiet import quiet_libraries
from fpdm.drawing import Choices, draw_missing, load_pipeline
from fpdm.experiments import trace
from fpdm.experiments.trace import SHOWN, frames_of, write_trace
from fpdm.imaging import grid

CHOICES = {
    "looped": Choices(iterations=(3, 1, 2), scheduler="dpm++"),
    "plain": Choices(num_inference_steps=3, scheduler="dpm++"),
}


@pytest.fixture(scope="module")
def drawn(models, tmp_path_factory):
    """label -> pipeline and report of a sampling."""
    quiet_libraries()
    pipes = {label: load_pipeline(folder, "cpu", "float32") for label, folder in models.items()}
    out = tmp_path_factory.mktemp("drawn")
    return {label: (pipe, draw_missing(pipe, out / label, 2, [1, 4], 2, CHOICES[label], lambda count: None))
            for label, pipe in pipes.items()}  # fmt: skip


def figure_of(report, planned, path, monkeypatch):
    kept = []
    with monkeypatch.context() as patch:
        patch.setattr(plt, "close", kept.append)
        trace.plot_report(report, planned, path)
    return kept[0]


def test_the_plot_shows_residuals_and_planned_and_spent_passes(drawn, tmp_path, monkeypatch):
    _, report = drawn["looped"]
    figure = figure_of(report, (5, 3, 4), tmp_path / "trace.png", monkeypatch)
    heat, last, spent = figure.axes[:3]
    shown = heat.images[0].get_array()
    assert shown.shape == (3, 3)
    assert shown.mask.tolist() == [[False] * 3, [False, True, False], [False, True, True]]
    assert shown[0].tolist() == pytest.approx([log10(row[0]) for row in report.residuals])
    assert last.lines[0].get_ydata().tolist() == pytest.approx(report.residual)
    assert list(spent.lines[0].get_ydata()) == [5, 3, 4]
    assert [bar.get_height() for bar in spent.patches] == report.passes == [5, 3, 4]
    labels = [text.get_text() for text in spent.get_legend().get_texts()]
    assert labels == ["planned, 12 in all", "spent, 12 on average"]
    plt.close(figure)


def test_an_explicit_network_has_passes_but_no_residuals(drawn, tmp_path, monkeypatch):
    _, report = drawn["plain"]
    figure = figure_of(report, (5, 5, 5), tmp_path / "trace.png", monkeypatch)
    heat, last, spent = figure.axes
    assert [text.get_text() for text in heat.texts] == ["this network has no iterations"]
    assert not last.lines
    assert list(spent.lines[0].get_ydata()) == [5, 5, 5]
    plt.close(figure)


@pytest.mark.parametrize("label", ["looped", "plain"])
def test_a_trace_is_a_plot_and_an_animation(label, drawn, tmp_path, monkeypatch):
    planned, plot_report = [], trace.plot_report
    monkeypatch.setattr(trace, "plot_report", lambda *given: planned.append(given[1]) or plot_report(*given))
    pipe, report = drawn[label]
    write_trace(pipe, CHOICES[label], [1, 4], report, tmp_path)
    assert planned == [CHOICES[label].plan(pipe).passes]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps.webp", "trace.png"]
    with Image.open(tmp_path / "trace.png") as plot, Image.open(tmp_path / "steps.webp") as strip:
        assert plot.format == "PNG"
        assert strip.n_frames == 3


@pytest.mark.parametrize(("steps", "frames"), [(1, 1), (7, 7), (100, 100), (130, 100)])
def test_there_is_a_frame_of_each_timestep_up_to_a_hundred_and_the_last_is_the_images(steps, frames, drawn):
    pipe, _ = drawn["plain"]
    choices = Choices(num_inference_steps=steps, scheduler="ddim", seed=3)
    strips = frames_of(pipe, choices, [5] * SHOWN)
    assert len(strips) == frames
    images = pipe([5] * SHOWN, **choices.to_dict(), image_indices=range(SHOWN)).images
    assert strips[-1].tobytes() == grid(images, columns=SHOWN, least=96).tobytes()


def test_a_sampling_without_classes_is_traced(drawn, tmp_path):
    pipe, report = drawn["looped"]
    write_trace(pipe, CHOICES["looped"], None, report, tmp_path)
    assert (tmp_path / "steps.webp").is_file()


@pytest.mark.parametrize("part", ["plot", "frames", "animation"])
def test_an_interrupted_write_leaves_nothing_half_done(part, drawn, tmp_path, monkeypatch):
    pipe, report = drawn["looped"]

    def interrupted(self, path, *args, **kwargs):
        if part != "frames":
            path.write_bytes(b"half")
        raise KeyboardInterrupt

    places = {"plot": (Figure, "savefig"), "frames": (trace, "frames_of"), "animation": (Image.Image, "save")}
    (tmp_path / "steps.webp").write_bytes(b"an older one")
    with monkeypatch.context() as patch:
        patch.setattr(*places[part], interrupted)
        if part == "animation":  # matplotlib writes its own pictures by the same method
            patch.setattr(trace, "plot_report", lambda report, planned, path: path.write_bytes(b"plot"))
        with pytest.raises(KeyboardInterrupt):
            write_trace(pipe, CHOICES["looped"], [1, 4], report, tmp_path)
    assert (tmp_path / "trace.png").exists() is (part != "plot")
    assert (tmp_path / "steps.webp").read_bytes() == b"an older one"
    assert {path.name for path in tmp_path.iterdir()} <= {"trace.png", "steps.webp"}
    plt.close("all")
