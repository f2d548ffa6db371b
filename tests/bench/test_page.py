"""The report says what the measurements say, loses nothing that speaks against us, and can be read everywhere."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from laco_kernels.bench import cases, page
from laco_kernels.bench.page import default, devices, losses, series, vec, views
from laco_kernels.bench.page.text import depth_label, digits, duration, escape_markdown, fraction
from laco_kernels.bench.results import FILE, Results, Row, device_folders
from laco_kernels.kernels import select

from . import synthetic

HOSTILE = "<script>alert('x')</script> | `code` </td> \"quoted\" & **bold**\nsecond line"
VOID = {"meta", "br", "hr", "img", "link", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    return [synthetic.cpu_results(root / "cpu-example"), synthetic.gpu_results(root / "example-h900")]


@pytest.fixture(scope="module")
def report(folders):
    return page.html(folders)


@pytest.fixture(scope="module")
def gpu(folders):
    return devices.read(folders)[0]


class Structure(HTMLParser):
    """Every start tag is closed in its place; ids and texts are collected."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.references, self.tags = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.references += [attrs["href"][1:]] if attrs.get("href", "").startswith("#") else []
        self.references += re.findall(r"url\(#([^)]+)\)", " ".join(filter(None, attrs.values())))
        self.references += attrs.get("aria-labelledby", "").split()
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag


def text_of(report):
    return html.unescape(re.sub(r"<[^>]+>", " ", report))


def one(folder, *rows, environment=synthetic.GPU):
    """Results of a few rows, given as functions of the environment's name."""
    results = Results.open(folder)
    name = results.begin(environment)
    results.add([row(name) for row in rows])
    return [folder]


def test_the_page_is_whole_and_needs_nothing_else(report):
    structure = Structure(report)
    assert structure.open == []
    assert len(set(structure.ids)) == len(structure.ids)
    assert set(structure.references) <= set(structure.ids)
    assert "script" not in structure.tags
    assert not re.search(r"https?:|@import|\bsrc=|xmlns", report)
    assert 'name="viewport"' in report
    assert len(re.findall("<svg ", report)) == 8
    svgs = re.findall(r"<svg .*?</svg>", report, re.DOTALL)
    assert not [svg for svg in svgs if re.search(r"(fill|stroke): ?#|<svg[^>]* (width|height)=|<style|font-family", svg)]
    assert all(svg.index("<title") < svg.index("<text") for svg in svgs)
    used = set(re.findall(r"var\((--[\w-]+)\)", report))
    assert used <= set(re.findall(r"(--[\w-]+):", report))


def test_the_same_measurements_give_the_same_bytes(folders, report):
    assert page.html(folders) == report
    assert page.html(folders[::-1]) == report
    assert page.markdown(folders) == page.markdown(folders[::-1])


def test_gpus_come_first_and_every_device_has_a_section(folders, report):
    assert [(device.name, device.gpu) for device in devices.read(folders)] == [
        ("Example H900", True),
        ("Example CPU 9000, 2 threads", False),
    ]
    headings = re.findall(r"<h2>(.*?)</h2>", report)
    assert headings == [
        "Beside LaCo&#39;s tables" if "&#39;" in report.split("</h2>")[0] else "Beside LaCo's tables",
        "Whole models beside the papers' tables",
        "Example H900",
        "Example CPU 9000, 2 threads",
        "How each number was taken",
    ]
    assert device_folders(folders[0].parent) == sorted(folders)
    assert device_folders(folders[0]) == [folders[0]]


