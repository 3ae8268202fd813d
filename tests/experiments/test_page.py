"""The report: one file that any browser shows, in which every point leads to its images and its numbers."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpdm.evaluation import Evaluation, Measure
from fpdm.evaluation.result import significant
from fpdm.experiments.page import best_of, write_report
from fpdm.experiments.sweep import all_points

VOID = {"meta", "img", "br", "link", "hr", "input"}
CLOSING = "#_"  # leads nowhere on purpose: an overlay is shown while it is the target
KEPT = Path(__file__).parents[2] / "benchmarks/results/2026-11-23-digits/points"
CHROMIUM = shutil.which("chromium")


def point(model="looped", budget=12, scheduler="ddim", iterations=None, distance=20.0, kernel=0.5, **changes):
    """What a sweep keeps of a point, with numbers of the test's own."""
    measures = [
        Measure("FD-classifier", distance, 0.9 * distance, 1.2 * distance, 1.5, "lower"),
        Measure("kernel distance", kernel, kernel - 0.1, kernel + 0.1, 0.001, "lower"),
        Measure("recall", 1 / (1 + distance), 0.0, 1.0, 0.98, "higher"),
    ]
    row = {
        "model": model, "budget": budget, "scheduler": scheduler, "iterations": iterations, "allocation": "constant",
        "reuse": "plain", "solver": "picard", "seed": 0, "tuned": False,
        "plan": f"{budget // 4} timesteps x 2 iterations, {budget} block passes",
        "passes": budget, "operations": 1000 * budget, "parameters": 22320, "seconds": 1e-4 * budget, "diverged": 0,
        "evaluation": evaluation(measures).to_dict(),
        "request": {"seed": 0, "guidance_scale": 1.0, "reuse": "plain", "allocation": "constant"},
        "made_with": {"device": "cpu", "hardware": "a processor"},
        **changes,
    }  # fmt: skip
    return {"key": key_of(row), **row}


def evaluation(measures, **changes):
    identity = {"preprocessing": {"size": 8}, "features": {"network": "classifier"}}
    real = {"name": "digits", "images": 1797, "broken": 0}
    settings = {"samples": 50, "compared": 50, "floor": (50, 1747), "halves": 0.2, "real": real, "identity": identity}
    return Evaluation(measures=tuple(measures), **{**settings, **changes})


def key_of(row):
    every = "" if row["iterations"] is None else f"-{row['iterations']}-iterations"
    return f"{row['model']}-{row['budget']}-{row['scheduler'].replace('+', 'p')}{every}"


def written(rows, out):
    """The report of these points, each with a grid that no other has."""
    (out / "grids").mkdir(parents=True, exist_ok=True)
    for i, row in enumerate(rows):
        noise = np.random.default_rng(i).integers(0, 256, (32, 64), dtype=np.uint8)
        Image.fromarray(noise).save(out / "grids" / f"{row['key']}.png")
    return write_report(rows, out)


MANY = [
    point(model, budget, scheduler, distance=(40.0 if model == "looped" else 60.0) / budget + 1.6 + i)
    for model in ("looped", "plain")
    for i, scheduler in enumerate(("ddim", "ddpm", "dpm++"))
    for budget in (6, 12, 24, 48)
]
PLANS = [  # of every budget, another number of iterations is the best
    point("looped", budget, "ddim", iterations, distance, distance / 10, operations=1000 * budget + iterations)
    for iterations, distances in ((1, (9.0, 5.0, 4.0)), (2, (8.0, 6.0, 3.0)), (4, (7.0, 7.0, 7.0)))
    for budget, distance in zip((6, 12, 24), distances, strict=True)
]


