"""A trial: one experiment as a frozen value with a stable hash, and grids of them from TOML.

    model = "emoji"                    # optional, as are the next ones
    protocol = "erasure"
    images = "full"
    [options]                          # of the protocol: see `bench.options`
    steps = 50

    [[grid]]
    tasks = "standard"                 # the four standard erasures, or a list of tasks
    methods = ["ap", "esd(steps=100)"]
    seeds = [0, 1, 2]

    [[grid]]                           # how a method takes many concepts at once: nested tasks, the first 1, 5 and 50 of
    many = { objects = 50, counts = [1, 5, 50] }     # 50 objects in the order of `emoji.crowd`, judged on the same unrelated ones
    methods = ["uce"]

    [[compare]]                        # optional: is `first` no worse than `second`?
    first = "ap"
    second = "ap(preset='authors')"
    margin = 0.03

    [[expected]]                       # optional: published numbers, shown beside the measured ones; see `bench.expected`
    method = "ap"
    values = { "target.ESR-1" = 98.63 }
    source = "…"

Trials come in the order of seeds, then attacks, then tasks, then methods, so that an unfinished sweep already compares all methods. With
`protocol = "attacks"` the options list them, cheapest first, and each is a trial of its own:

    [options]
    attacks = ["seed_search", "unlearndiffatk(times=5)"]
    limit = 16                         # prompts of each erased concept
    budget = 5000                      # optional: samples through the denoiser for each search
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from efface.bench.emoji import SIZES, UNRELATED, crowd, others
from efface.bench.expected import Expected
from efface.bench.options import DEFAULT, Options
from efface.bench.protocols import attacks
from efface.bench.protocols.registry import PROTOCOLS
from efface.concepts import resolve
from efface.concepts.standard import standard
from efface.concepts.vocabulary import read as read_world
from efface.core import catalog, search
from efface.core.errors import EffaceError, suggest
from efface.core.task import Task

STANDARD = "standard"
MARGIN = 0.03
COMPARED = ("target.ESR-1", "others.PSR-1")


@dataclass(frozen=True)
class Trial:
    """One experiment: everything that its outcome is meant to depend on, in one form only. Made by `of`."""

    model: str
    method: str
    """The text form with every field that is not the default, whatever preset it came from."""
    task: str
    seed: int = 0
    """Of the fit; the prompts and their noise are the protocol's own, the same for all."""
    protocol: str = "erasure"
    images: str = "quick"
    label: str = field(default="", compare=False)
    """The method as somebody wrote it, for tables; no part of the hash."""
    options: Options = DEFAULT
    """Of the protocol."""

    @classmethod
    def of(
        cls,
        model: str,
        method: str,
        task: str,
        seed: int = 0,
        protocol: str = "erasure",
        images: str = "quick",
        options: Options = DEFAULT,
    ) -> Trial:
        """The trial in its one form, so that two spellings have one hash. Raises InvalidTask, InvalidMethod, InvalidAttack, EffaceError."""
        if protocol not in PROTOCOLS:
            raise EffaceError(f"there is no protocol {protocol!r}; {suggest(protocol, PROTOCOLS)}")
        if bool(options.attack) != (protocol == attacks.NAME):
            raise EffaceError(
                f"protocol was {protocol!r} and the attack {options.attack!r}; expected protocol = {attacks.NAME!r} with attacks = [...] "
                "in [options], or neither"
            )
        if images not in SIZES:
            raise EffaceError(f"images was {images!r}; {suggest(images, SIZES)}")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise EffaceError(f"a seed was {seed!r}; expected an integer of at least 0")
        asked = Task.of(task, resolve=resolve)
        built = catalog.method(method, kind=asked.targets[0].kind)
        options = replace(options, attack=str(search.attack(options.attack))) if options.attack else options
        return cls(model, str(built), str(asked), seed, protocol, images, " ".join(method.split()), options)

    def json(self) -> dict[str, Any]:
        """All fields as JSON values; options only where some are given, as in records from before there were any."""
        values = {name: value for name, value in asdict(self).items() if name != "options"}
        given = self.options.given()
        return {**values, "options": given} if given else values

    @property
    def hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of `json` but the label, with sorted keys: the same on every machine."""
        values = {name: value for name, value in self.json().items() if name != "label"}
        return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"{self.title} on {Task.parse(self.task).brief}, seed {self.seed}"

    @property
    def title(self) -> str:
        """The method as it was written, and the attack that it meets."""
        name = self.label or self.method
        return f"{self.options.attack} against {name}" if self.options.attack else name


@dataclass(frozen=True)
class Pair:
    """A question for the end of a sweep: is the first method no worse than the second by more than a margin?"""

    first: str
    """A label of the grid."""
    second: str
    margin: float = MARGIN
    """As a share: 0.03 is three points."""
    lines: tuple[str, ...] = COMPARED
    """The keys of the lines that are compared."""


@dataclass(frozen=True)
class Sweep:
    """What a grid file says."""

    trials: tuple[Trial, ...]
    pairs: tuple[Pair, ...] = ()
    title: str = ""
    expected: tuple[Expected, ...] = ()
    """Published numbers of the same experiment."""


def read(path: str | Path) -> Sweep:
    """Reads a grid file. Raises EffaceError for what is no TOML, an unknown key or a missing one; and as `Trial.of`."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EffaceError(f"cannot read the grid {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EffaceError(f"{path} is no TOML: {error}") from error
    _known(data, ("title", "model", "protocol", "images", "options", "grid", "compare", "expected"), f"{path}")
    blocks = data.get("grid", [])
    if not isinstance(blocks, list) or not blocks:
        raise EffaceError(f"{path} has no [[grid]]; write one with tasks, methods and seeds")
    common: dict[str, Any] = {name: str(data[name]) for name in ("protocol", "images") if name in data}
    options = Options.of(data.get("options", {}), f"{path}, [options]")
    trials = [
        trial
        for each in options
        for block in blocks
        for trial in _block(block, str(data.get("model", "emoji")), {**common, "options": each}, path)
    ]
    unique = list(dict.fromkeys(trials))
    ordered = sorted(unique, key=lambda trial: trial.seed)
    labels = {trial.label for trial in unique}
    pairs = tuple(_pair(pair, labels, path) for pair in data.get("compare", []))
    expected = tuple(Expected.of(row, labels, f"{path}, [[expected]]") for row in data.get("expected", []))
    return Sweep(tuple(ordered), pairs, str(data.get("title", "")), expected)


def _block(block: Mapping[str, Any], model: str, common: Mapping[str, Any], path: Path) -> list[Trial]:
    where = f"{path}, [[grid]]"
    _known(block, ("tasks", "many", "methods", "seeds"), where)
    if "methods" not in block:
        raise EffaceError(f"{where} lacks 'methods'; write methods = [...]")
    if ("tasks" in block) == ("many" in block):
        found = "has both 'tasks' and 'many'" if "tasks" in block else "lacks 'tasks'"
        raise EffaceError(f"{where} {found}; write tasks = [...], or many = {{ objects = 50, counts = [1, 50] }}")
    if "many" in block:
        tasks, common = _many(block["many"], common, f"{where}, many")
    else:
        tasks = [s.task for s in standard()] if block["tasks"] == STANDARD else _list(block, "tasks", where)
    return [
        Trial.of(model, method, task, seed, **common)
        for seed in _list(block, "seeds", where, [0])
        for task in tasks
        for method in _list(block, "methods", where)
    ]


def _many(data: Any, common: Mapping[str, Any], where: str) -> tuple[Sequence[str], Mapping[str, Any]]:
    """Nested tasks, and what their trials have in common: concepts that are unrelated to every target, where the protocol takes them."""
    if not isinstance(data, dict) or set(data) != {"objects", "counts"} or type(data["objects"]) is not int:
        raise EffaceError(f"{where} was {data!r}; expected {{ objects = 50, counts = [1, 5, 50] }}")
    world, objects = read_world(), data["objects"]
    names = crowd(world, objects)
    for count in _list(data, "counts", where):
        if type(count) is not int or not 1 <= count <= objects:
            raise EffaceError(f"{where} has the count {count!r}; expected integers from 1 to objects = {objects}")
    tasks = ["; ".join(names[:count]) for count in data["counts"]]
    protocol, options = PROTOCOLS.get(common.get("protocol", "erasure")), common["options"]
    if protocol and "unrelated" in protocol.takes and not options.unrelated:
        apart = ", ".join(others(Task.of("; ".join(names)), world, UNRELATED))
        return tasks, {**common, "options": replace(options, unrelated=apart)}
    return tasks, common


def _pair(pair: Mapping[str, Any], labels: set[str], path: Path) -> Pair:
    where = f"{path}, [[compare]]"
    _known(pair, tuple(f.name for f in fields(Pair)), where)
    for name in ("first", "second"):
        if pair.get(name) not in labels:
            raise EffaceError(
                f"{where} has {name} = {pair.get(name)!r}, which the grid does not run; {suggest(str(pair.get(name)), labels)}"
            )
    return Pair(**{**pair, "lines": tuple(pair.get("lines", COMPARED))})


def _list(block: Mapping[str, Any], name: str, where: str, default: Sequence[Any] | None = None) -> Sequence[Any]:
    found = block.get(name, default)
    if not isinstance(found, list) or not found:
        raise EffaceError(f"{where} has {name} = {found!r}; expected a list that is not empty")
    return found


def _known(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in data:
        if name not in known:
            raise EffaceError(f"{where} has the unknown key {name!r}; {suggest(name, known)}")
