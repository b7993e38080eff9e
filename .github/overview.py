"""Draw overview.svg beside this file: what a judge does, how it is trained, how it is measured.

`python .github/overview.py` after a room was renamed; a test holds the picture to the rooms that
there are.
"""

from __future__ import annotations

import pathlib
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 446
BOX, GAP, LEFT = (144, 74), 22, 12
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1f2328 }
.room { font: 12px ui-monospace, monospace; fill: #59636e }
.title { font-weight: 600; font-size: 15px }
.box { fill: #f6f8fa; stroke: #d0d7de } .key { fill: #ddf4ff; stroke: #54aeff }
.arrow { stroke: #59636e; stroke-width: 1.5; fill: none } .head { fill: #59636e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .room { fill: #9da5af } .box { fill: #161b22; stroke: #30363d }
  .key { fill: #0c2d4a; stroke: #388bfd } .arrow { stroke: #9da5af } .head { fill: #9da5af } }
"""
# What happens, on two lines, and the room where it happens.
TRAINING = (
    (("a question and", "two answers"), "data"),
    (("R judgements", "are sampled"), "sampling"),
    (("each is read:", "its verdict"), "judgement"),
    (("rewards for the", "outcome alone"), "judgement"),
    (("advantage in its", "group, policy loss"), "rl"),
    (("the weights", "move"), "training"),
)
MEASURING = (
    (("a benchmark's", "item"), "evaluation"),
    (("games: a pair", "in an order"), "evaluation"),
    (("a response from", "any judge"), "judges"),
    (("its verdict", ""), "judgement"),
    (("credit by the", "benchmark's rule"), "evaluation"),
    (("metric and", "interval"), "evaluation"),
)
GIVEN = (
    "Question: How many legs has a spider?",
    "Answer 1: Eight, in four pairs.",
    "Answer 2: Six, as every insect.",
)
WRITTEN = (
    "<think> Spiders are no insects; eight is right. </think>",
    "<answer>9</answer><answer>2</answer>",
)


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "middle") -> str:
    """Return one line of text."""
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def rectangle(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a box with round corners."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>'


def arrow(path: str) -> str:
    """Return a line with a head at its end."""
    return f'<path d="{path}" class="arrow" marker-end="url(#head)"/>'


def row(y: float, steps: tuple[tuple[tuple[str, str], str], ...]) -> list[str]:
    """Return the boxes of a chain and the arrows between them."""
    parts = []
    for number, (lines, room) in enumerate(steps):
        x = LEFT + number * (BOX[0] + GAP)
        middle = x + BOX[0] / 2
        parts += [rectangle(x, y, *BOX, "box"), text(middle, y + 64, f"{room}/", "room")]
        heights = (y + 22, y + 41) if lines[1] else (y + 31,)
        parts += [text(middle, h, line) for h, line in zip(heights, lines, strict=False)]
        if number:
            parts.append(arrow(f"M{x - GAP + 2} {y + BOX[1] / 2} h{GAP - 8}"))
    return parts


def picture() -> str:
    """Return the whole picture."""
    first, second = 180, 356
    last = LEFT + 5 * (BOX[0] + GAP) + BOX[0] / 2
    sampling = LEFT + BOX[0] + GAP + BOX[0] / 2
    judge = [
        rectangle(LEFT, 12, 330, 104, "box"),
        *(text(LEFT + 16, 44 + 24 * n, line, "", "start") for n, line in enumerate(GIVEN)),
        arrow(f"M{LEFT + 334} 64 h38"),
        rectangle(LEFT + 376, 32, 136, 64, "key"),
        text(LEFT + 444, 69, "a judge", "title"),
        arrow(f"M{LEFT + 516} 64 h38"),
        rectangle(LEFT + 558, 12, WIDTH - 2 * LEFT - 558, 104, "box"),
        *(text(LEFT + 574, 56 + 24 * n, line, "", "start") for n, line in enumerate(WRITTEN)),
    ]
    back = f"M{last} {first + BOX[1]} v22 H{sampling} v-18"
    chains = [
        text(LEFT, first - 16, "Training (GRPO), step after step", "title", "start"),
        *row(first, TRAINING),
        arrow(back),
        text((last + sampling) / 2, first + BOX[1] + 38, "the next judgements", "room"),
        text(LEFT, second - 16, "Measuring", "title", "start"),
        *row(second, MEASURING),
    ]
    head = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" class="head"/></marker>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            "<title>How a judge is trained and measured</title>",
            f"<style>{STYLE}</style><defs>{head}</defs>",
            *judge,
            *chains,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("overview.svg").write_text(picture())
