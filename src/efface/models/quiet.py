"""Silence: what diffusers and transformers log and draw while they import and load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Only errors are logged, and only downloads draw a bar, while active; the former settings come back."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    libraries = (diffusers_logging, transformers_logging)
    levels = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        _draw_downloads(downloads)
        yield
    finally:
        for library, level, bars in levels:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
        _draw_downloads(downloads)


def _draw_downloads(wanted: bool) -> None:
    """transformers turns the Hub's bars on and off together with its own."""
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if wanted else disable_progress_bars)()
