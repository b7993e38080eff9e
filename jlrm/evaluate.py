"""Let a judge judge benchmarks, and score it by their own rules.

    python -m jlrm.evaluate --model M --benchmark B[,B2] [--data PATH] [--backend jlrm|openai]
    python -m jlrm.evaluate --verdicts FILE --benchmark B        what a judge has said already

    1  read     each benchmark's items
    2  games    pairs of answers in an order, by the benchmark's policy
    3  judge    those games that OUT/<benchmark>/answers.jsonl does not have yet
    4  read     verdicts off the answers
    5  score    by the benchmark's rule; intervals, diagnostics, the worst items
    6  write    OUT/results.json, report.html, report.png, model_card.md

Answers are kept as they come, so a command that was stopped goes on where it was, and another
parser or policy costs no judging. Games that got no answer make the evaluation incomplete: it says
so, and exits with code 1; the same command asks them again. On several hosts all of them run the
command, and process 0 keeps the answers.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import pathlib
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from tqdm import tqdm

from jlrm.config import RunError, UsageError
from jlrm.evaluation import journal, results
from jlrm.evaluation.benchmark import Benchmark
from jlrm.evaluation.benchmarks.registry import BENCHMARKS, benchmark, policy_of
from jlrm.evaluation.games import Backend, Game, Item, Response
from jlrm.evaluation.journal import Journal
from jlrm.evaluation.policies import Policy
from jlrm.evaluation.reading import PARSERS, Reader, reader
from jlrm.judges import options
from jlrm.judges.recorded import Recorded
from jlrm.reports import results_file
from jlrm.reports.results_file import BenchmarkResult, JudgeRecord, PairedComparison, Results
from jlrm.runtime import cluster, commands, hosts


class BenchmarkRun(NamedTuple):
    """One benchmark of an evaluation."""

    benchmark: Benchmark
    policy: Policy
    games: list[Game]
    header: dict[str, Any]  # of its answers, with what judges.identity adds
    recorded: Backend | None  # of the backend `verdicts`

    @property
    def num_items(self) -> int:
        """The number of items that are asked."""
        return len({game.item.id for game in self.games})


def evaluate(args: argparse.Namespace) -> tuple[Results, list[BenchmarkRun]]:
    """Judge and score benchmarks; return the content of `results.json`, and the tasks.

    Raises:
      UsageError: anything the user can mend.
      RunError: no item was judged at all.
      Interrupted: Ctrl-C or SIGTERM; the answers so far are kept.
    """
    low, high = args.options.get("scale") or (1, 10)
    read = reader(args.parser, (low, high))
    tasks = [_task(name, args) for name in args.names]  # before a model is downloaded
    identity = options.identity(args.backend, args.model, args.options, args.seed)
    headers = [{**task.header, **identity} for task in tasks]
    hosts.agree("benchmarks and models", headers)
    out = args.out if hosts.is_main() else None  # what others hear, process 0 hears too
    journals = [Journal(_path(out, task), h) for task, h in zip(tasks, headers, strict=True)]
    backend: Backend | None = None
    entries: dict[str, BenchmarkResult] = {}
    for task, kept in zip(tasks, journals, strict=True):
        name = task.benchmark.name
        left = _left(task, kept)
        if left and task.recorded is None and backend is None:
            backend = options.make(args.backend, args.model, args.options, args.seed)
        if left:
            _judge(task, left, kept, task.recorded or backend)
        if not hosts.is_main():
            continue
        evaluation = results.Evaluation(task.benchmark, task.policy, task.games, kept.answers, read)
        if not evaluation.judged()[0]:
            raise RunError(f"No item of {name} was judged. {_first_error(task, kept)}")
        entry = results.entry(evaluation, None if task.recorded else high - low)
        if args.compare:
            entry = replace(entry, comparison=_comparison(args.compare, task, evaluation))
        entries[name] = entry
    earned = Results(_described(args, identity), entries)
    if out:
        earned = _written(out, earned)
    if out and args.report:
        from jlrm.reports import scorecard_page  # brings matplotlib

        scorecard_page.write(out, [earned])
    return earned, tasks


# ------------------------------------------------------------------------------------- steps


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--benchmark is empty. Known: {', '.join(BENCHMARKS)}.")
    return [benchmark(name).name for name in dict.fromkeys(names)]


def _task(name: str, args: argparse.Namespace) -> BenchmarkRun:
    chosen, policy = BENCHMARKS[name], policy_of(name, args.policy)
    source = _of(args.data, name, args.names, "--data") or chosen.source
    items = chosen.read(source)
    if chosen.size and len(items) != chosen.size:
        text = "%s: %s holds %d items, the official set %d. Means are over those that there are."
        logging.getLogger(__name__).warning(text, name, source, len(items), chosen.size)
    seen = results.checksum([(item.id, item.question, item.answers) for item in items])
    header = {"benchmark": name, "data": seen}
    games = chosen.games(_sample(items, args.limit, args.seed), policy, args.seed)
    if args.backend != options.VERDICTS:
        return BenchmarkRun(chosen, policy, games, header, None)
    path = _of(args.verdicts, name, args.names, "--verdicts")
    recorded = Recorded(path, items)
    header["verdicts"] = results.checksum(recorded.answers)
    return BenchmarkRun(chosen, policy, recorded.as_played(games), header, recorded.backend(path))


def _path(out: pathlib.Path | None, task: BenchmarkRun) -> pathlib.Path | None:
    return out / task.benchmark.name / "answers.jsonl" if out else None


def _of(values: Sequence[str], name: str, names: Sequence[str], flag: str) -> str:
    """Return the value that a flag has for a benchmark: `NAME=VALUE`, or a value for the only one.

    Paths may hold "=" themselves.
    """
    own = [value.removeprefix(f"{name}=") for value in values if value.startswith(f"{name}=")]
    plain = [value for value in values if value.partition("=")[0] not in BENCHMARKS]
    if plain and len(names) > 1:
        raise UsageError(f"{flag} {plain[0]}: say for which benchmark, e.g. {flag} {name}=PATH.")
    found = own + plain
    if len(found) > 1:
        raise UsageError(f"{flag} names two values for {name}: {', '.join(found)}.")
    return found[0] if found else ""


def _sample(items: list[Item], limit: int, seed: int) -> list[Item]:
    """Return `limit` items by lot, in their order; 0: all. More keep what fewer had."""
    if not limit or limit >= len(items):
        return items

    def lot(item: Item) -> bytes:
        return hashlib.sha256(f"{seed}:{item.id}".encode(errors="surrogatepass")).digest()

    drawn = {item.id for item in sorted(items, key=lot)[:limit]}
    return [item for item in items if item.id in drawn]


def _left(task: BenchmarkRun, kept: Journal) -> list[Game]:
    """Return the games that have no answer yet, by the journal of process 0."""
    done = hosts.gather("the answers so far", set(kept.done))[0]
    return [game for game in task.games if game.id not in done]


def _judge(task: BenchmarkRun, left: list[Game], kept: Journal, backend: Backend | None) -> None:
    assert backend is not None
    name, done = task.benchmark.name, len(task.games) - len(left)
    bar = tqdm(
        total=len(task.games),
        initial=done,
        desc=name,
        unit=" games",
        file=sys.stderr,
        disable=not hosts.is_main(),
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )

    spent = getattr(backend, "spent", None)  # of a backend that costs money

    def record(answer: Response) -> None:
        kept.record(answer)
        if spent is not None:
            bar.set_postfix_str(str(spent), refresh=False)
        bar.update()

    with _stoppable() as stopped, kept.opened(), bar:
        try:
            backend(left, record)
        except KeyboardInterrupt:
            so_far = sum(game.id in kept.done for game in task.games)
            raise commands.Interrupted(
                stopped[-1] if stopped else signal.SIGINT,
                f"Stopped: {so_far} of {len(task.games)} games of {name} are judged. "
                "The same command goes on.",
            ) from None


@contextlib.contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Make SIGTERM stop like Ctrl-C; the list gets the number of the signal."""
    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_error(task: BenchmarkRun, kept: Journal) -> str:
    errors = (kept.answers[game.id].error for game in task.games if game.id in kept.answers)
    return f"The first game: {next(filter(None, errors), 'it has no answer')}."


