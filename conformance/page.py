"""The report as one static HTML page: levels and families, error ratios, failures and how to repeat them."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from conformance.catalogue import LEVELS
from conformance.status import Status

if TYPE_CHECKING:
    from conformance.check import Result
    from conformance.report import Report

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2e7d32; --bad: #c62828; --off: #888; }
:root { --poor: #b26a00; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .off { color: var(--off); }
.poor { color: var(--poor); } code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; background: #8881; padding: .6rem; border-radius: 4px; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 72px; }
.bars div { flex: 1; background: var(--good); min-height: 1px; } .bars div.over { background: var(--bad); }
.axis { display: flex; justify-content: space-between; font-size: 12px; color: var(--off); }
.verdict { font-size: 1.05rem; }
"""
_BINS = 20


def to_html(report: Report) -> str:
    """The whole page; it loads nothing from elsewhere."""
    from conformance.report import arithmetic_text

    b, e, run = report.backend, report.environment, report.run
    is_good = report.exit_code == 0
    facts = {
        "backend": f"{b['name']}: {b['summary']}",
        "version": b["version"] or "not installed as a distribution",
        "device": f"{e['device']} (driver {e['driver'] or 'not told'}); ran {report.execution}",
        "machine": f"{e['platform']}, Python {e['python']}",
        "packages": ", ".join(f"{name} {v}" for name, v in e["packages"].items()),
        "suite": f"{report.suite['version']}, contract {'.'.join(map(str, report.suite['contract']))}",
        "run": f"{run['levels_text']}, {run['dtype']}, seed {run['seed']}, "
        f"{'quick' if run['quick'] else 'full'}, {run['start']} to {run['end']}",
        "arithmetic": arithmetic_text(report),
        "commit": e["commit"] or "not told",
    }
    if report.emulated:
        kept = ", ".join(run.get("kept", ())) or "nothing"
        facts["constraints"] = f"{run['constraints']}, emulated; of the backend's own rules stay: {kept}"
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>Conformance of {escape(b['name'])}</title><style>{_STYLE}</style>",
        f"<h1>Conformance of {escape(b['name'])}</h1>",
        f"<p class='verdict {'good' if is_good else 'bad'}'>{escape(report.verdict)}</p>",
        "<table>",
        *(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts.items()),
        "</table><h2>Levels and families</h2>",
        _matrix(report),
        "<h2>Errors against their bounds</h2>",
        *(_histogram(report, rule) for rule in ("A", "B")),
        _failures(report),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _matrix(report: Report) -> str:
    rows = []
    for level, counts in report.by_level().items():
        title = f"L{level} {LEVELS[level]}"
        if not counts:
            rows.append(f"<tr><th>{title}</th><td colspan='5' class='off'>no case</td></tr>")
            continue
        rows.append(
            f"<tr><th>{title}</th>{_cells(counts, [r for r in report.results if int(r.id[1]) == level])}</tr>"
        )
        families: dict[str, list[Result]] = {}
        for r in report.results:
            if int(r.id[1]) == level:
                families.setdefault(r.id.split("/")[1], []).append(r)
        for family, own in families.items():
            cells = _cells(Counter(r.status for r in own), own)
            rows.append(f"<tr><td>&emsp;{escape(family)}</td>{cells}</tr>")
    names = ("", "pass", "not supported", "wrong", "worst ratio", "seconds")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _cells(counts: Counter[str], own: list[Result]) -> str:
    wrong = sum(n for status, n in counts.items() if not Status(status).is_good)
    ratios = [float(r.metrics["ratio_A"]) for r in own if "ratio_A" in r.metrics]
    poor = counts[Status.QUALITY_WARNING] + counts[Status.WAIVED]
    passed = f"{counts[Status.PASS]}" + (f" <span class='poor'>+ {poor} with a remark</span>" if poor else "")
    return (
        f"<td class='n good'>{passed}</td><td class='n off'>{counts[Status.NOT_SUPPORTED] or ''}</td>"
        f"<td class='n bad'>{wrong or ''}</td><td class='n'>{f'{max(ratios):.2f}' if ratios else ''}</td>"
        f"<td class='n'>{sum(r.duration_s for r in own):.1f}</td>"
    )


def _histogram(report: Report, rule: str) -> str:
    ratios = [float(r.metrics[f"ratio_{rule}"]) for r in report.results if f"ratio_{rule}" in r.metrics]
    if not ratios:
        return f"<p class='off'>No check of rule {rule} ran.</p>"
    bins = Counter(min(int(x * _BINS), _BINS) for x in ratios)
    most = max(bins.values())
    bars = "".join(
        f"<div class='{'over' if i == _BINS else ''}' style='height:{100 * bins[i] / most:.0f}%' "
        f"title='{bins[i]} checks'></div>"
        for i in range(_BINS + 1)
    )
    return (
        f"<p>Rule {rule}: the worst element of each of {len(ratios)} checks, as a part of its bound "
        f"(largest {max(ratios):.3g}).</p><div class='bars'>{bars}</div>"
        "<div class='axis'><span>0</span><span>half of the bound</span><span>the bound, beyond</span></div>"
    )


def _failures(report: Report) -> str:
    bad = [r for r in report.results if not Status(r.status).is_good]
    if not bad:
        return "<h2>Failures</h2><p class='good'>None.</p>"
    items = []
    for r in bad:
        repeat = f"core conformance repro report.json {r.id}"
        log = f"<details><summary>log</summary><pre>{escape(r.log)}</pre></details>" if r.log else ""
        items.append(
            f"<h3><code>{escape(r.id)}</code> <span class='bad'>{escape(r.status)}</span></h3>"
            f"<p>{escape(r.message)}</p><pre>{escape(repeat)}</pre>{log}"
        )
    return f"<h2>Failures</h2>{''.join(items)}"
