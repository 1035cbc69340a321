"""The protocols by name, as `efface measure --protocol` and `protocol = "…"` in a grid name them: all by one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from efface.bench import zeroshot
from efface.bench.draw import Judges
from efface.bench.options import DEFAULT, ROW, Options
from efface.bench.plan import Plan
from efface.bench.protocols import artists, attacks, erasure, generality, nudity, objects, preservation, unlearncanvas
from efface.bench.questions import ERASURE, Asks
from efface.bench.result import Result
from efface.core.errors import EffaceError, suggest
from efface.core.task import Task

Prepare = Callable[[str, Task, str, Options], tuple[Plan, Judges]]
SAMPLING = ("steps", "guidance")
"""Options that every protocol takes."""
FILE = ("prompts", "limit", "each")
"""Those of a protocol that can draw a file of prompts."""
JUDGE = ("detector", "clip")
"""Those of a protocol that CLIP can judge."""


@dataclass(frozen=True)
class Protocol:
    """What is drawn, who judges, and what is asked."""

    name: str
    about: str
    """In a few words."""
    asks: Asks
    prepare: Prepare
    takes: tuple[str, ...] = ()
    """Options beside `SAMPLING`."""
    own: bool = True
    """Whether it has prompts of its own for the bundled model, so that a dry run needs no file."""

    def setup(self, model: str, task: Task, size: str = "quick", options: Options = DEFAULT) -> tuple[Plan, Judges]:
        """The plan for the model of an id, and the judges. Raises as `check`, and what the protocol's own `setup` raises."""
        self.check(options)
        plan, judges = self.prepare(model, task, size, options)
        steps = plan.steps if options.steps is None else options.steps
        scale = plan.guidance if options.guidance in (None, ROW) else float(options.guidance)
        return replace(plan, steps=steps, guidance=scale), judges

    def check(self, options: Options) -> None:
        """Raises EffaceError for options that the protocol does not take, or that contradict each other."""
        for name in options.given():
            if name not in (*SAMPLING, *self.takes):
                raise EffaceError(f"the protocol {self.name!r} takes no {name!r}; it takes {', '.join((*SAMPLING, *self.takes))}")
        if options.guidance == ROW and not options.prompts:
            raise EffaceError(f"guidance was {ROW!r}, each prompt's own, and no file of prompts was given; give a number")
        if "detector" in self.takes and options.clip and not options.detector:
            raise EffaceError(f"clip was {options.clip!r}, and nobody looks with it; add --detector clip, or detector = 'clip'")
        for name in ("resnet", "canvas"):
            if (path := getattr(options, name)) and options.detector:
                raise EffaceError(f"{name} was {path!r}, and the detector is {options.detector!r}; leave one of the two out")


def _erasure(model: str, task: Task, size: str, options: Options) -> tuple[Plan, Judges]:
    return erasure.setup(model, task, size=size, unrelated=options.names, options=options)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("erasure", "is the target gone, and is everything else still there", ERASURE, _erasure, ("unrelated", *JUDGE)),
        Protocol(
            "objects", "ESR and PSR over a split of classes, as on Imagenette", objects.ASKS, objects.setup, (*FILE, *JUDGE, "resnet")
        ),
        Protocol(
            "generality",
            "the concept where prompts imply it without its name",
            generality.ASKS,
            generality.setup,
            (*FILE, *JUDGE, "resnet"),
        ),
        Protocol(
            "artists", "CLIP score and LPIPS of an erased style and of others", artists.JUDGED, artists.setup, (*FILE, "clip", "lpips")
        ),
        Protocol(
            "preservation",
            "distances and CLIP score of what has nothing to do with the target",
            preservation.ASKS,
            preservation.setup,
            (*FILE, "real", "inception", "clip"),
        ),
        Protocol(
            "unlearncanvas",
            "UA, IRA and CRA over styles × objects",
            unlearncanvas.ASKS,
            unlearncanvas.setup,
            (*unlearncanvas.PART, *JUDGE, "canvas"),
        ),
        Protocol("nudity", "NudeNet on a file of prompts such as I2P", nudity.ASKS, nudity.setup, (*FILE, "nudenet"), own=False),
        Protocol(attacks.NAME, "does an attack bring the concept back", attacks.ASKS, attacks.setup, ("attack", "budget", "limit", *JUDGE)),
    )
}


def find(name: str) -> Protocol:
    """The protocol of a name, or of a plan's name, which begins with it. Raises EffaceError for an unknown one."""
    first = name.partition("/")[0]
    if first not in PROTOCOLS:
        raise EffaceError(f"there is no protocol {first!r}; {suggest(first, PROTOCOLS)}")
    return PROTOCOLS[first]


def asks_of(result: Result) -> Asks:
    """What the protocol of a result asks of who judged it."""
    asks, judge = find(result.settings.protocol).asks, result.settings.detector
    return zeroshot.asked(asks) if judge is not None and judge["name"].endswith(zeroshot.MARK) else asks
