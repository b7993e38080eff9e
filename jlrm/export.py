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
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from jlrm.config import UsageError
from jlrm.judgement.prompts import planting_note
from jlrm.runtime import commands
from jlrm.weights import checkpoint, hf, hf_config
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

The prompt ends in `<think>`: fill the template and generate from there, without a chat template.
{planting}"""


def export_to_hf(source: str, out: pathlib.Path, dtype: str = "bfloat16") -> None:
    """Write the Hugging Face directory of a run's checkpoint.

    Args:
      source: `RUN`, `RUN@STEP`, `RUN@STAGE/STEP` or `RUN@best`.
      out: a directory that does not exist yet.
      dtype: "bfloat16" or "float32", of the stored weights.

    Raises:
      UsageError: no such checkpoint, or something is at `out`.
    """
    step_dir = checkpoint.find(source)
    model_dir = side_files(source) / "model"
    config = hf_config.read_config(model_dir)
    partial = _begin(out)
    hf.copy_side_files(model_dir, partial)
    _write_configs(partial, dtype)
    meta = json.loads((step_dir / "meta" / "metadata").read_text())
    (partial / "README.md").write_text(_card(out.name, meta))

    def read(tensor: hf.Tensor) -> Any:
        return checkpoint.read_tensor(step_dir, tensor.path, tensor.layer)

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
        checkpoint.IMPORTED,
        params,
        {"stage": checkpoint.IMPORTED, "step": 0, "source": source},
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


def _write_configs(directory: pathlib.Path, dtype: str) -> None:
    """Name the dtype, and spell RoPE for transformers 4 and 5 alike; the rest is the source's."""
    file = directory / "config.json"
    fields = json.loads(file.read_text())
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is not None:
        kind = rope.get("rope_type", rope.get("type", "default"))
        fields["rope_theta"] = theta
        fields["rope_parameters"] = {**rope, "rope_type": kind, "rope_theta": theta}
        if kind != "default":
            fields["rope_scaling"] = fields["rope_parameters"]
    fields |= {"dtype": dtype, "torch_dtype": dtype}
    file.write_text(json.dumps(fields, indent=2))
    generation = directory / "generation_config.json"
    if not generation.is_file():
        from jlrm.data.tokenizer import end_ids, load_tokenizer

        tokenizer = load_tokenizer(directory)
        ids = list(end_ids(tokenizer, directory))
        content = {"do_sample": False, "eos_token_id": ids, "pad_token_id": tokenizer.pad_token_id}
        generation.write_text(json.dumps(content, indent=2))


def _card(name: str, meta: dict[str, Any]) -> str:
    config = meta.get("config", {})
    prompt = config.get("data", {}).get("prompt", "unknown")
    planting = planting_note(prompt)
    scores = {key: round(value, 2) for key, value in meta.get("evaluation", {}).items()}
    return CARD.format(
        name=name,
        stage=meta["stage"],
        step=meta["step"],
        prompt=prompt,
        planting=f"\n{planting}\n" if planting else "",
        reward=config.get("reward", {}).get("mode", "unknown"),
        evaluation=", ".join(f"{key} {value}" for key, value in scores.items()) or "none",
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
    parser.add_argument("--out", required=True, type=pathlib.Path, help="directory to be made")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args(argv)
    out = args.out.expanduser()
    if args.checkpoint:
        export_to_hf(args.checkpoint, out, args.dtype)
    else:
        import_from_hf(args.from_hf, out)
    print(f"Written: {out}")


if __name__ == "__main__":
    sys.exit(commands.run(main))
