"""Methods by name: the text form, the registry that is the folder, third parties, and what is refused."""

import dataclasses
from dataclasses import dataclass

import pytest

from efface.core import catalog
from efface.core.errors import InvalidMethod
from efface.core.method import Method, Needs, Paper


@dataclass(frozen=True)
class Ours(Method):
    """A third party's method."""

    needs = Needs()
    paper = Paper("t", "a", "v")
    presets = {"authors": {"steps": 7}, "style": {"steps": 9}}

    steps: int = 3
    """How many steps."""
    group: str = "xattn"
    """What is trained."""

    def fit(self, model, task, *, seed=0, resources=None):
        raise NotImplementedError


PATH = f"{__name__}:Ours"


def test_every_bundled_method_is_found_and_documented():
    assert "ap" in catalog.names()
    for name in catalog.names():
        cls = catalog.find(name)
        assert cls.name() == name
        assert dataclasses.is_dataclass(cls)
        assert set(cls.field_docs()) == {f.name for f in dataclasses.fields(cls)}
        for preset in [None, *cls.presets]:
            built = cls.build(preset=preset)
            assert catalog.method(str(built)) == built


def test_a_method_trains_the_group_of_its_field_where_the_model_has_it(tiny_model):
    """A field that is called `group` and names none of the model's groups is about something else."""
    assert Ours().trained() == Ours().trained(tiny_model) == ("xattn",)
    assert Ours(group="their own").trained() == ("their own",)
    assert Ours(group="their own").trained(tiny_model) == Ours.needs.groups
    assert catalog.method("mace").trained(tiny_model) == catalog.method("mace").trained() == ("text_kv",)


def test_presets_fields_and_kinds():
    assert catalog.method(PATH) == Ours()
    assert catalog.method(f"{PATH}(steps=5)") == Ours(steps=5)
    assert catalog.method(f"{PATH}(preset='authors')") == Ours(steps=7)
    assert catalog.method(f"{PATH}(preset='authors', group='full')") == Ours(steps=7, group="full")
    assert catalog.method(PATH, kind="style") == Ours(steps=9)
    assert catalog.method(f"{PATH}(preset='authors')", kind="style") == Ours(steps=7)
    assert catalog.method(str(Ours(steps=5, group="full"))) == Ours(steps=5, group="full")
    assert Ours.field_docs() == {"steps": "How many steps.", "group": "What is trained."}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("app", "no method 'app'; did you mean 'ap'"),
        (f"{PATH}(step=3)", "no field 'step'; did you mean 'steps'"),
        (f"{PATH}(preset='author')", "no preset 'author'; did you mean 'authors'"),
        (f"{PATH}(steps=open('x'))", "cannot read the method"),
        (f"{PATH}(3)", "only field=value"),
        (f"{PATH}(steps='many')", "steps was 'many'; expected int"),
        (f"{PATH}(steps=2.5)", "steps was 2.5; expected int"),
        ("ap(lr='x')", "ap's lr was 'x'; expected float"),
        ("esd(retain_graph=1)", "no field 'retain_graph'"),
        (f"{PATH}(steps=3", "cannot read the method"),
        (f"{__name__}:Theirs", "write package.module:Class"),
        (f"{__name__}:pytest", "no subclass"),
        ("no_such_package:Ours", "no method at"),
    ],
)
def test_bad_texts_say_what_is_wrong(text, message):
    with pytest.raises(InvalidMethod, match=message):
        catalog.method(text)
