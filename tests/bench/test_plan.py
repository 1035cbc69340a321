"""Plans: the same for every method, of the promised sizes, and never asking for what was erased where it must not be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from efface.bench.emoji import UNRELATED, crowd, others
from efface.bench.log import Log
from efface.bench.plan import FIRST_SEED, SEED_STRIDE, Plan, numbered, shares
from efface.bench.protocols import erasure
from efface.concepts import resolve
from efface.concepts.vocabulary import read
from efface.core.errors import EffaceError, InvalidTask
from efface.core.evidence import Shot
from efface.core.task import Task

WORLD = read()
TASKS = ("cat", "cat; dog", "santa claus", "bomb", "fruit", "retro", "cat; retro", "cat; tiger; lion; leopard")


def plan(text: str, size: str = "quick", seed: int = 0) -> Plan:
    return erasure.plan(Task.of(text, resolve=resolve), size=size, world=WORLD, seed=seed)


@pytest.mark.parametrize("text", TASKS)
def test_a_demonstration_is_small_and_a_claim_is_large(text: str) -> None:
    quick, full = (Counter(shot.role for shot in plan(text, size).shots) for size in ("quick", "full"))
    assert 2 * quick.total() <= 450
    assert full["target"] >= 100
    assert full["neighbour"] + full["unrelated"] >= 240
    if "fruit" not in text and "leopard" not in text:  # whose whole group is erased, so that no neighbour is left
        assert full["neighbour"] + full["unrelated"] >= 300


@pytest.mark.parametrize("text", TASKS)
def test_what_is_erased_is_asked_for_in_target_and_pair_shots_alone(text: str) -> None:
    task = Task.of(text, resolve=resolve)
    erased = {concept.name for concept in task.targets}
    for shot in plan(text, "full").shots:
        assert (shot.role in ("target", "pair")) == (shot.concept in erased)
        assert set(shot.labels) <= {*WORLD.objects, *(s.name for s in WORLD.styles)}
        if shot.role not in ("target", "pair"):
            rest = shot.prompt.replace(shot.concept, "")  # a hot dog is no dog
            assert not any(f" {word} " in f" {rest} " for word in erased)


def test_neighbours_are_those_of_the_group_and_pairs_hold_both() -> None:
    shots = plan("cat").shots
    assert {s.concept for s in shots if s.role == "neighbour"} == {"tiger", "lion", "leopard"}
    for shot in (s for s in shots if s.role == "pair"):
        assert "cat" in shot.prompt.split()
        assert shot.partner in shot.prompt
        assert " beside " in shot.prompt


def test_every_record_s_plan_is_the_plan_of_today() -> None:
    """The committed records name the prompts and noise that they rest on."""
    records = Log(Path(__file__).parents[2] / "benchmarks" / "records" / "standard.jsonl.gz").read()
    found = {(r["trial"]["task"], r["trial"]["images"]): r["ground"]["prompts"] for r in records if r["trial"]["protocol"] == "erasure"}
    assert found
    for (text, size), digest in found.items():
        assert plan(text, size).digest == digest


def test_the_order_of_a_crowd_is_the_vocabulary_s_by_turns() -> None:
    names = crowd(WORLD, 50)
    groups = [group for group in WORLD.groups if group.kind == "object"]
    assert len(set(names)) == 50
    assert names[:14] == [group.objects[0] for group in groups[:14]]
    assert names[14:28] == [group.objects[1] for group in groups[:14]]
    assert [name for group in groups for name in group.objects if name in names] != names  # the control: it is not the list's own order
    for name in names:
        assert set(WORLD.neighbours(name)) - set(names)
    assert not any(WORLD.group_of(name).objects[-1] == name for name in names)


@pytest.mark.parametrize("count", [0, 61])
def test_a_crowd_that_is_empty_or_leaves_too_little(count: int) -> None:
    assert len(crowd(WORLD, 60)) == 60
    with pytest.raises(EffaceError, match=f"{count} objects were to be erased; expected 1 to 60 of the 108 of the world 'emoji'"):
        crowd(WORLD, count)


@pytest.mark.parametrize("size", ["quick", "full"])
def test_nested_tasks_can_be_judged_on_the_very_same_unrelated_pictures(size: str) -> None:
    names = crowd(WORLD, 50)
    tasks = [Task.of("; ".join(names[:count])) for count in (1, 5, 10, 25, 50)]
    apart = others(tasks[-1], WORLD, UNRELATED)
    assert len(apart) == UNRELATED
    plans = [erasure.plan(task, size=size, world=WORLD, unrelated=apart) for task in tasks]
    alone = [erasure.plan(task, size=size, world=WORLD) for task in tasks]
    same, differ = ([[(s.prompt, s.seed) for s in p.shots if s.role == "unrelated"] for p in some] for some in (plans, alone))
    assert all(shots == same[0] for shots in same)
    assert any(shots != differ[0] for shots in differ)  # the control: chosen for each task, they differ
    for task, found in zip(tasks, plans, strict=True):
        seen = {role: {s.concept for s in found.shots if s.role == role} for role in found.roles}
        targets = {concept.name for concept in task.targets}
        assert seen["target"] == targets
        assert seen["neighbour"] <= {n for name in targets for n in WORLD.neighbours(name)} - targets
        assert seen["unrelated"] == set(apart)
        assert not set(apart) & {o for name in targets for o in WORLD.group_of(name).objects}
        assert len([s for s in found.shots if s.role == "neighbour"]) == len([s for s in found.shots if s.role == "target"])


def test_named_unrelated_concepts_stand_beside_what_is_kept() -> None:
    found = erasure.plan(Task.of("cat", "dog"), world=WORLD, unrelated=["church", "rose"])
    assert {s.concept for s in found.shots if s.role == "unrelated"} == {"dog", "church", "rose"}
    anywhere = erasure.plan(Task.of("cat"), unrelated=["church", "Cat"])
    assert {s.concept for s in anywhere.shots if s.role == "unrelated"} == {"church"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("churhc", "names 'churhc', no object of the world 'emoji'; did you mean 'church'"),
        ("cat", "names 'cat', which is a target or of a target's group"),
        ("tiger", "names 'tiger', which is a target or of a target's group"),
    ],
)
def test_an_unrelated_concept_that_is_unknown_or_related(name: str, message: str) -> None:
    with pytest.raises(InvalidTask, match=message):
        erasure.plan(Task.of("cat"), world=WORLD, unrelated=["church", name])


def test_what_is_kept_is_measured() -> None:
    task = Task.of("cat", "dog,church,tiger,a zebra crossing")
    found = erasure.plan(task, world=WORLD)
    assert {"dog", "church"} <= {s.concept for s in found.shots if s.role == "unrelated"}
    assert found.unmeasured == ("'a zebra crossing' in `keep`: the bundled model and its judge do not know the word.",)


def test_a_broad_target_is_seen_in_any_of_its_members() -> None:
    targets = [s for s in plan("fruit").shots if s.role == "target"]
    assert {s.labels for s in targets} == {("apple", "banana", "grapes", "strawberry", "pineapple")}
    assert {"a fruit", "an apple on a green background"} <= {s.prompt for s in targets}


def test_a_style_is_judged_as_a_style() -> None:
    shots = plan("retro").shots
    assert {(s.role, s.kind) for s in shots if s.role != "unrelated"} == {("target", "style"), ("neighbour", "style")}
    assert all("retro" in s.prompt for s in shots if s.role == "target")


def test_prompts_take_many_forms() -> None:
    targets = [s.prompt for s in plan("cat", "full").shots if s.role == "target"]
    assert len(set(targets)) > 60
    for style in WORLD.styles:
        assert any(f" {style.name} " in f" {prompt} " for prompt in targets)
    for background in WORLD.backgrounds:
        assert any(f"{background.name} background" in prompt for prompt in targets)


def test_seeds_are_unique_far_from_those_of_fits_and_a_function_of_the_seed() -> None:
    first, again, other = plan("cat"), plan("cat"), plan("cat", seed=1)
    seeds = [shot.seed for shot in first.shots]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= FIRST_SEED
    assert first == again
    assert first.digest == again.digest != other.digest
    assert not set(seeds) & {shot.seed for shot in other.shots}


def test_the_first_shots_of_a_role_show_different_concepts() -> None:
    found = plan("cat")
    shown = [found.shots[i] for i in found.shown(8)]
    assert Counter(s.role for s in shown) == {"target": 8, "neighbour": 8, "unrelated": 8, "pair": 8}
    assert len({s.concept for s in shown if s.role == "unrelated"}) == 8


@pytest.mark.parametrize(
    ("task", "message"), [(Task.of("kat"), "no object 'kat'; did you mean 'cat'"), (Task.of("style:cat"), "no style 'cat'")]
)
def test_a_target_that_the_world_does_not_know(task: Task, message: str) -> None:
    with pytest.raises(InvalidTask, match=message):
        erasure.plan(task, world=WORLD)


def test_a_size_or_seed_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="size was 'huge'; expected one of quick, full"):
        plan("cat", "huge")
    with pytest.raises(ValueError, match="seed was -1"):
        plan("cat", seed=-1)
    with pytest.raises(ValueError, match="100001 shots"):
        numbered([Shot("a cat", 0, "target", "cat")] * (SEED_STRIDE + 1), 0)


def test_any_other_model_gets_general_prompts() -> None:
    task = Task.of("cat; style:van gogh; identity:Santa Claus", "dog")
    found = erasure.plan(task)
    assert found.name == "erasure/general/quick"
    assert found.roles == ("target", "kept", "unrelated", "pair")
    assert "a photo of a cat" in {s.prompt for s in found.shots}
    assert not any(s.concept == "dog" for s in found.shots if s.role == "unrelated")
    assert all("Santa Claus" in s.prompt for s in found.shots if s.concept == "Santa Claus")


def test_shares_are_even() -> None:
    for total in (0, 1, 7, 60):
        for parts in (1, 3, 8):
            found = shares(total, parts)
            assert sum(found) == total
            assert max(found) - min(found) <= 1


def test_a_picture_that_is_asked_two_questions_is_shown_once() -> None:
    twice = [Shot("a feline", 7, "target", "cat", ("cat",), "object"), Shot("a feline", 7, "neighbour", "feline", ("lion",), "object")]
    other = Shot("a feline", 8, "neighbour", "feline", ("lion",), "object")
    assert Plan("p", tuple(twice)).shown() == (0,)
    assert Plan("p", (*twice, other)).shown() == (0, 2)
