"""The impact matrix: what is drawn, what Δ is, what it comes to, the fixed targets, and its picture."""

from dataclasses import dataclass

import pytest
import torch
from benchparts import WORLD, Brightness

from efface.bench.draw import Judges, draw
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import impact
from efface.bench.protocols.impact import Cell, Impact, baselines, fitted, listed, measure, members, plan
from efface.core import catalog
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Contrast, Detector, Sighting
from efface.core.task import Task
from efface.evals.detectors.imagenet import ImageNet
from efface.models import tiny
from efface.report import figures

GROUPS = {"feline": ("cat", "tiger"), "boat": ("ship", "canoe")}
ROWS = {"cat": (20, 10, 1, 0), "ship": (2, 0, 18, 4), "tiger": (4, 20, 0, 1)}
LOST = {(erased, name): lost for erased, row in ROWS.items() for name, lost in zip(("cat", "tiger", "ship", "canoe"), row, strict=True)}
"""Of 20 pictures that all showed the concept."""


@pytest.fixture
def known() -> Impact:
    before, prompts = [True] * 20, [str(i) for i in range(20)]
    contrasts = {pair: Contrast.shares("DS-5", before, [i >= n for i in range(20)], prompts, "neither") for pair, n in LOST.items()}
    return Impact(GROUPS, tuple(Cell(*pair, contrast) for pair, contrast in contrasts.items()), 5, "uce")


def test_impact_is_the_share_lost_on_the_diagonal_within_and_across(known):
    assert known.cell("cat", "tiger").impact == pytest.approx(0.5)
    assert known.erasure == pytest.approx((1 + 0.9 + 1) / 3)
    assert known.within == pytest.approx((0.5 + 0.2 + 0.2) / 3)
    assert known.across == pytest.approx((0.05 + 0 + 0.1 + 0 + 0 + 0.05) / 6)
    assert known.asymmetry == pytest.approx((0.3 + 0.05 + 0) / 3)  # cat and tiger, cat and ship, ship and tiger
    data = known.json()
    assert data["means"]["within"] == known.within
    assert len(data["cells"]) == 12
    assert all(row["change"]["low"] <= row["change"]["value"] <= row["change"]["high"] for row in data["cells"])
    assert Impact(GROUPS, known.cells[:1], 5, "uce").json()["means"] == {"erasure": 1.0, "within": None, "across": None, "asymmetry": None}
    with pytest.raises(KeyError, match="erasing 'canoe' on 'cat' was not measured"):
        known.cell("canoe", "cat")


def test_the_heat_map_has_a_row_for_each_erasure_and_says_what_was_seen_before(known):
    values = figures.matrix(known)
    assert values.shape == (3, 4)
    assert values[0].tolist() == pytest.approx([1.0, 0.5, 0.05, 0.0])
    assert values[2].tolist() == pytest.approx([0.2, 1.0, 0.0, 0.05])
    svg = figures.impact(known)
    assert svg == figures.impact(known)
    assert all(f">{text}<" in svg for text in ("cat  100", "canoe  100", "tiger", "ship", "50", "90"))
    assert ">5<" not in svg  # too little to be written
    partly = Impact(GROUPS, known.cells[:7], 5, "uce")
    assert torch.isnan(figures.matrix(partly)).sum() == 1
    assert "<svg" in figures.impact(partly)


def test_every_object_of_the_groups_is_drawn_as_often():
    found = plan(WORLD, ["feline", "boat"], each=6, seed=1)
    counts = [sum(shot.concept == name for shot in found.shots) for name in ("cat", "tiger", "lion", "leopard", "ship")]
    assert counts == [6] * 5
    assert len({shot.seed for shot in found.shots}) == len(found.shots) == 6 * 8
    assert all(shot.labels == (shot.concept,) and shot.concept in shot.prompt for shot in found.shots)
    again, other = (plan(WORLD, ["feline", "boat"], each=6, seed=seed).digest for seed in (1, 2))
    assert found.digest == again != other
    assert len(plan(WORLD).shots) == 20 * len(impact.objects(WORLD, impact.NETFIVE))
    for groups, message in ((["cat"], "'cat' is no neighbour group; the groups are feline"), (["felines"], "did you mean 'feline'")):
        with pytest.raises(InvalidTask, match=message):
            plan(WORLD, groups)
    with pytest.raises(ValueError, match="each was 0; expected at least one"):
        plan(WORLD, each=0)


