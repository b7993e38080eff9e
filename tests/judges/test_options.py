"""What is left open until a model and its games are known: limits of tokens, and batches."""

from __future__ import annotations

import json
import pathlib
import signal

import pytest
from judges.test_local import write_model
from test_evaluate import Judge

from jlrm import judge
from jlrm.config import UsageError
from jlrm.judges import options
from jlrm.runtime import commands

OPEN = dict.fromkeys(options.OPEN)
USUAL = 4096, 2048


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return a model with 512 positions."""
    path = tmp_path_factory.mktemp("small")
    write_model(path)
    return str(path)


@pytest.mark.parametrize(
    ("positions", "given", "wanted"),
    [
        (8192, (None, None), (4096, 2048)),
        (6144, (None, None), (4096, 2048)),
        (5000, (None, None), (2952, 2048)),
        (2048, (None, None), (1024, 1024)),
        (2048, (None, 160), (1888, 160)),
        (2048, (1900, None), (1900, 148)),
        (2048, (4096, None), (4096, 1)),  # which is refused, by name, where the model is opened
        (2048, (64, 32), (64, 32)),
    ],
)
def test_limits_fit_the_positions(positions, given, wanted):
    assert options.limits(positions, given, USUAL) == wanted


def test_what_was_chosen_for_a_small_model_is_told(model, caplog):
    found = options.settled(options.JLRM, model, {**OPEN, "votes": 1})
    assert found == {**dict(zip(OPEN, (256, 256, 32), strict=True)), "votes": 1}
    (said,) = caplog.messages
    assert "has 512 positions: prompts of up to 256 tokens and judgements of up to 256" in said
    caplog.clear()
    given = {"max_prompt_tokens": 64, "max_new_tokens": 8, "batch_size": 5}
    assert options.settled(options.JLRM, "/nowhere", given, 2) == given and not caplog.messages
    assert options.settled(options.OPENAI, "m", {"votes": 2}, 2) == {"votes": 2}


@pytest.mark.parametrize(("num_games", "rows"), [(1, 1), (2, 2), (12, 16), (32, 32), (1000, 32)])
def test_a_batch_is_as_large_as_the_games_are_many(num_games, rows):
    chosen = {**OPEN, "max_prompt_tokens": 64, "max_new_tokens": 8}
    assert options.settled(options.JLRM, "m", chosen, num_games)["batch_size"] == rows


def test_a_command_goes_on_with_the_batches_that_it_began_with(
    model, tmp_path: pathlib.Path, monkeypatch, capsys
):
    row = {"question": "q", "answer_1": "a", "answer_2": "b"}
    rows = [{**row, "id": str(i)} for i in range(6)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(each) + "\n" for each in rows))
    made = []
    stopping = Judge(stop_after=9)
    stopping.stop = lambda: signal.raise_signal(signal.SIGTERM)
    tellers = [stopping, Judge()]

    def make(backend, name, chosen, *_):
        made.append({key: chosen[key] for key in OPEN})
        return tellers.pop(0)

    monkeypatch.setattr(options, "make", make)
    command = [str(pairs), "--model", model, "--prompt", "toy", "--out", str(tmp_path / "o")]
    codes = [commands.run(lambda: judge.main(command)) for _ in range(2)]
    assert codes == [143, 0]
    assert made == 2 * [dict(zip(OPEN, (256, 256, 16), strict=True))]
    assert "256" in capsys.readouterr().err
    header = json.loads((tmp_path / "o" / "responses.jsonl").read_text().splitlines()[0])["header"]
    assert header["max_new_tokens"] == 256 and "batch_size" not in header


def test_limits_that_are_given_and_do_not_fit_are_refused(model):
    from jlrm.serving.judge import Judge as Asked

    with pytest.raises(UsageError, match=r"512\. Lower --max-prompt-tokens"):
        Asked.load(model, prompt="toy", max_prompt_tokens=600)