class Page(HTMLParser):
    """Elements as dictionaries of tag, attributes, and what is below: texts and elements. Refuses what is not
    balanced."""

    def __init__(self, path):
        super().__init__()
        self.root = self.new("page", {})
        self.open = [self.root]
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert len(self.open) == 1, f"not closed: {[element['tag'] for element in self.open[1:]]}"

    @staticmethod
    def new(tag, attributes):
        return {"tag": tag, "attributes": attributes, "below": []}

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), f"an attribute twice: <{tag} {attrs}>"
        element = self.new(tag, dict(attrs))
        self.open[-1]["below"].append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1]["below"].append(self.new(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1]["tag"] == tag, f"</{tag}> closes <{self.open[-1]['tag']}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1]["below"].append(data)

    def all(self, tag=None, within=None):
        for element in (within or self.root)["below"]:
            if isinstance(element, str):
                continue
            if tag in (None, element["tag"]):
                yield element
            yield from self.all(tag, element)

    def text(self, element):
        """Of an element and all below it."""
        return "".join(part if isinstance(part, str) else self.text(part) for part in element["below"])

    def overlays(self):
        return {
            element["attributes"]["id"]: element
            for element in self.all("div")
            if element["attributes"].get("class") == "overlay"
        }

    def plots(self):
        return list(self.all("svg"))

    def table(self):
        """The rows of all points, as lists of texts."""
        (place,) = [element for element in self.all("div") if element["attributes"].get("class") == "scroll"]
        return [[self.text(cell).strip() for cell in row["below"]] for row in self.all("tr", place)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def page(out):
    return Page(written(MANY, out))


def test_the_page_is_balanced_html_without_scripts(page):
    tags = {element["tag"] for element in page.all()}
    assert {"html", "head", "body", "svg", "table", "figure", "img"} <= tags
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not [name for element in page.all() for name in element["attributes"] if name.startswith("on")]
    assert page.source.lower().startswith("<!doctype html>")


def test_the_page_needs_nothing_from_elsewhere(page):
    for element in page.all():
        for name, value in element["attributes"].items():
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), value
            if name == "src":
                assert value.startswith("data:image/png;base64,")
            assert "url(" not in (value or "") or re.findall(r"url\((.)", value) == ["#"]
    assert re.findall(r"[^\"'>]*://[^\"'<]*", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)) == []


def test_every_link_has_a_target_and_only_one(page):
    ids = [element["attributes"]["id"] for element in page.all() if "id" in element["attributes"]]
    wanted = {
        value[1:]
        for element in page.all()
        for name, value in element["attributes"].items()
        if name in ("href", "xlink:href") and value != CLOSING
    }
    wanted |= set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert {key_of(row) for row in MANY} < wanted
    assert [name for name in wanted if ids.count(name) != 1] == []
    assert CLOSING[1:] not in ids


def test_every_plot_links_every_point_and_says_what_it_is(page):
    plots = page.plots()
    assert len(plots) == 5, "three of the distance, one of each other metric"
    for plot in plots:
        links = {link["attributes"]["href"]: link for link in page.all("a", plot)}
        assert len(links) == len(list(page.all("a", plot)))
        assert set(links) == {f"#{key_of(row)}" for row in MANY}
        assert not any("target" in link["attributes"] for link in links.values()), "they stay on the page"
        for row in MANY:
            (title,) = page.all("title", links[f"#{key_of(row)}"])
            assert f"{row['model']}, {row['scheduler']}, {row['plan']}" in page.text(title)
    for plot, name, column in zip(plots[-2:], ("kernel distance", "recall"), (1, 2), strict=True):
        for row in MANY:
            (link,) = [a for a in page.all("a", plot) if a["attributes"]["href"] == f"#{key_of(row)}"]
            value = row["evaluation"]["measures"][column]["value"]
            assert page.text(link).strip().endswith(f": {name} {significant(value)}")


def test_every_point_has_an_overlay_with_its_own_grid_and_numbers(page, out):
    overlays = page.overlays()
    assert list(overlays) == [key_of(row) for row in MANY]
    for row in MANY:
        overlay = overlays[key_of(row)]
        (image,) = page.all("img", overlay)
        data = base64.b64decode(image["attributes"]["src"].partition(",")[2], validate=True)
        assert data == (out / "grids" / f"{key_of(row)}.png").read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (64, 32)
        text = page.text(overlay)
        assert f"{row['model']}, {row['scheduler']}" in text
        assert row["plan"] in text
        lines = [[page.text(cell) for cell in line["below"]] for line in page.all("tr", overlay)]
        assert lines[1:] == [
            [m["name"], significant(m["value"]), f"{significant(m['low'])} to {significant(m['high'])}",
             significant(m["floor"])]
            for m in row["evaluation"]["measures"]
        ]  # fmt: skip


