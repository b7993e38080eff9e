"""Write five tiny Hugging Face checkpoints with the logits and greedy tokens they produce.

Run `python tests/golden/make_hf_golden.py` in an environment with torch 2.13 (CPU), transformers 5
and numpy; a few seconds, no network. Writes beside this file `qwen2_untied/`, `qwen2_tied/`,
`qwen3/`, `qwen3_rope/` (YaRN, 80 tokens over an original context of 64) and `qwen3_moe/`, each with
`config.json`, `generation_config.json`, `model.safetensors` (float32) and `logits.npz`:

    tokens, mask                [3, T] int32   right-padded rows
    tokens_left, mask_left      [3, T] int32   the same rows, left-padded
    columns                     [C]    int32   columns for which logits are kept (all when T = 11)
    logits, logits_left         [3, C, 96] float32, zero where the mask is zero
    greedy                      [3, 12] int32 argmax continuation of each unpadded row, free of EOS

Every parameter is random, norm scales and biases too, so that each one shows in the logits. The
embedding of `qwen2_untied` is small (std 0.02), so that its rms_norm_eps of 1e-5 shows as well.
Positions count unpadded tokens: cumsum(mask) - 1, clipped at 0.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB, PAD, EOS, NUM_GREEDY = 96, 93, 95, 12
SHORT, LONG = [11, 7, 4], [80, 72, 66]
LONG_COLUMNS = [0, 1, 14, 20, 31, 47, 62, 63, 64, 65, 71, 79]
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": PAD,
    "eos_token_id": EOS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "dtype": "float32",
    "attn_implementation": "eager",
}
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def randomise(model, seed, embedding_std):
    """Draw every parameter anew: norm scales 1 + 0.2 N, the embedding and the rest std N."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_((embedding_std if "embed_tokens" in name else 0.3) * noise)


def padded(rows, side):
    """Return tokens and mask, both [rows, longest] int64, padded on the given side."""
    length = max(map(len, rows))
    tokens = torch.full((len(rows), length), PAD)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


def logits_of(model, tokens, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits


def greedy_continuation(model, row):
    """Append argmax tokens by full forward passes; refuse EOS and near ties rounding may turn."""
    for _ in range(NUM_GREEDY):
        top = model(input_ids=row[None]).logits[0, -1].topk(2)
        if top.values[0] - top.values[1] < 1e-2 or top.indices[0] in (EOS, PAD):
            raise ValueError(f"greedy tokens {top.indices.tolist()}: near tie or EOS; change seed")
        row = torch.cat([row, top.indices[:1]])
    return row[-NUM_GREEDY:]


@torch.no_grad()
def write(name, model, seed, lengths, columns, embedding_std=0.3):
    """Randomise the model, save it, and save its logits for both paddings."""
    model.eval()
    randomise(model, seed, embedding_std)
    model.generation_config = GenerationConfig(
        bos_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=[EOS, PAD],
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    rows = [torch.randint(0, PAD, (n,), generator=generator) for n in lengths]
    tokens, mask = padded(rows, "right")
    tokens_left, mask_left = padded(rows, "left")
    logits = logits_of(model, tokens, mask)
    logits_left = logits_of(model, tokens_left, mask_left)
    torch.testing.assert_close(logits[mask == 1], logits_left[mask_left == 1], rtol=0, atol=1e-4)
    greedy = torch.stack([greedy_continuation(model, row) for row in rows])

    folder = Path(__file__).with_name(name)
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "logits.npz",
        tokens=tokens.int().numpy(),
        mask=mask.int().numpy(),
        tokens_left=tokens_left.int().numpy(),
        mask_left=mask_left.int().numpy(),
        columns=np.array(columns, dtype=np.int32),
        logits=(logits * mask[..., None])[:, columns].numpy(),
        logits_left=(logits_left * mask_left[..., None])[:, columns].numpy(),
        greedy=greedy.int().numpy(),
    )


def main():
    every = list(range(max(SHORT)))
    untied = Qwen2Config(
        **SIZES | {"rms_norm_eps": 1e-5}, rope_parameters=ROPE, tie_word_embeddings=False
    )
    write("qwen2_untied", Qwen2ForCausalLM(untied), 10, SHORT, every, embedding_std=0.02)
    tied = Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True)
    write("qwen2_tied", Qwen2ForCausalLM(tied), 28, SHORT, every)
    qwen3 = Qwen3Config(**SIZES, head_dim=16, rope_parameters=ROPE, tie_word_embeddings=True)
    write("qwen3", Qwen3ForCausalLM(qwen3), 30, SHORT, every)
    yarn = Qwen3Config(
        **SIZES | {"max_position_embeddings": 256},
        head_dim=16,
        rope_parameters=YARN,
        tie_word_embeddings=True,
    )
    write("qwen3_rope", Qwen3ForCausalLM(yarn), 40, LONG, LONG_COLUMNS)
    experts = Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        rope_parameters=ROPE,
        tie_word_embeddings=False,
        moe_intermediate_size=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    write("qwen3_moe", Qwen3MoeForCausalLM(experts), 50, SHORT, every)


if __name__ == "__main__":
    main()