def test_the_papers_columns_stand_beside_ours(folders):
    tables = {table.title.split()[0]: table for table in vec.beside_the_paper(devices.read(folders))}
    aimv2 = tables["aimv2-l-336"]
    assert list(aimv2.columns[1:]) == ["@1/12", "@1/6", "@1/4", "@1/2", "@1"]
    lines = {line.cells[0].text + line.cells[0].note: line.cells[1:] for line in aimv2.lines if not line.heading}
    assert [cell.note for cell in lines["LaCoGPU and batch not stated"]] == [
        "23.5 ms",
        "26.2 ms",
        "29.3 ms",
        "39.0 ms",
        "58.0 ms",
    ]
    assert [cell.text for cell in lines["LaCo, TPS"]] == ["28.2", "27.7", "27.4", "26.3", "24.0"]
    assert lines["Example H900batch 16, bfloat16, eager"][0].text == "2.67x"
    assert lines["Example CPU 9000, 2 threadsbatch 1, float32, eager"][0].note == "845 ms"
    assert "TPS, ours: not measured yet" in [line.heading for line in aimv2.lines]
    assert "ours: not measured yet" in [line.heading for line in tables["internvit-300m-448"].lines]
    assert tables["our"].title == "our own encoder (not in LaCo's tables)"
    for encoder, speeds in cases.PAPER_TPS.items():
        assert set(speeds) == set(cases.PAPER_MS[encoder])


def test_every_losing_row_is_listed(folders, gpu, report):
    table = losses.losing(gpu)
    found = {(line.cells[0].text, line.cells[0].note, line.cells[1].text): line.cells[2:] for line in table.lines}
    ratios = found["strided_conv_gelu", "aimv2-l-336, 24 x 24, hidden 4096, batch 16, forward, bfloat16", "triton"]
    assert [(cell.text, cell.kind) for cell in ratios[:4]] == [
        ("0.80x", "bad"),
        ("0.59x", "bad"),
        ("0.80x", "bad"),
        ("0.59x", "bad"),
    ]
    expected = [
        row
        for row in gpu.rows
        if row.variant in ("composite", "triton")
        and row.values["timings"]
        and row.values["ok"]
        and min(row.values["ratio_eager"]["high"], row.values["ratio_compile"]["high"]) < 1
    ]
    assert len(found) == len(expected) > 1
    for text in (text_of(report), page.markdown(folders), page.readme_section(folders)):
        assert f"{len(expected)} rows of ours are slower than the best other one beyond the interval" in " ".join(text.split())
        assert "0.58-0.60" in text


def test_a_loss_that_only_cold_caches_show(tmp_path):
    case = synthetic.case()
    cold = {"timings": {"graph": synthetic.spread(50.0), "cold": synthetic.spread(90.0)}, "ratio_compile": None}
    folder = one(
        tmp_path,
        lambda name: synthetic.operator_row(case, "eager", name, gpu=True),  # 93 and 121 us
        lambda name: synthetic.operator_row(case, "compile", name, gpu=True, timings={"cold": synthetic.spread(80.0)}),
        lambda name: synthetic.operator_row(case, "triton", name, gpu=True, **cold),
    )
    table = losses.losing(devices.read(folder)[0])
    (line,) = table.lines
    found = {name: (cell.text, cell.kind) for name, cell in zip(table.columns, line.cells, strict=True)}
    assert found["cold, vs compile"] == ("0.89x", "bad")
    assert found["cold, vs eager"] == ("1.60x", "good")  # the paired ratio, which is of the times that all have
    assert found["vs eager"] == ("1.84x", "good")
    assert "vs compile" not in found


def table_of(**impls):
    rows = [{"op": "patch_merge", "layout": "raster", "dtype": "bfloat16", "up_to": 4000} for _ in impls]
    return {
        "Example H900": {"rows": [{**row, "direction": way, "impl": impls[way]} for row, way in zip(rows, impls, strict=True)]}
    }


def test_what_runs_by_default_stands_beside_the_fastest(gpu, monkeypatch):
    monkeypatch.setattr(select, "winners", lambda: table_of(forward="composite"))
    group = views.operators(gpu)["patch_merge"]
    table = views.fastest_of_ours(gpu, group)
    columns = [list(table.columns).index(name) for name in ("fastest of ours", "default", "default vs compile")]
    found = [[line.cells[i].text for i in columns] for line in table.lines if line.cells]
    assert ["triton", "composite", "1.01x"] in found
    assert ["triton", "composite + eager", ""] in found, "backward has no row in the table"
    assert ["triton", "eager", "0.74x"] in found, "block order has no row either, and what eager loses is said"
    every = views.every_variant(gpu, group)
    marked = [line.cells[0].text for line in every.lines if line.cells and line.cells[0].note == "the default"]
    assert sorted(set(marked)) == ["composite", "eager"]
    monkeypatch.setattr(select, "winners", lambda: table_of(forward="composite", backward="composite"))
    overview = {
        (line.cells[0].note, line.cells[1].text): line.cells[4]
        for line in views.overview(gpu).lines
        if line.cells[0].text == "patch_merge"
    }
    assert overview["both, bfloat16", "default"].text == "1.01x"
    assert overview["both, bfloat16", "fastest"].text == "1.20x"


