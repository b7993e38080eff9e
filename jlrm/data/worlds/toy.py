"""A small world for the embedded default: judge which answer has more words spelled correctly.

A question asks for words of a kind ("Name animals."). An answer is a list of words, some of them
misspelt. Its true quality is the number of correctly spelled words, plus one. SFT imitates
judgements that a careless annotator wrote. More often than not the annotator counts every word, so
the longer answer wins; otherwise only the correct words. The gold scores are always correct. So
imitation learns to be careless, and GRPO, which sees only outcomes, must discover that careful
reading pays.

Everything is a pure function of the seed. The tokenizer is a byte-level BPE, trained on the text of
this world.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

from jlrm.data.comparisons import Comparison
from jlrm.judgement import prompts

KINDS = {
    "animals": ("cat", "dog", "cow", "fox", "owl", "pig", "hen", "wolf"),
    "fruits": ("fig", "plum", "pear", "lime", "kiwi", "date", "grape", "peach"),
    "colours": ("red", "blue", "green", "pink", "grey", "white", "black", "brown"),
    "tools": ("saw", "axe", "chisel", "file", "plane", "wrench", "rake", "spade"),
}
MAX_WORDS = 4  # right ones, and as many misspelt, in an answer
HASTE = 0.55  # share of written judgements that count every word
NUM_TRAIN = 20000
VOCAB_SIZE = 448
END, PAD = "<|im_end|>", "<|endoftext|>"


def comparisons(seed: int, num_rows: int) -> list[Comparison]:
    """Return comparisons with gold scores in 1..5 and a written judgement in `meta`."""
    rng = np.random.default_rng(seed)
    return [_comparison(rng, f"toy-{seed}-{i}") for i in range(num_rows)]


def save_tokenizer(directory: pathlib.Path) -> None:
    """Train the tokenizer and write it as a Hugging Face directory would hold it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = []
    for row in comparisons(seed=0, num_rows=2000):
        written = prompts.target(row.meta["reasoning"], *row.meta["judged"])
        texts.append(
            prompts.fill(
                prompts.PAIR_TEMPLATES["toy"],
                question=row.question,
                answer_1=row.answer_1,
                answer_2=row.answer_2,
            )
            + written
        )
    tokenizer.train_from_iterator(texts, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _comparison(rng: np.random.Generator, identity: str) -> Comparison:
    kind = str(rng.choice(list(KINDS)))
    answers = [draw_answer(rng, kind) for _ in range(2)]
    right = [[word for word in answer if word in KINDS[kind]] for answer in answers]
    reasoning, judged = careless(rng, [*map(len, answers)], [*map(len, right)])
    gold = [1.0 + len(words) for words in right]
    return Comparison(
        id=identity,
        question=f"Name {kind}.",
        answer_1=" ".join(answers[0]),
        answer_2=" ".join(answers[1]),
        score_1=gold[0],
        score_2=gold[1],
        source="toy",
        meta={"reasoning": reasoning, "judged": judged},
    )


def careless(
    rng: np.random.Generator, every: list[int], right: list[int]
) -> tuple[str, list[float]]:
    """Return what a careless annotator writes of answers with so many words, and so many right.

    The scores are a word more than what was counted.
    """
    is_hasty = rng.random() < HASTE
    seen = every if is_hasty else right
    counts = " and ".join(map(str, seen))
    text = f"Counting {'all' if is_hasty else 'right'} words: {counts}."
    return text, [1.0 + count for count in seen]


def draw_answer(rng: np.random.Generator, kind: str) -> list[str]:
    """Return different words of the kind in random order, at least one, some of them misspelt."""
    num_right = int(rng.integers(0, MAX_WORDS + 1))
    num_wrong = int(rng.integers(0 if num_right else 1, MAX_WORDS + 1))
    words = [str(word) for word in rng.permutation(KINDS[kind])[: num_right + num_wrong]]
    is_wrong = rng.permutation(len(words)) < num_wrong
    return [_misspell(w) if wrong else w for w, wrong in zip(words, is_wrong, strict=True)]


def _misspell(word: str) -> str:
    """Swap the last two letters."""
    return word[:-2] + word[-1] + word[-2]