def test_the_table_has_every_number_of_every_point_and_the_floor(page):
    head, *lines, floor = page.table()
    assert head == [
        "model", "scheduler", "plan", "passes", "operations", "s / image", "FD-classifier", "kernel distance", "recall",
    ]  # fmt: skip
    assert len(lines) == len(MANY)
    for row in MANY:
        plan = row["plan"].split(",")[0]
        cells = [
            row["model"], row["scheduler"], plan, str(row["passes"]), f"{row['operations']:.3g}",
            significant(row["seconds"]),
        ]  # fmt: skip
        for measure in row["evaluation"]["measures"]:
            value, low, high = (significant(measure[name]) for name in ("value", "low", "high"))
            cells.append(f"{value}{low} to {high}")
        assert lines.count(cells) == 1, cells
    assert [int(line[3]) for line in lines] == sorted(row["passes"] for row in MANY)
    assert floor == ["real images", "", "", "", "", "", "1.5", "0.001", "0.98"]


def test_the_page_says_what_was_measured_and_with_what(page):
    text = page.text(page.root)
    for words in (
        "24 points",
        "50 samples",
        "1,797 images of digits",
        "8 x 8",
        "classifier",
        "FD-classifier: 50 against",
        "between two halves",
    ):
        assert words in text, words
    assert "Parameters: looped 22,320, plain 22,320" in text
    assert "hardware a processor" in text
    assert "guidance scale 1.0" in text
    legend = [page.text(item) for item in page.all("li")]
    assert [item.split()[1] for item in legend] == ["looped", "plain", "ddim", "ddpm", "dpm++"]


@pytest.mark.parametrize("label", ["R&D", "it's 50%20 $x$ größe"])
def test_names_with_special_characters_are_shown_as_they_are(label, tmp_path):
    rows = [point(label, 6, distance=9.0), point(label, 12, distance=4.0)]
    rows[0]["evaluation"]["real"]["name"] = "<b>data</b>"
    rows[0]["evaluation"]["notes"] = ["note: <b>a</b> & c"]
    page = Page(written(rows, tmp_path))
    assert not list(page.all("b"))
    keys = [key_of(row) for row in rows]
    assert list(page.overlays()) == keys
    for plot in page.plots():
        assert [link["attributes"]["href"] for link in page.all("a", plot)] == [f"#{key}" for key in keys]
        assert all(label in page.text(link) for link in page.all("a", plot))
    assert [line[0] for line in page.table()[1:-1]] == [label, label]
    assert page.text(next(iter(page.all("h1")))) == f"Quality against compute: {label}"
    assert "images of <b>data</b>" in page.text(page.root)
    assert "note: <b>a</b> & c" in page.text(page.overlays()[keys[0]])


@pytest.mark.parametrize("changes", [{"kernel": -0.02, "iterations": 3, "diverged": 7}, {"distance": 0.0}], ids=str)
def test_a_single_point_makes_a_page(changes, tmp_path):
    row = point(**changes)
    page = Page(written([row], tmp_path))
    assert [link["attributes"]["href"] for plot in page.plots() for link in page.all("a", plot)] == [
        f"#{key_of(row)}"
    ] * 5
    assert page.table()[1][6].startswith(significant(row["evaluation"]["measures"][0]["value"]))
    assert ("7 of the images diverged" in page.text(page.overlays()[key_of(row)])) == (row["diverged"] == 7)


def test_an_interval_that_rounding_leaves_beside_its_value_is_drawn(tmp_path):
    """Samples that are all equal, as a diverging model's: the bootstrap adds and takes away a mean."""
    value = 116.51378999182882
    above = Measure("FD-classifier", value, np.nextafter(value, 200), np.nextafter(value, 200), 1.5, "lower")
    page = Page(written([point(evaluation=evaluation([above]).to_dict())], tmp_path))
    assert "117" in page.table()[1][6]


