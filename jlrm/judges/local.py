"""A model of ours as a judge: Hugging Face weights or a run's, decoded on the devices of a mesh.

Three ways to decode. Sampling and greedy decoding are those of training (sampler.py); beams or a
repetition penalty are the search of the paper's own evaluation (beam.py).

What is written in a game of a batch depends on the game alone, not on when it is asked, nor on what
else is left to ask: its prompt's width is a function of its length, batches are filled up to one
size so that a width is one compiled program, and random numbers are addressed by (seed, game, vote,
token). Another batch size or mesh is another program, whose sums may differ in their last bits:
there a text differs where two ids are as good as tied. With `refill` games begin where others end,
and other games make such a difference too.

Left out: int8 weights, swapping and voting (the benchmarks' business), progress (the caller's).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from jlrm.config import MeshConfig, UsageError
from jlrm.data.batches import Example
from jlrm.data.tokenizer import (
    Tokenizer,
    decode,
    token_bytes,
)
from jlrm.evaluation.games import Backend, Game, Response
from jlrm.evaluation.prompting import game_encoder, prompting
from jlrm.evaluation.reading import Reader
from jlrm.judgement import prompts
from jlrm.judges import asking
from jlrm.model.qwen import Params
from jlrm.runtime import devices
from jlrm.runtime.mesh import open_mesh
from jlrm.sampling.expected import Asked, Expectation
from jlrm.sampling.generate import lay_out_program
from jlrm.sampling.policy import TextPolicy, check_positions, open_policy
from jlrm.sampling.writer import (
    DecodingSettings,
    Writer,
    Written,
    check_decoding,
    make_writer,
    widths,
)
from jlrm.weights import hf_config, steps
from jlrm.weights.source import model_files, num_labels, read_params

REFILLED = 16  # batches that a host takes at a time, where games begin as others end
STOP = {"</answer>": 2}  # of a pair; others are stopped behind as many scores as they have answers
Expect = Callable[[Params, Sequence["WrittenGame"]], list[Response]]


class LocalModel(NamedTuple):
    """A model on a mesh, and its weights laid out for decoding, which are read when asked for."""

    policy: TextPolicy
    weights: Callable[[], Params]


class WrittenGame(NamedTuple):
    """A game with its prompt, its completions' ids, and the response that they are."""

    game: Game
    prompt_ids: Sequence[int]
    ids: Sequence[Sequence[int]]
    response: Response


def open_model(
    model: str,
    mesh: MeshConfig,
    compute_dtype: str,
    longest: tuple[int, int],
    apart: bool = False,
) -> LocalModel:
    """Open a Hugging Face directory or hub id, or RUN[@STEP].

    Args:
      longest: most tokens of a prompt and of a judgement.
      apart: on the devices of this host alone.

    Raises:
      UsageError: anything the user can mend.
    """
    if num_labels(model):
        raise UsageError(
            f"{model} is a reward model: it scores answers and writes no judgement. python -m "
            "jlrm.evaluate judges benchmarks with it."
        )
    directory = model_files(model)
    config = hf_config.read_config(directory, compute_dtype=compute_dtype)
    if not steps.is_run(model):  # whose weights are masters, whatever it began from
        config = dataclasses.replace(config, param_dtype=hf_config.stored_dtype(directory))
    check_positions(config, sum(longest), "--max-prompt-tokens or --max-new-tokens")
    policy = open_policy(config, open_mesh(mesh, apart=apart), directory)
    devices.tell(policy.mesh)

    @functools.cache
    def weights() -> Params:
        params = read_params(model, config, policy.training)
        return lay_out_program(config, policy.decoding)(params)

    return LocalModel(policy, weights)


