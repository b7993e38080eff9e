"""The card of an exported judge: the hub's metadata, what was measured, and how to ask it.

Everything on it is read from the run, its base model, its data and the results of evaluations. What
is not known is left out of the metadata, and said to be unknown in the text. The program on the
card asks as training did, for whatever prompt the run has.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from jlrm.data.tokenizer import Tokenizer, control_tokens, prompt_template
from jlrm.evaluation import scored
from jlrm.judgement import prompts
from jlrm.reports import evaluated, pages
from jlrm.reports.results_file import Published, Results
from jlrm.runtime.settings import parse_yaml
from jlrm.serving.calibration import ConfidenceMap
from jlrm.weights import hub, steps
from jlrm.weights.source import side_files

SHOWN_METRICS = ("agreement", "f1", "parse_rate", "swap_consistency")  # of the held-out ones
QWEN_RESEARCH = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE",
}
LICENCES = {  # of official models whose own card is not at hand, by their hub ids
    r"qwen/qwen2\.5-(coder-)?3b(-instruct)?": QWEN_RESEARCH,
    r"qwen/qwen2\.5-(coder-)?(0\.5|1\.5|7|14|32)b(-instruct)?": {"license": "apache-2.0"},
    r"qwen/qwen3-[\d.]+b(-base)?": {"license": "apache-2.0"},
    r"huggingfacetb/smollm2-\d+(\.\d+)?[mb](-instruct)?": {"license": "apache-2.0"},
}
CACHED = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")  # a hub id within the hub's own cache
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

ABOUT = """# {name}

{what}
Trained with jlrm ({stage}, step {step}); prompt template `{prompt}`, reward mode `{reward}`.
Base model: {base}. Licence: {licence}.
Training pairs: {data}.
Held-out metrics at that step: {heldout}.
{planting}"""
WRITES = """A judge: given a question and two answers it reasons and then scores both,
`<think>...</think><answer>s1</answer><answer>s2</answer>`, from {low} to {high}."""
SCORES = "A judge: a reward model of the kind `{kind}`, which gives answers scores."
CALIBRATED = """
## Calibration

`calibration.json` maps the confidence that the margin of the scores states to how often such
verdicts were right: {method}, fitted on {rows} rows. On questions that the map had not seen, the
expected calibration error went from {ece[0]:.1f} to {ece[1]:.1f} points, and the Brier score from
{brier[0]:.3f} to {brier[1]:.3f}. `Judge.load` and `jlrm judge` use it.
"""
USE = """
## Prompt

`{prompt}`. {prompt_is}

````text
{template}
````

## Decoding

| setting | value |
| --- | --- |
| temperature | 0 in evaluations; training sampled at {temperature:g} |
| longest prompt | {max_prompt} tokens in training |
| longest judgement | {max_tokens} tokens in training |
| ends at | token {ends}, or after the second `</answer>` behind the reasoning |

## How to ask it

With transformers:

```python
import re

from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = (
{lines}
)
path = "."  # this directory, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
control = (
{control}
)


def quoted(text):  # control tokens in a judged text would steer the judge
    for token in control:
        text = text.replace(token, {broken})
    return text


texts = {{"question": "What is 2 + 2?", "answer_1": "4", "answer_2": "5"}}
prompt = re.sub(r"\\{{(question|answer_1|answer_2)\\}}", lambda hit: quoted(texts[hit[1]]), PROMPT)
ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
written = model.generate(
    ids,
    attention_mask=ids.new_ones(ids.shape),
    max_new_tokens={max_tokens},
    do_sample=False,
    repetition_penalty=1.0,  # whatever generation_config.json says
)
text = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
scores = re.findall(r"<answer>\\s*(-?[\\d.]+)\\s*</answer>", text.rpartition("</think>")[2])
print(text, scores[:2])
```

With vLLM, and jlrm as its client, which judges both orders and reads the verdicts:

```bash
{serve}
{ask}
```

{server_is}

## Limits

* A verdict may follow the order or the length of the answers: judge both orders.
* Nothing was trained beyond {max_prompt} tokens of prompt and {max_tokens} of judgement, nor in
  other languages than those of the pairs. The prompt itself is English.
* Equal scores mean a tie. A response without two scores is no verdict, and no tie either.
"""
# How the program breaks a token: as `prompts.quote` does with its usual spelling.
SPACED = 'token[0] + " " + token[1:]'
BRACKETED = f'f"[{{token[1:-1]}}]" if token[0] + token[-1] == "<>" else {SPACED}'
FIXED_PROMPT = (
    "The prompt is a fixed text that ends in `<think>`. Fill it in and generate from there, without"
    " a chat template."
)
CHAT_PROMPT = (
    "The prompt is a system and a user message in this model's chat template, and then an open\n"
    "`{first}`. Below is the text that this makes, as in training: fill it in and generate from"
    " there.\nDon't put it through the chat template once more."
)
FIXED_SERVER = (
    "The client sends the text above to `/v1/completions`. A server's chat route would write"
    " another prompt around it."
)
CHAT_SERVER = (
    "The client sends a system and a user message to `/v1/chat/completions`. The chat template of"
    " this directory\nmakes of them the text above, `<think>` included."
)
OTHER_SERVER = (
    "The client sends a system and a user message, of which this model's chat template makes"
    " another prompt than the text\nabove: send that text to `/v1/completions` to ask as in"
    " training."
)


class Base(NamedTuple):
    """What a judge was trained from. id: on the hub, "" if unknown; about: its card's metadata."""

    id: str = ""
    about: Mapping[str, Any] = {}

    @property
    def licence(self) -> dict[str, str]:
        """The licence as metadata of the hub; empty where it is not known."""
        if self.about.get("license"):
            names = ("license", "license_name", "license_link")
            return {name: str(self.about[name]) for name in names if self.about.get(name)}
        known = (it for form, it in LICENCES.items() if re.fullmatch(form, self.id.lower()))
        return next(known, {})


