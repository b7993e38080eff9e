"""Every command block of README.md does what it says, on stand-ins for what is not here.

A block is indented by four spaces or fenced. Its commands are run in a folder that holds files of
the names that they use: a few pairs, small benchmarks, and models of one layer where hub ids would
be. `CHECKED` names the commands that can't run here, with the reason; these are parsed, and their
configs loaded. A block that no table knows fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import COMPILE_FASTEST, slowness
from judges.test_local import CONFIG, write_model
from server.test_server import started
from test_export import TEMPLATE, edit

from jlrm.data.worlds import toy
from jlrm.judges import options
from jlrm.planning import slices
from jlrm.runtime import commands, settings

runs = pytest.mark.slow  # models are compiled
ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
BASE = "Qwen/Qwen2.5-0.5B-Instruct"

# Blocks that show what is printed or written, by their first line.
SHOWN = {
    "stage  agreement  parse_rate  swap_consistency  reward  mean_length": "the quickstart's end",
    "Question:  Name fruits.": "a judgement of the quickstart",
}
ROW = '{"question": "How many legs'  # of pairs.jsonl, which the commands below read
PYTHON = "from jlrm import Judge"
GRADED = 'criteria = {"accuracy"'  # Python too, which goes on from that

# Commands that run, by their beginning: what is put in place of a name, and what is added so that
# it takes seconds.
RUN: dict[str, tuple[dict[str, str], str]] = {
    "jlrm report runs/mine": ({}, ""),
    "jlrm export --checkpoint runs/mine@best --out judge": ({}, ""),
    "jlrm export --checkpoint runs/mine@best --out pushed": (
        {"ORG/NAME": "org/judge"},
        "--dry-run",  # test_card.py pushes to a hub of its own
    ),
    "jlrm export --from-hf Qwen/Qwen3-0.6B": ({}, ""),
    "jlrm prepare --input pairs.jsonl more.parquet": ({}, ""),
    "jlrm judge pairs.jsonl --model runs/mine@best --out": ({}, ""),
    "jlrm judge pairs.jsonl --model runs/mine@best --rubric": ({"pairs.jsonl": "gold.jsonl"}, ""),
    "jlrm judge pairs.jsonl --model runs/mine@best --prompt": ({}, ""),
    "jlrm judge check judged/verdicts.jsonl": ({"judged/": "labelled/"}, ""),
    "jlrm evaluate --model runs/mine@best --benchmark pandalm": ({}, ""),
    "jlrm evaluate --backend openai": (
        {"http://HOST:8000/v1": "URL", "NAME": "judge"},
        "--data judgebench.jsonl",  # which is downloaded without it
    ),
    "jlrm evaluate --verdicts said.jsonl": ({}, ""),
    "jlrm evaluate --model runs/mine@best --benchmark pairs": ({}, ""),
    "jlrm evaluate --backend heuristic": ({}, ""),
    "jlrm scorecard OUT_1 OUT_2": ({}, ""),
    "jlrm study configs/study/toy.yaml --dry-run": ({}, ""),
    "jlrm study configs/study/toy.yaml --jobs": ({}, "--dry-run"),  # minutes
    "jlrm study configs/study/judgelrm_3b.yaml": ({}, "--dry-run"),  # it needs a TPU slice
    "bash launch/tpu_vm.sh up": ({"BUCKET": "bucket"}, "--dry-run"),
}
# Commands of which other tests take care.
APART = {
    "jlrm train --config configs/judge_pairs_0.5b.yaml": "makes runs/mine for all others",
    "jlrm judge --model runs/mine@best": "is typed into (server/test_terminal.py)",
    "jlrm judge serve": "is started, and asked by the next one",
    "jlrm export --checkpoint runs/judgelrm_7b_lora --out": "weights/test_peft.py exports adapters",
    "curl -s http://127.0.0.1:8000/v1/judge": "asks that server",
}
# Commands that can't run here, and how far they are checked.
CHECKED = {
    "bash launch/quickstart.sh": "makes .venv and trains for minutes (test_launch.py runs it)",
    "bash launch/test.sh": "runs this test",
    "source .venv/bin/activate": "launch/setup.sh makes it",
    "pip install 'jlrm[serve]'": "the name of an extra",
    "jlrm train --config configs/language_135m.yaml": "a checkpoint of the hub, and an hour",
    "jlrm train --config configs/judgelrm_3b.yaml": "a 3B model on a TPU slice",
    "jlrm train --config configs/judgelrm_7b_lora.yaml": "a 7B model on a TPU slice",
    "jlrm prepare --engine beam": "runs on Dataflow (preparation/test_engines.py runs it here)",
    "bash launch/peers.sh": "installs gigabytes",
    "jlrm plan": "compiles for minutes, with libtpu",
    "jlrm study configs/study/judgelrm_4b.yaml": "compiles for minutes, with libtpu",
    "jlrm bench": "measures a 0.5B model",
}
OPTIONAL = {"OTHER.yaml": "configs/judge_pairs_0.5b.yaml"}  # names that only [...] holds


def blocks() -> list[str]:
    """Return the text of every block, without its indentation."""
    text = README.read_text()
    fence = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
    plain = fence.sub("", text)
    indented = re.findall(r"^(?: {4}.*\n)(?:(?: {4}.*)?\n)*", plain, re.M)
    cut = [re.sub(r"(?m)^ {4}", "", each).strip("\n") for each in indented]
    return [*fence.findall(text), *cut]


def is_shell(block: str) -> bool:
    return not block.startswith((*SHOWN, ROW, PYTHON, GRADED))


def shell_commands() -> list[str]:
    joined = (block.replace("\\\n", " ") for block in blocks() if is_shell(block))
    lines = [line for block in joined for line in block.splitlines()]
    return [re.sub(r"\s+", " ", line.partition(" #")[0]).strip() for line in lines]


def forms(command: str) -> list[str]:
    """Return a command without what stands in brackets, and with all of it."""
    both = [re.sub(r" \[.*?\]", "", command), command.replace("[", "").replace("]", "")]
    return both if re.search(r" \[", command) else [command]


def entry(command: str) -> str:
    """Return the one beginning that a table knows a command by."""
    (found,) = [each for each in (*RUN, *APART, *CHECKED) if command.startswith(each)]
    return found


def test_every_block_is_in_a_table():
    assert len(blocks()) > 15  # they are found at all
    listed = shell_commands()
    unknown = [each for each in listed if not each.startswith((*RUN, *APART, *CHECKED))]
    assert not unknown, f"say in {__file__} how these are tested: {unknown}"
    assert {entry(each) for each in listed} == {*RUN, *APART, *CHECKED}  # none is left of before
    for first in (*SHOWN, ROW, PYTHON, GRADED):
        assert sum(block.startswith(first) for block in blocks()) == 1, first


# ------------------------------------------------------------------------------- stand-ins


def lines_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pair_rows(num: int) -> list[dict[str, Any]]:
    return [
        {"question": f"{row.question} ({i})", "preference": 1 + i % 2}
        | {"answer_1": row.answer_1, "answer_2": row.answer_2}
        for i, row in enumerate(toy.comparisons(5, num))
    ]


def write_data(world: pathlib.Path) -> None:
    (shown,) = (block for block in blocks() if block.startswith(ROW))
    rows = pair_rows(40)
    (world / "pairs.jsonl").write_text(shown + "\n" + lines_of(rows[:7]))
    pq.write_table(pa.Table.from_pylist(rows[7:]), world / "more.parquet")
    (world / "gold.jsonl").write_text(lines_of([{**row, "gold": "fig"} for row in rows[:3]]))
    (world / "rubric.yaml").write_text("accuracy: Facts are right.\nstyle: Plain words.\n")
    (world / "mine.txt").write_text("{question}\n1: {answer_1}\n2: {answer_2}\nYour scores?\n")
    annotated = {f"annotator{i}": 1 for i in (1, 2, 3)}
    pandalm = [
        {"idx": i, "instruction": row["question"] + "?", "input": "", **annotated}
        | {"response1": row["answer_1"], "response2": row["answer_2"]}
        for i, row in enumerate(rows[:4])
    ]
    for name in ("pandalm.json", "testset-v1.json"):
        (world / name).write_text(json.dumps(pandalm))
    said = [{"idx": i, "output": "<answer>7</answer><answer>2</answer>"} for i in range(4)]
    (world / "said.jsonl").write_text(lines_of(said))
    bench = [
        {"pair_id": str(i), "question": row["question"], "source": "mmlu-pro-law", "label": "A>B"}
        | {"response_A": row["answer_1"], "response_B": row["answer_2"]}
        for i, row in enumerate(rows[:3])
    ]
    (world / "judgebench.jsonl").write_text(lines_of(bench))
    (world / "mine.csv").write_text("question,answer_1,answer_2,winner\nq,a,b,1\nr,a,b,2\n")
    (world / "labelled").mkdir()
    verdicts = [
        {**row, "winner": 1 + (i % 2 if i % 5 else 0), "label": 1 + i % 2}
        | {"confidence": 0.5 + (i % 7) / 20, "id": str(i)}
        for i, row in enumerate(rows)
    ]
    (world / "labelled" / "verdicts.jsonl").write_text(lines_of(verdicts))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    """A folder with a file for every name that the README uses, and a run that its command made."""
    path = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "jlrm"):
        (path / name).symlink_to(ROOT / name)
    for name in (BASE, "Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-3B-Instruct"):
        write_model(path / name, config=dataclasses.replace(CONFIG, max_position_embeddings=8192))
        edit(path / name / "tokenizer_config.json", chat_template=TEMPLATE)
    write_data(path)
    (command,) = [each for each in shell_commands() if entry(each) == next(iter(APART))]
    small = (
        "run.dir=runs/mine run.tensorboard=false grpo.steps=1 grpo.prompts=2 grpo.rollouts=2 "
        "data.eval_rows=2 sampling.max_new_tokens=8 model.compute_dtype=float32"
    )
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(f"{command} {small}")],
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": COMPILE_FASTEST},
        capture_output=True,
        text=True,
        timeout=300 * slowness(),
    )
    assert done.returncode == 0, done.stderr
    assert "Report: runs/mine/report.html" in done.stdout
    return path


@pytest.fixture
def here(world, monkeypatch) -> pathlib.Path:
    monkeypatch.chdir(world)
    short = options.OPTIONS["max_new_tokens"]._replace(default=8)
    monkeypatch.setitem(options.OPTIONS, "max_new_tokens", short)
    update = jax.config.update  # an import chooses the platform of its own process
    chosen = {"jax_platforms"}
    monkeypatch.setattr(jax.config, "update", lambda *a: None if a[0] in chosen else update(*a))
    return world


def run(words: list[str]) -> None:
    """Run `jlrm NAME ...` as the command does."""
    name, *arguments = words[1:]
    main = importlib.import_module(f"jlrm.{name}").main
    assert commands.run(lambda: main(arguments)) == 0, shlex.join(words)


def substituted(command: str, names: dict[str, str]) -> list[str]:
    for name, instead in names.items():
        assert name in command
        command = command.replace(name, instead)
    return shlex.split(command)


@runs
@pytest.mark.parametrize("known", RUN)
def test_a_command_runs(known, here, serve):
    (command,) = [each for each in shell_commands() if entry(each) == known]
    names, more = RUN[known]
    if known == "jlrm scorecard OUT_1 OUT_2":
        for judge, out in (("longer", "OUT_1"), ("shorter", "OUT_2")):
            asked = f"--model {judge} --benchmark pandalm --data testset-v1.json --out {out}"
            run(shlex.split(f"jlrm evaluate --backend heuristic {asked}"))
    if "URL" in names.values():
        names = {name: serve().url if new == "URL" else new for name, new in names.items()}
    for form in forms(command):
        words = substituted(form, names)
        if words[0] == "jlrm":
            run([*words, *shlex.split(more)])
            continue
        place = words.index("--")
        words[place:place] = [more]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and "gcloud" in done.stdout, done.stderr
    for made in re.findall(r"--out (\S+)", command):
        assert (here / made.rstrip("]")).exists()


@runs
def test_the_python_block_runs(here, capsys):
    (block,) = [each for each in blocks() if each.startswith(PYTHON)]
    exec(block, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == block.count("print(") and printed[1].startswith("(")
    (block,) = [each for each in blocks() if each.startswith(GRADED)]
    from jlrm import Judge

    texts = {"question": "How many legs has a spider?", "answer_1": "Eight.", "answer_2": "Six."}
    exec(block, {"Judge": Judge, **texts})
    assert capsys.readouterr().out.splitlines()[-1] == "None None None"  # an untrained judge's


@runs
def test_the_server_is_started_and_asked(world, tmp_path, monkeypatch):
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    serve_line, curl_line = (
        next(each for each in shell_commands() if each.startswith(begin))
        for begin in ("jlrm judge serve", "curl")
    )
    flags = shlex.split(serve_line)[3:]
    place = flags.index("--model") + 1
    flags[place] = str(world / flags[place])
    sizes = ["--max-prompt-tokens", "1024", "--max-new-tokens", "8", "--slots", "2"]
    with started(tmp_path, *flags, *sizes) as server:
        words = shlex.split(curl_line.replace(":8000", f":{server.port}"))
        done = subprocess.run(words, capture_output=True, text=True, timeout=120 * slowness())
    reply = json.loads(done.stdout)
    assert len(reply["games"]) == 2 and "winner" in reply, reply


# ------------------------------------------------------------------- what can't run here


class Parsed(Exception):
    """Raised in place of what a command does with its arguments."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that parses a command's flags with its own parser, and goes no further."""
    found: list[argparse.Namespace] = []
    parse_args = argparse.ArgumentParser.parse_known_args

    def parsed(self: Any, args: Any = None, namespace: Any = None) -> Any:
        known, left = parse_args(self, args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        found.append(known)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *a, **k: parsed(*a, **k))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parsed)

    def of(words: list[str]) -> argparse.Namespace:
        with pytest.raises(Parsed):
            importlib.import_module(f"jlrm.{words[1]}").main(words[2:])
        return found.pop()

    return of


@pytest.mark.parametrize("known", CHECKED)
def test_what_cannot_run_is_checked(known, monkeypatch, parse):
    monkeypatch.chdir(ROOT)
    for command in [each for each in shell_commands() if entry(each) == known]:
        for form in forms(command):
            checked(substituted(form, {k: v for k, v in OPTIONAL.items() if k in form}), parse)


def checked(words: list[str], parse: Any) -> None:
    """Check a command as far as it goes without running it."""
    match words:
        case ["bash", script, *_]:
            assert subprocess.run(["bash", "-n", script]).returncode == 0
        case ["source", path]:
            assert 'venv "$ROOT/.venv"' in (ROOT / "launch" / "setup.sh").read_text(), path
        case ["pip", "install", package]:
            (extra,) = re.findall(r"jlrm\[(\w+)\]", package)
            assert re.search(rf'^    "{extra}": ', (ROOT / "setup.py").read_text(), re.M)
        case _:
            args = parse(words)
            if not hasattr(args, "config"):
                return
            given = getattr(args, "overrides", [])
            assert settings.load(args.config, given).run.dir
            if other := getattr(args, "compare", None):
                assert settings.load(other)
            if topology := getattr(args, "topology", None):
                assert slices.find(topology)