def test_beyond_the_table_eager_runs(gpu, monkeypatch):
    monkeypatch.setattr(select, "winners", lambda: table_of(forward="triton"))
    assert default.implementations(gpu, synthetic.case(batch=16)) == ("triton",)
    assert default.implementations(gpu, synthetic.case(batch=64)) == ("eager",)
    assert default.implementations(gpu, {"op": "patch_merge"}) == ("eager",)
    monkeypatch.setattr(select, "winners", dict)
    assert default.implementations(gpu, synthetic.case()) == ("eager",)


def test_the_readme_is_narrow(folders):
    lines = page.readme_section(folders).splitlines()
    tables = [line for line in lines if line.startswith("| ") and "NVIDIA" not in line and "LaCo" not in line]
    timed = [line for line in tables if "memory" not in line and "tick" not in line and "wrong" not in line]
    cases = [line for line in timed if "batch 16) |" in line or "bfloat16) |" in line]
    assert len(cases) > 20
    assert max(map(len, cases)) <= 120


def test_goals_and_how_far_off(gpu):
    table = losses.goals(gpu)
    assert [line.cells[4].text for line in table.lines] == ["24.0 % short", *["met"] * 4]
    assert table.lines[0].cells[1].text == "2.50x of eager"
    assert losses.missed(table) == 1


def test_a_failed_tick_shows_no_time(gpu, report, folders):
    row = next(row for row in gpu.rows if row.values["ok"] is False)
    measured = row.values["timings"]["graph"]["median"]
    text = " ".join(text_of(report).split())
    assert "NO 3.1e-01 of 4.2e-03" in text
    assert "the correctness tick failed (error 3.1e-01 of 4.2e-03)" in text
    for shown in (text, page.markdown(folders), page.readme_section(folders)):
        assert duration(measured) not in shown
        assert "1.78x" not in shown
        assert synthetic.OUT_OF_MEMORY in shown


def test_what_is_absent_is_said(tmp_path, folders):
    cpu = page.html(folders[:1])
    assert "not yet measured on a GPU" in cpu
    assert "not yet measured on a GPU" not in page.html(folders)
    assert "\N{MICRO SIGN}s" not in cpu
    assert "There are no measurements." in page.html([])
    assert "There are no measurements." in page.markdown([tmp_path / "missing"])
    text = page.html(one(tmp_path, lambda name: synthetic.vec_row("x", "1/4", "eager", name, gpu=True, batch=1, ratio=2.0)))
    assert "The operators have not been measured on this device." in text
    assert "None of our implementations has a time on this device, so none could lose." in text
    assert "The memory of the operators has not been measured on this device." in text


def test_the_readme_without_a_gpu(tmp_path, folders):
    assert page.readme_section(folders[:1]) == "not yet measured on a GPU\n"
    assert page.readme_section([tmp_path]) == "not yet measured on a GPU\n"


def test_the_readme_with_a_gpu(folders):
    text = page.readme_section(folders)
    assert text.startswith("**Example H900**: driver 580.95.05, torch 2.13.0")
    assert "CPU" not in text
    assert "not yet measured on a GPU" not in text
    assert "| LaCo, TPS | 28.2 |" in text
    assert "1 of 5 goals are missed." in text
    assert "| strided_conv_gelu (forward, bfloat16) | fastest | 3 |" in text
    assert "| patch_merge (block order, forward, bfloat16) | fastest | 1 |" in text
    for line in text.splitlines():
        assert line == line.rstrip()
    assert "\n\n\n" not in text + page.markdown(folders)


