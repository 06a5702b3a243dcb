"""Captions that the model reads only the start of, counted by its own tokenizer where that is on this machine."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sat_ext.recipe import Recipe

LETTERS_PER_TOKEN = 4  # English text in T5's vocabulary, about
BYT5 = "byt5"  # in place of a tokenizer's folder: its tokens are bytes


def too_long(captions: Iterable[tuple[str, Sequence[str]]], recipe: Recipe) -> tuple[list[str], str]:
    """The paths that have a caption of more tokens than the model of `recipe` reads, and the limit in words.

    `captions` are paths with their captions."""
    limit, folder = recipe.shape.text_length, recipe.engine.tokenizer
    counts = _counter(folder)
    words = f"{limit} tokens" + ("" if counts else f" (about {limit * LETTERS_PER_TOKEN} letters)")

    def is_long(caption: str) -> bool:
        letters = len(caption.encode(errors="replace"))
        if counts is None:
            return letters > limit * LETTERS_PER_TOKEN
        # a token has a letter at least, beside the end and the space that T5 puts in front
        return letters + 2 > limit and counts(caption) > limit

    return [path for path, own in captions if any(map(is_long, own))], words


def _counter(folder: str | None) -> Callable[[str], int] | None:
    """What counts the tokens of a caption, its end included; None where the tokenizer cannot be loaded."""
    if folder == BYT5:
        return lambda caption: len(caption.encode(errors="replace")) + 1
    if folder is None or not Path(folder).is_dir():
        return None
    from transformers import AutoTokenizer  # seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError):  # a folder of something else: training says so
        return None
    return lambda caption: len(tokenizer(caption).input_ids)
