"""Pictures, the page and the whole run, on made-up or tiny measurements."""

from __future__ import annotations

import base64
import io
import re

import pytest
import torch
from PIL import Image
from rich.console import Console

from nnarch.benchmarking import cases, machine, plots, report, results, rooflines, run, tables
from nnarch.benchmarking.case import Case
from nnarch.benchmarking.machine import KIB, MIB, Machine, Roof
from nnarch.benchmarking.results import UNAVAILABLE, Row

HOST = Machine("Test CPU <1>", 2, "avx2", {"L1d": 32 * KIB}, 1 << 30, "Linux x86_64", "2.10")
ROOF = Roof(100e9, ((MIB, 80e9), (256 * MIB, 20e9)), "native", 1)


def case_rows(case: str, group: str, ms: float, **peers: float) -> list[Row]:
    work = {
        "gflop": 0.5,
        "mbytes": 10.0,
        "peak_gflops": 100.0,
        "bandwidth": "1048576:80 268435456:20",
        "machine": "m",
    }
    rows = [Row(case, group, case, "nnarch", ours=True, ms=ms, must=1.1, why="2 < 3", **work)]
    rows += [Row(case, group, case, name, ms=value, **work) for name, value in peers.items()]
    for row in rows:
        row.gflops, row.best_peer, row.roof, row.bound = (
            row.gflop / row.ms * 1e3,
            "eager",
            0.5,
            "memory",
        )
    return rows


@pytest.fixture
def rows() -> list[Row]:
    failed = Row("a", "conv", "a", "openvino", status=UNAVAILABLE, note="<not> installed")
    return [
        *case_rows("a", "conv", 10.0, eager=20.0, compile=30.0),
        failed,
        *case_rows("b", "conv", 10.0, eager=8.0, unheard_of=9.0),
        *case_rows("c", "linear", 0.01, eager=0.0105),
    ]


def open_png(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    assert image.format == "PNG"
    return image


def colours(image: Image.Image) -> set[str]:
    found = image.convert("RGB").getcolors(maxcolors=1 << 24) or []
    return {"#{:02x}{:02x}{:02x}".format(*rgb) for _, rgb in found}


def test_ratio_bars_show_wins_short_wins_and_losses(rows, tmp_path):
    file = tmp_path / "made" / "ratios.png"
    plots.ratio_bars(rows, file)
    image = open_png(file.read_bytes())
    assert image.width > 1000
    assert {plots.MET, plots.SHORT, plots.SLOWER} <= colours(image)


def test_ratio_bars_need_only_names_and_times(tmp_path):
    bare = [
        Row("m", "models", "MobileNetV2", "nnarch", ours=True, ms=5.0),
        Row("m", "models", "MobileNetV2", "eager", ms=9.0),
    ]
    plots.ratio_bars(bare, tmp_path / "bare.png", title="demo")
    seen = colours(open_png((tmp_path / "bare.png").read_bytes()))
    assert plots.MET in seen and plots.SLOWER not in seen


def test_a_plot_grows_with_its_bars(rows, tmp_path):
    more = (
        rows + case_rows("d", "linear", 1.0, eager=2.0) + case_rows("e", "linear", 1.0, eager=2.0)
    )
    plots.ratio_bars(rows, tmp_path / "few.png")
    plots.ratio_bars(more, tmp_path / "more.png")
    few, many = (open_png((tmp_path / name).read_bytes()) for name in ("few.png", "more.png"))
    assert few.width == many.width and few.height < many.height


@pytest.mark.parametrize("draw", [plots.ratio_bars, rooflines.roofline])
def test_nothing_to_draw_is_an_error_and_no_file(draw, tmp_path):
    alone = [Row("a", "conv", "a", "eager", ms=1.0)]
    with pytest.raises(ValueError, match="got none"):
        draw(alone, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_roofline_is_drawn_with_one_roof_or_several(rows, tmp_path):
    rooflines.roofline(rows, tmp_path / "two.png")
    for row in rows:
        row.bandwidth = row.bandwidth.split(" ")[-1]
    rooflines.roofline(rows, tmp_path / "one.png")
    one, two = (open_png((tmp_path / name).read_bytes()) for name in ("one.png", "two.png"))
    assert one.size == two.size
    assert one.tobytes() != two.tobytes()


def test_the_page_is_self_contained(rows):
    page = report.page(rows, HOST, [ROOF])
    images = re.findall(r"<img [^>]*src='data:image/png;base64,([^']+)'", page)
    assert len(images) == 3  # roofline and two groups
    for data in images:
        open_png(base64.b64decode(data))
    assert page.count("<img") == len(images)
    assert not re.search(r"(src|href)='(?!data:)|@import|url\(|<script", page)


def test_the_page_escapes_what_it_prints(rows):
    page = report.page(rows, HOST, [ROOF])
    assert "Test CPU &lt;1&gt;" in page and "&lt;not&gt; installed" in page
    assert "<not>" not in page


def test_the_page_can_be_made_from_another_machines_rows(rows):
    assert "<h2>Machine</h2>" not in report.page(rows, None)


def test_losses_and_missing_peers_are_in_the_tables(rows):
    console = Console(width=200, record=True, file=io.StringIO())
    tables.print_rows(rows, console)
    text = console.export_text()
    assert "unavailable" in text and "OpenVINO: unavailable on a: <not> installed" in text
    assert "unheard_of" in text
    assert "0 of 3 nnarch rows meet their must: conv 0/2, linear 0/1." in text


def test_a_narrow_terminal_cuts_off_no_number(rows):
    console = Console(width=60, file=io.StringIO())
    tables.print_rows(rows, console)
    assert "…" not in console.file.getvalue() and console.width == 60


@pytest.mark.parametrize(
    "value, text",
    [(0.01234, "0.0123"), (4.561, "4.56"), (45.61, "45.6"), (1230.4, "1230"), (float("nan"), "–")],
)
def test_times_have_three_digits(value, text):
    assert tables.milliseconds(value) == text


def test_a_run_from_end_to_end(monkeypatch, tmp_path):
    tiny = Case("tiny_linear", "tiny", lambda nn: nn.Linear(12, 7), (5, 12), quick=True)
    monkeypatch.setattr(cases, "CASES", (tiny,))
    monkeypatch.setattr(
        machine, "calibrate", lambda threads: Roof(1e11, ((MIB, 1e10),), "native", 1)
    )
    console = Console(width=200, record=True, file=io.StringIO())
    threads = torch.get_num_threads()
    csv, html = tmp_path / "rows.csv", tmp_path / "page.html"
    rows = run(
        "tiny", quick=True, providers=["nnarch", "eager"], csv=csv, html=html, console=console
    )
    assert torch.get_num_threads() == threads
    assert [(row.provider, row.timed) for row in rows] == [("nnarch", True), ("eager", True)]
    assert [row.provider for row in results.read(csv)] == ["nnarch", "eager"]
    assert "tiny_linear" in html.read_text(encoding="utf-8")
    assert "tiny_linear" in console.export_text()


@pytest.mark.parametrize("threads", [0, [], [1, -1]])
def test_impossible_thread_counts_are_refused(threads):
    with pytest.raises(ValueError, match="threads: expected positive numbers"):
        run("linear", threads=threads)


def test_this_machine_describes_itself():
    host = machine.describe()
    assert host.cpu and host.cores >= 1 and host.torch == torch.__version__
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", host.slug)
