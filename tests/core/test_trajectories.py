"""What methods on trajectories share: the fields that the base classes name, when trajectories are walked, and how many in all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from efface.core import catalog, search
from efface.core.errors import InvalidMethod
from efface.core.method import Needs, Paper
from efface.core.probe import Probe
from efface.core.sampling import seeded
from efface.core.trajectories import TrajectoryMethod
from efface.core.wordgame import WordMethod

BASES = (TrajectoryMethod, WordMethod, Probe)


@dataclass(frozen=True)
class Walker(TrajectoryMethod):
    """A method of this family with nothing else."""

    needs = Needs()
    paper = Paper("t", "a", "v")

    batch: int = 2
    latents: str = "replay"
    latent_steps: int = 3
    latent_guidance: float = 3.0
    trajectories: int = 4
    refresh: int = 5

    def __post_init__(self):
        self.check_trajectories()

    def fit(self, model, task, *, seed=0, resources=None):
        raise NotImplementedError


def lacking(cls):
    """The fields that a base class names and a class does not have, by name or by order of its own file."""
    own = {f.name for f in dataclasses.fields(cls)}
    named = [name for base in BASES if issubclass(cls, base) for name in base.__annotations__ if name not in ("access", "threat", "paper")]
    return [name for name in named if name not in own or name not in cls.__annotations__]


def test_every_method_and_attack_has_the_fields_that_its_base_works_with():
    family = [cls for name in catalog.names() if issubclass(cls := catalog.find(name), TrajectoryMethod)]
    probes = [cls for name in search.names() if issubclass(cls := search.find(name), Probe)]
    assert len(family) >= 9
    assert len(probes) == 3
    assert not [(cls, lacking(cls)) for cls in (*family, *probes) if lacking(cls)]

    @dataclass(frozen=True)
    class Short(Walker):
        pass

    assert "refresh" in lacking(Short)


@pytest.mark.parametrize("latents", ["replay", "aligned"])
def test_walks_are_what_the_renewals_make(latents):
    """Counted step by step, for two sorts of prompt."""
    method = Walker(latents=latents)
    for steps in (1, 5, 6, 11):
        renewals = sum(method.renews(step) for step in range(steps))
        assert method.walks(steps, sorts=2, fresh=2 * steps) == 2 * method.abreast * renewals
        assert method.walks(steps) == method.abreast * renewals


def test_a_step_uses_some_of_what_is_kept_and_all_of_what_is_fresh(tiny_model):
    prompts, null = tiny_model.encode(["cat", "car"]), tiny_model.encode([""])
    for latents, held in (("replay", 4 * 3), ("aligned", 2)):
        method = Walker(latents=latents)
        tiny_model.meter.reset()
        pool = method.walked(tiny_model, prompts, seeded(0), null=null)
        assert len(pool) == held
        assert len(method.rows(pool, seeded(1))) == 2
        spent = method.forwards(method.walks(1), beside=0)
        assert spent.low <= tiny_model.meter.forwards <= spent.high
        assert method.latent_bytes(tiny_model) == 4 * held * pool.x[0].numel()


def test_a_batch_beyond_what_is_kept_is_refused_and_fresh_ones_may_be_as_large():
    assert Walker(batch=12).batch == 12
    assert Walker(batch=13, latents="aligned").batch == 13
    with pytest.raises(InvalidMethod, match="batch was 13; expected at most trajectories × latent_steps = 12"):
        Walker(batch=13)
    with pytest.raises(InvalidMethod, match="latents was 'fresh'; expected one of replay, authors, aligned, jittered"):
        Walker(latents="fresh")
