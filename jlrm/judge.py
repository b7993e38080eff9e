"""Judge pairs of answers: `python -m jlrm.judge pairs.jsonl --model M --out DIR`.

    python -m jlrm.judge answers.jsonl --single ...      one answer a row, each scored by itself
    python -m jlrm.judge lists.jsonl --rank ...          several answers a row, each beside each
    python -m jlrm.judge check judged/verdicts.jsonl     verdicts beside labels (serving/audit.py)
    python -m jlrm.judge serve --model M                 a judge behind HTTP (server/command.py)
    python -m jlrm.judge [--model M]                     pairs typed here (server/terminal.py)

    1  read    the pairs: a file, a directory, hf:ORG/NAME, or lines of JSON on stdin ("-")
    2  judge   each in both orders (--orders); responses are kept as they come
    3  write   DIR/verdicts.jsonl, a line for each line read, in order; DIR/summary.json; and
               report.html, which shows them

The same command goes on where it was stopped, and gives the same lines (but for --refill). A row
that can't be judged has its line too, with the reason. On several hosts all of them run it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jlrm.config import RunError, UsageError
from jlrm.evaluation import rubrics
from jlrm.evaluation.games import Game
from jlrm.evaluation.journal import Journal
from jlrm.evaluation.reading import PARSERS, Reader, check_rubric, reader
from jlrm.evaluation.statistics import results
from jlrm.judges import asking, options
from jlrm.judges.requests import NO_PROBABILITIES
from jlrm.runtime import cluster, commands, hosts
from jlrm.runtime.storage import write_atomically
from jlrm.serving import audit, calibration, lists, tally, training_rows
from jlrm.serving import rows as row_files
from jlrm.serving.asked import ORDERS, Pair, Single, games_of, single_game
from jlrm.serving.lists import ListRow
from jlrm.serving.results import (
    JudgedPair,
    Plain,
    ScoredAnswer,
    ScoreLine,
    VerdictLine,
    judged_pair,
    scored_answer,
)
from jlrm.serving.rows import Row, SingleRow

VERDICTS, SUMMARY = audit.VERDICTS, "summary.json"
# Flags that say nothing of pairs that are typed, and of those that a model of ours judges.
UNTYPED = ("out", "single", "rank", "make_pairs", "make_judgements", "json", "columns", "values")
UNTYPED += ("reference", "rubric", "expected_scores", "at_once")
UNSTREAMED = ("num_beams", "repetition_penalty", "batch_size", "fit_batches", "refill", "apart")


def judge(args: argparse.Namespace) -> tally.JudgingSummary:
    """Judge the pairs, write their verdicts, and return what they come to.

    Raises:
      UsageError: anything the user can mend.
      Interrupted: Ctrl-C or SIGTERM; the responses so far are kept.
    """
    # 1. Read.
    reading = args.reading
    rows = row_files.read(args.pairs, reading["columns"], reading["values"], args.reference)
    games = {
        number: games_of(
            number, Pair(*row[1:4], "", row.reference, *args.told), args.orders, args.seed
        )
        for number, row in enumerate(rows)
        if not row.error
    }
    asked = [game for own in games.values() for game in own]

    # 2. Judge.
    data = results.checksum([row[:4] for row in rows])
    header = {"data": data, "orders": args.orders} | _told(args, rows)
    kept = _asked(args, asked, header, args.name)

    # 3. Write.
    read = _reader(args)
    judged = [
        judged_pair(
            row.id, own := games[number], [kept.responses.get(g.id) for g in own], read, args.map
        )
        if number in games
        else JudgedPair(None, None, None, None, "", "unjudged", (), None, row.id, row.error)
        for number, row in enumerate(rows)
    ]
    names = args.model, args.name
    summary = tally.summary(names, rows, judged, list(games.values()), kept.responses, read)
    if not hosts.is_main():
        return summary
    _write(args, (VerdictLine(**_both(*each)) for each in zip(rows, judged, strict=True)), summary)
    if args.report:
        from jlrm.serving import judged_page  # brings matplotlib

        judged_page.write(args.out)
    if args.make_pairs:
        _write_rows(args.make_pairs, training_rows.preferences(rows, judged))
    if args.make_judgements:
        made = training_rows.judgements(rows, games, kept.responses, read)
        _write_rows(args.make_judgements, made)
    return summary


def score(args: argparse.Namespace) -> tally.ScoringSummary:
    """Score single answers, write their scores, and return what they come to.

    Raises:
      UsageError, Interrupted: as `judge`.
    """
    rows = row_files.read_single(args.pairs, args.reading["columns"], args.reference)
    games = {
        number: single_game(number, Single(*row[1:3], "", row.reference, *args.told))
        for number, row in enumerate(rows)
        if not row.error
    }
    data = results.checksum([row[:3] for row in rows])
    header = {"data": data, "single": True} | _told(args, rows)
    kept = _asked(args, list(games.values()), header, args.name)
    read = _reader(args)
    scored = [
        scored_answer(row.id, games[number], kept.responses.get(games[number].id), read)
        if number in games
        else ScoredAnswer(None, "", "unjudged", (), None, row.id, row.error)
        for number, row in enumerate(rows)
    ]
    summary = tally.scoring_summary(scored, kept.responses)
    if hosts.is_main():
        lines = (ScoreLine(**_both(*each)) for each in zip(rows, scored, strict=True))
        _write(args, lines, summary)
    return summary


def rank(args: argparse.Namespace) -> tally.RankingSummary:
    """Rank the answers of each row, write the rankings, and return what they come to.

    Raises:
      UsageError, Interrupted: as `judge`.
    """
    rows = lists.read(args.pairs, args.reading["columns"], args.reference, args.at_once)
    games = {
        number: lists.games(number, row, args.orders, args.seed, args.told, args.at_once)
        for number, row in enumerate(rows)
        if not row.error
    }
    asked = [game for own in games.values() for pair in own.values() for game in pair]
    data = results.checksum([row[:3] for row in rows])
    header = {"data": data, "orders": args.orders, "rank": True} | _told(args, rows)
    header |= {"at_once": True} if args.at_once else {}  # older journals do not name it
    kept = _asked(args, asked, header, args.name)
    told = _reader(args), args.map
    rankings = [
        lists.ranking(games[number], kept.responses, len(row.answers), *told)
        if number in games
        else None
        for number, row in enumerate(rows)
    ]
    summary = tally.ranking_summary(rows, rankings, kept.responses)
    if hosts.is_main():
        _write(args, (lists.line(*each) for each in zip(rows, rankings, strict=True)), summary)
        if args.make_pairs:
            _write_rows(args.make_pairs, training_rows.preferences_of_lists(rows, rankings))
    return summary


def _reader(args: argparse.Namespace) -> Reader:
    low, high = args.options.get("scale") or (1, 10)
    return reader(args.parser, (low, high), args.tie_margin)


def _both(row: Row | SingleRow, judged: JudgedPair | ScoredAnswer) -> dict[str, Any]:
    """Return the fields of a row and of what was said of it, whose id and error hold."""
    return {**row._asdict(), **vars(judged)}


def _write(args: argparse.Namespace, lines: Iterable[Plain], summary: tally.AnySummary) -> None:
    _write_rows(args.out / VERDICTS, (line.to_dict() for line in lines))
    tally.write(args.out / SUMMARY, summary)


def _write_rows(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _told(args: argparse.Namespace, rows: Sequence[Row | SingleRow | ListRow]) -> dict[str, Any]:
    """Return what else shapes the responses; nothing where nothing else is told."""
    rubric, is_expected = args.told
    header: dict[str, Any] = {}
    if rubric is not None:
        header["rubric"] = rubrics.identity(rubric)
    if args.reference:
        header["references"] = results.checksum([row.reference for row in rows])
    if is_expected:
        header["expected_scores"] = True
    return header


def _asked(
    args: argparse.Namespace, games: Sequence[Game], header: dict[str, Any], name: str
) -> Journal:
    """Ask for the games that have no response yet, and return all responses."""
    model = options.pinned(args.backend, args.model)
    chosen = options.settled(args.backend, model, args.options, len(games))
    header |= options.identity(args.backend, model, chosen, args.seed)
    hosts.agree("pairs and models", header)
    kept = Journal(args.out if hosts.is_main() else None, header)
    done = hosts.gather("the responses so far", kept.done - kept.refused)[0]
    if left := [game for game in games if game.id not in done]:
        backend = options.make(args.backend, model, chosen, args.seed, args.out)
        asking.judge(backend, left, kept, name, len(games))
    return kept


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, judge, and print what came of it."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["check"]:
        audit.main(words[1:])
        return
    if words[:1] == ["serve"]:
        from jlrm.server import command  # its packages are an extra

        command.main(words[1:])
        return
    args = _parser().parse_args(words)
    if not args.pairs:
        _interact(args)
        return
    if not args.model:
        raise UsageError("--model is missing: name a run, a directory, a hub id or an endpoint's.")
    _check_form(args)
    args.options = options.options(args)
    rubric = rubrics.read(args.rubric) if args.rubric else None
    check_rubric(reader(args.parser), rubric)
    if args.expected_scores and args.backend == options.OPENAI:
        raise UsageError(NO_PROBABILITIES)
    args.told = rubric, args.expected_scores
    args.reading = commands.read_pair_flags(args)
    args.map = calibration.find(args.calibration, args.model)
    name = options.as_folder(pathlib.PurePath(args.model).name)
    args.out = (args.out or pathlib.Path("judged", name)).expanduser()
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file. Name a directory.")
    args.name = "stdin.jsonl" if args.pairs == "-" else pathlib.PurePath(args.pairs).name
    if args.pairs != "-":
        _run(args)
        return
    with tempfile.TemporaryDirectory() as directory:  # readers want a file
        file = pathlib.Path(directory, args.name)
        file.write_bytes(sys.stdin.buffer.read())
        args.pairs = str(file)
        _run(args)


def _check_form(args: argparse.Namespace) -> None:
    """Refuse flags that would say nothing of rows of this form."""
    if args.single and args.rank:
        raise UsageError("--single and --rank read rows of two forms. Name one of them.")
    if args.at_once is not None and not args.rank:
        raise UsageError("--at-once has an effect with --rank alone.")
    if args.at_once is None:
        args.at_once = options.judging(args.backend, args.model) == "lists"
    if not args.single:
        options.refuse_pairs(args.backend, args.model)
    useless = {
        "--single": ("values", "calibration", "tie_margin", "make_pairs", "make_judgements"),
        "--rank": ("values", "make_judgements"),
    }
    for flag, names in useless.items():
        if not getattr(args, flag.removeprefix("--")):
            continue
        for name in names:
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} has no effect with {flag}.")
    if args.single and args.orders != "both":
        raise UsageError("--orders has no effect with --single.")
    for path in (args.make_pairs, args.make_judgements):
        if path and path.is_dir():
            raise UsageError(f"{path} is a directory. Name a file to write.")


def _interact(args: argparse.Namespace) -> None:
    """Judge what is typed, where somebody types."""
    if not sys.stdin.isatty():
        raise UsageError("Name a file of pairs, or - to read them from stdin.")
    for name in (*UNTYPED, *(UNSTREAMED if args.backend == options.JLRM else ())):
        if getattr(args, name) not in (None, False, "", [], {}):
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} has no effect on pairs that are typed. Name a file.")
    from jlrm.server import terminal

    terminal.run(args)


def _run(args: argparse.Namespace) -> None:
    agreed = {name: getattr(args, name) for name in ("model", "options", "orders", "seed")}
    is_ours = args.backend == options.JLRM  # several hosts judge where their devices do
    with hosts.joined(args, agreed) if is_ours else contextlib.nullcontext():
        summary = (score if args.single else rank if args.rank else judge)(args)
        hosts.gather("the verdicts", None)
    if not hosts.is_main():
        return
    if args.json:
        print(json.dumps(tally.as_json(summary)))
    else:
        print("\n".join([*tally.lines(summary), f"Written: {args.out / VERDICTS}"]))
    if summary.games and 2 * summary.unread > summary.games:
        print(f"warning: {tally.doubt(args.model, summary.unread, summary.games)}", file=sys.stderr)
    if summary.errors:
        raise RunError(
            f"{summary.errors} of {summary.rows} rows have no verdict, for a reason that stands in "
            "their line. The same command asks again what was asked in vain."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.judge",
        description=(__doc__ or "").split("\n")[0],
        epilog="jlrm judge check holds verdicts against labels, jlrm judge serve answers HTTP: see "
        "their --help.",
    )
    add = parser.add_argument
    what = "FILE (.jsonl, .csv, .tsv, .parquet), directory, hf:ORG/NAME, or - for stdin; without "
    add("pairs", nargs="?", help=f"{what}it, pairs are typed in the terminal")
    add("--model", default="", metavar="M", help="RUN@STEP, directory, hub id, endpoint's name")
    add("--out", type=pathlib.Path, metavar="DIR", help="of what is written (judged/NAME)")
    backends = [name for name in options.BACKENDS if name != options.VERDICTS]
    add("--backend", choices=backends, default=options.JLRM, help="who judges (jlrm)")
    add("--single", action="store_true", help="rows hold a question and one answer, to be scored")
    add("--rank", action="store_true", help="rows hold a question and a list of answers")
    once = argparse.BooleanOptionalAction
    what = "with --rank: one judgement of all answers, 2 to 8 (of a run trained on lists, its way)"
    add("--at-once", action=once, default=None, help=what)
    add("--orders", choices=ORDERS, default="both", help="of the answers (both)")
    parsers = "; ".join(f"{name}: {what}" for name, what in PARSERS.items())
    add("--parser", choices=PARSERS, default="lenient", help=f"how texts are read. {parsers}")
    add(
        "--calibration",
        default="",
        metavar="FILE",
        help="map of the confidence, or none (calibration.json of the model)",
    )
    made: dict[str, Any] = {"type": pathlib.Path, "metavar": "FILE"}
    add("--make-pairs", **made, help="also write rows for DPO: the better answer and the worse")
    add("--make-judgements", **made, help="also write the judgements that gave the label, for SFT")
    margin = "scores of a pair that differ by no more are a tie (0)"
    add("--tie-margin", type=float, default=0.0, metavar="POINTS", help=margin)
    add("--rubric", default="", metavar="FILE",
        help="what to look at: a text, or criteria by name in YAML or JSON")  # fmt: skip
    add(
        "--reference",
        default="",
        metavar="COLUMN",
        help="holds a reference answer, which the judge is shown",
    )
    expected = "add the scores to be expected by their probabilities (jlrm; one more pass)"
    add("--expected-scores", action="store_true", help=expected)
    add("--seed", type=int, default=0, help="of random orders and of sampling (0)")
    report = argparse.BooleanOptionalAction
    add("--report", action=report, default=True, help="report.html, of pairs")
    add("--json", action="store_true", help="the summary as one JSON object on stdout")
    commands.add_pair_flags(parser)
    options.add_options(parser)
    cluster.add_arguments(parser)
    return parser


if __name__ == "__main__":
    commands.finish(main)
