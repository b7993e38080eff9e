"""The sections that every run has: its directory, model, mesh, data, sampling and reward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jlrm.config.values import Count, Metric, NonNegative, Part, Positive, Seed, Target


@dataclass(frozen=True)
class RunConfig:
    dir: str  # directory or url for all that the run writes; the same command again resumes there
    seed: Seed = 0  # initial weights, order of the data, every sampled token
    save_every: Positive = 50  # steps between checkpoints; the last step of a stage always has one
    keep_last: Positive = 2  # newest checkpoints kept
    accept: list[Part] = field(default_factory=list)  # changed parts with which it goes on
    resume: str = ""  # where to go on: [STAGE/]STEP, or "previous" where the newest is damaged
    keep_best: Count = 1  # checkpoints kept for the highest values of `best_metric`
    # Held-out metric that ranks checkpoints. What the reward calls malformed is wrong here.
    best_metric: Metric = "agreement"
    eval_every: Count = 50  # steps between held-out evaluations; 0: only at the end of a stage
    completions_every: Count = 10  # steps between parquet files of sampled judgements; 0: none
    # Alarms that end the run, saved, with exit code 1 (names: reports/alarms.py), e.g. [kl, place].
    stop_on: list[str] = field(default_factory=list)
    host_timeout: Positive = 1800  # seconds that a host may lag behind; then all stop and name it
    # Compile every program before the first step; "auto": where there are several hosts.
    precompile: Literal["auto", "always", "never"] = "auto"
    tensorboard: bool = True  # write event files for TensorBoard
    wandb_project: str = ""  # project on Weights & Biases; empty: not used


@dataclass(frozen=True)
class ModelSource:
    # Weights to begin with: Hugging Face directory or hub id, or an earlier run as DIR[@STEP].
    path: str = ""
    # Directory of a PEFT adapter of `path` (LoRA or DoRA) to go on from; with lora.rank=0: merged.
    adapter: str = ""
    preset: str = ""  # random weights of this named shape (weights/presets.py), instead of `path`
    # Hugging Face directory or hub id; empty: the one beside `path`; "toy": generated.
    tokenizer: str = ""
    # Precision of the trained weights; those frozen beneath adapters keep that of their files.
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # Precision of matrix products, activations and KV cache.
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # What the backward pass computes again instead of keeping it: "full", everything, needs least
    # memory; "attention" all but attention and what enters it; "dots" all but it and products.
    remat: Literal["none", "dots", "attention", "full"] = "full"


@dataclass(frozen=True)
class LoRAConfig:
    """Adapters, which are trained instead of the model's own weights (model/lora.py)."""

    rank: Count = 0  # of every adapter; 0: none, all weights are trained
    alpha: NonNegative = 32.0  # what an adapter adds is multiplied by alpha / rank
    rank_stabilised: bool = False  # by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)
    # Matrices of the layers that have an adapter.
    targets: list[Target] = field(
        default_factory=lambda: ["q", "k", "v", "o", "gate", "up", "down"]
    )
    # How the frozen matrices of the layers are stored: as their files have them, or quantised in
    # blocks of 64, to 8 bits or to the 4 of NormalFloat (model/quantised.py).
    base: Literal["stored", "int8", "nf4"] = "stored"
    magnitude: bool = False  # the length of each output's weights is trained too (DoRA)


@dataclass(frozen=True)
class MeshConfig:
    data: int = 1  # copies of the weights, one a slice; gradients are summed over them
    # Devices that share one copy of the weights, gathered layer by layer; -1: all that are left.
    fsdp: int = -1
    tensor: int = 1  # devices that share heads, MLP and vocabulary during rollouts


@dataclass(frozen=True)
class DataConfig:
    # A file, a directory, a url, hf:ORG/NAME or tfds:NAME, `#split` after it (data/readers.py); or
    # "toy", "languages", "lists" and others: generated (data/worlds/).
    train: str
    eval: str = ""  # held-out rows, named as above; empty: rows of `train`, by whole questions
    # Number of held-out comparisons; 0: 200, but of `train` at most a fifth.
    eval_rows: Count = 0
    # What two questions share that are one, both trained on or both held out: words and signs, or
    # the text in lower case. A run keeps what it began with.
    folding: Literal["words", "text"] = "words"
    # Our name of a field: the name of that column in the file, e.g. {answer_1: response_a}.
    columns: dict[str, str] = field(default_factory=dict)
    # What the file's labels mean: 1, the first answer is better, 2, the second, or 0, a tie, e.g.
    # {0: 1, 1: 2, 2: 0} or {chosen_a: 1, chosen_b: 2}. Empty: 1, 2, 0 and words such as model_a.
    values: dict[str, int] = field(default_factory=dict)
    # Which scores of a JudgeLM row are gold: made without or with a reference answer.
    scores: Literal["score", "score_w_reference"] = "score"
    # Two scores of the file and what they become, if its scale is not the reward's: {0: 1, 100: 10}
    rescale: dict[str, float] = field(default_factory=dict)
    # "shuffled", a control: in half the training pairs, by chance, gold names the worse answer.
    # "majority": GRPO pays agreement with what most judgements of a group prefer; the gold of a
    # training row is counted by metrics alone, and it needs none.
    gold: Literal["given", "shuffled", "majority"] = "given"
    prompt: str = "judgelrm_train"  # name of the prompt template (judgement/prompts.py)
    # "both": every pair is judged in both orders in one step, and GRPO compares all of them.
    orders: Literal["given", "both"] = "given"
    # "single": each answer of a pair is judged alone, by the prompt's form for one answer, and its
    # score is paid by comparison with the scores of the other one (judgement/rewards.py). "lists":
    # rows hold `answers`, 2 to 8, and `scores` or a `ranking`; all are judged at once.
    judging: Literal["pairs", "single", "lists"] = "pairs"
    max_prompt_tokens: Positive = 1024  # longest prompt that is used
    # A longer prompt is counted and left out ("skip"), or stops the run ("refuse").
    overlong: Literal["skip", "refuse"] = "skip"

    @property
    def prompts_of_row(self) -> int:
        """How many prompts a training row has, which stand together in every batch."""
        return 2 if self.orders == "both" or self.judging == "single" else 1