def test_what_is_not_the_default_is_said_of_every_point(tmp_path):
    apart = [
        {"reuse": "linear"}, {"seed": 1}, {"tuned": True}, {"solver": "anderson:2"}, {"allocation": "linear:-1"},
        {"tuned": True, "reuse": "none", "solver": "broyden", "seed": 3},
    ]  # fmt: skip
    said = [
        "linear reuse", "seed 1", "tuned", "anderson:2", "linear:-1 allocation", "tuned, none reuse, broyden, seed 3",
    ]  # fmt: skip
    rows = [point(), *(point(key=f"point-{i}", **changes) for i, changes in enumerate(apart))]
    page = Page(written(rows, tmp_path))
    plan = rows[0]["plan"].split(",")[0]
    assert [line[2] for line in page.table()[1:-1]] == [plan, *(f"{plan}, {words}" for words in said)]
    overlays = page.overlays()
    assert f"{rows[0]['plan']};" in page.text(overlays["looped-12-ddim"])
    for i, words in enumerate(said):
        assert f"{rows[0]['plan']}, {words};" in page.text(overlays[f"point-{i}"])
        for plot in page.plots():
            (link,) = [a for a in page.all("a", plot) if a["attributes"]["href"] == f"#point-{i}"]
            assert f"{rows[0]['plan']}, {words}: " in page.text(link)


@pytest.mark.parametrize(
    ("passes", "shown"),
    [
        pytest.param(12.0, "12"),
        (11.5, "11.5"),
    ],
)  # fmt: skip
def test_block_passes_are_shown_without_needless_digits(passes, shown, tmp_path):
    page = Page(written([point(passes=passes)], tmp_path))
    assert page.table()[1][3] == shown


def test_the_kept_points_of_an_older_version_still_make_a_page(tmp_path):
    shutil.copytree(KEPT, tmp_path / "points")
    (tmp_path / "grids").mkdir()
    names = sorted(path.stem for path in KEPT.iterdir())
    for name in names:
        Image.new("L", (64, 32)).save(tmp_path / "grids" / f"{name}.png")
    points = all_points(tmp_path)
    assert not any("solver" in row for row in points), "or they are none of an older version"
    page = Page(write_report(points, tmp_path))
    assert sorted(page.overlays()) == names
    plans = [line[2] for line in page.table()[1:-1]]
    assert len(plans) == len(names)
    assert not any(word in plan for plan in plans for word in ("None", "reuse", "seed", "tuned", "allocation"))


def coordinates(path):
    """The corners of a path of SVG, y upwards."""
    return [(float(x), -float(y)) for x, y in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path)]


def centres(page, plot):
    """Where the points of a plot are drawn, by key."""
    found = {}
    for link in page.all("a", plot):
        shapes = [element["attributes"] for element in page.all(within=link)]
        if uses := [shape for shape in shapes if "x" in shape]:
            place = (float(uses[0]["x"]), -float(uses[0]["y"]))
        else:
            corners = coordinates(next(shape["d"] for shape in shapes if "d" in shape))
            place = tuple((min(values) + max(values)) / 2 for values in zip(*corners, strict=True))
        found[link["attributes"]["href"][1:]] = place
    return found


def test_a_line_goes_through_the_best_plan_of_each_budget(tmp_path):
    page = Page(written(PLANS, tmp_path))
    best = ["looped-6-ddim-4-iterations", "looped-12-ddim-1-iterations", "looped-24-ddim-2-iterations"]
    for plot in page.plots():
        places = centres(page, plot)
        assert set(places) == {key_of(row) for row in PLANS}
        (line,) = [
            coordinates(path["attributes"]["d"])
            for path in page.all("path", plot)
            if "stroke: #0072b2; stroke-width: 1.1" in path["attributes"].get("style", "")
        ]
        for corner, key in zip(line, best, strict=True):
            assert corner == pytest.approx(places[key], abs=0.5), key


def test_the_best_is_the_highest_where_higher_is_better():
    rows = [{**row, "evaluation": Evaluation.from_dict(row["evaluation"])} for row in PLANS]
    for name in ("FD-classifier", "recall"):  # the one falls as the other rises
        found = best_of(rows, "passes", lambda row, name=name: row["evaluation"][name])
        best = [row for row in rows if (row["budget"], row["iterations"]) in ((6, 4), (12, 1), (24, 2))]
        assert found == sorted((row["passes"], row["evaluation"][name].value) for row in best)