def make(
    model: str,
    *,
    prompt: str,
    scale: tuple[int, int],
    max_prompt_tokens: int,
    decoding: DecodingSettings,
    mesh: MeshConfig,
    compute_dtype: str,
    apart: bool = False,
) -> Backend:
    """Return a judge; its weights are read when it is first asked.

    Args:
      model: a Hugging Face directory or hub id, or RUN[@STEP].
      prompt, scale: the template's name or file, and the scores that it asks for if it states any.
      apart: each host holds the model on its own devices, and takes the next games when it is done
        with its last (`asking.in_blocks`). Otherwise all hosts judge each batch together.

    A prompt over `max_prompt_tokens` is answered with an error, and so never cut. At most
    `len(widths(max_prompt_tokens))` programs are compiled, each when a prompt first needs it; with
    `decoding.refill` for each width one that prompts enter by, and one for each size of caches.

    Raises:
      UsageError: anything the user can mend.
    """
    check_decoding(decoding)
    decoding = dataclasses.replace(decoding, stop_after=prompts.reasoning_end(prompt))
    longest = max_prompt_tokens, decoding.max_new_tokens
    policy, weights = open_model(model, mesh, compute_dtype, longest, apart)
    sizes = widths(max_prompt_tokens)
    encode_games = game_encoder(policy.tokenizer, prompting(prompt, scale))
    expect, num_shards = make_expectation(policy, scale), policy.decoding.num_shards("P")

    @functools.cache
    def writer(num_answers: int) -> Writer:
        stops = dict.fromkeys(decoding.stop_strings, num_answers)
        return make_writer(policy, dataclasses.replace(decoding, stop_strings=stops), sizes)

    def judge(games: Sequence[Game], record: Callable[[Response], None]) -> None:
        for num_answers in sorted({len(game.shown) for game in games}):
            own = {game.id: game for game in games if len(game.shown) == num_answers}
            fitting = []
            for example in encode_games(list(own.values())):
                if len(example.prompt_ids) > max_prompt_tokens:
                    record(too_long(example, max_prompt_tokens))
                else:
                    fitting.append(example)
            if not fitting:
                continue
            written = (
                written_game(policy.tokenizer, own[each.example.comparison.id], each)
                for each in writer(num_answers)(weights(), fitting)
            )
            for response in with_expected(written, partial(expect, weights()), num_shards):
                record(response)

    if not apart:
        return judge
    weights()  # by all hosts: some read together, and one may find no games left
    size = decoding.batch_size
    return asking.in_blocks(judge, size, REFILLED * size if decoding.refill else 0)


def with_expected(
    written: Iterable[WrittenGame],
    expect: Callable[[Sequence[WrittenGame]], list[Response]],
    together: int,
) -> Iterator[Response]:
    """Yield the responses, with expected scores where they are wanted: `together` in one pass."""
    waiting: list[WrittenGame] = []
    for each in written:
        if not each.game.item.is_expected:
            yield each.response
            continue
        waiting.append(each)
        if len(waiting) == together:
            yield from expect(waiting)
            waiting = []
    yield from expect(waiting)


def make_expectation(policy: TextPolicy, scale: tuple[int, int]) -> Expect:
    """Return what adds expected scores to responses."""
    read = Reader("lenient", scale)

    @functools.cache
    def expectation() -> Expectation:
        return Expectation(policy, token_bytes(policy.tokenizer), scale)

    def expect(weights: Params, judged: Sequence[WrittenGame]) -> list[Response]:
        asked = []
        for game, prompt, ids, response in judged:
            texts, endings = response.texts or (), response.endings or (None,) * len(ids)
            spelled, places = expectation().spelled, []
            for own, text, ending in zip(ids, texts, endings, strict=True):
                # Broken characters one by one, so that a place in the text is one in the bytes.
                said = b"".join(spelled[token] for token in own).decode(errors="surrogateescape")
                said = text if said.startswith(text) else said  # cut where its score was written
                found = read.places(said, ending, game.item.rubric, len(game.shown)) or ()
                places.append([len(said[:i].encode(errors="surrogateescape")) for i in found])
            asked.append(Asked(prompt, ids, places))
        expected = expectation()(weights, asked) if asked else []
        return [
            dataclasses.replace(each.response, expected=own)
            for each, own in zip(judged, expected, strict=True)
        ]

    return expect


def written_game(tokenizer: Tokenizer, game: Game, written: Written) -> WrittenGame:
    """Return a game with what was written in it."""
    ids = [each.ids for each in written.completions]
    return WrittenGame(game, written.example.prompt_ids, ids, answer(tokenizer, written))


def answer(tokenizer: Tokenizer, written: Written) -> Response:
    """Return what was written as the answer of the game that the example's id names."""
    return Response(
        game=written.example.comparison.id,
        texts=tuple(decode(tokenizer, [each.ids for each in written.completions])),
        endings=tuple("stop" if each.is_finished else "length" for each in written.completions),
        prompt_tokens=len(written.example.prompt_ids),
        num_tokens=sum(len(each.ids) for each in written.completions),
        seconds=written.seconds,
    )


def too_long(example: Example, max_prompt_tokens: int) -> Response:
    """Return the response of a game whose prompt is too long: an error, since none is cut."""
    length = len(example.prompt_ids)
    return Response(
        game=example.comparison.id,
        error=f"The prompt has {length} tokens, max_prompt_tokens is {max_prompt_tokens}.",
        prompt_tokens=length,
    )
