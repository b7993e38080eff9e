"""Expected scores: every way to write a number counts, and the pass is that of the plain model."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from conftest import tiny_config

from jlrm.config import MeshConfig, UsageError
from jlrm.model import qwen
from jlrm.runtime.mesh import create_mesh
from jlrm.sampling import decode, expected
from jlrm.sampling.expected import Asked, Expectation
from jlrm.sampling.generate import lay_out_program
from jlrm.sampling.policy import Network

# Digits by themselves, pairs of them, and digits with what stands before or behind a number.
SPELLED = [
    *(b"%d" % digit for digit in range(10)),
    *(b"10", b"12", b"100", b"<", b">", b" ", b" 1", b">1", b">10", b">8", b"8<", b"0<", b"1."),
    *(b"answer", b"</", b"a", b"", b"t", b"7.5", b"<end>"),
]
END = len(SPELLED) - 1
SCORES = range(1, 11)


@functools.cache
def network(num_devices: int = 1) -> Network:
    config = dataclasses.replace(
        tiny_config(vocab_size=40, num_hidden_layers=2), compute_dtype="float32"
    )
    mesh = create_mesh(MeshConfig(fsdp=num_devices), jax.devices()[:num_devices])
    return Network(config, mesh, len(SPELLED), (END,))  # ten rows of the head are no ids


@functools.cache
def params() -> qwen.Params:
    return jax.tree.map(
        lambda x: 3 * np.asarray(x), qwen.init(network().model, network().decoding, 3)
    )


@functools.cache
def weights(num_devices: int = 1) -> qwen.Params:
    net = network(num_devices)
    return lay_out_program(net.model, net.decoding)(params())


@functools.cache
def next_probabilities(ids: tuple[int, ...]) -> np.ndarray:
    """The plain model's: one prompt, and no branches."""
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(ids)] = ids
    return np.asarray(_plain()(weights(), tokens, len(ids) - 1), np.float64)


@functools.cache
def _plain():
    net = network()

    @jax.jit
    def probabilities(weights, tokens, last):
        hidden, _ = decode.prefill(net.model, net.decoding, weights, tokens)
        logits = decode.logits(net.model, net.decoding, weights, hidden[:, last])
        return jax.nn.softmax(logits[0, : net.num_ids])

    return probabilities


def enumerated(context: tuple[int, ...], rest: bytes, scores=SCORES) -> float:
    """The expectation by writing out token by token whatever may follow a context."""
    texts = {str(score) for score in scores}
    mass = dict.fromkeys(texts, 0.0)

    def follow(ids: tuple[int, ...], said: bytes, chance: float) -> None:
        for token, share in enumerate(next_probabilities(ids)):
            whole = said + SPELLED[token]
            if len(whole) > len(rest) and whole.startswith(rest):
                count((*ids, token), whole[len(rest) :].decode(), chance * share)
            elif len(whole) > len(said) and rest.startswith(whole):
                follow((*ids, token), whole, chance * share)

    def count(ids: tuple[int, ...], said: str, chance: float) -> None:
        digits = said[: len(said) - len(said.lstrip("0123456789"))]
        stays = 1.0
        if digits == said and any(t != digits and t.startswith(digits) for t in texts):
            for token, share in enumerate(next_probabilities(ids)):
                if SPELLED[token][:1].isdigit():
                    stays -= share
                    count((*ids, token), said + SPELLED[token].decode(), chance * share)
        if digits in texts:
            mass[digits] += chance * stays

    follow(context, b"", 1.0)
    return sum(int(text) * each for text, each in mass.items()) / sum(mass.values())


def ids_of(*texts: bytes) -> list[int]:
    return [SPELLED.index(text) for text in texts]


PROMPT = ids_of(b"a", b"t", b"a", b"<")
WRITTEN = {  # completions, and where their scores begin
    "digits": (ids_of(b"t", b">", b"8", b"<", b">", b"3", b"</"), [2, 5]),
    "in two tokens": (ids_of(b"t", b">", b"1", b"0", b"<", b">", b"10", b"<"), [2, 6]),
    "with what stands before": (ids_of(b"t", b">10", b"</", b">8", b"<"), [2, 6]),
    "with what stands behind": (ids_of(b"answer", b">", b"8<", b" 1", b"0<"), [7, 10]),
    "at once": (ids_of(b"8", b"<", b"7.5"), [0, 2]),
    "broken off": (ids_of(b"t", b">", b"1"), [2]),
}


