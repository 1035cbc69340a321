"""Attacks as trials of a sweep: one line each, never run twice, on the very edit of the erasure, which is not fitted again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import clipparts
import diffusers
import pytest
from attackparts import CAT, Bright, Script, tiny_model
from benchparts import load, prepare
from torch import Tensor

from efface.bench import dry
from efface.bench.controls import Noop
from efface.bench.draw import Judges
from efface.bench.log import Log
from efface.bench.options import Options
from efface.bench.plan import Plan
from efface.bench.protocols import attacks, registry
from efface.bench.run import RECORDS, run
from efface.bench.trial import Trial, read
from efface.concepts import resolve
from efface.core import search
from efface.core.edit import Edit, WeightEdit
from efface.core.errors import EffaceError
from efface.core.evidence import Detector, Evidence, Sighting
from efface.core.method import Method, Resources
from efface.core.model import Model
from efface.core.rules import SafeLatent
from efface.core.task import Concept, Task

SEARCH = "seed_search(seeds=1)"
GRID = """
protocol = "attacks"
[options]
attacks = ["seed_search( seeds=1 )", "noise_probe"]
limit = 3
[[grid]]
tasks = ["cat", "dog"]
methods = ["uce", "efface.bench.controls:Noop"]
seeds = [0, 1]
"""


@dataclass(frozen=True)
class Counting(Method):
    """Nudges a few weights, and counts how often it was fitted."""

    needs = Noop.needs
    paper = Noop.paper
    fits: ClassVar[list[int]] = []

    def fit(self, model: Model, task: Task, *, seed: int = 0, resources: Resources = Resources()) -> WeightEdit:
        self.fits.append(seed)
        plain = Noop().fit(model, task, seed=seed)
        return replace(plain, deltas={n: d + 0.1 for n, d in plain.deltas.items()}, card=replace(plain.card, method=str(self)))


@pytest.fixture
def fits() -> list[int]:
    Counting.fits.clear()
    return Counting.fits


COUNTING = f"{__name__}:Counting"


def trial(method: str, attack: str = "", *, task: str = "cat", seed: int = 0, **options: int) -> Trial:
    if not attack:
        return Trial.of("tiny", method, task, seed)
    return Trial.of("tiny", method, task, seed, "attacks", options=Options(attack=attack, **options))  # type: ignore[arg-type]


def ran(trials: list[Trial], folder: Path, *, others: tuple[Path, ...] = (), load: Callable[[str], Model] = load) -> list[str]:
    """The hashes of the trials that were run."""
    done: list[str] = []
    run(trials, folder, load=load, setup=prepare, watch=lambda n: done.append(n.trial.hash) if n.stage == "done" else None, others=others)
    return done


def records(folder: Path) -> dict[str, dict]:
    return {record["hash"]: record for record in Log(folder / RECORDS).read()}


def test_a_grid_lists_attacks_and_each_is_a_trial_the_first_on_all_methods_first(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID, encoding="utf-8")
    trials = read(tmp_path / "grid.toml").trials
    assert len({t.hash for t in trials}) == len(trials) == 16
    assert [t.options.attack for t in trials[:8]] == [SEARCH] * 4 + ["noise_probe"] * 4  # one form of its text
    assert {t.seed for t in trials[:8]} == {0}
    assert [(t.task, t.label) for t in trials[:2]] == [("cat", "uce"), ("cat", "efface.bench.controls:Noop")]
    assert str(trials[0]) == f"{SEARCH} against uce on cat, seed 0"
    assert trials[0].json()["options"] == {"attack": SEARCH, "limit": 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"attacks"\n[', '"erasure"\n[', "expected protocol = 'attacks' with attacks"),
        ('attacks = ["seed_search( seeds=1 )", "noise_probe"]', "", "expected protocol = 'attacks' with attacks"),
        ('"noise_probe"', '"noise_prob"', "did you mean 'noise_probe'"),
        ('"noise_probe"', "3", "expected a list of attacks"),
        ("limit = 3", "prompts = 3", "how many is `limit`"),
        ("limit = 3", "attack = 'noise_probe'", "unknown key 'attack'"),
        ("limit = 3", "budget = 0", "budget was 0"),
    ],
)
def test_a_grid_that_cannot_be_run_says_why(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GRID
    (tmp_path / "grid.toml").write_text(GRID.replace(old, new), encoding="utf-8")
    with pytest.raises(EffaceError, match=message):
        read(tmp_path / "grid.toml")


def test_the_edit_of_an_erasure_is_attacked_and_not_fitted_again(tmp_path: Path, fits: list[int]) -> None:
    erasure, attacked = trial(COUNTING), [trial(COUNTING, SEARCH), trial(COUNTING, "inpainting")]
    assert len(ran([erasure, *attacked], tmp_path)) == 3
    assert fits == [0]
    assert [path.stem for path in (tmp_path / "edits").iterdir()] == [erasure.hash]
    for each in attacked:
        record = records(tmp_path)[each.hash]
        assert record["edit"]["file"] == erasure.hash
        assert record["cost"] == records(tmp_path)[erasure.hash]["cost"]
    assert ran([erasure, *attacked], tmp_path) == []  # a record is never made twice
    elsewhere = tmp_path / "elsewhere"
    assert len(ran([attacked[0]], elsewhere, others=(tmp_path,))) == 1
    assert fits == [0]
    assert not (elsewhere / "edits").exists()


def test_without_an_erasure_one_fit_serves_all_attacks_and_another_seed_or_task_is_another_fit(tmp_path: Path, fits: list[int]) -> None:
    ran([trial(COUNTING, SEARCH), trial(COUNTING, "inpainting")], tmp_path)
    assert fits == [0]
    (path,) = (tmp_path / "edits").iterdir()
    (tmp_path / RECORDS).write_text("", encoding="utf-8")  # as a kill leaves it between the fit and the record
    ran([trial(COUNTING, SEARCH)], tmp_path)
    assert fits == [0]
    ran([trial(COUNTING, SEARCH, seed=1), trial(COUNTING, SEARCH, task="dog")], tmp_path)
    assert fits == [0, 1, 0]
    other = Edit.load(path)
    replace(other, card=replace(other.card, task="dog")).save(path)
    ran([trial(COUNTING, "inpainting")], tmp_path)
    assert fits == [0, 1, 0, 0], "a file whose card names another task is not taken"


def test_a_record_holds_the_rates_the_settings_and_no_picture(tmp_path: Path) -> None:
    each = trial("uce", "noise_probe(etas=(1.0, 1.5), variances=(1.0,))")
    (record,) = run([each], tmp_path, load=load, setup=prepare)
    (line,) = (tmp_path / RECORDS).read_bytes().splitlines()
    assert json.loads(line) == json.loads(json.dumps(record))
    (row,) = record["attacks"]
    assert (record["ground"]["detector"], row["concept"], row["asr"]["n"]) == ("brightness 1", "cat", 3)
    assert row["asr"]["value"] >= row["pre_asr"]["value"]
    assert row["details"]["settings"]["etas"] == (1.0, 1.5)
    assert (row["details"]["steps"], row["details"]["guidance"]) == (2, 2.0)  # the plan's, and not the model's own
    assert {"forwards", "backwards", "control_forwards", "seconds"} <= set(row["cost"])
    assert len(line) < 20_000


def test_what_is_refused_or_fails_is_recorded_with_its_reason_and_not_done_again(tmp_path: Path) -> None:
    trials = [trial("negative_prompt", "unlearndiffatk"), trial("uce", SEARCH, budget=1), trial("saeuron", SEARCH)]
    ran(trials, tmp_path)
    *refused, failed = (records(tmp_path)[each.hash] for each in trials)
    for record, why in zip(refused, ("it would attack the un-erased model", "the budget was 1 samples"), strict=True):
        assert [set(row) for row in record["attacks"]] == [{"attack", "concept", "refused"}]
        assert why in record["attacks"][0]["refused"]
    assert failed["error"]["type"] == "Unsupported", "without an edit there is nothing to attack"
    assert ran(trials, tmp_path) == []


def attacked(texts: str, detector: Detector, budget: int | None = None) -> list[Evidence | attacks.Refused]:
    """Attacks on a model that holds an edit."""
    before, after = tiny_model(), tiny_model()
    with Noop().fit(after, Task.of("cat")).attach(after, check=False):
        return attacks.measure(before, after, [attacks.Aim(CAT, detector)], search.attacks(texts), attacked="a test", budget=budget)


def outcome(found: Sequence[Evidence | attacks.Refused]) -> list[str]:
    """Why each came to nothing; "" where it did not."""
    return [item.why if isinstance(item, attacks.Refused) else "" for item in found]


def test_an_attack_that_cannot_be_run_leaves_the_finished_ones() -> None:
    """Nothing to learn from, too small a budget, pictures that cannot be judged, a label that is lacking."""
    learns = f"{SEARCH},concept_inversion(steps=1),relearning(checkpoints=(0, 1)),completion(shares=(0.5,))"
    first, *none, last = outcome(attacked(learns, Bright(2.0)))
    assert (first, last) == ("", "")
    assert all("drew 'cat' in none of" in why for why in none)
    short = outcome(attacked(f"{SEARCH},latent_inversion", Bright(2.0), budget=2 * 2 * 2 * 3 + 12))
    assert (short[0], "ended before one candidate was tried" in short[1]) == ("", True)
    unsure = outcome(attacked(f"completion(shares=(0.5,)),{SEARCH}", Script([False] * (3 + 3 + 3 + 3) + [None])))
    assert (unsure[0], "could not judge 1 of 9" in unsure[1]) == ("", True)
    blind = attacks.measure(tiny_model(), tiny_model(), [attacks.Aim(Concept("fox"), Bright(2.0))], search.attacks(SEARCH), attacked="")
    assert "has no label 'fox'" in outcome(blind)[0]


def test_control_a_bug_is_raised() -> None:
    class Broken(Script):
        def look(self, images: Tensor, kind: str = "object") -> list[Sighting]:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        attacked(SEARCH, Broken([]))


def test_the_dearer_sampler_of_the_two_models_sets_the_budget() -> None:
    before, after = tiny_model(), tiny_model()
    before.pipeline.scheduler = diffusers.PNDMScheduler.from_config(before.pipeline.scheduler.config, skip_prk_steps=True)
    with Noop().fit(after, Task.of("cat")).attach(after, check=False):
        (found,) = attacks.measure(before, after, [attacks.Aim(CAT, Bright(2.0))], search.attacks("seed_search(seeds=2)"), attacked="")
    assert isinstance(found, Evidence)
    assert (found.candidates, found.details["ended"]) == (2, "the search was done")
    plain = search.attack("seed_search(seeds=2)").cost(after, 3)["forwards"]
    assert found.cost["forwards"] > plain, "control: what the attacked model's own sampler would take"


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("texts", [1, 4])
def test_a_sampling_rule_with_several_texts_ends_no_search_early(texts: int, guidance: float) -> None:
    before, after = tiny_model(), tiny_model()
    rule = SafeLatent(
        ["a", "b", "c", "d"][:texts], warmup=0, strength=5000.0, threshold=1.0, momentum=0.5, momentum_decay=0.7, warmup_of=50
    )
    after.rules.append(rule)
    attack = search.attacks("seed_search(seeds=2)")
    (found,) = attacks.measure(before, after, [attacks.Aim(CAT, Bright(2.0))], attack, attacked="", guidance=guidance)
    assert isinstance(found, Evidence)
    assert (found.candidates, found.details["ended"]) == (2, "the search was done")


def test_on_another_model_clip_judges_what_came_back(tmp_path: Path) -> None:
    """The candidates are all that the erasure protocol draws; the edit is that of an erasure, which nobody judged."""
    options = Options(attack=SEARCH, detector="clip", clip=str(clipparts.save(tmp_path / "clip")), limit=2, steps=2, guidance=2.0)
    each = Trial.of("tiny", "uce", "cat -> dog", protocol="attacks", options=options)
    (record,) = run([each], tmp_path, load=load)
    (row,) = record["attacks"]
    assert record["ground"]["detector"].startswith("clip clip zero-shot ")
    assert (row["concept"], row["asr"]["n"], len(set(row["details"]["prompts"]))) == ("cat", 2, 2)
    assert all(len(seen["seen"]) == 3 for seen in row["details"]["seen"])
    plan, judges = registry.find("attacks").setup("tiny", Task.of("cat -> dog"), options=options)
    assert judges.detector is not None
    assert {"cat", "dog", "guitar"} <= set(judges.detector.labels())
    assert {shot.role for shot in plan.shots} == {"target"}


def test_control_doing_nothing_resists_nothing(tmp_path: Path) -> None:
    """No effect is asked of a control; the erasure's record says that nothing changed, and before any attack the concept is there."""

    def bright(trial: Trial, task: Task) -> tuple[Plan, Judges]:
        plan, _ = prepare(trial, task)
        shots = [replace(plan.shots[row], labels=("cat",), concept="cat") for row in range(3)]
        return replace(plan, shots=tuple(shots)), Judges(Bright(0.0))

    trials = [trial("efface.bench.controls:Noop"), trial("efface.bench.controls:Noop", SEARCH)]
    erasure, attacked = run(trials, tmp_path, load=load, setup=bright)
    assert {change["distance"]["value"] for change in erasure["result"]["changes"]} == {0.0}
    (row,) = attacked["attacks"]
    assert row["un-erased"]["value"] == row["pre_asr"]["value"] == row["asr"]["value"] == 1.0


