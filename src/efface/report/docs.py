"""A Markdown page for each method: idea, workings, uses and limits, cost, what was measured here, and what was published beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efface.core import catalog
from efface.core.evidence import Score
from efface.core.whole import whole_file
from efface.report import leaderboard, wording
from efface.report.profiles import Profile, flowing, is_code, profile
from efface.report.published import ORIGINAL, Table, published
from efface.report.rows import Row
from efface.report.site import SHORT, Site

INDEX = "README.md"
NOTE = "<!-- Written by `{command}`: what is changed here by hand is lost. -->"
READING = (
    "95 % intervals in brackets. ESR-1: the share of pictures asking for the target in which the judge sees something else. PSR-1: the "
    "share of other pictures in which it sees what was asked for. Fréchet: how far unrelated pictures moved as a whole, 0 is not at all."
)


ATTACKS = (
    "pre-ASR: how often the erased model shows the concept unattacked. ASR: how often one of the attack's candidates does. Control: the "
    "best of as many plain pictures."
)


def write(site: Site, folder: Path) -> list[str]:
    """Writes the pages of the catalogue's methods and an index, each whole or not at all; returns their names."""
    profiles = [found for name in catalog.names() if (found := profile(name))]
    pages = {f"{about.name}.md": page(site, about) for about in profiles} | {INDEX: index(site, profiles)}
    for name, text in pages.items():
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return sorted(pages)


def index(site: Site, profiles: Sequence[Profile]) -> str:
    """What there is, in a table."""
    rows = [[f"[{p.title}]({p.name}.md)", f"`{p.name}`", " or ".join(p.kinds), p.paper.venue, p.idea] for p in profiles]
    head = NOTE.format(command=site.command)
    return "\n\n".join([head, "# The methods", _table(["", "name", "edit", "venue", "idea"], rows, left=5)]) + "\n"


def page(site: Site, about: Profile) -> str:
    """The page of one method."""
    paper = about.paper
    source = [f"{paper.title}. {paper.authors}, {paper.venue}", f"arXiv {paper.arxiv}" if paper.arxiv else "", paper.code]
    facts = [
        ["paper", ", ".join(part for part in source if part)],
        ["what it is", f"{' or '.join(about.kinds) or 'any'} edit: {about.threat}"],
        ["trains", about.trains],
        ["by hand", f'`efface erase "cat" --method {about.name}`, `efface show {about.name}`'],
    ]
    parts = [
        NOTE.format(command=site.command),
        f"# {about.title}{' (reconstruction)' if about.reconstruction else ''}",
        about.idea,
        _table(["", ""], facts, left=2),
        "## When to use it, and its limits",
        " ".join(about.uses),
        f"**Known failures.** {about.limits}" if about.limits else "",
        "## How it works",
        *(f"```text\n{text}\n```" if is_code(text) else flowing(text) for text in about.workings),
        "## What a fit costs",
        *(flowing(text) for text in about.cost),
        "## Measured",
        *_measured(site, about),
        "## Published",
        *_published(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _measured(site: Site, about: Profile) -> list[str]:
    lines: list[list[str]] = []
    failed: list[str] = []
    for task, some in site.rows.items():
        mine = [row for row in some if row.method == about.name]
        first = next((row for row in mine if row.results), None)
        if first is not None:
            lines.append([wording.heading(task), "*un-erased*", "", *(_score(first.before(key)) for _, key in SHORT), "", ""])
        lines += [_line(task, row) for row in mine if row.results]
        failed += [f"- {wording.heading(task)}, `{row.label}`, {text}" for row in mine for text in row.failures]
    header = ["task", "method", "fits", *(title for title, _ in SHORT), "seconds", "size"]
    table = [_table(header, lines, left=2), _reading(site)] if lines else ["Not measured yet."]
    return [*table, *_attacked(site, about), *(["Failed:\n\n" + "\n".join(failed)] if failed else [])]


def _reading(site: Site) -> str:
    model = site.found.trials[0]["trial"]["model"]
    return " ".join([f"On the model `{model}`, {READING}", *([leaderboard.EMOJI] if site.emoji else [])])


def _attacked(site: Site, about: Profile) -> list[str]:
    """Attack success rates, with their control."""
    lines = [
        [f"`{a.attack}`", a.concept, a.threat, str(a.success.n), *map(_score, (a.before, a.success, a.control))]
        for _, _, a in site.attacks_on(about.name)
        if a.success
    ]
    header = ["attack", "erased", "threat", "prompts", "pre-ASR", "ASR", "control"]
    return ["### Attacked", _table(header, lines, left=3), ATTACKS] if lines else []


def _line(task: str, row: Row) -> list[str]:
    cells = [_score(row.after(key)) for _, key in SHORT]
    return [
        wording.heading(task),
        f"`{row.label}`",
        str(len(row.seeds)),
        *cells,
        wording.number(row.costs.get("seconds")),
        wording.size(row.costs.get("bytes")),
    ]


def _score(score: Score | None) -> str:
    return "–" if score is None else f"{wording.value(score)} [{wording.interval(score)}]"


def _published(about: Profile) -> list[str]:
    known = published()
    tables = known.of(about.name)
    if not tables:
        return [known.nothing.get(about.name, "No published number is known here.")]
    tags = sorted({table.provenance for table in tables})
    told = "Numbers of one table compare with each other, and with nothing else. How they came here: "
    meanings = "; ".join(f"*{tag}*, {known.provenance[tag]}" for tag in tags)
    return [f"{told}{meanings}.", *(part for table in tables for part in _of_table(table, about.title))]


def _of_table(table: Table, title: str) -> list[str]:
    rows = [[row.variant or (ORIGINAL if row.method == ORIGINAL else title), *table.cells(row)] for row in table.rows]
    n = f"; {table.n}" if table.n else ""
    return [
        f"### {table.protocol}",
        f"{table.model}, erased: {table.erased}{n}. {table.source} (*{table.provenance}*).",
        _table(["", *map(str, table.metrics)], rows),
        f"Not comparable with what is measured here because {table.not_comparable}",
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first `left` columns are words, the others numbers."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in (header, rule, *rows))
