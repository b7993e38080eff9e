"""Let a judge judge benchmarks, and measure it by their own rules.

    python -m jlrm.evaluate --model M --benchmark B[,B2] [--data PATH] [--backend jlrm|openai|...]
    python -m jlrm.evaluate --verdicts FILE --benchmark B        what a judge has said already

    1  read     each benchmark's items, and make games of them: pairs of answers in an order
    2  open     the journal of each benchmark, OUT/<benchmark>/responses.jsonl
    3  judge    the games that have no response there yet
    4  credit   read verdicts off the responses, and credit them by the benchmark's rule
    5  compare  with another evaluation, where --compare names one
    6  write    OUT/results.json, report.html, report.png, model_card.md

Responses are kept as they come, so a command that was stopped goes on where it was, and another
parser or policy costs no judging. Games that got no response make the evaluation incomplete: it
says so, and exits with code 1; the same command asks them again. On several hosts all of them run
the command, and process 0 keeps the responses.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jlrm.config import RunError, UsageError
from jlrm.evaluation import groups, journal, sources
from jlrm.evaluation.benchmark import Benchmark
from jlrm.evaluation.benchmarks.registry import BENCHMARKS, benchmark, policy_of
from jlrm.evaluation.games import WAYS, Backend, Game, Response, asked_about, said_of, way_of
from jlrm.evaluation.groups import Groups
from jlrm.evaluation.journal import Journal
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import PARSERS, Reader, reader
from jlrm.evaluation.statistics import results, unread
from jlrm.judges import asking, options
from jlrm.judges.recorded import Recorded
from jlrm.reports import results_file
from jlrm.reports.results_file import BenchmarkResult, JudgeRecord, PairedComparison, Results
from jlrm.runtime import cluster, commands, hosts

log = logging.getLogger(__name__)

WHO = "RUN@STEP, directory, hub id, endpoint's name, or a heuristic: longer, shorter, first, second"


class BenchmarkRun(NamedTuple):
    """One benchmark of an evaluation."""

    benchmark: Benchmark
    policy: Policy
    games: list[Game]
    asked: list[Game]  # these, or those of single answers or lists that decide them
    header: dict[str, Any]  # of its journal, with what judges.identity adds
    groups: Groups  # of --groups
    judging: str = "pairs"  # as of `data.judging`
    recorded: Backend | None = None  # of the backend `verdicts`

    @property
    def num_items(self) -> int:
        """The number of items that are asked."""
        return len({game.item.id for game in self.games})


def evaluate(args: argparse.Namespace) -> tuple[Results, list[BenchmarkRun]]:
    """Judge benchmarks and credit the judge; return the content of `results.json`, and the runs.

    Raises:
      UsageError: anything the user can mend.
      RunError: no item was judged at all.
      Interrupted: Ctrl-C or SIGTERM; the responses so far are kept.
    """
    # 1. Read the benchmarks, before a model is downloaded.
    low, high = args.options.get("scale") or (1, 10)
    read = reader(args.parser, (low, high))
    runs = [_read(name, args) for name in args.names]

    # 2. Open the journals. What other processes hear, process 0 hears too.
    model = options.pinned(args.backend, args.model)
    num_games = sum(len(run.asked) for run in runs)
    args.options = options.settled(args.backend, model, args.options, num_games)
    identity = options.identity(args.backend, model, args.options, args.seed)
    identity |= WAYS["single"] if args.judging == "single" else {}
    headers = [{**run.header, **identity, **WAYS[run.judging]} for run in runs]
    hosts.agree("benchmarks and models", headers)
    out = args.out if hosts.is_main() else None
    folders = [out and out / name for name in args.names]
    journals = [Journal(*each) for each in zip(folders, headers, strict=True)]

    if args.compare and hosts.is_main():  # what is wrong there is said before anything is asked
        for run in runs:
            _other_judge(args.compare, run)

    @functools.cache  # the model is loaded for the first game that has no response yet
    def backend() -> Backend:
        return options.make(args.backend, model, args.options, args.seed, args.out)

    entries: dict[str, BenchmarkResult] = {}
    for run, kept in zip(runs, journals, strict=True):
        # 3. Judge.
        name = run.benchmark.name
        left = _left(run, kept)
        if left and (args.backend == options.JLRM or hosts.is_main()):
            asking.judge(run.recorded or backend(), left, kept, name, len(run.asked))
        if not hosts.is_main():
            continue

        # 4. Credit the verdicts.
        games, responses = run.games, kept.responses
        for text in asking.remarks(name, run.asked, responses, run.policy.counts_refused):
            log.warning("%s", text)
        responses = said_of(games, responses, run.judging)
        read = read._replace(judging=run.judging)
        evaluation = results.Evaluation(
            run.benchmark, run.policy, games, responses, read, run.groups
        )
        if not evaluation.judged()[0]:
            raise RunError(f"No item of {name} was judged. {_first_error(run, kept)}")
        entries[name] = results.entry(evaluation, high - low if "scale" in args.options else None)

        # 5. Compare.
        if args.compare:
            comparison = _comparison(_other_judge(args.compare, run), run, evaluation)
            entries[name] = replace(entries[name], comparison=comparison)

    # 6. Write.
    earned = Results(_described(args, identity), entries)
    if out:
        earned = _written(out, earned)
    if out and args.report:
        from jlrm.reports import scorecard_page  # brings matplotlib

        scorecard_page.write(out, [earned])
    return earned, runs


# ------------------------------------------------------------------------------------- steps


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--benchmark is empty. Known: {', '.join(BENCHMARKS)}.")
    return [benchmark(name).name for name in dict.fromkeys(names)]


def _read(name: str, args: argparse.Namespace) -> BenchmarkRun:
    chosen, policy = BENCHMARKS[name], policy_of(name, args.policy)
    source = _of(args.data, name, args.names, "--data") or chosen.source
    items = chosen.read(source, **(args.reading if chosen.is_own else {}))
    if chosen.size and len(items) != chosen.size:
        text = "%s: %s holds %d items, the official set %d. Means are over those that there are."
        log.warning(text, name, source, len(items), chosen.size)
    seen = results.checksum([(item.id, item.question, item.answers) for item in items])
    header = {"benchmark": name, "data": seen}
    asked = sources.of_subset(items, _of(args.subset, name, args.names, "--subset"))
    games = chosen.games(sources.sample(asked, args.limit, args.seed), policy, args.seed)
    named = groups.of_items(_of(args.groups, name, args.names, "--groups"), items)
    if args.backend != options.VERDICTS:
        judging = args.judging if args.judging == "single" or chosen.is_listed else "pairs"
        asked = asked_about(games, judging)
        return BenchmarkRun(chosen, policy, games, asked, header, named, judging)
    path = _of(args.verdicts, name, args.names, "--verdicts")
    recorded = Recorded(path, items)
    rows = {game: journal.as_row(each) for game, each in recorded.responses.items()}
    header["verdicts"], games = results.checksum(rows), recorded.as_played(games)
    recorded_by = recorded.backend(path)
    return BenchmarkRun(chosen, policy, games, games, header, named, "pairs", recorded_by)


def _of(values: Sequence[str], name: str, names: Sequence[str], flag: str) -> str:
    """Return the value that a flag has for a benchmark: `NAME=VALUE`, or a value for the only one.

    Paths may hold "=" themselves.
    """
    own = [value.removeprefix(f"{name}=") for value in values if value.startswith(f"{name}=")]
    plain = [value for value in values if value.partition("=")[0] not in BENCHMARKS]
    if plain and len(names) > 1:
        value = "NAME" if flag == "--subset" else "PATH"
        raise UsageError(f"{flag} {plain[0]}: say for which benchmark, e.g. {flag} {name}={value}.")
    named = own + plain
    if len(named) > 1:
        raise UsageError(f"{flag} names two values for {name}: {', '.join(named)}.")
    return named[0] if named else ""


def _plain(value: str) -> str:
    """Return the value of a flag without the benchmark that it is for."""
    owner, _, rest = value.partition("=")
    return rest if owner in BENCHMARKS else value


def _left(run: BenchmarkRun, kept: Journal) -> list[Game]:
    """Return the games that have no response yet, by the journal of process 0."""
    here = kept.done if run.policy.counts_refused else kept.done - kept.refused
    done = hosts.gather("the responses so far", here)[0]
    return [game for game in run.asked if game.id not in done]


def _first_error(run: BenchmarkRun, kept: Journal) -> str:
    own = (kept.responses[game.id] for game in run.asked if game.id in kept.responses)
    reasons = (response.error or response.refused for response in own)
    return f"The first game: {next(filter(None, reasons), 'it has no response').rstrip('.')}."


class OtherJudge(NamedTuple):
    """Another judge that the judge is compared with, and its responses on one benchmark."""

    judge: str
    read: Reader
    responses: Mapping[str, Response]


def _other_judge(other_dir: pathlib.Path, run: BenchmarkRun) -> OtherJudge:
    """Read the responses of another evaluation, which are read as that one read them.

    Raises:
      UsageError: there are none, or on other data.
    """
    name = run.benchmark.name
    header, responses = journal.read(other_dir / name)
    if header.get("data") != run.header["data"]:
        raise UsageError(f"--compare {other_dir}: it was evaluated on other data of {name}.")
    judge = results_file.read(other_dir).judge
    low, high = judge.decoding.get("scale") or (1, 10)
    read = Reader(judge.parser, (low, high), judging=way_of(header))
    return OtherJudge(judge.name, read, responses)


def _comparison(
    other: OtherJudge, run: BenchmarkRun, mine: results.Evaluation
) -> PairedComparison | None:
    """Compare with the responses of another evaluation.

    None, and a warning, where there is nothing to compare: a judge without any verdict.
    """
    responses = said_of(run.games, other.responses, other.read.judging)
    theirs = mine._replace(responses=responses, reader=other.read)
    compared = results.comparison(mine, theirs, other.judge)
    if compared is None:
        log.warning(
            "%s: NO COMPARISON with %s: one of the two judges has no verdict on their common items",
            *(run.benchmark.name, other.judge),
        )
    return compared


def _described(args: argparse.Namespace, identity: dict[str, Any]) -> JudgeRecord:
    decoding = {k: v for k, v in identity.items() if k not in ("backend", "prompt", "model")}
    return JudgeRecord(
        name=args.name or pathlib.PurePath(args.model).name,
        model=args.model,
        backend=args.backend,
        prompt=args.options.get("prompt", ""),
        parser=args.parser,
        decoding=decoding,
    )


def _written(out: pathlib.Path, earned: Results) -> Results:
    """Write `results.json`, in which other benchmarks of the same judge stay."""
    path = out / results_file.NAME
    before = results_file.read(out) if path.exists() else earned
    if before.judge == earned.judge:
        earned = replace(earned, benchmarks={**before.benchmarks, **earned.benchmarks})
    elif rest := before.benchmarks.keys() - earned.benchmarks.keys():
        log.warning(
            "%s: the results of another judge or parser on %s are replaced", path, ", ".join(rest)
        )
    results_file.write(out, earned)
    return earned


# ------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate, and print what came of it."""
    args = _checked(_parser().parse_args(argv))
    try:
        with _joined(args):
            earned, runs = evaluate(args)
    except UsageError as error:  # parts used here name settings of a training config
        text = str(error)
        for name in ("prompt", "columns", "values"):
            text = text.replace(f"data.{name}", f"--{name}")
        raise UsageError(text) from error.__cause__
    hosts.gather("the results", None)
    if not hosts.is_main():
        return
    for run in runs:
        lines = unread.lines(run.benchmark.name, earned.benchmarks[run.benchmark.name])
        if text := "\n".join(lines):
            log.warning("%s", text)
    for run in runs:
        if text := results.silence(run.benchmark.name, earned.benchmarks[run.benchmark.name]):
            log.warning("%s", text)
    shown = {run.benchmark.name: earned.benchmarks[run.benchmark.name] for run in runs}
    if args.json:
        print(json.dumps({name: results_file.headline(each) for name, each in shown.items()}))
    else:
        for run in runs:
            lines = results.table(run.benchmark.name, shown[run.benchmark.name], run.benchmark.size)
            print("\n".join([*lines, ""]))
        if args.out:
            print(f"Written: {args.out}")
    lacking = [
        f"{run.num_items - each.n} of {run.num_items} items of {name}"
        for run, (name, each) in zip(runs, shown.items(), strict=True)
        if each.incomplete
    ]
    if lacking:
        raise RunError(
            f"Incomplete: {', '.join(lacking)} have a game without a response, and do not count. "
            "The same command asks those games again."
        )