def _comparison(
    other_dir: pathlib.Path, task: BenchmarkRun, mine: results.Evaluation
) -> PairedComparison:
    """Compare with the answers of another evaluation, read as that one read them."""
    name = task.benchmark.name
    header, answers = journal.read(other_dir / name / "answers.jsonl")
    if header.get("data") != task.header["data"]:
        raise UsageError(f"--compare {other_dir}: it was evaluated on other data of {name}.")
    judge = results_file.read(other_dir).judge
    low, high = judge.decoding.get("scale") or (1, 10)
    read = Reader(judge.parser, (low, high))
    other = mine._replace(responses=answers, reader=read)
    return results.comparison(mine, other, judge.name)


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
        logging.getLogger(__name__).warning(
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
            earned, tasks = evaluate(args)
    except UsageError as error:  # parts used here name settings of a training config
        raise UsageError(str(error).replace("data.prompt", "--prompt")) from error.__cause__
    hosts.gather("the results", None)
    if not hosts.is_main():
        return
    shown = {task.benchmark.name: earned.benchmarks[task.benchmark.name] for task in tasks}
    if args.json:
        print(json.dumps({name: results_file.headline(each) for name, each in shown.items()}))
    else:
        for task in tasks:
            lines = results.table(
                task.benchmark.name, shown[task.benchmark.name], task.benchmark.size
            )
            print("\n".join([*lines, ""]))
        if args.out:
            print(f"Written: {args.out}")
    lacking = [
        f"{task.num_items - each.n} of {task.num_items} items of {name}"
        for task, (name, each) in zip(tasks, shown.items(), strict=True)
        if each.incomplete
    ]
    if lacking:
        raise RunError(
            f"Incomplete: {', '.join(lacking)} have a game without an answer, and do not count. "
            "The same command asks those games again."
        )


def _joined(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Several hosts judge together where it is their devices that judge."""
    if args.backend != options.JLRM:
        return contextlib.nullcontext()
    names = ("model", "names", "options", "policy", "limit", "seed")
    return hosts.joined(args, {name: getattr(args, name) for name in names})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.evaluate",
        description="Let a judge judge benchmarks, and score it by their own rules.",
        epilog=f"Benchmarks: {', '.join(BENCHMARKS)}. Policies: "
        + "; ".join(
            f"{name} {' | '.join(p.aggregation for p in known.policies)}"
            for name, known in BENCHMARKS.items()
        ),
    )
    add = parser.add_argument
    add("--model", default="", metavar="M", help="RUN@STEP, directory, hub id, or a name there")
    add("--benchmark", required=True, metavar="B,B2", help="one or more, see below")
    add(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="file, directory, hf:NAME; B=PATH of several",
    )
    add("--backend", choices=options.BACKENDS, help="who judges (jlrm)")
    add(
        "--verdicts",
        action="append",
        default=[],
        metavar="FILE",
        help="recorded verdicts; or B=FILE",
    )
    add("--parser", default="lenient", help=f"how texts are read: {', '.join(PARSERS)} (lenient)")
    add(
        "--policy",
        nargs="+",
        default=[],
        metavar="K=V",
        help="e.g. order=both judgebench.order=as_given",
    )
    add("--limit", type=int, default=0, metavar="N", help="items of each, by lot (0: all)")
    add("--seed", type=int, default=0, help="of random orders, the lot and sampling (0)")
    add("--name", default="", help="of the judge in reports (the model's)")
    add("--out", type=pathlib.Path, metavar="DIR", help="answers and results (evaluations/NAME)")
    add("--compare", type=pathlib.Path, metavar="DIR", help="--out of another evaluation")
    report = argparse.BooleanOptionalAction
    add("--report", action=report, default=True, help="report.html, report.png, model_card.md")
    add("--json", action="store_true", help="the metrics as one JSON object on stdout")
    options.add_options(parser)
    cluster.add_arguments(parser)
    return parser


def _checked(args: argparse.Namespace) -> argparse.Namespace:
    """Return the arguments with `options` of the backend, each with its value."""
    args.backend = args.backend or (options.VERDICTS if args.verdicts else options.JLRM)
    if (args.backend == options.VERDICTS) != bool(args.verdicts):
        wanted = "needs" if args.backend == options.VERDICTS else "has no use for"
        raise UsageError(f"--backend {args.backend} {wanted} --verdicts FILE.")
    if args.backend != options.VERDICTS and not args.model:
        raise UsageError(f"--backend {args.backend} needs --model.")
    if args.limit < 0:
        raise UsageError(f"--limit={args.limit} is negative: wanted a number of items.")
    args.names = _names(args.benchmark)
    args.options = options.options(args)
    args.model = args.model or pathlib.Path(args.verdicts[0]).stem
    args.out = _out(args)
    return args


def _out(args: argparse.Namespace) -> pathlib.Path | None:
    """Return where answers are kept; recorded verdicts are kept nowhere unless it is named."""
    if args.out is not None:
        return args.out.expanduser()
    name = re.sub(r"[^\w.-]+", "-", args.name or args.model).strip("-.") or "judge"
    return None if args.backend == options.VERDICTS else pathlib.Path("evaluations", name)


if __name__ == "__main__":
    sys.exit(commands.run(main))
