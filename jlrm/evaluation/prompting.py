"""How a game is asked about: by a prompt of ours, or by a template of one's own.

A template is a file with named places. Its text is the user's message of a chat, which the model's
own chat template turns into a prompt that opens `<think>`:

    {question} {answer_1} {answer_2}      of a pair; where one answer is judged {question} {answer}
    {reference} {rubric}                  where these are given
    {min_score} {max_score}               of the scale

`{{name}}` stands for `{name}` itself, and other braces for themselves. Places are filled in one
pass, so what is filled in is never read as a place, and control texts in it are broken as in the
prompts of ours.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from jlrm.config import UsageError, nearest
from jlrm.data.batches import Example
from jlrm.data.comparisons import Comparison
from jlrm.data.tokenizer import Tokenizer, control_tokens, encode, whole_text
from jlrm.evaluation.games import WAYS, Game
from jlrm.judgement import prompts
from jlrm.judgement.prompts import PromptText
from jlrm.reports import contracts
from jlrm.runtime.settings import load

PAIR, SINGLE = ("question", "answer_1", "answer_2"), ("question", "answer")
MORE = ("reference", "rubric", "min_score", "max_score")
PLACES = (*PAIR, "answer", *MORE)
LARGEST = 2**20  # bytes of a template
NAME, VERSION = "judging.json", 1
EncodeGames = Callable[[Sequence[Game]], list[Example]]

_PLACE = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Prompting:
    """A prompt by name, or by the file that `own` was read from; and the scale that it asks for."""

    name: str
    scale: tuple[int, int] = (1, 10)
    own: str | None = None

    @property
    def identity(self) -> str:
        """What tells this prompt from others: its name, or what the file says."""
        if self.own is None:
            return self.name
        return f"a template of sha256 {hashlib.sha256(self.own.encode()).hexdigest()[:16]}"

    @property
    def plain(self) -> PromptText:
        """The text for a pair alone, or the template.

        Raises:
          UsageError: no such prompt.
        """
        if self.own is not None:
            return PromptText("", self.own)
        if self.name in prompts.PAIR_TEMPLATES:
            return PromptText(None, prompts.PAIR_TEMPLATES[self.name])
        return prompts.messages(self.name, *self.scale)

    def text(self, game: Game) -> PromptText:
        """Return the text that asks for a game.

        Raises:
          UsageError: the prompt has no form for it, or no place for what is to be shown, or a place
            for what is not given.
        """
        rubric, reference = game.item.rubric, game.item.reference
        if self.own is not None:
            self._check(game, places(self.own))
            return PromptText("", self.own)
        num = len(game.shown)
        if self.name == prompts.OURS:
            write = prompts.single_messages if game.is_single else prompts.messages
            more = {} if game.is_single else {"num_answers": num}
            kind = rubric.kind if rubric else ""
            return write(self.name, *self.scale, kind, reference is not None, **more)
        for what, value in (("rubric", rubric), ("reference", reference)):
            if value is not None:
                raise UsageError(
                    f"The prompt '{self.name}' has no place for a {what}: take jlrm, or a template "
                    f"with {{{what}}}."
                )
        if game.is_single:
            return prompts.single_messages(self.name, *self.scale)
        if self.name in prompts.PAIR_TEMPLATES:
            return PromptText(None, prompts.pair_template(self.name, num))
        return prompts.messages(self.name, *self.scale, num_answers=num)

    def _check(self, game: Game, own: set[str]) -> None:
        wanted = SINGLE if game.is_single else PAIR
        if game.rest:
            raise UsageError(
                f"The template {self.name} has no form for {len(game.shown)} answers at once: take "
                "the prompt jlrm."
            )
        if missing := [name for name in wanted if name not in own]:
            form = "one answer" if game.is_single else "pairs"
            raise UsageError(
                f"The template {self.name} has no form for {form}: it lacks {{{missing[0]}}}."
            )
        given = {"rubric": game.item.rubric, "reference": game.item.reference}
        for name, value in given.items():
            if value is None and name in own:
                raise UsageError(
                    f"The template {self.name} has {{{name}}}, and no {name} is given."
                )
            if value is not None and name not in own:
                raise UsageError(
                    f"A {name} is given, and the template {self.name} has no {{{name}}}."
                )

    def fill(self, template: str, game: Game, quote: Callable[[str], str]) -> str:
        """Write a game into a text; `quote` breaks what could steer a judge."""
        item, shown = game.item, [quote(game.item.answers[i]) for i in game.shown]
        values = {"question": quote(item.question)}
        values |= {f"answer_{place}": text for place, text in enumerate(shown, 1)}
        if game.is_single:
            values = {"question": values["question"], "answer": shown[0]}
        if item.reference is not None:
            values["reference"] = quote(item.reference)
        if item.rubric is not None:
            values["rubric"] = quote(item.rubric.text)
        if self.own is None:
            return prompts.fill(template, **values)
        values |= {"min_score": str(self.scale[0]), "max_score": str(self.scale[1])}
        # What is no place of ours was written by the model's chat template.
        return _PLACE.sub(
            lambda hit: f"{{{hit[1]}}}" if hit[1] else values.get(hit[2], hit[0]), template
        )


def prompting(name: str, scale: tuple[int, int] = (1, 10)) -> Prompting:
    """Return a prompt of ours by its name, or else the template of a file.

    Raises:
      UsageError: neither, or a file that is no template.
    """
    if name in prompts.PAIR_NAMES or name in prompts.PAIR_TEMPLATES:
        return Prompting(name, scale)
    file = pathlib.Path(name).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"The prompt '{name}' is neither the name of one nor a file that can be read "
            f"({error.strerror}). {nearest(name, prompts.PAIR_NAMES)}"
        ) from None
    if len(content) > LARGEST:
        raise UsageError(f"The template {name} has over {LARGEST} bytes.")
    try:
        own = content.decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"The template {name} is not UTF-8 text: {error}.") from None
    if not own:
        raise UsageError(f"The template {name} is empty.")
    found = places(own)
    for place in sorted(found):
        if place not in PLACES:
            raise UsageError(
                f"The template {name} has {{{place}}}, which is no place. "
                f"{nearest(place, PLACES)} For the text {{{place}}} itself write {{{{{place}}}}}."
            )
    if "answer" in found and found & set(PAIR[1:]):
        raise UsageError(
            f"The template {name} has {{answer}} and {{{min(found & set(PAIR[1:]))}}}: it is for "
            "one answer or for pairs."
        )
    wanted = SINGLE if "answer" in found else PAIR
    if missing := ", ".join(f"{{{each}}}" for each in wanted if each not in found):
        raise UsageError(
            f"The template {name} lacks {missing}. Wanted {{question}} with {{answer_1}} and "
            "{answer_2}, or with {answer}."
        )
    return Prompting(name, scale, own)


def places(own: str) -> set[str]:
    """Return the names of a template's places."""
    return {hit[2] for hit in _PLACE.finditer(own) if hit[2]}


