"""An export is what others load: its tokenizer, its end tokens, and a card whose program runs."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from conftest import mesh_of, tiny_config
from safetensors.numpy import save_file

from jlrm import export
from jlrm.config import UsageError
from jlrm.data.tokenizer import end_ids, load_tokenizer
from jlrm.data.worlds import toy
from jlrm.model import qwen
from jlrm.runtime import commands
from jlrm.runtime.mesh import training_layout
from jlrm.weights import checkpoint, hf, hf_config, reading, steps

pytestmark = pytest.mark.slow  # each writes a tokenizer or a checkpoint

MODEL = tiny_config(vocab_size=toy.VOCAB_SIZE, num_hidden_layers=1, max_position_embeddings=2048)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = "{{ strftime_now('%d %B %Y') }}\n" + TEMPLATE
END, START, PAD = 2, 1, 0  # of the generated tokenizer


@pytest.fixture(scope="module")
def params() -> Any:
    return qwen.init(MODEL, training_layout(mesh_of(1, 1, 1)), 0)


def edit(file: pathlib.Path, **changes: Any) -> None:
    fields = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(fields | changes))


@pytest.fixture
def run_dir(tmp_path, params) -> pathlib.Path:
    return write_run(tmp_path / "run", params)


def write_run(directory: pathlib.Path, params: Any) -> pathlib.Path:
    """Write a run as training leaves it, whose weights nobody has trained."""
    model = directory / "model"
    toy.save_tokenizer(model)
    edit(model / "tokenizer_config.json", chat_template=TEMPLATE)
    (model / "config.json").write_text(json.dumps(hf_config.config_to_hf(MODEL, "float32")))
    save(directory, params)
    return directory


def save(directory: pathlib.Path, params: Any, prompt: str = "jlrm") -> None:
    described = {
        "data": {"prompt": prompt},
        "reward": {"mode": "judgelrm_symmetric", "min_score": 0, "max_score": 5},
        "sampling": {"max_new_tokens": 4},
    }
    meta = {"stage": "grpo", "step": 0, "config": described, "evaluation": {"agreement": 51.234}}
    checkpoint.save_params(directory, "grpo", params, meta)


def exported(run_dir: pathlib.Path, name: str = "out") -> pathlib.Path:
    export.export_to_hf(str(run_dir), run_dir.parent / name, "float32")
    return run_dir.parent / name


def read(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text())


# ------------------------------------------------------------------ config.json


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": None, "head_dim": None, "rope_theta": None},
        {"max_position_embeddings": None, "rope_parameters": None, "hidden_act": "swish"},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": None}},
        {"rope_scaling": {**YARN, "factor": None}},
    ],
)
def test_transformers_reads_an_export_of_a_config_with_null_in_it(fields, run_dir):
    """It refuses null in most fields, where we take the default."""
    edit(run_dir / "model" / "config.json", **fields)
    ours, out = hf_config.read_config(run_dir / "model"), exported(run_dir)
    assert hf_config.read_config(out) == ours
    theirs = transformers.AutoConfig.from_pretrained(out)
    assert theirs.rms_norm_eps == ours.rms_norm_eps
    assert theirs.max_position_embeddings == ours.max_position_embeddings
    assert theirs.tie_word_embeddings == ours.tie_word_embeddings
    assert theirs.rope_parameters["rope_type"] == ("yarn" if ours.rope_scaling else "default")


# ------------------------------------------------------------------ end tokens


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (None, {END}),
        (b'{"eos_token_id": 1, "temperature": 0.6}', {START, END}),
        (b'{"eos_token_id": [0, 1], "top_k": 20}', {PAD, START, END}),
        (b'{"top_k": 20}', {END}),
        (b'{"eos_token_id": null}', {END}),
        (b'{"eos_token_id"', {END}),
        (b"\xff\xfe", {END}),
        (b"[]", {END}),
    ],
)
def test_an_export_ends_where_the_judge_ended_in_training(content, wanted, run_dir):
    file = run_dir / "model" / "generation_config.json"
    if content is not None:
        file.write_bytes(content)
    out = exported(run_dir)
    fields = read(out / "generation_config.json")
    assert set(fields["eos_token_id"]) == wanted
    assert set(end_ids(load_tokenizer(run_dir / "model"), run_dir / "model")) == wanted
    if content and b"top_k" in content:
        assert fields["top_k"] == 20  # the rest is the source's


@pytest.mark.parametrize("text", ['{ "eos_token_id":2 }', '{"eos_token_id": [0, 2],\n"top_k": 3}'])
def test_a_generation_config_that_names_them_all_stays_as_it_is(text, run_dir):
    (run_dir / "model" / "generation_config.json").write_text(text)
    assert (exported(run_dir) / "generation_config.json").read_text() == text


def test_generation_in_transformers_ends_at_each_end_token(run_dir, torch):
    """Weights that write one token only: each end token ends the text after it."""
    from transformers import AutoModelForCausalLM

    edit(run_dir / "model" / "generation_config.json", eos_token_id=START)
    model = AutoModelForCausalLM.from_pretrained(exported(run_dir), dtype=torch.float32)
    for end in (START, END):
        head = torch.zeros_like(model.get_input_embeddings().weight)
        with torch.no_grad():
            head[end] = model.model(torch.tensor([[7]])).last_hidden_state[0, -1]
        model.lm_head.weight = torch.nn.Parameter(head)
        ids = torch.tensor([[7]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5)
        assert written[0].tolist() == [7, end]


# ------------------------------------------------------------------ both versions of transformers


def test_the_tokenizer_of_transformers_5_is_spelt_so_that_4_reads_it(run_dir, tmp_path):
    from transformers import AutoTokenizer

    source = run_dir / "model"
    toy.save_tokenizer(tmp_path / "apart")  # no config.json is beside it, which names a class
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "apart")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|judge|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "apart")
    hf.copy_tokenizer(tmp_path / "apart", source)
    before = read(source / "tokenizer_config.json")
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert isinstance(before["extra_special_tokens"], list)
    out = exported(run_dir)
    fields = read(out / "tokenizer_config.json")
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in fields  # a dictionary in 4, which calls its `keys`
    assert fields["additional_special_tokens"] == ["<|judge|>"]
    again = AutoTokenizer.from_pretrained(out)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.all_special_ids == tokenizer.all_special_ids
    assert again.chat_template == tokenizer.chat_template + export.OPENING
    assert (source / "tokenizer_config.json").read_text() == json.dumps(before, indent=2) + "\n"


def test_a_tokenizer_that_both_read_stays_as_it_is(run_dir):
    text = '{ "tokenizer_class":"Qwen2Tokenizer", "eos_token":"<|im_end|>" }'
    (run_dir / "model" / "tokenizer_config.json").write_text(text)
    save_prompt = run_dir / "model" / "chat_template.jinja"
    save_prompt.write_text(TEMPLATE)
    out = exported(run_dir)
    assert (out / "tokenizer_config.json").read_text() == text
    assert (out / "chat_template.jinja").read_text() == TEMPLATE + export.OPENING


# ------------------------------------------------------------------ the other way


def write_hf(directory: pathlib.Path, dtype: str, change: Any = None) -> None:
    toy.save_tokenizer(directory)
    fields = hf_config.config_to_hf(MODEL, dtype)
    (directory / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(0)
    held = {t.name: rng.normal(size=t.hf_shape).astype(np.float32) for t in hf.tensors(MODEL)}
    if change is not None:
        change(held)
    save_file(held, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def cpu_alone(monkeypatch):
    """Leave the platform as it is, which an import sets for its own process."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("torch.bfloat16", "bfloat16"),
        ("torch.float32", "float32"),
        ("half", "float16"),
        ("float16", "float16"),
    ],
)
def test_a_dtype_is_read_as_torch_spells_it(dtype, stored, tmp_path, cpu_alone):
    write_hf(tmp_path / "hf", dtype)
    export.import_from_hf(str(tmp_path / "hf"), tmp_path / "run")
    tensor = reading.read_tensor(steps.find(str(tmp_path / "run")), "embed")
    assert tensor.dtype.name == stored