def _joined(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Several hosts judge together; where no device judges, the first one does it alone."""
    if args.backend != options.JLRM and cluster.settings(args) is None:
        return contextlib.nullcontext()
    names = ("model", "names", "options", "policy", "subset", "limit", "seed", "reading", "judging")
    return hosts.joined(args, {name: getattr(args, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.evaluate",
        description="Let a judge judge benchmarks, and measure it by their own rules.",
        epilog="\n".join(_benchmarks()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--model", default="", metavar="M", help=WHO)
    add("--benchmark", required=True, metavar="B,B2", help="one or more of those listed below")
    add("--data", **several, metavar="PATH", help="file, directory or hf:NAME; or B=PATH")
    add("--backend", choices=options.BACKENDS, help="who judges (jlrm)")
    add("--verdicts", **several, metavar="FILE", help="recorded verdicts; or B=FILE")
    add("--single", action="store_true", help="score each answer alone, and compare the scores")
    told = "lists: one judgement of all answers (of a run that was trained so, its way)"
    report = argparse.BooleanOptionalAction
    add("--at-once", action=report, default=None, help=told)
    parsers = "; ".join(f"{name}: {what}" for name, what in PARSERS.items())
    add("--parser", default="lenient", help=f"how texts are read (lenient). {parsers}")
    add(
        "--policy",
        nargs="+",
        default=[],
        metavar="K=V",
        help="change the rule, e.g. order=both or, of one benchmark, judgebench.order=as_given. "
        "Keys: order, aggregation, tie_credit, error_credit, refused",
    )
    only = "only this subset and rows without one; or B=NAME"
    add("--subset", **several, metavar="NAME", help=only)
    grouped = "metrics of groups of subsets too, as this YAML or JSON file names them; or B=FILE"
    add("--groups", **several, metavar="FILE", help=grouped)
    add("--limit", type=int, default=0, metavar="N", help="items of each, drawn by lot (0: all)")
    add("--seed", type=int, default=0, help="seed of random orders, the lot and sampling (0)")
    add("--name", default="", help="name of the judge in reports (the model's)")
    add("--out", type=pathlib.Path, metavar="DIR", help="of what is written (evaluations/NAME)")
    add("--compare", type=pathlib.Path, metavar="DIR", help="--out of another judge to compare")
    add("--report", action=report, default=True, help="report.html, report.png, model_card.md")
    add("--json", action="store_true", help="the metrics as one JSON object on stdout")
    commands.add_pair_flags(parser)
    add("--scores", choices=["score", "score_w_reference"], help="gold of JudgeLM rows")
    options.add_options(parser)
    cluster.add_arguments(parser)
    return parser


def _benchmarks() -> Iterator[str]:
    """Yield lines that list the benchmarks and how each can aggregate."""
    yield "Benchmarks, and what --policy aggregation= can be for each (the first if left open):"
    for name, known in BENCHMARKS.items():
        yield f"  {name:20}{' | '.join(policy.aggregation for policy in known.policies)}"


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with `options` of the backend, each with its value."""
    args.backend = args.backend or (options.VERDICTS if args.verdicts else options.JLRM)
    if (args.backend == options.VERDICTS) != bool(args.verdicts):
        wanted = "needs" if args.backend == options.VERDICTS else "has no use for"
        raise UsageError(f"--backend {args.backend} {wanted} --verdicts FILE.")
    if args.backend != options.VERDICTS and not args.model:
        raise UsageError(f"--backend {args.backend} needs --model.")
    args.judging = options.judging_of(args)
    if args.limit < 0:
        raise UsageError(f"--limit={args.limit} is negative: wanted a number of items.")
    args.names = _names(args.benchmark)
    for flag in ("data", "verdicts", "subset", "groups"):
        for value in getattr(args, flag):
            if (owner := value.partition("=")[0]) in BENCHMARKS and owner not in args.names:
                raise UsageError(f"--{flag} {value}: --benchmark does not name {owner}.")
    if args.at_once is not None and not any(BENCHMARKS[name].is_listed for name in args.names):
        raise UsageError("--at-once is for lists of your own: --benchmark lists.")
    args.reading = _reading(args)
    args.options = options.options(args)
    args.model = args.model or pathlib.Path(_plain(args.verdicts[0])).stem
    args.out = _out(args)
    return args


def _reading(args: argparse.Namespace) -> dict[str, Any]:
    """Return how the user's own rows are read."""
    given = {**commands.read_pair_flags(args), "scores": args.scores}
    reading = {name: value for name, value in given.items() if value}
    if reading and not any(BENCHMARKS[name].is_own for name in args.names):
        flag = next(iter(reading))
        raise UsageError(f"--{flag} is for rows of your own: --benchmark pairs, or lists.")
    return reading


def _out(args: argparse.Namespace) -> pathlib.Path | None:
    """Return where responses are kept; recorded verdicts are kept nowhere unless it is named."""
    if args.out is not None:
        return args.out.expanduser()
    name = options.as_folder(args.name or args.model)
    return None if args.backend == options.VERDICTS else pathlib.Path("evaluations", name)


if __name__ == "__main__":
    commands.finish(main)
