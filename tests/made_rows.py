"""Comparisons in any number, for what has to be measured against the number of rows.

    python tests/made_rows.py DIR NUM_ROWS [NUM_FILES]

writes them as JSONL files. Row n is a function of n alone, so the first 100,000 of a million rows
are the 100,000 rows that this makes by themselves. In a hundred rows some five repeat an earlier
row, two differ from one in the label alone, one asks the benchmark's question and one has no label.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import random
import sys
from typing import Any

SOUNDS = ("ba", "ko", "mi", "tu"), "lnrst", ("", "a", "en", "ig")
WORDS = ["".join(sounds) for sounds in itertools.product(*SOUNDS)]
BENCHMARK = "Why does a bridge hum when the wind blows across it from the side at night?"


def row(number: int) -> dict[str, Any]:
    """Return row `number`; some 110 words, 650 characters."""
    rng = random.Random(number)
    kind = rng.random()
    if kind < 0.07 and number:
        earlier = row(rng.randrange(number))
        if kind < 0.02 and "score_1" in earlier:  # another label
            earlier |= {"score_1": earlier["score_2"], "score_2": earlier["score_1"]}
        elif kind < 0.04:  # the other order
            names = ("answer_1", "answer_2", "score_1", "score_2")
            given = [earlier.get(name) for name in names]
            swapped = dict(zip(names, (given[1], given[0], given[3], given[2]), strict=True))
            earlier |= {name: value for name, value in swapped.items() if value is not None}
        return earlier | {"id": f"{number}"}
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(low, high))) for low, high in LENGTHS]
    made = dict(zip(("question", "answer_1", "answer_2"), texts, strict=True), id=f"{number}")
    made["question"] = BENCHMARK if kind > 0.99 else f"{made['question']}?"
    scores = {"score_1": rng.randint(2, 20) / 2, "score_2": rng.randint(2, 20) / 2}
    return made | (scores if kind < 0.98 else {})


LENGTHS = ((8, 30), (20, 70), (20, 70))  # words of the question and the answers


def write(directory: pathlib.Path, num_rows: int, num_files: int = 10) -> None:
    """Write rows, and beside the directory a benchmark, `NAME-benchmark.jsonl`."""
    directory.mkdir(parents=True)
    for file in range(num_files):
        first, end = (num_rows * each // num_files for each in (file, file + 1))
        with open(directory / f"rows-{file:05}.jsonl", "w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row(number)) + "\n" for number in range(first, end))
    benchmark = directory.with_name(f"{directory.name}-benchmark.jsonl")
    benchmark.write_text(json.dumps({"question": BENCHMARK}) + "\n")


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
