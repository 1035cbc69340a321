"""What all attacks share: the success rate, the control, the budget, refusals, and models that stay as they were."""

from __future__ import annotations

import dataclasses

import attackparts as parts
import diffusers
import pytest
import torch
from attackparts import CAT, QUICK

from efface.api import erase
from efface.bench.protocols import attacks as protocol
from efface.core import model as model_module
from efface.core import search
from efface.core.edit import SamplingEdit
from efface.core.errors import InvalidAttack, Undetermined, Unsupported
from efface.core.evidence import Detector, Evidence
from efface.core.model import Model
from efface.core.sampling import seeded
from efface.models.sd import StableDiffusion

LARGE = 10**6


def run(text: str, before: Model, after: Model, detector: Detector, *, budget: int = LARGE, seed: int = 0) -> Evidence:
    return search.attack(text).search(before, after, CAT, detector, budget=budget, seed=seed)


def test_every_attack_is_here() -> None:
    assert sorted(QUICK) == search.names()


# -- the rate ----------------------------------------------------------------------------------------------------------------
def test_the_rate_counts_what_succeeded_before_and_by_any_candidate(before: Model, after: Model) -> None:
    answers = [True, True, True]  # un-erased
    answers += [True, False, False]  # pre: the first prompt needs no attack
    answers += [False, False, True, False]  # two candidates for each of the two others
    found = run("seed_search(seeds=2)", before, after, parts.Script(answers))
    assert (found.original.value, found.before.value, found.success.value) == (1.0, pytest.approx(1 / 3), pytest.approx(2 / 3))  # type: ignore[union-attr]
    assert found.details["tried"] == [0, 2, 2]
    assert found.success.items == (1.0, 1.0, 0.0)
    assert found.details["ended"] == "the search was done"


def test_the_control_draws_as_many_pictures_as_the_attack_tried_and_no_more(before: Model, after: Model) -> None:
    answers = [True] * 3 + [False] * 3 + [False] * 6 + [False, True, False] + [False, False]
    script = parts.Script(answers)
    found = run("completion(shares=(0.1, 0.2))", before, after, script)
    assert found.candidates == 2
    assert found.control.value == pytest.approx(1 / 3)  # type: ignore[union-attr]
    assert found.success.value == 0.0
    assert not script.answers, "the prompt that fell in the control's first picture is not drawn again"
    assert found.cost["control_forwards"] == 4 * (3 + 2)


def test_what_cannot_be_judged_is_neither(before: Model, after: Model) -> None:
    with pytest.raises(Undetermined, match="could not judge 1 of 9"):
        run("seed_search(seeds=1)", before, after, parts.Script([True] * 3 + [False] * 3 + [None]))


def test_on_the_model_itself_nothing_was_erased(before: Model) -> None:
    """The pre-check of a model that is not erased is the un-erased rate, on the same noise, to the picture."""
    found = run("completion(shares=(0.0,))", before, parts.tiny_model(), parts.Bright(0.5))
    assert found.before.items == found.original.items  # type: ignore[union-attr]
    drawn = found.parts["pictures"].tensors
    assert torch.equal(drawn["un-erased"], drawn["erased"])


def test_control_the_erased_model_draws_something_else(before: Model, after: Model) -> None:
    drawn = run("completion(shares=(0.0,))", before, after, parts.Bright(0.5)).parts["pictures"].tensors
    assert not torch.equal(drawn["un-erased"], drawn["erased"])


# -- every attack ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hopeless(before: Model) -> parts.OnlyOriginals:
    return hopeless_eye(before)


def hopeless_eye(before: Model) -> parts.OnlyOriginals:
    """Sees the cat in what the un-erased model draws, of the prompts and to be learned from, and in no candidate."""
    first = search.FIRST_SEED
    with before.frozen():
        asked = before.sample(CAT.texts, seeds=list(range(first, first + 3)))
        prompts, first = [CAT.texts[i % 3] for i in range(4)], first + search.TRAINING
        learned = before.sample(prompts, seeds=list(range(first, first + 4)))
    return parts.OnlyOriginals(torch.cat([asked, learned]))