def game_encoder(tokenizer: Tokenizer, asked: Prompting) -> EncodeGames:
    """Return what fills and tokenises the prompts of games, however long.

    Raises:
      UsageError: there is no such prompt, or the tokenizer's chat template can't write it; and
        later for games that it has no form for.
    """
    text = functools.cache(partial(whole_text, tokenizer, asked.name))
    text(asked.plain)  # what is wrong is heard of at once
    quote = partial(prompts.quote, name=asked.name, control_tokens=control_tokens(tokenizer))

    def encode_games(games: Sequence[Game]) -> list[Example]:
        texts = [asked.fill(text(asked.text(game)), game, quote) for game in games]
        rows = map(comparison, games)
        return [Example(*each) for each in zip(rows, texts, encode(tokenizer, texts), strict=True)]

    return encode_games


def comparison(game: Game) -> Comparison:
    """Return a game as what prompts are made of; its id is the game's."""
    answers = game.item.answers
    return Comparison(game.id, game.item.question, answers[game.first], answers[game.second])


@dataclass(frozen=True)
class AsTrained:
    """How a judge was asked in training; of an exported one the content of `judging.json`."""

    prompt: str = prompts.OURS
    scale: tuple[int, int] = (1, 10)
    judging: str = "pairs"  # as of `data.judging`
    version: int = VERSION


def as_trained(model: str) -> AsTrained | None:
    """Return how a run was asked in training, or the run that was exported; None of other models.

    Raises:
      UsageError: no such step, a config that can't be read, or a `judging.json` that is none.
    """
    from jlrm.weights import hf, hub, steps  # with JAX
    from jlrm.weights.source import side_files

    directory = pathlib.Path(model).expanduser()
    if steps.is_run(model):
        steps.find(model)
        file = side_files(model) / "config.yaml"
        if file.is_file():
            run = load(file)
            return AsTrained(run.data.prompt, run.reward.scale, run.data.judging)
        directory = side_files(model) / "model"  # of an imported model
    elif not directory.is_dir() and hub.REPOSITORY.fullmatch(model):
        directory = hf.resolve(model, (NAME,))
    return _read(directory / NAME) if (directory / NAME).is_file() else None


def _read(file: pathlib.Path) -> AsTrained:
    remedy = "Export the run again, or remove the file to have the model asked as any other."
    content = contracts.read(file, VERSION, remedy)
    found = contracts.decode(AsTrained, {**content, "version": VERSION}, str(file))
    # A prompt by name alone: a file of this machine is nothing that a model from elsewhere names.
    known = {"prompt": prompts.PAIR_NAMES, "judging": WAYS}
    for name, values in known.items():
        if (value := getattr(found, name)) not in values:
            raise UsageError(f"{file}: {name}={value!r:.60}. {nearest(value, values)} {remedy}")
    if found.scale[0] >= found.scale[1]:
        raise UsageError(f"{file}: scale={[*found.scale]} does not rise. {remedy}")
    return found