class Trained(NamedTuple):
    """A checkpoint that is exported, and what is known of it beside its weights.

    is_chat: whether the chat template that is exported makes the prompt of messages.
    """

    name: str
    meta: Mapping[str, Any]
    tokenizer: Tokenizer
    ends: Sequence[int]
    is_chat: bool = False
    results: Sequence[Results] = ()
    calibrated: ConfidenceMap | None = None

    @property
    def is_scoring(self) -> bool:
        return self.meta.get("stage") == "reward_model"


def write(path: pathlib.Path, trained: Trained) -> None:
    """Write the card of an export."""
    path.write_text(text(trained), encoding="utf-8")


def text(trained: Trained) -> str:
    """Return the card of an export."""
    config, meta = trained.meta.get("config", {}), trained.meta
    prompt, reward = config.get("data", {}).get("prompt", "unknown"), config.get("reward", {})
    base, dataset = base_of(config.get("model", {})), config.get("data", {}).get("train", "")
    heldout = meta.get("evaluation", {})
    planting = prompts.planting_note(prompt)
    what = WRITES.format(low=reward.get("min_score", 1), high=reward.get("max_score", 10))
    if trained.is_scoring:
        what = SCORES.format(kind=config["reward_model"]["kind"])
    front = yaml.safe_dump(_metadata(trained, base, dataset), sort_keys=False, allow_unicode=True)
    about = ABOUT.format(
        name=pages.markdown_text(trained.name),
        what=what,
        stage=meta["stage"],
        step=meta["step"],
        prompt=prompt,
        reward=reward.get("mode", "unknown"),
        base=pages.markdown_text(base.id or "unknown"),
        licence=base.licence.get("license_name") or base.licence.get("license", "not known here"),
        data=_described(dataset),
        heldout=", ".join(f"{key} {value:.4g}" for key, value in heldout.items()) or "none",
        planting=f"\n{planting}\n" if planting else "",
    )
    measured = f"\n{_evaluation(trained.results)}" if trained.results else ""
    calibrated = CALIBRATED.format(**vars(trained.calibrated)) if trained.calibrated else ""
    return f"---\n{front}---\n{about}{measured}{calibrated}{_use(trained)}"


def _metadata(trained: Trained, base: Base, dataset: str) -> dict[str, Any]:
    """Return what the hub reads; what is not known is left out."""
    languages = base.about.get("language") or ["en"]
    found: dict[str, Any] = {"base_model": base.id} if base.id else {}
    found |= base.licence
    if dataset.startswith("hf:"):
        found["datasets"] = [dataset.removeprefix("hf:").partition("#")[0]]
    found["language"] = [languages] if isinstance(languages, str) else list(languages)
    kind = "text-classification" if trained.is_scoring else "text-generation"
    found |= {"library_name": "transformers", "pipeline_tag": kind}
    stage = trained.meta["stage"]
    found["tags"] = ["judge", *([] if stage == steps.IMPORTED else [stage]), hub.TAG]
    if measured := list(_model_index(trained)):
        found["model-index"] = [{"name": trained.name, "results": measured}]
    return found


def _model_index(trained: Trained) -> Iterator[dict[str, Any]]:
    """Yield what was measured as the hub's `results`; all values are in percent."""
    heldout = trained.meta.get("evaluation", {})
    measured = [("held-out pairs", {name: heldout.get(name) for name in SHOWN_METRICS})]
    measured += [
        (name, result.metrics)
        for results in trained.results
        if results.judge.backend != "heuristic"  # a baseline, which is in the table alone
        for name, result in results.benchmarks.items()
        if not result.incomplete
    ]
    for name, metrics in measured:
        known = {key: v for key, v in metrics.items() if v is not None and math.isfinite(v)}
        if known:
            yield {
                "task": {"type": "text-generation", "name": "Pairwise judging"},
                "dataset": {"name": name, "type": re.sub(r"\W+", "-", name)},
                "metrics": [
                    {"type": key, "name": f"{key} (%)", "value": round(float(value), 2)}
                    for key, value in known.items()
                ],
            }