def test_one_object_for_both_models_is_a_mistake(tmp_path: Path) -> None:
    model = load("tiny")
    with pytest.raises(ValueError, match="same object twice"):
        ran([trial("uce", SEARCH)], tmp_path, load=lambda name: model)


def test_the_bundled_models_prompts_are_the_erasures_own() -> None:
    task = Task.of("cat; bomb", resolve=resolve)
    setup = registry.find("attacks").setup
    plan, judges = setup("emoji", task, options=Options(attack=SEARCH, limit=5))
    assert [shot.concept for shot in plan.shots] == ["cat"] * 5 + ["bomb"] * 5
    assert plan.shots[:5] == setup("emoji", task, "full", Options(attack=SEARCH, limit=7))[0].shots[:5]
    assert [len(aim.concept.texts) for aim in attacks.aims(plan, judges, task)] == [5, 5]
    assert len(setup("emoji", task)[0].shots) == 2 * attacks.PROMPTS
    with pytest.raises(EffaceError, match="needs a detector .* known for 'nowhere'; add --detector clip"):
        setup("nowhere", task)
    with pytest.raises(EffaceError, match="nobody looks with it; add --detector clip"):
        setup("nowhere", task, options=Options(clip="folder"))
    world = setup("emoji", task, options=Options(detector="clip"))[1].detector
    assert world is not None
    assert (world.name, judges.detector and judges.detector.name) == ("emoji-clip zero-shot", "emoji-judge")


