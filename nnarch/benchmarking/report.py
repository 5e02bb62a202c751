"""One self-contained page: the verdict, ratio bars and a table per group, roofline, the machine."""

from __future__ import annotations

import base64
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from nnarch.benchmarking import plots, rooflines
from nnarch.benchmarking.machine import Machine, Roof
from nnarch.benchmarking.results import Row
from nnarch.benchmarking.tables import (
    PROTOCOL,
    cases_of,
    first_cell,
    judged,
    notes,
    number,
    providers_of,
    roof_cell,
    roof_text,
    time_cell,
    title_of,
    verdict,
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; background: #f5f7fa; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
p { margin: .3rem 0; } .quiet { color: #616e7c; font-size: .9rem; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px; padding: 1.1rem 1.3rem;
          margin: 1.1rem 0; }
img { max-width: 100%; height: auto; display: block; margin: 0 auto .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; white-space: nowrap;
        font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .7rem; border-bottom: 1px solid #eef1f4; }
th { font-weight: 600; color: #52606d; vertical-align: bottom; }
th:first-child, td:first-child, td.why, th.why { text-align: left; }
td.best { font-weight: 600; } td.yes { color: #0b6e6f; font-weight: 600; }
td.no { color: #b8324a; font-weight: 600; } td.ours { background: #f0fafa; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt { color: #616e7c; } dd { margin: 0; }
"""


def write(
    rows: Sequence[Row], host: Machine | None, path: str | Path, roofs: Sequence[Roof] = ()
) -> None:
    """Write the page.

    Args:
        rows: of one run, any number of threads.
        host: the machine they were measured on; None where only its name in the rows is known.
        path: HTML file to write; its folder is made.
        roofs: the machine's limits, one per number of threads.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(rows, host, roofs), encoding="utf-8")


def page(rows: Sequence[Row], host: Machine | None, roofs: Sequence[Roof] = ()) -> str:
    """The page as text; it refers to nothing outside itself."""
    stamp = max((row.time for row in rows), default="")
    commits = ", ".join(dict.fromkeys(row.commit for row in rows if row.commit))
    name = host.cpu if host else ", ".join(dict.fromkeys(row.machine for row in rows))
    sections = [
        _machine_section(host, roofs) if host else "",
        *_roofline_sections(rows),
        *(_group_section(group, cases) for group, cases in cases_of(rows)),
        _first_call_section(rows),
        _notes_section(rows),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>nnarch benchmarks: {escape(name)}</title><style>{_STYLE}</style></head>"
        "<body><main><h1>nnarch benchmarks</h1>"
        f"<p class='quiet'>{escape(name)} · {escape(stamp[:16].replace('T', ' '))}"
        f"{' · commit ' + escape(commits) if commits else ''}</p>"
        f"<p>{escape(verdict(rows))}</p><p class='quiet'>{escape(PROTOCOL)}</p>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _machine_section(host: Machine, roofs: Sequence[Roof]) -> str:
    facts = {
        "processor": host.cpu,
        "cores": str(host.cores),
        "instruction set": host.isa,
        "caches": ", ".join(
            f"{name} {size >> 20} MiB" if size >= 1 << 20 else f"{name} {size >> 10} KiB"
            for name, size in host.caches.items()
        ),
        "memory": f"{host.memory / (1 << 30):.0f} GiB" if host.memory else "",
        "system": host.system,
        "torch": host.torch,
    }
    for roof in roofs:
        source = "" if roof.source == "native" else " (lower bound, from torch's own loops)"
        facts[f"limits, threads: {roof.threads}"] = f"{roof_text(roof)}{source}"
    return _section("Machine", _definitions(facts))


def _definitions(facts: dict[str, str]) -> str:
    items = (
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items() if text
    )
    return f"<dl>{''.join(items)}</dl>"


def _roofline_sections(rows: Sequence[Row]) -> list[str]:
    sections = []
    for threads in sorted({row.threads for row in rows}):
        chosen = [row for row in rows if row.threads == threads]
        image = _image(
            f"roofline, threads: {threads}",
            lambda file, chosen=chosen: rooflines.roofline(chosen, file),
        )
        if image:
            sections.append(_section(f"Roofline, threads: {threads}", image))
    return sections


def _group_section(group: str, cases: Sequence[Sequence[Row]]) -> str:
    rows = list(itertools.chain.from_iterable(cases))
    image = _image(f"ratio bars of {group}", lambda file: plots.ratio_bars(rows, file, title=group))
    return _section(group, image, _times_table(cases, providers_of(rows)))


def _image(alt: str, draw: Callable[[Path], None]) -> str:
    """What `draw` writes, embedded; "" where it has nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plot.png"
        try:
            draw(file)
        except ValueError:
            return ""
        data = base64.b64encode(file.read_bytes()).decode()
    return f"<img alt='{escape(alt, quote=True)}' src='data:image/png;base64,{data}'>"


def _times_table(cases: Sequence[Sequence[Row]], providers: Sequence[str]) -> str:
    heads = ["case", *(f"{title_of(name)}, ms" for name in providers)]
    heads += ["ratio", "GFLOP/s", "GB/s", "roof", "must", "why"]
    body = []
    for rows in cases:
        by_provider = {row.provider: row for row in rows}
        fastest = min((row.ms for row in rows if row.timed), default=math.nan)
        for i, row in enumerate(judged(rows)):
            threads = f" ({row.threads} threads)" if row.threads > 1 else ""
            cells = [_cell(row.label + threads if i == 0 else "· " + title_of(row.provider))]
            for name in providers:
                other = by_provider.get(name) if i == 0 else None
                kinds = "ours " * bool(other and other.ours)
                kinds += "best" * bool(other and other.timed and other.ms == fastest)
                cells.append(_cell(time_cell(other), kinds))
            body.append(f"<tr>{''.join(cells + _rate_cells(row))}</tr>")
    return _table(heads, body)


def _rate_cells(row: Row) -> list[str]:
    rates = [_cell(number(row.gflops)), _cell(number(row.gbs)), _cell(roof_cell(row))]
    if not row.ours:
        return [_cell(""), *rates, _cell(""), _cell("")]
    ratio = "–" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
    return [
        _cell(ratio, "yes" if row.met else "no"),
        *rates,
        _cell(f"{row.must:g}"),
        _cell(row.why, "why"),
    ]


def _first_call_section(rows: Sequence[Row]) -> str:
    providers = providers_of(rows)
    body = []
    for _, cases in cases_of(rows):
        for case in cases:
            by_provider = {row.provider: row for row in case}
            cells = [first_cell(by_provider.get(name)) for name in providers]
            body.append(f"<tr>{''.join(_cell(text) for text in [case[0].label, *cells])}</tr>")
    explanation = "ms of preparation (conversion, graph passes, compilation) + first call"
    return _section(
        "Before the steady state",
        f"<p class='quiet'>{explanation} (of which packing weights).</p>",
        _table(["case", *(title_of(name) for name in providers)], body),
    )


def _notes_section(rows: Sequence[Row]) -> str:
    lines = notes(rows)
    if not lines:
        return ""
    return _section("Not timed", *(f"<p>{escape(line)}</p>" for line in lines))


def _table(heads: Sequence[str], body: Sequence[str]) -> str:
    head = "".join(
        f"<th{' class=why' if text == 'why' else ''}>{escape(text)}</th>" for text in heads
    )
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(text: str, kind: str = "") -> str:
    return f"<td class='{kind.strip()}'>{escape(text)}</td>" if kind else f"<td>{escape(text)}</td>"
