"""Results to JSON and back, and to one page that needs nothing else."""

import base64
import dataclasses
import html
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from dememo_jax import report
from dememo_jax.errors import BadInput

NASTY = 'a <b> & "c" <script>alert(1)</script>'


def make(name="one"):
    return report.Section(
        title=f"Part {name} {NASTY}",
        summary="0.1 + 0.2",
        tables=(
            report.Table("Scores", ("name", "share", "count"), (("x", 0.1 + 0.2, 12345), (NASTY, None, 0)), note="see <there>"),
            report.Table("Empty", ("a",), ()),
        ),
        plots=(report.Plot("curve", "A curve", "epoch", "accuracy", (("run", (0.0, 1.0, 2.0), (0.1, None, 0.3)),), note="n"),),
        pictures=(("grid.png", "A grid & more"),),
    )


def pixels(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return matplotlib.image.imread(BytesIO(png), format="png")


def test_section_survives_json():
    for part in (make(), report.Section("bare", "nothing")):
        text = report.to_json(part)
        assert report.section(json.loads(text)) == part
    changed = dataclasses.replace(make(), summary="0.30000000000000001")
    assert report.section(json.loads(report.to_json(changed))) != make()  # equality looks inside


def test_json_of_numbers_and_paths():
    plain = {
        "a": np.float64(1 / 3),
        "b": np.arange(3),
        "c": np.int32(4),
        "d": Path("x") / "y",
        "e": make(),
        "f": np.bool_(True),
    }
    got = json.loads(report.to_json(plain))
    assert got["a"] == 1 / 3
    assert (got["b"], got["c"], got["d"], got["f"]) == ([0, 1, 2], 4, "x/y", True)
    assert report.section(got["e"]) == make()
    with pytest.raises(TypeError):
        report.to_json({"a": object()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, np.nan])])
def test_json_refuses_what_is_not_a_number(bad):
    with pytest.raises(ValueError, match="JSON compliant"):
        report.to_json({"deep": [{"value": bad}]})


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (0.12345, "0.123"),
        (0.9996, "1.000"),
        (np.float64(2.5), "2.500"),
        (1234567, "1,234,567"),
        (12, "12"),
        (True, "True"),
        ("text", "text"),
        (float("inf"), "inf"),
    ],
)
def test_cells(value, shown):
    assert report.cell(value) == shown


def test_pictures_are_real():
    gap = pixels(report.draw(make().plots[0]))
    assert gap.shape[0] > 100
    assert gap.shape[1] > 200
    assert len(np.unique(gap)) > 2  # something is drawn
    straight = dataclasses.replace(make().plots[0], series=(("run", (0.0, 1.0, 2.0), (0.1, 0.2, 0.3)),))
    assert not np.array_equal(pixels(report.draw(straight)), gap)

    images = np.stack([np.zeros((4, 4, 1)), np.ones((4, 4, 1))])
    colour = np.zeros((2, 4, 4, 3))
    colour[..., 0] = 1.0
    grid = pixels(report.image_grid([("grey", images), ("red", colour)], ["one", "two"]))[..., :3]
    for shade in ((0, 0, 0), (1, 0, 0), (1, 1, 1)):
        assert (grid == shade).all(axis=-1).mean() > 0.02  # patches of each