def context_of(ids: list[int], place: int) -> tuple[tuple[int, ...], bytes]:
    said = b""
    for i, token in enumerate(ids):
        if len(said) + len(SPELLED[token]) > place:
            return (*PROMPT, *ids[:i]), SPELLED[token][: place - len(said)]
        said += SPELLED[token]
    raise AssertionError("no such place")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_they_are_what_writing_out_every_number_comes_to(name):
    ids, places = WRITTEN[name]
    ((found,),) = Expectation(network(), SPELLED, (1, 10))(
        weights(), [Asked(PROMPT, [ids], [places])]
    )
    wanted = [enumerated(*context_of(ids, place)) for place in places]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    assert len(set(found)) == len(found)  # of each place its own


@pytest.mark.slow
@pytest.mark.parametrize("scale", [(0, 5), (1, 100), (8, 12)])
def test_other_scales(scale):
    ids, places = WRITTEN["in two tokens"]
    ((found,),) = Expectation(network(), SPELLED, scale)(
        weights(), [Asked(PROMPT, [ids], [places])]
    )
    scores = range(scale[0], scale[1] + 1)
    wanted = [enumerated(*context_of(ids, place), scores) for place in places]
    np.testing.assert_allclose(found, wanted, atol=1e-4 * scale[1] / 10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("most", [expected.MOST_NODES, 16], ids=["whole", "in parts"])
def test_votes_and_rows_that_run_together_are_what_they_are_alone(most, monkeypatch):
    """Votes share the prompt and see nothing of one another; rows are filled up to the devices."""
    monkeypatch.setattr(expected, "MOST_NODES", most)
    names = list(WRITTEN)
    together = Asked(PROMPT, [WRITTEN[n][0] for n in names], [WRITTEN[n][1] for n in names])
    silent = Asked(PROMPT, [WRITTEN["digits"][0]] * 2, [[], WRITTEN["digits"][1]])
    other = Asked(PROMPT[::-1], *([each] for each in WRITTEN["digits"]))
    many = Expectation(network(8), SPELLED, (1, 10))(weights(8), [together, silent, other])
    one = Expectation(network(), SPELLED, (1, 10))
    for name, found in zip(names, many[0], strict=True):
        ((alone,),) = one(weights(), [Asked(PROMPT, *([each] for each in WRITTEN[name]))])
        np.testing.assert_allclose(found, alone, atol=1e-5)
    assert many[1][0] is None
    np.testing.assert_allclose(many[1][1], many[0][0], atol=1e-5)
    assert many[2][0] is not None and abs(many[2][0][0] - many[0][0][0]) > 1e-3


def test_a_forced_score_is_expected_as_computed_by_hand():
    """A head that sees nothing but one direction gives the digits the probabilities of a table."""
    chances = {b"8": 0.5, b"3": 0.25, b"1": 0.2, b"10": 0.05}
    logits = np.full(40, -40.0)
    for text, chance in chances.items():
        logits[SPELLED.index(text)] = math.log(chance)
    net = network()
    config = dataclasses.replace(net.model, tie_word_embeddings=False)
    forced = dict(jax.tree.map(np.asarray, qwen.init(config, net.decoding, 0)))
    width = config.hidden_size
    # All states are equal: nothing is added to an embedding of ones, whose norm is 1 everywhere.
    forced["embed"] = np.ones_like(forced["embed"])
    forced["layers"] = jax.tree.map(np.zeros_like, forced["layers"])
    forced["head"] = np.repeat(logits[:, None] / width, width, axis=1).astype(np.float32)
    own = dataclasses.replace(net, model=config)
    laid = lay_out_program(config, own.decoding)(forced)
    ids, places = WRITTEN["digits"]
    ((found,),) = Expectation(own, SPELLED, (1, 10))(laid, [Asked(PROMPT, [ids], [places])])
    # Behind "1" a digit follows with probability 1, as everywhere: no 1 ends, and "0" hardly comes.
    assert found == pytest.approx([(8 * 0.5 + 3 * 0.25 + 10 * 0.05) / 0.8] * 2, abs=1e-4)


def test_a_scale_below_zero_is_refused():
    with pytest.raises(UsageError, match="a scale from 0 on, got -5"):
        Expectation(network(), SPELLED, (-5, 5))
