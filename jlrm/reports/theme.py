"""Colours, fonts and style sheet that every page and chart share."""

from __future__ import annotations

from typing import NamedTuple


class Theme(NamedTuple):
    ink: str
    faint: str
    paper: str
    colours: list[str]


# Okabe and Ito: told apart with any colour vision
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
LIGHT = Theme("#1f2328", "#d9dde2", "#ffffff", COLOURS)
DARK = Theme("#e6e8eb", "#3b4048", "#1c1f24", [COLOURS[i] for i in (5, 4, 2, 3, 1, 0)])

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d9dde2;
  --paper: #fff; --box: #f6f8fa; --right: #007a5a; --wrong: #b34700 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9da5af; --line: #3b4048;
  --paper: #1c1f24; --box: #262a31; --right: #3ecf9f; --wrong: #ff9d5c } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem } h3 { margin: .75rem 0 }
p, small { color: var(--soft); font-weight: normal }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1rem }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th { text-align: left } th, tr:first-child { font-weight: 600 } table * { overflow-wrap: normal }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
img { width: 100%; display: block }
article { border: 1px solid var(--line); border-radius: .5rem; padding: 0 1rem; margin: 1rem 0 }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 1rem; align-items: start }
@media (max-width: 45rem) { .pair { grid-template-columns: minmax(0, 1fr) }
  td, th { padding: .25rem .4rem } }
pre { white-space: pre-wrap; background: var(--box); padding: .75rem; border-radius: .4rem;
  max-height: 24rem; overflow-y: auto; margin: 0 0 .75rem; font-size: .85rem }
summary { cursor: pointer; padding-bottom: .75rem }
.right { color: var(--right) } .wrong { color: var(--wrong) }
"""