@pytest.mark.parametrize("name", QUICK)
def test_a_search_costs_what_it_says_and_leaves_both_models_to_the_bit(
    name: str, before: Model, after: Model, hopeless: parts.OnlyOriginals
) -> None:
    states, flags = [parts.state(model) for model in (before, after)], [p.requires_grad for p in after.denoiser.parameters()]
    noise = torch.get_rng_state()
    attack = search.attack(QUICK[name])
    found = run(QUICK[name], before, after, hopeless)
    expected = attack.cost(after, 3)
    spared = found.details["tried"].count(0)
    assert (found.cost["forwards"], found.cost["backwards"]) == (expected["forwards"], expected.get("backwards", 0))
    assert (found.success.value, found.before.value, found.original.value, spared) == (0.0, 0.0, 1.0, 0)  # type: ignore[union-attr]
    for model, state in zip((before, after), states, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in parts.state(model).items())
    assert [p.requires_grad for p in after.denoiser.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), noise)
    assert found.threat == attack.threat


@pytest.mark.parametrize("name", sorted(QUICK))
def test_no_more_pictures_are_drawn_at_once_than_the_model_takes(
    name: str, before: StableDiffusion, after: StableDiffusion, hopeless: parts.OnlyOriginals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor walked or differentiated by the attack itself, and each picture is still that of its prompt, where what was found does not hang
    on the order in which noise is drawn. Guidance doubles the rows of the denoiser."""
    sizes: dict[str, set[int]] = {"walked": set(), "decoded": set(), "encoded": set(), "differentiated": set()}
    for model in (before, after):
        networks = {"walked": model.denoiser, "decoded": model.pipeline.vae.decoder, "encoded": model.pipeline.vae.encoder}
        for what, network in networks.items():
            network.register_forward_pre_hook(lambda module, inputs, what=what: sizes[what].add(len(inputs[0])))
        model.denoiser.register_forward_hook(
            lambda module, inputs, out: sizes["differentiated"].add(len(out[0]) if out[0].requires_grad else 0)
        )
    whole = run(QUICK[name], before, after, hopeless)
    assert min(max(sizes["walked"]), 2 * max(sizes["decoded"])) >= 2 * 3, "control: all prompts at once"
    for seen in sizes.values():
        seen.clear()
    monkeypatch.setattr(model_module, "POSITIONS", 2 * 8 * 8)
    found = run(QUICK[name], before, after, hopeless)
    assert (max(sizes["walked"]), max(sizes["decoded"])) == (2 * 2, 2)
    assert max(sizes["encoded"], default=0) <= 2
    assert [found.cost[kind] for kind in ("forwards", "backwards")] == [whole.cost[kind] for kind in ("forwards", "backwards")]
    if name in ("p4d", "unlearndiffatk"):
        assert max(sizes["differentiated"]) == 2
        return
    drawn, expected = (each.parts["pictures"].tensors["attacked"].int() for each in (found, whole))
    assert (drawn - expected).abs().max() <= 1
    assert (drawn - expected.roll(1, 0)).abs().max() > 1, "control: another prompt's picture"


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d", "concept_inversion", "relearning"])
def test_no_more_is_differentiated_at_once_than_a_large_model_allows(
    name: str, before: Model, after: Model, hopeless: parts.OnlyOriginals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where a step is of several pictures, it is the same step."""
    sizes = []
    after.denoiser.register_forward_hook(lambda module, inputs, out: sizes.append(len(out[0])) if out[0].requires_grad else None)
    whole = run(QUICK[name], before, after, hopeless)
    assert max(sizes) >= 2, "control: several at once"
    sizes.clear()
    monkeypatch.setattr(search, "LEARNED", 8 * 8)
    found = run(QUICK[name], before, after, hopeless)
    assert max(sizes) == 1
    assert [found.cost[kind] for kind in ("forwards", "backwards")] == [whole.cost[kind] for kind in ("forwards", "backwards")]
    if name in ("concept_inversion", "relearning"):
        drawn, expected = (each.parts["pictures"].tensors["attacked"].int() for each in (found, whole))
        assert (drawn - expected).abs().max() <= 1


def test_of_stable_diffusion_one_picture_is_differentiated_at_once_and_of_the_bundled_model_all(before: StableDiffusion) -> None:
    after = parts.tiny_model()
    hunt = search.Hunt(search.attack("p4d"), before, after, CAT, parts.Bright(2), LARGE, 0, CAT.texts, (1, 2, 3), seeded(0))
    assert hunt.batches(range(16), learning=True) == [list(range(16))]
    after.pipeline.unet.register_to_config(sample_size=64)
    assert hunt.batches(range(3), learning=True) == [[0], [1], [2]]
    assert hunt.batches(range(3)) == [[0, 1, 2]]


@pytest.mark.parametrize("name", ["unlearndiffatk", "p4d", "concept_inversion", "ring_a_bell"])
def test_the_same_seed_finds_the_same(name: str, before: Model, after: Model, hopeless: parts.OnlyOriginals) -> None:
    first, again = (run(QUICK[name], before, after, hopeless) for _ in range(2))
    assert torch.equal(first.parts["pictures"].tensors["attacked"], again.parts["pictures"].tensors["attacked"])
    other = run(QUICK[name], before, after, parts.Bright(-1), seed=1)
    assert not torch.equal(first.parts["pictures"].tensors["erased"], other.parts["pictures"].tensors["erased"])


@pytest.mark.parametrize("name", ["unlearndiffatk", "completion", "seed_search"])
def test_the_erased_model_is_attacked_with_its_hooks_active(name: str, before: Model, after: Model) -> None:
    """A hook on the attacked denoiser is called, and what it does changes what the attack meets."""
    calls = []
    plain = run(QUICK[name], before, after, parts.Bright(2))
    handle = after.denoiser.register_forward_hook(lambda module, args, output: (calls.append(1), (output[0] * 0.5,))[1])
    hooked = run(QUICK[name], before, after, parts.Bright(2))
    handle.remove()
    assert calls
    assert not torch.equal(plain.parts["pictures"].tensors["attacked"], hooked.parts["pictures"].tensors["attacked"])


@pytest.mark.parametrize("name", QUICK)
def test_only_attacks_on_guided_predictions_meet_a_sampling_rule(name: str, before: Model) -> None:
    model = parts.tiny_model()
    edit = erase(model, "cat", method="negative_prompt")
    assert isinstance(edit, SamplingEdit)
    attack = search.attack(QUICK[name])
    with edit.attach(model):
        if attack.bare:
            with pytest.raises(Unsupported, match="it would attack the un-erased model"):
                run(QUICK[name], before, model, parts.Bright(2))
        else:
            run(QUICK[name], before, model, parts.Bright(2))
    assert attack.bare == (name in ("concept_inversion", "latent_inversion", "p4d", "relearning", "unlearndiffatk"))


# -- budgets -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", QUICK)
def test_a_budget_is_never_overrun(name: str, before: Model, after: Model, hopeless: parts.OnlyOriginals) -> None:
    budget = round(search.attack(QUICK[name]).cost(after, 3)["forwards"]) - 1
    try:
        found = run(QUICK[name], before, after, hopeless, budget=budget)
    except ValueError as error:
        assert "ended before one candidate was tried" in str(error)
        return
    assert found.cost["forwards"] <= budget
    assert found.details["ended"] == "budget"


def test_a_budget_below_the_first_pictures_says_what_they_cost(before: Model, after: Model) -> None:
    with pytest.raises(ValueError, match="24 are spent on drawing 3 prompts un-erased and erased"):
        run("seed_search", before, after, parts.Bright(2), budget=24)


@pytest.mark.parametrize("name", ["seed_search(seeds=4)", "noise_probe", "completion"])
def test_a_rule_that_adds_forwards_does_not_overrun_the_budget(name: str, before: Model) -> None:
    model = parts.tiny_model()
    with erase(model, "cat", method="sld(preset='max')").attach(model):
        budget = round(search.attack(name).cost(model, 3)["forwards"])
        found = run(name, before, model, parts.Bright(2), budget=budget)
    assert found.cost["forwards"] <= budget, "guidance by a safety text makes three forwards a step where others make two"
    assert found.details["ended"] == "budget"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("scheduler", [diffusers.PNDMScheduler, diffusers.HeunDiscreteScheduler])
@pytest.mark.parametrize("name", QUICK)
def test_the_cost_is_that_of_the_models_own_sampler(name: str, scheduler: type, before: StableDiffusion, after: StableDiffusion) -> None:
    """PNDM calls the denoiser once more than there are steps, and Heun's nearly twice a step: no candidate and no control is lost."""
    for model in (before, after):
        model.default_steps = 3
        model.pipeline.scheduler = scheduler.from_config(model.pipeline.scheduler.config, skip_prk_steps=True)
    eye = hopeless_eye(before)
    cost = search.attack(QUICK[name]).cost(after, 3)["forwards"]
    found = run(QUICK[name], before, after, eye, budget=round(cost))
    assert (found.cost["forwards"], found.details["ended"]) == (cost, "the search was done")
    if name in ("concept_inversion", "latent_inversion", "relearning"):
        assert "never_learned" in {**found.details, **found.details.get("curves", {})}


CANDIDATES = {
    "completion": 2,
    "concept_inversion": 1,
    "inpainting": 2,
    "latent_inversion": 1,
    "noise_probe": 12,
    "p4d": 8,
    "random_tokens": 10,
    "relearning": 1,
    "ring_a_bell": 4,
    "seed_search": 0,
    "unlearndiffatk": 10,
}
"""C of the defaults, which the control draws; seed search needs none."""


@pytest.mark.parametrize("name", QUICK)
def test_the_defaults_take_four_minutes_at_most_with_the_bundled_model(name: str) -> None:
    model, prompts = parts.tiny_model(), 16
    model.default_steps, model.default_guidance = 20, 4.0
    cost = search.attack(name).cost(model, prompts)
    control = 2 * 20 * prompts * CANDIDATES[name]
    assert protocol.seconds({**cost, "forwards": cost["forwards"] + control}) <= 60 * protocol.MINUTES
    if name in ("unlearndiffatk", "p4d", "concept_inversion"):
        paper = search.attack(f"{name}(preset='authors')").cost(model, prompts)
        assert protocol.seconds(paper) > 60 * protocol.MINUTES, "control: the paper's run takes longer"


# -- text forms --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", QUICK)
def test_text_forms_are_read_back_and_every_field_is_explained(name: str) -> None:
    attack = search.attack(QUICK[name])
    assert search.attack(str(attack)) == attack
    assert str(search.attack(name)) == name
    assert set(attack.field_docs()) == {field.name for field in dataclasses.fields(attack)}  # type: ignore[arg-type]
    for preset in attack.presets:
        named = search.attack(f"{name}(preset={preset!r})")
        assert search.attack(str(named)) == named


def test_several_are_separated_by_commas_outside_of_brackets() -> None:
    found = search.attacks("p4d(mode='K', tokens=4), seed_search,completion(shares=(0.1, 0.3))")
    assert [str(a) for a in found] == ["p4d(mode='K', tokens=4)", "seed_search", "completion(shares=(0.1, 0.3))"]


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "unlearndifatk": "did you mean 'unlearndiffatk'",
        "p4d(modes='K')": "did you mean 'mode'",
        "p4d(mode='L')": "p4d's mode was 'L'; expected N or K",
        "p4d(preset='author')": "did you mean 'authors'",
        "p4d(mode=open('x'))": "cannot read the attack",
        "seed_search(seeds=0)": "expected an integer of at least 1",
        "relearning(checkpoints=(5, 3))": "rising step numbers from 0 on",
        "relearning(checkpoints=50)": "relearning's checkpoints was 50; expected tuple[int, ...]",
        "relearning(checkpoints=(0, 2.5))": "checkpoints was (0, 2.5); expected tuple[int, ...]",
        "relearning(train_on='a dog')": "train_on was 'a dog'; expected tuple[str, ...]",
        "noise_probe(etas=1.0)": "noise_probe's etas was 1.0; expected tuple[float, ...]",
        "noise_probe(etas=(1e999,))": "etas was (inf,); expected numbers of at least 0",
        "noise_probe(matched=2)": "matched was 2; expected bool",
        "completion(steps=2.5)": "steps was 2.5; expected int | None",
        "p4d(lr='x')": "p4d's lr was 'x'; expected float",
        "ring_a_bell(pairs=(('a cat',),))": "expected tuple[tuple[str, str], ...]",
        "ring_a_bell(elite=2)": "elite was 2; expected 0 or 1",
    }.items(),
)
def test_a_wrong_text_says_what_is_meant(text: str, message: str) -> None:
    with pytest.raises(InvalidAttack) as error:
        search.attack(text)
    assert message in str(error.value)


def test_two_spellings_of_a_value_are_one_attack() -> None:
    first, second = search.attack("noise_probe(etas=[1, 1.5])"), search.attack("noise_probe(etas=(1.0, 1.5))")
    assert first == second
    assert str(first) == str(second) == "noise_probe(etas=(1.0, 1.5))"
    assert str(search.attack("unlearndiffatk(weight_decay=0)")) == "unlearndiffatk(weight_decay=0.0)"


@pytest.mark.parametrize("name", ["noise_probe", "completion", "inpainting", "latent_inversion"])
def test_more_steps_than_the_schedule_has_times_are_refused(name: str, before: Model, after: Model, hopeless: parts.OnlyOriginals) -> None:
    with pytest.raises(InvalidAttack, match="steps was 5000; expected at most 1000"):
        run(f"{name}(steps=5000)", before, after, hopeless)
