"""Move weights between a run and the Hugging Face format.

    python -m jlrm.export --checkpoint RUN[@STEP] --out DIR     a directory that transformers loads
    python -m jlrm.export --checkpoint RUN --out DIR --push ORG/NAME      and upload it
    python -m jlrm.export --checkpoint RUN --out DIR --adapter  its adapters alone, for PEFT
    python -m jlrm.export --from-hf MODEL --out DIR             an Orbax checkpoint to train from

Export reads one tensor at a time out of the checkpoint and appends it to a safetensors file, so its
memory is that of the largest tensor, and it needs no accelerator. Adapters are merged on the way.
A directory appears whole or not at all, and is uploaded when it is whole. Its card is
serving/model_card.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from jlrm.config import UsageError
from jlrm.data.tokenizer import CLOCK, Tokenizer, end_ids, load_tokenizer, prompt_template
from jlrm.evaluation import journal, prompting
from jlrm.judgement import prompts
from jlrm.reports import contracts, results_file
from jlrm.reports.results_file import Results
from jlrm.runtime import commands
from jlrm.runtime.settings import read_json
from jlrm.serving import calibration, model_card
from jlrm.serving.model_card import Trained
from jlrm.weights import adapters, checkpoint, hf, hf_config, hub, steps
from jlrm.weights.hub import Target
from jlrm.weights.source import fingerprint, num_labels, side_files

log = logging.getLogger(__name__)

# What a chat template lacks that leaves it to the model to begin its reasoning.
OPENING = "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"


def export_to_hf(
    source: str, out: pathlib.Path, dtype: str = "bfloat16", results: Sequence[pathlib.Path] = ()
) -> None:
    """Write the Hugging Face directory of a run's checkpoint.

    Args:
      source: `RUN`, `RUN@STEP`, `RUN@STAGE/STEP` or `RUN@best`.
      out: a directory that does not exist yet.
      dtype: "bfloat16" or "float32", of the stored weights.
      results: directories of evaluations for the card; those that are found are on it too.

    Raises:
      UsageError: no such checkpoint, or something is at `out`.
    """
    step_dir = steps.find(source)
    measured = [results_file.read(directory) for directory in results]
    model_dir, meta = side_files(source) / "model", steps.read_meta(step_dir)
    config = replace(hf_config.read_config(model_dir), num_labels=num_labels(source))
    partial = _begin(out)
    hf.copy_side_files(model_dir, partial)
    tokenizer = load_tokenizer(partial)
    _write_config(partial / "config.json", hf_config.config_to_hf(config, dtype))
    if config.num_labels:
        _write_scoring_config(partial / "config.json", meta, tokenizer)
    _write_generation_config(partial, tokenizer)
    _write_tokenizer_config(partial / "tokenizer_config.json")
    _write_judging(source, partial)
    calibrated = calibration.find("", source)
    if calibrated:
        calibration.write(partial / calibration.NAME, calibrated)
    trained = Trained(
        out.name,
        meta,
        tokenizer,
        end_ids(tokenizer, partial),
        _open_thinking(partial, tokenizer, meta.get("config", {})),
        [*measured, *found_results(source, results)],
        calibrated,
    )
    model_card.write(partial / "README.md", trained)

    total = len(hf.tensors(config))
    with contextlib.ExitStack() as stack:
        saved = hf.save_tensors(adapters.reader(source, config, stack), config, partial, dtype)
        for _ in tqdm(saved, total=total, desc="export"):
            pass
    os.replace(partial, out)


def export_adapter(source: str, out: pathlib.Path) -> None:
    """Write the adapters of a run's checkpoint as a directory of PEFT.

    Raises:
      UsageError: no such checkpoint, it has no adapters, or something is at `out`.
    """
    adapters.of_step(source)
    partial = _begin(out)
    hf.copy_tokenizer(side_files(source) / "model", partial)
    adapters.write(source, partial)
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
    _write_judging(source, partial / "model")
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


def _write_judging(source: str, directory: pathlib.Path) -> None:
    """Say how the judge is asked, where that is known; transformers passes the file over."""
    if asked := prompting.as_trained(source):
        contracts.write(directory / prompting.NAME, asked)


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
    if "num_local_experts" in fields:  # what transformers 5 calls it
        fields["num_experts"] = as_read["num_experts"]
    file.write_text(json.dumps(fields, indent=2))


def _write_scoring_config(file: pathlib.Path, meta: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Say what the scores of a reward model are of, and which token fills a batch behind them."""
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id:  # then an end would not be scored
        log.warning("the tokenizer has no token to fill batches with: score one text at a time")
    kind = meta["config"]["reward_model"]["kind"]
    fields = hf_config.scoring_to_hf(read_json(file), kind, pad)
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


def _open_thinking(directory: pathlib.Path, tokenizer: Tokenizer, config: dict[str, Any]) -> bool:
    """Let the exported chat template write the prompt of training; return whether it does.

    A server fills the template without knowing of our prompt. What it lacks is the open `<think>`,
    and a fixed date. It is changed only where that is all, which is tried. A prompt that is no
    conversation leaves it as it is.
    """
    name, reward = config.get("data", {}).get("prompt"), config.get("reward", {})
    if name not in prompts.PAIR_NAMES or name in prompts.PAIR_TEMPLATES:
        return False
    scale = reward.get("min_score", 1), reward.get("max_score", 10)
    system, user = prompts.messages(name, *scale)
    chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    wanted = prompt_template(tokenizer, name, min_score=scale[0], max_score=scale[1])
    own = tokenizer.get_chat_template()
    dated = (CLOCK if "strftime_now" in own else "") + own
    for template in (own, dated, dated.removesuffix("\n") + OPENING):
        try:
            text = tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except Exception:  # a template is a program: it raises anything
            continue
        if text == wanted:
            return template == own or _write_chat_template(directory, own, template)
    return False


