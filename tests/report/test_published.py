"""Published numbers: every method has some or a reason, they obey what their definitions demand, and a wrong file is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from efface.core import catalog
from efface.core.errors import EffaceError
from efface.report.published import ORIGINAL, Published, Row, Table, published, read

GOOD = """
[provenance]
paper = "read in the paper"

[nothing]
sld = "no number is known"

[[table]]
protocol = "P"
model = "SD 1.4"
erased = "cat"
source = "S"
provenance = "paper"
not_comparable = "it is another model."
metrics = [
    { metric = "ESR-1", unit = "%", better = "higher" },
    { metric = "FID", unit = "", better = "lower" },
    { metric = "minutes", unit = "min", better = "neither" },
]
rows = [
    { method = "ap", values = [[98.63, 1.15], nan, nan] },
    { method = "un-erased", as = "SD", values = [22.1, 14, nan] },
    { method = "esd", as = "ESD-x", values = [78, -0.5, 3] },
]
"""


def test_every_method_has_numbers_or_a_reason() -> None:
    found = published()
    named = {row.method for table in found.tables for row in table.rows} - {ORIGINAL}
    assert named | set(found.nothing) == set(catalog.names())
    assert all(found.of(name) or name in found.nothing for name in catalog.names())
    assert {table.provenance for table in found.tables} == set(found.provenance)
    assert all(table.not_comparable.endswith(".") and table.source for table in found.tables)


def test_no_sentence_names_a_path_of_a_machine() -> None:
    texts = [f"{t.protocol} {t.source} {t.not_comparable} {t.n}" for t in published().tables]
    assert not [text for text in texts if "../" in text or "/work" in text]


def broken(found: Published) -> Iterator[str]:
    """Rows that contradict the definitions of their own columns."""
    for table in found.tables:
        names = [metric.name for metric in table.metrics]
        for row in table.rows:
            values = {name: value.value for name, value in zip(names, row.values, strict=True) if value}
            thresholds = [values[name] for name in names if name.startswith(("NER-", "boxes at")) and name in values]
            least = [("ESR-5", "ESR-1"), ("PSR-1", "PSR-5"), ("pre-ASR", "ASR")]
            least += [(name, name.replace("pre-", "")) for name in names if name.endswith(", pre-ASR")]
            pairs = [(values[a], values[b]) for a, b in least if {a, b} <= set(values)]
            shares = [values[m.name] for m in table.metrics if m.unit == "%" and m.name in values]
            if thresholds != sorted(thresholds, reverse=True) or any(a > b for a, b in pairs) or any(not 0 <= s <= 100 for s in shares):
                yield f"{table.source}: {row.method}"


def test_the_numbers_obey_their_definitions() -> None:
    """A higher threshold finds no more; five guesses hold the best one; an attack counts what fell without it; shares are shares."""
    assert list(broken(published())) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("[3.64, 1.70, 0.40, 0.06]", "[1.64, 1.70, 0.40, 0.06]"),
        ("[20.42, 76.05, 18.18, 0.302]", "[76.05, 20.42, 18.18, 0.302]"),
        ("[98.1, 73.6, 95.6, 16.1, 26.0]", "[98.1, 95.6, 73.6, 16.1, 26.0]"),
        ("[12.6, 63.2]", "[126, 63.2]"),
    ],
)
def test_control_numbers_that_were_mixed_up_are_found(good: str, bad: str) -> None:
    from importlib import resources

    text = (resources.files("efface.report") / "published.toml").read_text(encoding="utf-8")
    assert text.count(good) == 1
    assert len(list(broken(read(text.replace(good, bad))))) == 1


def test_a_methods_view_has_its_rows_and_the_un_erased_model() -> None:
    found = read(GOOD)
    (table,) = found.tables
    (view,) = found.of("esd")
    assert isinstance(view, Table)
    assert [row.method for row in view.rows] == [ORIGINAL, "esd"]
    assert [str(metric) for metric in view.metrics] == ["ESR-1, % ↑", "FID ↓", "minutes, min"]
    assert view.cells(view.rows[1]) == ["78.00", "−0.5", "3"]
    (narrow,) = found.of("ap")
    assert [metric.name for metric in narrow.metrics] == ["ESR-1"]
    assert [narrow.cells(row) for row in narrow.rows] == [["22.10"], ["98.63 ± 1.15"]]
    assert found.of("uce") == ()
    assert found.nothing == {"sld": "no number is known"}
    assert isinstance(table.rows[0], Row)


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ("[[table]]", "[[table]", "is no TOML"),
        ("[[table]]", "[[tables]]", "unknown key 'tables'"),
        ('source = "S"\n', "", r"table 1 lacks 'source'"),
        ('source = "S"', 'source = "S"\nsorce = "S"', "unknown key 'sorce'; did you mean 'source'"),
        ('provenance = "paper"', 'provenance = "papers"', r"\(P\) has the provenance 'papers'; did you mean 'paper'"),
        ('method = "ap"', 'method = "app"', r"names the method 'app'; did you mean 'ap'"),
        ("[78, -0.5, 3]", "[78, -0.5]", "2 values for esd; expected 3, with nan"),
        ("[78, -0.5, 3]", "[78, -0.5, 'x']", "the value 'x'; expected a number"),
        ("[78, -0.5, 3]", "[78, -0.5, [1, 2, 3]]", r"the value \[1, 2, 3\]"),
        ("[78, -0.5, 3]", "[78, -0.5, true]", "the value True"),
        ("[78, -0.5, 3]", "[nan, nan, nan]", "no value for esd; leave the row out"),
        ('better = "higher"', 'better = "more"', "expected metric, unit, and better"),
        ('sld = "no', 'ap = "no', "has numbers of 'ap' and lists it under"),
        ('sld = "no', 'un-erased = "no', "names the method 'un-erased'"),
    ],
)
def test_a_wrong_file_is_refused(good: str, bad: str, message: str) -> None:
    assert good in GOOD
    with pytest.raises(EffaceError, match=message):
        read(GOOD.replace(good, bad, 1))
