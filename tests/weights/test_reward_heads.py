"""A reward model in Hugging Face's format: `transformers` gives the scores that we give."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import mesh_of, tiny_config

from jlrm.config import UsageError
from jlrm.model import qwen
from jlrm.runtime.mesh import training_layout
from jlrm.sampling.policy import Network
from jlrm.sampling.scores import Scorer
from jlrm.weights import hf, hf_config

PAD = 0


def test_what_a_directory_says_of_its_scores(tmp_path):
    config = hf_config.config_to_hf(tiny_config("qwen3"), "float32")

    def found(**fields) -> int:
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return hf_config.num_labels(tmp_path)

    assert found() == 0
    for kind, names in hf_config.LABELS.items():
        fields = hf_config.scoring_to_hf(config, kind, PAD)
        assert fields["architectures"] == ["Qwen3ForSequenceClassification"]
        assert found(**fields) == len(names)
    assert found(architectures=["Qwen3ForSequenceClassification"]) == 2  # as transformers has it
    assert found(architectures="Qwen3ForSequenceClassification") == 0
    for field, odd in (("num_labels", "3"), ("num_labels", -1), ("id2label", 5)):
        with pytest.raises(UsageError, match=f"{field}="):
            found(architectures=["Qwen3ForSequenceClassification"], **{field: odd})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("qwen2_tied", "bradley_terry"), ("qwen3", "classes"), ("qwen2_untied", "cross")],
)
def test_transformers_gives_the_same_scores(tmp_path, torch, architecture, kind):
    from transformers import AutoModelForSequenceClassification

    labels = len(hf_config.LABELS[kind])
    config = dataclasses.replace(tiny_config(architecture), num_labels=labels)
    mesh = mesh_of(1, 1, 1)
    layout, rng = training_layout(mesh), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(0.3, 0.3, leaf.shape).astype(np.float32)),
        qwen.abstract_params(config, layout),
    )

    def read(tensor: hf.Tensor) -> np.ndarray:
        leaf = params
        for name in tensor.path.split("."):
            leaf = leaf[name]
        return np.asarray(leaf[tensor.index])

    written = list(hf.save_tensors(read, config, tmp_path, "float32"))
    assert "score.weight" in written and "lm_head.weight" not in written
    fields = hf_config.scoring_to_hf(hf_config.config_to_hf(config, "float32"), kind, PAD)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    texts = [rng.integers(1, 90, length).tolist() for length in (3, 17, 130, 9)]
    padded = np.full((len(texts), 130), PAD)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    with torch.no_grad():
        ids = torch.tensor(padded)
        wanted = theirs(input_ids=ids, attention_mask=(ids != PAD).long()).logits.numpy()
    loaded = hf.load_params(tmp_path, config, layout)
    found = Scorer(Network(config, mesh, 0, (1,)), 3)(loaded, texts)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, loaded
    )