def test_a_readme_sends_readers_of_long_tables_to_the_report(monkeypatch, folders):
    monkeypatch.setattr(page, "README_ROWS", 3)
    text = page.readme_section(folders)
    assert "rows are too many for here; `laco report` shows each." in text
    assert "0.58-0.60" not in text
    assert "rows of ours are slower than the best other one beyond the interval" in " ".join(text.split())


def test_several_runs_of_one_device_are_told_apart(folders, report):
    text = text_of(report)
    assert "Run A: torch 2.13.0" in text
    assert "(ba9876543210), 2026-11-21 10:00 UTC." in text
    (cpu,) = devices.read(folders[:1])
    assert {cpu.run(row) for row in cpu.rows} == {"A", "B"}


def test_hostile_texts_stay_texts(tmp_path):
    folder = one(
        tmp_path,
        lambda name: synthetic.operator_row(synthetic.case(), "triton", name, gpu=True, **synthetic.untimed(HOSTILE)),
        lambda name: synthetic.operator_row(synthetic.case(op=HOSTILE, encoder=HOSTILE), "eager", name, gpu=True),
        lambda name: synthetic.vec_row(HOSTILE, "1/4", "eager", name, gpu=True, batch=1, ratio=2.0),
        lambda name: synthetic.operator_row(
            synthetic.case(dtype=HOSTILE, sweep="tokens"), "eager", name, gpu=True, suite="sweep"
        ),
        environment={**synthetic.GPU, "device": HOSTILE, "gpus": [HOSTILE]},
    )
    text = page.html(folder)
    structure = Structure(text)
    assert structure.open == []
    assert "script" not in structure.tags
    assert " ".join(HOSTILE.split()) in " ".join(html.unescape(text).split())
    for markdown in (page.markdown(folder), page.readme_section(folder)):
        assert "<script" not in markdown
        tables = [line for line in markdown.splitlines() if line.startswith("|")]
        assert "second line" not in [line[:11] for line in markdown.splitlines()]
        assert all(line.endswith("|") for line in tables)
    assert escape_markdown("a|b _c_ d_e <f>") == r"a\|b \_c\_ d_e &lt;f&gt;"


@pytest.mark.parametrize("environment", [synthetic.GPU, synthetic.ENVIRONMENT, {}], ids=["gpu", "cpu", "unknown"])
@pytest.mark.parametrize(
    "row",
    [
        ("ops", synthetic.case(), "triton", {"timings": {}}),
        ("ops", {"a": 1}, "something new", {"ok": None, "timings": {"new": synthetic.spread(3.0)}, "goal": {"ratio": 2}}),
        ("ops", {"op": "patch_merge", "grid": "wide"}, "cuda", {"ok": True, "timings": {"wall": synthetic.spread(3.0)}}),
        ("ops", synthetic.case(), "triton", {"timings": {"graph": synthetic.spread(5.0)}, "roofline": 2}),
        ("ops", synthetic.case(), "cuda", {"timings": {}, "goal": {"ratio": 1.1, "against": "compile"}, "peak_bytes": 0}),
        ("sweep", {"sweep": "batch"}, "triton", {"timings": {"wall": synthetic.spread(5.0)}}),
        ("sweep", synthetic.case(sweep="tokens"), "new", {"timings": {"graph": synthetic.spread(5.0)}}),
        ("sweep", {"sweep": "tokens", "grid": [1, 2]}, "triton", {"timings": {"cold": synthetic.spread(5.0)}}),
        ("vec", {"a": 1}, "eager", {"timings": {}}),
        (
            "vec",
            {"encoder": "aimv2-l-336", "depth": "x/0", "batch": 1},
            "eager",
            {"ok": True, "timings": {"wall": synthetic.spread(1.0)}},
        ),
        (
            "vec",
            {"encoder": "aimv2-l-336", "depth": "1"},
            "eager",
            {"timings": {"wall": synthetic.spread(1.0)}, "ratio": {"median": 1}},
        ),
        ("another suite", {"a": 1}, "b", {"timings": {}}),
    ],
    ids=range(12),
)
def test_a_single_odd_row_is_no_reason_to_fail(tmp_path, row, environment):
    folder = one(tmp_path, lambda name: Row(*row, name, None), environment=environment)
    assert Structure(page.html(folder)).open == []
    assert page.markdown(folder)
    assert page.readme_section(folder)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"results: got '\{' in line 1"):
        page.html([tmp_path])