@pytest.mark.parametrize("dtype", ["int8", "torch.float8_e4m3fn", 16, {"text": "bfloat16"}, ["a"]])
def test_a_dtype_that_weights_are_not_read_in_is_named(dtype, tmp_path):
    write_hf(tmp_path / "hf", dtype)
    with pytest.raises(UsageError, match=r"dtype=.* is not one of float32, bfloat16, float16"):
        export.import_from_hf(str(tmp_path / "hf"), tmp_path / "run")


def test_a_broken_generation_config_does_not_keep_a_model_out(tmp_path, cpu_alone, caplog):
    write_hf(tmp_path / "hf", "float32")
    (tmp_path / "hf" / "generation_config.json").write_text("{")
    export.import_from_hf(str(tmp_path / "hf"), tmp_path / "run")
    out = exported(tmp_path / "run")
    assert read(out / "generation_config.json")["eos_token_id"] == [END]
    assert "generation_config.json is not valid JSON" in caplog.text


def test_an_adapter_and_nan_end_the_command_with_one_sentence(tmp_path, capsys, cpu_alone):
    def break_one(held: dict[str, np.ndarray]) -> None:
        held["model.norm.weight"][3] = np.inf

    write_hf(tmp_path / "nan", "float32", break_one)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for name, said in {"nan": "model.norm.weight holds NaN", "adapter": "PEFT adapter"}.items():
        argv = ["--from-hf", str(tmp_path / name), "--out", str(tmp_path / f"{name}-run")]
        assert commands.run(lambda argv=argv: export.main(argv)) == 2
        error = capsys.readouterr().err
        assert said in error and error.splitlines()[-1].startswith("error: "), error
        assert not (tmp_path / f"{name}-run").exists()


