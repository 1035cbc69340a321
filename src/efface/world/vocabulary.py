"""The words of the bundled world; they are read in `efface.concepts.vocabulary`, where the other layers find them too."""

from __future__ import annotations

from efface.concepts.vocabulary import Background, Group, Style, Vocabulary, check, parse, read

__all__ = ["Background", "Group", "Style", "Vocabulary", "check", "parse", "read"]
