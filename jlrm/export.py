"""Move weights between a run and the Hugging Face format.

    python -m jlrm.export --checkpoint RUN[@STEP] --out DIR     a directory that transformers loads
    python -m jlrm.export --from-hf MODEL --out DIR             an Orbax checkpoint to train from

Export reads one tensor at a time out of the checkpoint and appends it to a safetensors file, so its
memory is that of the largest tensor, and it needs no accelerator. A directory appears whole or not
at all.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from jlrm.config import UsageError
from jlrm.data.tokenizer import (
    Tokenizer,
    control_tokens,
    end_ids,
    load_tokenizer,
    prompt_template,
)
from jlrm.judgement import prompts
from jlrm.runtime import commands
from jlrm.runtime.settings import read_json
from jlrm.weights import checkpoint, hf, hf_config, reading, steps
from jlrm.weights.source import side_files

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [judge, grpo, jlrm]
---
# {name}

A judge: given a question and two answers it reasons and then scores both,
`<think>...</think><answer>s1</answer><answer>s2</answer>`.
Trained with jlrm ({stage}, step {step}); prompt template `{prompt}`, reward mode `{reward}`.
Held-out metrics at that step: {evaluation}.
{planting}"""
USE = """
## How to ask it

{prompt_is}
A server that takes messages writes another prompt than this: use its completions endpoint.

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
written = model.generate(ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens={max_tokens})
print(tokenizer.decode(written[0, ids.shape[1]:]))
```
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
    "`<think>`. Below is the text that this makes, as in training: fill it in and generate from"
    " there.\nDon't put it through the chat template once more."
)


def export_to_hf(source: str, out: pathlib.Path, dtype: str = "bfloat16") -> None:
    """Write the Hugging Face directory of a run's checkpoint.

    Args:
      source: `RUN`, `RUN@STEP`, `RUN@STAGE/STEP` or `RUN@best`.
      out: a directory that does not exist yet.
      dtype: "bfloat16" or "float32", of the stored weights.

    Raises:
      UsageError: no such checkpoint, or something is at `out`.
    """
    step_dir = steps.find(source)
    reading.check_files(step_dir)
    wanted = steps.read_digests(step_dir)
    model_dir = side_files(source) / "model"
    config = hf_config.read_config(model_dir)
    partial = _begin(out)
    hf.copy_side_files(model_dir, partial)
    tokenizer = load_tokenizer(partial)
    _write_config(partial / "config.json", hf_config.config_to_hf(config, dtype))
    _write_generation_config(partial, tokenizer)
    _write_tokenizer_config(partial / "tokenizer_config.json")
    meta = steps.read_meta(step_dir)
    card = _card(out.name, meta) + _use(meta, tokenizer)
    (partial / "README.md").write_text(card, encoding="utf-8")

    def read(tensor: hf.Tensor) -> Any:
        return reading.read_tensor(step_dir, tensor.path, tensor.layer, wanted)

    total = len(hf.tensors(config))
    for _ in tqdm(hf.save_tensors(read, config, partial, dtype), total=total, desc="export"):
        pass
    os.replace(partial, out)


def import_from_hf(source: str, out: pathlib.Path) -> None:
    """Write an Orbax checkpoint of a Hugging Face model, in the dtype its config.json names.

    Raises:
      UsageError: no such model, an unsupported one, or something is at `out`.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")  # the weights only pass through

    from jlrm.config import MeshConfig
    from jlrm.runtime.mesh import create_mesh, training_layout

    directory = hf.resolve(source)
    config = hf_config.read_config(directory, param_dtype=hf_config.stored_dtype(directory))
    layout = training_layout(create_mesh(MeshConfig(), jax.devices()[:1]))
    partial = _begin(out)
    params = hf.load_params(directory, config, layout)
    hf.copy_side_files(directory, partial / "model")
    checkpoint.save_params(
        partial,
        steps.IMPORTED,
        params,
        {"stage": steps.IMPORTED, "step": 0, "source": source},
    )
    os.replace(partial, out)