@dataclass(frozen=True)
class SamplingConfig:
    max_new_tokens: Positive = 2048  # longest completion
    temperature: NonNegative = 1.0  # of rollouts; 0: greedy
    top_k: Count = 0  # sample from this many likeliest tokens; 0: off
    top_p: float = 1.0  # sample from the likeliest tokens of this total probability; 1: off
    # Weights that rollouts are drawn with; "int8" halves what a step reads. The sampler is then
    # another policy, so grpo.loss.importance_cap is needed. Evaluation is never quantised. Adapters
    # are merged, or stay beside their matrices ("unmerged"), where nothing is rounded anew.
    weights: Literal["full", "int8", "unmerged"] = "full"
    # Rollouts of a prompt that run at once; the next begins when one ends. 0: all of them.
    slots: Count = 0
    # Sampler and trainer compute in one order, so that log-probabilities of both have the same
    # bits (runtime/exact.py). On one CPU device, in bfloat16, and without top_k and top_p.
    exact: bool = False
    # Text: the number of the occurrence that ends a completion. They count from the end of the
    # reasoning, `</think>`: what is drafted or quoted before it ends nothing. With
    # data.judging=single, `</answer>` is taken to occur once; with lists, name it as often as the
    # longest list has answers (shorter ones end by the end token).
    stop_strings: dict[str, int] = field(default_factory=lambda: {"</answer>": 2})
    eval_temperature: NonNegative = 0.0  # for the held-out set; 0: greedy
    eval_batch_size: Positive = 32  # held-out prompts that are sampled together


@dataclass(frozen=True)
class RewardConfig:
    # Formula of the reward: the authors' code, its symmetric form, or only what `plugins` pay (and
    # `overlong`).
    mode: Literal["judgelrm", "judgelrm_symmetric", "none"] = "judgelrm_symmetric"
    format: float = 1.0  # paid for well-formed output
    out_of_range: float = -0.5  # instead of `format`: well-formed, but a score is outside the scale
    malformed: float = -1.0  # instead of `format`: the text has another form
    # Added to the two above where no verdict can be read (the authors' code: -2.0).
    no_verdict: float = 0.0
    relation: float = 2.0  # the two scores are in the order of the gold scores
    wrong_relation: float = -1.5  # they are in another order
    preference: float = 2.0  # as `relation`, for rows that have a preference and no scores
    wrong_preference: float = -1.5  # as `wrong_relation`, for the same rows
    absolute_exact: float = 1.0  # both scores equal the gold scores
    absolute_near: float = 0.6  # |score - gold| of both answers sums to at most `near_distance`
    near_distance: float = 2.0  # the distance that `absolute_near` allows
    confidence: float = 0.2  # the margin of the scores is at least as large as gold's
    brier: float = 0.0  # proper score, 1 to -3, of the confidence that the margin implies
    certain_margin: NonNegative = 0.0  # margin that means certainty to `brier`; 0: whole scale
    # Share of its content's pay that a verdict loses when the other order's contradicts it.
    swap_consistency: NonNegative = 0.0
    length: float = 0.0  # completion longer than `length_tokens` (the paper's ablation: 0.2)
    length_tokens: int = 120  # tokens of a completion that `length` asks for
    # Paid at the token limit, growing from 0 over the last `overlong_share` of it, whatever was
    # written (DAPO: -1.0).
    overlong: float = 0.0
    overlong_share: float = 0.2  # see `overlong`
    limit: float = 0.0  # completion cut by the token limit (the paper's ablation: -1.0)
    min_score: int = 1  # lowest score of the scale; the prompt `jlrm` names it too
    max_score: int = 10  # highest score of the scale
    # Rewards of your own: "module:name" of a function or callable object in TRL's or verl's form,
    # async or not (judgement/plugins.py), and their weights.
    plugins: dict[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> tuple[int, int]:
        """The least and the highest score."""
        return self.min_score, self.max_score