def test_the_best_is_so_on_average_over_its_seeds():
    """Of the two plans the one with the luckiest seed is the worse."""
    points = [
        point(iterations=n, distance=d, seed=s)
        for n, s, d in (([1, 1], 0, 1.0), ([1, 1], 1, 9.0), (2, 0, 3.0), (2, 1, 4.0))
    ]
    rows = [{**row, "evaluation": Evaluation.from_dict(row["evaluation"])} for row in points]
    assert best_of(rows, "passes", lambda row: row["evaluation"]["FD-classifier"]) == [(12, 3.5)]


@pytest.mark.parametrize("distances", [(22.0, 38.0), (0.5, 700.0)], ids=str)
def test_every_axis_has_numbers(distances, tmp_path):
    """Also a logarithmic one on which there is no power of ten."""
    rows = [point(budget=budget, distance=distance) for budget, distance in zip((6, 12), distances, strict=True)]
    for row in rows:
        row["evaluation"]["measures"][0]["floor"] = min(distances)
    page = Page(written(rows, tmp_path))
    for plot in page.plots():
        for axis in ("x", "y"):
            groups = [g for g in page.all("g", plot) if g["attributes"].get("id", "").startswith(f"{axis}tick")]
            numbers = [page.text(text) for group in groups for text in page.all("text", group)]
            (name,) = [page.text(text) for text in list(page.all("text", plot))[-1:]]
            assert any(re.search(r"\d", number) for number in numbers), f"the {axis} axis of {name}"


def test_a_metric_that_the_first_model_has_not_is_shown_of_the_others(tmp_path):
    """A model without classes has no accuracy."""
    rows = [point("a"), point("b", distance=9.0)]
    accuracy = Measure("accuracy", 0.625, 0.5, 0.75, 0.99, "higher")
    rows[1]["evaluation"] = evaluation([*Evaluation.from_dict(rows[1]["evaluation"]).measures, accuracy]).to_dict()
    page = Page(written(rows, tmp_path))
    head, first, second, floor = page.table()
    assert head[-1] == "accuracy"
    assert (first[-1], second[-1], floor[-1]) == ("", "0.6250.5 to 0.75", "0.99")
    assert [link["attributes"]["href"] for link in page.all("a", page.plots()[-1])] == ["#b-12-ddim"]


def test_the_same_points_make_the_same_page(page, tmp_path):
    assert Page(written(MANY, tmp_path)).source == page.source


# As a browser shows it


def browse(*options):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at the page with")
def test_a_browser_shows_the_page_and_a_point(page, out, tmp_path):
    shots, address = [], (out / "report.html").as_uri()
    for name, place in (("whole", ""), ("point", "#plain-24-dpmpp")):
        shot = tmp_path / f"{name}.png"
        browse(f"--user-data-dir={tmp_path / 'browser'}", f"--screenshot={shot}", address + place)
        with Image.open(shot) as picture:
            shots.append(np.asarray(picture.convert("L"), np.float32))
    whole, shown = shots
    assert whole.shape == shown.shape == (1000, 1400)
    assert min(whole.std(), shown.std()) > 10, "blank"
    assert np.abs(whole - shown).mean() > 10, "the overlay covers the page"
    assert whole[0, 0] == 255
    assert shown[0, 0] < 128, "what is behind it is darkened"


PROBE = """<script>
onload = () => {
  const said = [...document.querySelectorAll("svg a")].map(link => {
    link.scrollIntoView({block: "center"});
    const box = link.getBoundingClientRect();
    const hit = document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2).closest("a");
    return link.getAttribute("href") + " " + (hit ? hit.getAttribute("href") : "nothing");
  });
  document.body.innerHTML = "<pre>" + said.join("\\n") + "</pre>";
};
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to click with")
def test_a_click_in_the_middle_of_a_point_opens_it(page, tmp_path):
    rows = [row for row in MANY if row["scheduler"] == "ddim"]
    path = written(rows, tmp_path)
    path.write_text(path.read_text().replace("</body>", PROBE))
    dom = browse(f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom", path.as_uri())
    hits = [line.split() for line in dom.partition("<pre>")[2].partition("</pre>")[0].splitlines()]
    distances = hits[: 3 * len(rows)]  # of the distance: there, no two points of these lie on each other
    assert {link for link, _ in distances} == {f"#{key_of(row)}" for row in rows}
    assert [(link, hit) for link, hit in distances if link != hit] == []
