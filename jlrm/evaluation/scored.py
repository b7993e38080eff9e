"""A reward model as a judge: it gives scores, and writes nothing.

Its number of scores tells how it is asked. One: each answer alone, as a reply to the question, and
the scores are compared. Two: both answers in the judge's prompt, with a score for each. Three: the
same, with a class for a tie and for either answer; the largest is the verdict.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jlrm.config import MeshConfig, UsageError
from jlrm.data.batches import question_encoder
from jlrm.data.tokenizer import Tokenizer, control_tokens, encode, question_template
from jlrm.evaluation.games import Backend, Game, Response
from jlrm.evaluation.prompting import comparison, game_encoder, prompting
from jlrm.judgement import prompts
from jlrm.model.qwen import Params
from jlrm.runtime import devices
from jlrm.runtime.mesh import open_mesh
from jlrm.sampling.policy import check_positions, open_policy
from jlrm.sampling.scores import Scorer
from jlrm.weights import hf_config, source, steps

TextsOfGames = Callable[[Sequence[Game]], list[list[list[int]]]]


class GivenScores(NamedTuple):
    """What a reward model gives a game: two scores, or a preference alone."""

    scores: tuple[float, float] | None
    preference: int | None


def make(
    model: str,
    *,
    prompt: str,
    scale: tuple[int, int],
    max_prompt_tokens: int,
    batch_size: int,
    mesh: MeshConfig,
    compute_dtype: str,
    apart: bool = False,
) -> Backend:
    """Return a judge by scores; the arguments are those of `judges.local.make`.

    A text over `max_prompt_tokens`, the answer included, is answered with an error.

    Raises:
      UsageError: anything the user can mend.
    """
    directory, num_labels = source.model_files(model), source.num_labels(model)
    known = {len(names) for names in hf_config.LABELS.values()}
    if num_labels not in known:
        raise UsageError(
            f"{model} gives {num_labels} scores, which say nothing of two answers. Wanted a reward "
            f"model with {', '.join(map(str, sorted(known)))} of them (id2label in config.json)."
        )
    config = hf_config.read_config(directory, compute_dtype=compute_dtype)
    config = dataclasses.replace(config, num_labels=num_labels)
    if not steps.is_run(model):
        config = dataclasses.replace(config, param_dtype=hf_config.stored_dtype(directory))
    check_positions(config, max_prompt_tokens, "--max-prompt-tokens")
    policy = open_policy(config, open_mesh(mesh, apart=apart), directory)
    devices.tell(policy.mesh)
    texts_of = game_texts(policy.tokenizer, num_labels, prompt, scale, policy.end_ids[0])
    score = Scorer(policy, batch_size)

    @functools.cache
    def weights() -> Params:
        return source.read_params(model, config, policy.training)

    def judge(games: Sequence[Game], record: Callable[[Response], None]) -> None:
        if num_labels > 1 and any(game.is_single for game in games):
            raise UsageError(f"{model} scores two answers together, and none by itself.")
        if any(game.rest for game in games):
            raise UsageError(f"{model} is a reward model, which sees no list at once.")
        for start in range(0, len(games), batch_size):
            block = games[start : start + batch_size]
            texts = texts_of(block)
            longest = [max(map(len, own)) for own in texts]
            fitting = [i for i, length in enumerate(longest) if length <= max_prompt_tokens]
            found = given(score(weights(), [ids for i in fitting for ids in texts[i]]))
            for i, each in zip(fitting, found, strict=True):
                num_read = sum(map(len, texts[i]))
                record(
                    Response(block[i].id, prompt_tokens=num_read, num_tokens=0, **each._asdict())
                )
            for i in sorted({*range(len(block))} - {*fitting}):
                error = f"A text has {longest[i]} tokens, max_prompt_tokens is {max_prompt_tokens}."
                record(Response(block[i].id, error=error))

    if apart:
        weights()  # by all hosts: some read together, and one may find no games left
    return judge


def game_texts(
    tokenizer: Tokenizer, num_labels: int, prompt: str, scale: tuple[int, int], end_id: int
) -> TextsOfGames:
    """Return games -> the token ids of the texts that are scored in each: two with one score."""
    if num_labels > 1:
        encode_games = game_encoder(tokenizer, prompting(prompt, scale))
        return lambda games: [[list(each.prompt_ids)] for each in encode_games(games)]
    ask, control = question_encoder(tokenizer), control_tokens(tokenizer)

    def texts(games: Sequence[Game]) -> list[list[list[int]]]:
        asked = ask([comparison(game) for game in games])
        rows = [each.comparison for each in asked]
        answers = [text for row in rows for text in (row.answer_1, row.answer_2)]
        ids = encode(tokenizer, [prompts.neutralise(text, control) for text in answers])
        return [
            [[*each.prompt_ids, *answer, end_id] for answer in pair]
            for each, pair in zip(asked, zip(ids[::2], ids[1::2], strict=True), strict=True)
        ]

    return texts


def given(scores: np.ndarray) -> list[GivenScores]:
    """Return what the scores of games' texts say of each game."""
    if scores.shape[1] == 3:
        return [GivenScores(None, int(row.argmax())) for row in scores]
    return [GivenScores((float(row[0]), float(row[1])), None) for row in scores.reshape(-1, 2)]


def how_to_ask(
    text: str, tokenizer: Tokenizer, kind: str, template: str, end_id: int, max_prompt_tokens: int
) -> str:
    """Fill the part of an export's card that says how a reward model is asked, with a program.

    Args:
      text: of that part (reports/templates/scoring_card.txt).
      template: the judge's prompt.
    """
    texts, which = 'question="What is 2 + 2?", answer_1="4", answer_2="5"', "which holds both"
    asked = f"print(scores({texts}))  # {', '.join(hf_config.LABELS[kind])}"
    if kind == "bradley_terry":
        end = tokenizer.convert_ids_to_tokens(end_id)
        template, which = f"{question_template(tokenizer)}{{answer}}{end}", "for each answer"
        asked = 'print([scores(question="What is 2 + 2?", answer=each) for each in ("4", "5")])'
    control = sorted({*control_tokens(tokenizer), *prompts.THINK_TAGS})
    return text.format(
        scored=which,
        template=template,
        lines="\n".join(f"    {line!r}" for line in template.splitlines(keepends=True)),
        control="\n".join(f"    {token!r}," for token in control),
        broken='token[0] + " " + token[1:]',
        asked=asked,
        max_prompt=max_prompt_tokens,
    )