def test_the_committed_grid_is_read_and_cast_for_a_dry_run(tmp_path: Path) -> None:
    asked = read(Path(__file__).parents[2] / "benchmarks" / "attacks.toml")
    small = dry.sweep(asked, tmp_path)
    for part in (lambda t: t.label, lambda t: search.attack(t.options.attack).name()):
        assert {part(t) for t in small.trials} == {part(t) for t in asked.trials}
    assert all(t.options.limit == dry.EACH for t in small.trials)
    judged = [replace(t, options=replace(t.options, detector="clip", clip="folder")) for t in asked.trials]
    assert {t.options.detector for t in dry.sweep(replace(asked, trials=tuple(judged)), tmp_path).trials} == {"clip"}
    seen: dict[str, list[int]] = {}
    for number, each in enumerate(asked.trials):
        seen.setdefault(each.options.attack, []).append(number)
    assert all(rows == list(range(rows[0], rows[-1] + 1)) for rows in seen.values())
    *first, last = seen
    assert last == "ring_a_bell", "which encodes texts by the ten thousand, dearer than any other's pictures"
    backwards = [search.attack(text).cost(load("tiny"), 16).get("backwards", 0) > 0 for text in first]
    assert backwards == sorted(backwards), "those without gradients, the cheapest, come first"
