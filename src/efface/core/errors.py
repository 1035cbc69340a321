"""Every error that efface raises on purpose: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffaceError(Exception):
    """The base class: `except EffaceError` catches every error that efface raises on purpose."""


class InvalidTask(EffaceError, ValueError):
    """A concept or a task that cannot mean anything: empty, contradictory, of an unknown kind."""


class InvalidMethod(EffaceError, ValueError):
    """A method's text form that cannot be read: unknown method, field, preset or value."""


class InvalidAttack(EffaceError, ValueError):
    """An attack's text form that cannot be read, unknown attack, field, preset or value; or a budget for not one candidate."""


class InvalidModel(EffaceError, ValueError):
    """Something that was given as a model and is none that efface can read."""


class InvalidEdit(EffaceError, ValueError):
    """An edit file that is corrupt, truncated, of an unknown version, or inconsistent in itself."""


class Mismatch(EffaceError, ValueError):
    """An edit that was fitted for another model than the one it meets."""


class NoEffect(EffaceError, RuntimeError):
    """An attached edit that changes nothing: the classic silent failure of this field."""


class Overlap(EffaceError, RuntimeError):
    """Two edits that want the same tensor, or a detach out of order."""


class Unsupported(EffaceError, RuntimeError):
    """A need of a method, or a use of an edit, that this model or this kind of edit does not meet."""


class Diverged(EffaceError, ArithmeticError):
    """A loss that is not finite; the model is left as it was."""


class Undetermined(EffaceError, RuntimeError):
    """More pictures than allowed that a detector could not judge; a broken detector must never read as "erased"."""


class MissingExtra(EffaceError, ImportError):
    """An optional package that is not installed; the message names the extra to install."""


def suggest(word: str, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid word if one is near, and the valid words."""
    words = sorted(valid)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Valid: {', '.join(words)}"
