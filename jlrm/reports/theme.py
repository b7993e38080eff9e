"""One look for every page and chart: colours for light and dark.

Each colour of `LIGHT` has its partner at the same place of `DARK`, so that a chart is drawn once
and a dark page gets it with its colours exchanged. Lines and marks have a contrast of 3:1 or more
against the paper.
"""

from __future__ import annotations

import colorsys
import re
from typing import NamedTuple


class Theme(NamedTuple):
    ink: str
    soft: str  # secondary text
    faint: str  # grid lines and what is neither first nor second
    paper: str
    box: str  # behind quoted text
    right: str
    wrong: str
    colours: tuple[str, ...]  # of lines, judges and parts, in this order


def _hues(lightness: float) -> tuple[str, ...]:
    """Return twelve more colours for charts of very many lines, spread by the golden ratio."""
    all_rgb = (colorsys.hls_to_rgb(0.618 * i % 1, lightness, 0.55) for i in range(12))
    return tuple("#" + "".join(f"{round(255 * each):02x}" for each in rgb) for rgb in all_rgb)


# The first six have the hues of Okabe and Ito's palette, which any colour vision tells apart;
# their lightness is chosen for the paper.
_ON_LIGHT = "#0b63ad #cc4e00 #0a7f5c #a3478b #946800 #3a8ec2"
_ON_LIGHT += " #b3263e #5d6773 #5b4bb5 #6f7f00 #8c5a3c #0d8c94"
_ON_DARK = "#6db3f2 #ff9a57 #3fcf9d #e39ad0 #e6b93c #9bd6ff"
_ON_DARK += " #ff8a9b #aab4bf #a99cf5 #c3d35b #d3a17e #5fd4da"

LIGHT = Theme(
    ink="#1d232a",
    soft="#57606a",
    faint="#dde1e6",
    paper="#ffffff",
    box="#f5f7f9",
    right="#007a5a",
    wrong="#b54400",
    colours=(*_ON_LIGHT.split(), *_hues(0.36)),
)
DARK = Theme(
    ink="#e6e9ed",
    soft="#a2abb6",
    faint="#3a424c",
    paper="#171b21",
    box="#20262e",
    right="#3fcf9e",
    wrong="#ff9a58",
    colours=(*_ON_DARK.split(), *_hues(0.72)),
)


def colour(number: int) -> str:
    """Return the colour of a chart's line or of a judge, by its number."""
    return LIGHT.colours[number % len(LIGHT.colours)]


def darken(drawing: str) -> str:
    """Return a drawing with each colour of `LIGHT` exchanged for its partner of `DARK`."""
    light = (*LIGHT[:-1], *LIGHT.colours)
    partners = dict(zip(light, (*DARK[:-1], *DARK.colours), strict=True))
    return re.sub("|".join(partners), lambda match: partners[match[0]], drawing)