def _evaluation(results: Sequence[Results]) -> str:
    """Return the part about evaluations, as `jlrm evaluate` writes it."""
    judges = evaluated.name_judges(results)
    names = dict.fromkeys(name for judge in judges for name in judge.benchmarks)
    benchmarks = [PublishedValues(name, evaluated.published_rows(name, judges)) for name in names]
    return pages.page("model_card.md", judges=judges, benchmarks=benchmarks).lstrip()


class PublishedValues(NamedTuple):
    """What others report of a benchmark."""

    name: str
    published: list[Published]


def _use(trained: Trained) -> str:
    """Return how to ask a judge, with a program that does; "" where no prompt was trained on."""
    config = trained.meta.get("config", {})
    name = config.get("data", {}).get("prompt")
    if name not in prompts.PAIR_NAMES or config["data"].get("judging") == "single":
        return ""
    reward, sampling = config.get("reward", {}), config.get("sampling", {})
    is_fixed = name in prompts.PAIR_TEMPLATES
    scale = {key: reward[key] for key in ("min_score", "max_score") if key in reward}
    template = prompt_template(trained.tokenizer, name, **scale)
    control = sorted({*control_tokens(trained.tokenizer), *prompts.broken_tags(name)})
    limits = (
        config.get("data", {}).get("max_prompt_tokens", 1024),
        sampling.get("max_new_tokens", 2048),
    )
    if trained.is_scoring:
        kind = config["reward_model"]["kind"]
        text = (pages.TEMPLATES / "scoring_card.txt").read_text(encoding="utf-8")
        own = trained.tokenizer, kind, template, trained.ends[0], limits[0]
        return scored.how_to_ask(text, *own)
    model, low_high = shlex.quote(trained.name), " ".join(map(str, scale.values())) or "1 10"
    return USE.format(
        prompt=name,
        template=template,
        temperature=sampling.get("temperature", 1.0),
        max_prompt=limits[0],
        max_tokens=limits[1],
        ends=" or ".join(map(str, trained.ends)),
        broken=SPACED if is_fixed else BRACKETED,
        prompt_is=FIXED_PROMPT if is_fixed else CHAT_PROMPT.format(first=prompts.first_tag(name)),
        lines="\n".join(f"    {line!r}" for line in template.splitlines(keepends=True)),
        control="\n".join(f"    {token!r}," for token in control),
        serve=f"vllm serve . --served-model-name {model} --generation-config vllm "
        f"--max-model-len {sum(limits)}",
        ask=f"jlrm judge pairs.jsonl --backend openai --base-url http://localhost:8000/v1 "
        f"--model {model} --prompt {name} --scale {low_high} --max-new-tokens {limits[1]}",
        server_is=FIXED_SERVER if is_fixed else CHAT_SERVER if trained.is_chat else OTHER_SERVER,
    )


# ------------------------------------------------------------------------------- what it is made of


def base_of(model: Mapping[str, Any]) -> Base:
    """Return what `model.path` of a run's config began from, through earlier runs."""
    path = str(model.get("path") or "")
    if not path:
        return Base()
    if steps.is_run(path):
        return _base_of_run(path)
    directory = pathlib.Path(path).expanduser()
    if not directory.is_dir():
        return Base(path if HUB_ID.fullmatch(path) else "")
    cached = CACHED.search(f"{directory.resolve()}/")
    about = _front_matter(directory / "README.md")
    named = about.get("base_model") if "jlrm" in (about.get("tags") or ()) else ""
    return Base("/".join(cached.groups()) if cached else str(named or ""), about)


def _base_of_run(path: str) -> Base:
    file = side_files(path) / "config.yaml"
    if file.is_file():
        return base_of((parse_yaml(file.read_text(), str(file)) or {}).get("model") or {})
    source = steps.read_meta(steps.find(path)).get("source", "")  # an imported model
    return base_of({"path": source})


def _front_matter(card: pathlib.Path) -> dict[str, Any]:
    """Return the metadata of another model's card; none where it has none that can be read."""
    try:
        found = re.match(r"---\r?\n(.*?)\r?\n---\s", card.read_text(encoding="utf-8"), re.DOTALL)
        about = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return about if isinstance(about, dict) else {}


def _described(dataset: str) -> str:
    """Return where training pairs came from and under what licence, without folders of a machine.

    The licence is what `dataset_info.json` says, of the directory or in the hub's own cache.
    """
    if not dataset:
        return "unknown"
    source, _, split = dataset.partition("#")
    shown = evaluated.shown_name(source) + (f" ({split})" if split else "")
    licences = sorted({*_licences(source)})
    licence = f"licence {', '.join(licences)}" if licences else "licence not known here"
    return pages.markdown_text(f"{shown}, {licence}")


def _licences(source: str) -> Iterator[str]:
    directory = pathlib.Path(source).expanduser()
    if source.startswith("hf:"):
        from datasets import config

        name = source.removeprefix("hf:").replace("/", "___").lower()
        directory = pathlib.Path(config.HF_DATASETS_CACHE) / name
    if not directory.is_dir():
        return
    for file in sorted(directory.rglob("dataset_info.json")):
        try:
            about = json.loads(file.read_text())
            licence = about.get("license") or about["redistributionInfo"]["license"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(licence, str) and licence.strip():
            yield licence.strip()
