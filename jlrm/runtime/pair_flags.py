"""Flags of pairs, `--columns` and `--values`: `data.columns` and `data.values` of a config."""

from __future__ import annotations

import argparse

from jlrm.config import UsageError
from jlrm.runtime.settings import parse_pairs

# Flags of pairs: their form, an example and what they are for.
PAIR_FLAGS = {
    "columns": ("OURS=THEIRS", "answer_1=response_a", "names of the columns"),
    "values": ("THEIRS=OURS", "0=1 1=2 2=0", "what labels mean: 1, 2 or 0 (a tie)"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name columns and labels: `data.columns` and `data.values` of a config."""
    for name, (form, example, meaning) in PAIR_FLAGS.items():
        note = f"{meaning}, e.g. {example}"
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar=form, help=note)


def read(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Return the pairs of those flags by their names, in any spelling of `parse_pairs`.

    Raises:
      UsageError: what is no pair.
    """
    given = {}
    for name, (form, example, _) in PAIR_FLAGS.items():
        texts, pairs = getattr(args, name), {}
        if texts and texts[0].startswith("{") and not texts[0].endswith("}"):
            texts = [" ".join(texts)]  # a mapping without quotes, divided at its spaces
        for text in texts:
            if "=" not in text and not text.startswith("{"):
                raise UsageError(f"--{name} {text}: wanted {form}, e.g. {example}.")
            pairs |= parse_pairs(text, f"--{name}")
        given[name] = pairs
    return given