def test_the_fixed_targets_are_anchors_of_the_same_erasure():
    assert {sort: str(task) for sort, task in baselines(WORLD, "cat", synonym="kitten").items()} == {
        "synonym": "cat -> kitten",
        "neighbour": "cat -> tiger",
        "general": "cat -> feline",
        "unrelated": "cat -> dog",
        "empty": "cat",
    }
    assert "synonym" not in baselines(WORLD, "cat")
    assert str(baselines(WORLD, "skull")["unrelated"]) == "skull -> cat"
    assert baselines(WORLD, "bomb")["empty"].targets[0].kind == "unsafe"
    with pytest.raises(InvalidTask, match="'feline' is no object"):
        baselines(WORLD, "feline")


def test_all_is_measured_on_the_same_noise_and_the_model_is_as_it_was():
    model, groups = tiny.model("sd1"), ["boat"]
    full = plan(WORLD, groups, each=2)
    small = Plan(full.name, full.shots, full.seed, 2)
    before = draw(model, small, Judges(Brightness())).samples
    method, targets = catalog.method("uce"), ("ship", "canoe")
    neighbours = members(WORLD, groups)
    found = measure(model, fitted(model, method, map(Task.of, targets)), neighbours, plan=small, detector=Brightness(), k=2)
    assert (found.erased, found.concepts) == (targets, ("sailboat", "ship", "canoe", "speedboat"))
    assert len(found.cells) == 8
    with method.fit(model, Task.of("ship")).attach(model):
        after = draw(model, small, Judges(Brightness())).samples
    for name in found.concepts:
        rows = [i for i, shot in enumerate(small.shots) if shot.concept == name]
        first, second = (sum(side.sightings[i].shows([name], 2) for i in rows) / 2 for side in (before, after))
        assert found.before(name).value == first
        assert found.cell("ship", name).impact == pytest.approx(first - second)
    again = draw(model, small, Judges(Brightness())).samples
    assert torch.equal(before.images, again.images)
    with pytest.raises(EffaceError, match="no edit was given"):
        measure(model, [], neighbours, plan=small, detector=Brightness())


@dataclass(frozen=True)
class Sees(Detector):
    """Always the same labels in their order."""

    found: tuple[str, ...]
    name = "sees"
    version = "1"

    def labels(self, kind="object"):
        return self.found

    def threshold(self, kind="object"):
        return 0.0

    def look(self, images, kind="object"):
        return [Sighting(self.found, tuple(1 / (i + 1) for i in range(len(self.found))), 0.0) for _ in images]


FILE = """case_number,prompt,label_str,evaluation_seed
0,a photo of Church,Church,5
1,a photo of Church,Church,6
2,a photo of Monastery,Monastery,7
3,a photo of Saxophone,Saxophone,8
4,a photo of Basson,Basson,9
5,a photo of Cat,Cat,10
"""


def test_a_file_of_classes_is_measured_with_any_model(tmp_path, monkeypatch):
    """The authors' file, with its slip and with the classes that ResNet-50 has under another name."""
    judge = Sees(("church", "sax", "bassoon", "cat", "clumber", "monastery"))
    monkeypatch.setattr(ImageNet, "load", lambda path="": judge)
    file = tmp_path / "netfive.csv"
    file.write_text(FILE, encoding="utf-8")
    found, detector, groups = listed(Options(prompts=str(file), steps=2))
    assert groups == {"wind instrument": ("bassoon", "saxophone"), "building": ("church", "monastery"), "cat": ("cat",)}
    assert [(shot.concept, *shot.labels, shot.seed) for shot in found.shots] == [
        ("church", "church", 5),
        ("church", "church", 6),
        ("monastery", "monastery", 7),
        ("saxophone", "sax", 8),
        ("bassoon", "bassoon", 9),
        ("cat", "cat", 10),
    ]
    assert found.cases == (0, 1, 2, 3, 4, 5)
    assert detector is judge
    model = tiny.model("sd1")
    matrix = measure(model, fitted(model, catalog.method("uce"), [Task.of("church")]), groups, plan=found, detector=detector)
    assert matrix.erased == ("church",)
    assert matrix.concepts == ("bassoon", "saxophone", "church", "monastery", "cat")
    before = {cell.concept: (cell.contrast.before.value, cell.contrast.before.n) for cell in matrix.cells}
    assert before == {"bassoon": (1, 1), "saxophone": (1, 1), "church": (1, 2), "monastery": (0, 1), "cat": (1, 1)}  # among the best five
    with pytest.raises(EffaceError, match="draws a file of prompts, and none was given"):
        listed(Options())


def test_the_papers_groups_are_known_and_no_class_stands_twice():
    names = [name for group in impact.IMAGENET.values() for name in group]
    assert len(names) == len(set(names)) == 25
    assert set(impact.RESNET) <= set(names)
    assert set(impact.SLIPS.values()) <= set(names)