def test_charts_show_what_was_measured(folders):
    gpu, cpu = devices.read(folders)
    rows = vec.runs(gpu.suite("vec"))["aimv2-l-336", 16, "bfloat16"]
    chart = series.vec_chart(gpu, ("aimv2-l-336", 16, "bfloat16"), rows)
    assert [line.label for line in chart.series] == ["eager", "compile", "LaCo"]
    assert chart.series[0].points[2].y.median == pytest.approx(100 / 2.06)
    assert chart.series[2].points[2].y.median == pytest.approx(100 * 29.3 / 58)
    assert chart.second == pytest.approx(58)
    tokens, batch = series.growth_charts(gpu)
    assert list(tokens.ticks.values()) == ["196", "576", "729", "1024", "2304", "4096"]
    assert list(batch.ticks.values()) == ["1", "2", "4", "8", "16", "32", "64"]
    relative = series.growth_charts(cpu)[0]
    assert relative.series[0].points[0].y.median == 1
    assert relative.y_label == "time, eager at 196 = 1"


def test_how_numbers_are_written():
    assert [digits(value) for value in (0.0, 1.2, 9.996, 12.34, 99.94, 99.96, 12345.6, 0.00012)] == [
        *("0", "1.20", "10.0", "12.3", "99.9", "100", "12346", "0.00012")
    ]
    assert [duration(value) for value in (12.34, 999.6, 2.5e6)] == ["12.3 \N{MICRO SIGN}s", "1.00 ms", "2.50 s"]
    assert depth_label(fraction("1/12")) == "@1/12"
    assert depth_label(fraction("0.3333333")) == "@0.333"


MEASURE = """
const page = document.querySelector("iframe").contentDocument, root = page.scrollingElement;
let overlaps = 0, smallest = 99;
for (const svg of page.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect());
  smallest = Math.min(smallest, ...boxes.map(box => Math.min(box.height, box.width * 9)));
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => overlaps +=
    a.left + 1 < b.right && b.left + 1 < a.right && a.top + 3 < b.bottom && b.top + 3 < a.bottom));
}
const dark = page.defaultView.matchMedia("(prefers-color-scheme: dark)").matches;
document.body.dataset.found = [root.scrollWidth, root.clientWidth, overlaps, Math.floor(smallest), dark].join(" ");
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium executable on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_can_be_read_in_a_browser(report, tmp_path, width, scheme):
    """On a phone and on a desk, light and dark: nothing wider than the screen, no labels on each other, none too small.

    A window cannot be as narrow as a phone, so the page stands in a frame; all that is folded is unfolded.
    """
    frame = html.escape(report.replace("<details", "<details open"))
    style = "border: 0; display: block; color-scheme: light dark"
    host = tmp_path / "host.html"
    host.write_text(
        f'<!doctype html><html style="color-scheme: light dark"><meta charset="utf-8"><body style="margin: 0">'
        f'<iframe style="{style}" width="{width}" height="800" srcdoc="{frame}"></iframe>'
        f"<script>onload = () => {{{MEASURE}}}</script></body></html>"
    )
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={tmp_path}"]
    command += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--window-size=1400,800"]
    picture = tmp_path / "page.png"
    options = {"capture_output": True, "text": True, "timeout": 120, "check": True}
    dom = subprocess.run([*command, "--dump-dom", host.as_uri()], **options).stdout
    scroll, client, overlaps, smallest, dark = re.search(r'data-found="([^"]+)"', dom)[1].split()
    assert (int(client), dark) == (width, "true" if scheme == "dark" else "false")
    assert int(scroll) <= width
    assert overlaps == "0"
    assert int(smallest) >= 10
    subprocess.run([*command, f"--screenshot={picture}", host.as_uri()], **options)
    with Image.open(picture) as image:
        background = image.convert("RGB").getpixel((2, 2))
    assert background == ((15, 20, 26) if scheme == "dark" else (255, 255, 255))