def _write_chat_template(directory: pathlib.Path, own: str, template: str) -> bool:
    """Put a template in the place of the tokenizer's own; return whether it stood anywhere."""
    written, file = False, directory / "chat_template.jinja"
    if file.is_file():
        file.write_text(template, encoding="utf-8")
        written = True
    for named in ("tokenizer_config.json", "chat_template.json"):
        place = directory / named
        fields = read_json(place) if place.is_file() else {}
        if fields.get("chat_template") == own:
            place.write_text(json.dumps({**fields, "chat_template": template}, indent=2))
            written = True
    return written


def found_results(source: str, named: Sequence[pathlib.Path]) -> list[Results]:
    """Return the evaluations of a checkpoint that lie in its run or in `evaluations`.

    A file counts for the benchmarks whose responses were given by these very weights; directories
    that are `named` are left to whoever names them.
    """
    run, wanted = pathlib.Path(steps.split(source)[0]), fingerprint(steps.pinned(source))
    places = [*run.glob(f"*/{results_file.NAME}"), run / results_file.NAME]
    places += [*run.glob(f"*/*/{results_file.NAME}")]
    places += pathlib.Path().glob(f"evaluations/*/{results_file.NAME}")
    known = {directory.resolve() for directory in named}
    found = []
    for directory in sorted({place.parent.resolve() for place in places if place.is_file()}):
        try:
            results = results_file.read(directory)
            own = {
                name: result
                for name, result in results.benchmarks.items()
                if journal.path_in(directory / name).exists()
                and journal.read(directory / name)[0].get("model") == wanted
            }
        except UsageError as error:  # perhaps of another program: nobody has named it
            log.warning("%s It is not on the card.", error)
            continue
        if own and directory not in known:
            found.append(replace(results, benchmarks=own))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, convert, and push."""
    args = _parser().parse_args(argv)
    if "://" in args.out:
        raise UsageError(f"--out {args.out}: wanted a local directory. Copy that to the store.")
    out, target = pathlib.Path(args.out).expanduser(), _target(args)
    if target and not args.dry_run:
        hub.check(target)
    if args.adapter:
        if not args.checkpoint or args.dtype or args.results or args.push:
            raise UsageError("--adapter goes with --checkpoint and --out alone.")
        export_adapter(args.checkpoint, out)
    elif args.checkpoint:
        export_to_hf(args.checkpoint, out, args.dtype or "bfloat16", args.results)
    elif not args.from_hf:
        _check_exported(out)
    elif args.dtype or args.results:
        flag = "--dtype" if args.dtype else "--results"
        raise UsageError(f"{flag} has no effect with --from-hf, which keeps what the files hold.")
    else:
        import_from_hf(args.from_hf, out)
    print(f"Written: {out}" if args.checkpoint or args.from_hf else f"Whole: {out}")
    if target:
        _push(out, target, args.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jlrm.export",
        description="Move weights between a run and Hugging Face's format, and to the hub.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="RUN[@STEP]", help="@STEP: 100, sft/100 or best")
    source.add_argument("--from-hf", metavar="MODEL", help="directory or hub id")
    add = parser.add_argument
    add("--out", required=True, help="directory to be made; without the above, one to be pushed")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of exported weights; --from-hf keeps what the files hold (bfloat16)",
    )
    add(
        "--results",
        action="append",
        default=[],
        type=pathlib.Path,
        metavar="DIR",
        help="--out of an evaluation, for the card; repeatable. Those of these weights that lie in "
        "the run or in evaluations/ are found",
    )
    add("--adapter", action="store_true", help="write the adapters alone, as PEFT loads them")
    add("--push", metavar="ORG/NAME", help="upload to this repository of the hub, when all is done")
    add("--private", action="store_true", help="make the repository private, if it is new")
    add("--revision", default="", metavar="BRANCH", help="upload to this branch (main)")
    add("--dry-run", action="store_true", help="list what would be uploaded, and ask no hub")
    return parser


def _target(args: argparse.Namespace) -> Target | None:
    """Return where to push; None: nowhere.

    Raises:
      UsageError: flags that have no effect, or no name of a repository.
    """
    if not args.push:
        for name in ("private", "revision", "dry_run"):
            if getattr(args, name):
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --push.")
        if not args.checkpoint and not args.from_hf:
            raise UsageError("Nothing to do: name --checkpoint RUN or --from-hf MODEL.")
        return None
    if args.from_hf:
        raise UsageError("--push has no effect with --from-hf: a run is no repository of the hub.")
    hub.check_name(args.push)
    return Target(args.push, args.revision, args.private)


def _check_exported(out: pathlib.Path) -> None:
    """Refuse to push what is no export."""
    lacking = [name for name in ("config.json", "README.md") if not (out / name).is_file()]
    if not [*out.glob("*.safetensors")]:
        lacking.append("*.safetensors")
    if lacking:
        raise UsageError(
            f"--out {out} is no export: it holds no {lacking[0]}. Make one: --checkpoint RUN."
        )


def _push(out: pathlib.Path, target: Target, is_dry: bool) -> None:
    if is_dry:
        for file in sorted(out.iterdir()):
            print(f"  {file.stat().st_size:>14,}  {file.name}")
        print(f"Nothing was uploaded (--dry-run). These files would go to {target}.")
        return
    try:
        print(f"Pushed: {hub.push(out, target)}")
    except UsageError as error:
        again = f"jlrm export --out {out} --push {target.repo}"
        again += f" --revision {target.branch}" if target.branch else ""
        raise UsageError(f"{error} The export is whole; to upload it: {again}") from None


if __name__ == "__main__":
    commands.finish(main)
