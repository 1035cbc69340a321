"""The border to diffusers: loading, one file a family, and what is read from and written to its formats."""

from efface.models.load import load

__all__ = ["load"]