class Links(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.words = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster", "action")]

    def handle_data(self, data):
        self.words.append(data)


def figure_of(plot, monkeypatch):
    kept = []
    monkeypatch.setattr(report, "_png", lambda figure: kept.append(figure) or b"")
    report._draw.__wrapped__(plot)
    return kept[0]


def test_axes_of_a_roc_have_the_ticks_of_their_decades(monkeypatch):
    line = ("this model", (0.02, 0.1, 1.0), (0.1, 0.5, 1.0))
    (axes,) = figure_of(report.Plot("roc", "A ROC", "x", "y", (line,), scale="roc"), monkeypatch).axes
    assert axes.get_xlim() == (0.01, 1.0)
    shown = [tick for tick in axes.get_xticks() if 0.01 <= tick <= 1]
    assert shown == pytest.approx([0.01, 0.1, 1.0])


def test_bands_and_ticks(monkeypatch):
    band = ("this model: bounds", (0.01, 0.1), (0.2, None), (0.6, None))
    plot = report.Plot("b", "Bounds", "eta", "accuracy", (("this model: draws", (0.0, 0.0), (0.3, 0.5)),), bands=(band,),
                       ticks=(0.0, 0.01, 0.1))  # fmt: skip
    (axes,) = figure_of(plot, monkeypatch).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.01", "0.1"]
    assert len(axes.collections) == 1
    assert {line.get_color() for line in axes.lines} == {"C0"}
    told = report.Section("t", "s", plots=(plot,))
    assert report.section(json.loads(report.to_json(told))) == told


def test_page_needs_nothing_else(tmp_path):
    grid = report.image_grid([("row", np.zeros((1, 3, 3, 1)))], ["column"])
    (tmp_path / "grid.png").write_bytes(grid)
    page = report.page(f"Title {NASTY}", "Intro & more", [make()], tmp_path, {"seed": 7, "why": NASTY})
    links = Links()
    links.feed(page)
    assert links.tags.count("html") == links.tags.count("body") == 1
    assert len(links.addresses) == 2  # the plot and the picture, inlined
    for address in links.addresses:
        head, data = address.split(",", 1)
        assert head == "data:image/png;base64"
        pixels(base64.b64decode(data, validate=True))
    assert base64.b64encode(grid).decode() in page
    assert not re.search(r"url\(|@import|https?://", page)
    assert not {"script", "b", "link", "iframe", "there"} & set(links.tags)  # text stays text
    words = "".join(links.words)
    for said in (f"Title {NASTY}", "Intro & more", f"Part one {NASTY}", "0.300", "12,345", "see <there>", '"seed": 7'):
        assert said in words
    assert html.escape("A grid & more") in page


def test_maps_and_landscapes_are_pictures():
    maps = [("clean", np.array([[1.0, 2.0], [0.5, 0.0]])), ("dead", np.zeros((2, 2)))]
    assert report.heat_maps(maps, ["first", "last"], ["1", "2"], "SAL, nats", 0.7)[:4] == b"\x89PNG"
    x = np.linspace(-1, 1, 3)
    panels = [("loss", 0.1 + np.add.outer(x**2, x**2), True), ("accuracy", np.ones((3, 3)), False)]  # one is flat
    assert report.landscape(x, x, panels, ("x", "y"), [[0.5, 0.5], [0.0, 0.0]])[:4] == b"\x89PNG"


WRONG = {
    "no section": lambda s: [],
    "no title": lambda s: {name: value for name, value in s.items() if name != "title"},
    "a title that is a number": lambda s: {**s, "title": 3},
    "a short row": lambda s: {**s, "tables": [{**s["tables"][0], "rows": [["x"]]}]},
    "a cell that is a list": lambda s: {**s, "tables": [{**s["tables"][0], "rows": [["x", [1], 2]]}]},
    "infinity": lambda s: {**s, "tables": [{**s["tables"][0], "rows": [["x", float("inf"), 2]]}]},
    "a number too large": lambda s: {**s, "tables": [{**s["tables"][0], "rows": [["x", 10**400, 2]]}]},
    "curves of text": lambda s: {**s, "plots": [{**s["plots"][0], "series": [["a", ["b"], ["c"]]]}]},
    "a short curve": lambda s: {**s, "plots": [{**s["plots"][0], "series": [["a", [1.0, 2.0], [1.0]]]}]},
    "an unknown entry": lambda s: {**s, "plots": [{**s["plots"][0], "colour": "red"}]},
    "a plot elsewhere": lambda s: {**s, "plots": [{**s["plots"][0], "name": "../plot"}]},
    "a picture elsewhere": lambda s: {**s, "pictures": [["../../private.txt", "x"]]},
    "a path": lambda s: {**s, "pictures": [["/etc/passwd", "x"]]},
    "no pair": lambda s: {**s, "pictures": ["x"]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_section_is_said(name):
    whole = json.loads(report.to_json(make()))
    assert report.section(whole) == make()
    with pytest.raises(BadInput, match="no section of a result"):
        report.section(WRONG[name](whole))


def test_pictures_are_png_files_of_the_folder_itself(tmp_path):
    (tmp_path / "run").mkdir()
    png = report.image_grid([("row", np.zeros((1, 3, 3, 1)))], ["column"])
    (tmp_path / "run" / "whole.png").write_bytes(png)
    assert report.picture(tmp_path / "run", "whole.png") == png
    (tmp_path / "private.png").write_bytes(png)
    (tmp_path / "run" / "link.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "run" / "text.png").write_text("private")
    (tmp_path / "run" / "folder.png").mkdir()
    for name in ("link.png", "text.png", "folder.png", "gone.png", "../private.png", str(tmp_path / "private.png"), "", "."):
        with pytest.raises(BadInput, match="picture"):
            report.picture(tmp_path / "run", name)
        with pytest.raises(BadInput, match="picture"):
            report.page("t", "i", [dataclasses.replace(make(), pictures=((name, "c"),))], tmp_path / "run", {})


def test_dollars_are_no_mathematics_and_odd_channels_are_drawn():
    odd = dataclasses.replace(
        make().plots[0], title="$x^{$ and $", x="$", y="\\$_{", series=(("$\\frac$", (0.0, 1.0), (0.1, 0.2)),)
    )
    assert pixels(report.draw(odd)).shape
    assert pixels(report.heat_maps([("$a^{$", np.ones((1, 1)))], ["$b_{$"], ["1"], "SAL")).shape
    for channels in (1, 2, 3, 4, 12):
        assert pixels(report.image_grid([("$r^{$", np.zeros((1, 3, 3, channels)))], ["$c^{$"])).shape