def test_a_checkpoint_that_is_not_finite_is_named_when_it_is_restored(run_dir, params):
    layout = training_layout(mesh_of(1, 1, 1))
    broken = jax.tree.map(lambda leaf: leaf, params)
    broken["layers"]["attn"]["q"] = broken["layers"]["attn"]["q"].at[0, 1, 1, 1].set(np.nan)
    save_to = run_dir.parent / "broken"
    save(save_to, broken)
    abstract = qwen.abstract_params(MODEL, layout)
    with pytest.raises(
        UsageError, match=r"NaN or infinite numbers in layers\.attn\.q: its training"
    ):
        reading.restore_params(steps.find(str(save_to)), abstract)
    fine = reading.restore_params(steps.find(str(run_dir)), abstract)
    jax.tree.map(np.testing.assert_array_equal, fine, params)


def test_flags_of_export_without_an_effect_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"--out gs://b/x: wanted a local directory"):
        export.main(["--checkpoint", str(tmp_path), "--out", "gs://b/x"])
    flags = ["--from-hf", str(tmp_path), "--out", str(tmp_path / "x")]
    with pytest.raises(UsageError, match=r"--dtype has no effect with --from-hf"):
        export.main([*flags, "--dtype", "float32"])
    with pytest.raises(UsageError, match=r"--results has no effect with --from-hf"):
        export.main([*flags, "--results", str(tmp_path)])
    with pytest.raises(UsageError, match=r"--push has no effect with --from-hf"):
        export.main([*flags, "--push", "a/b"])
    with pytest.raises(UsageError, match=r"--dry-run has no effect without --push"):
        export.main([*flags, "--dry-run"])
    with pytest.raises(UsageError, match=r"Nothing to do: name --checkpoint"):
        export.main(["--out", str(tmp_path)])