def _begin(out: pathlib.Path) -> pathlib.Path:
    """Return an empty directory beside `out`, to become it."""
    if out.exists():
        raise UsageError(f"{out} exists already. Remove it, or name another --out.")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def _write_config(file: pathlib.Path, as_read: dict[str, Any]) -> None:
    """Name the dtype, and spell RoPE for transformers 4 and 5 alike; the rest is the source's.

    Except null, which transformers 5 refuses in many fields: there stands what we have read it as.
    """
    fields = read_json(file)
    fields |= {key: as_read[key] for key in fields if fields[key] is None and key in as_read}
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    # A factor that is null is another thing than none: it follows from the model's positions.
    rope = {key: value for key, value in rope.items() if value is not None or key == "factor"}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is not None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        fields["rope_theta"] = theta
        fields["rope_parameters"] = {**rope, "rope_type": kind, "rope_theta": theta}
        if kind != "default":
            fields["rope_scaling"] = fields["rope_parameters"]
    fields |= {key: as_read[key] for key in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(fields, indent=2))


def _write_generation_config(directory: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Name every token that ended a judgement in training; the rest is the source's."""
    file = directory / "generation_config.json"
    ids = end_ids(tokenizer, directory)
    try:
        fields = read_json(file)
    except UsageError:  # none, or a broken one, which `end_ids` has told of
        fields = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    listed = fields.get("eos_token_id")
    if {*(listed if isinstance(listed, list) else [listed])} != {*ids}:
        file.write_text(json.dumps({**fields, "eos_token_id": list(ids)}, indent=2))


def _write_tokenizer_config(file: pathlib.Path) -> None:
    """Spell what transformers 5 writes so that 4 reads it too; else the file stays as it is."""
    if not file.is_file():
        return
    fields = read_json(file)
    told = dict(fields)
    if str(fields.get("tokenizer_class")).endswith("Backend"):
        told["tokenizer_class"] = "PreTrainedTokenizerFast"  # of which 5 has kept the name
    if isinstance(fields.get("extra_special_tokens"), list):
        extra = told.pop("extra_special_tokens")  # in 4, a dictionary that stands for another thing
        told["additional_special_tokens"] = fields.get("additional_special_tokens") or extra
    if told != fields:
        file.write_text(json.dumps(told, indent=2))


def _card(name: str, meta: dict[str, Any]) -> str:
    config = meta.get("config", {})
    prompt = config.get("data", {}).get("prompt", "unknown")
    planting = prompts.planting_note(prompt)
    scores = meta.get("evaluation", {})
    return CARD.format(
        name=name,
        stage=meta["stage"],
        step=meta["step"],
        prompt=prompt,
        planting=f"\n{planting}\n" if planting else "",
        reward=config.get("reward", {}).get("mode", "unknown"),
        evaluation=", ".join(f"{key} {value:.4g}" for key, value in scores.items()) or "none",
    )


def _use(meta: dict[str, Any], tokenizer: Tokenizer) -> str:
    """Return how to ask a judge, with a program that does; "" where no prompt was trained on."""
    config = meta.get("config", {})
    name = config.get("data", {}).get("prompt")
    if name not in prompts.PAIR_NAMES:
        return ""
    reward, is_fixed = config.get("reward", {}), name in prompts.PAIR_TEMPLATES
    scale = {key: reward[key] for key in ("min_score", "max_score") if key in reward}
    text = prompt_template(tokenizer, name, **scale)
    tags = prompts.THINK_TAGS if is_fixed else prompts.TAGS
    control = sorted({*control_tokens(tokenizer), *tags})
    return USE.format(
        broken=SPACED if is_fixed else BRACKETED,
        prompt_is=FIXED_PROMPT if is_fixed else CHAT_PROMPT,
        lines="\n".join(f"    {line!r}" for line in text.splitlines(keepends=True)),
        control="\n".join(f"    {token!r}," for token in control),
        max_tokens=config.get("sampling", {}).get("max_new_tokens", 2048),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.export",
        description="Move weights between a run and Hugging Face's format.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="RUN[@STEP]", help="@STEP: 100, sft/100 or best")
    source.add_argument("--from-hf", metavar="MODEL", help="directory or hub id")
    parser.add_argument("--out", required=True, help="directory to be made")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of exported weights; --from-hf keeps what the files hold (bfloat16)",
    )
    args = parser.parse_args(argv)
    if "://" in args.out:
        raise UsageError(f"--out {args.out}: wanted a local directory. Copy that to the store.")
    out = pathlib.Path(args.out).expanduser()
    if args.checkpoint:
        export_to_hf(args.checkpoint, out, args.dtype or "bfloat16")
    elif args.dtype:
        raise UsageError("--dtype has no effect with --from-hf, which keeps what the files hold.")
    else:
        import_from_hf(args.from_hf, out)
    print(f"Written: {out}")


if __name__ == "__main__":
    commands.finish(main)
