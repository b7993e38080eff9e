"""`transformers` on torch, as in a loop of one's own: `generate`, log-probabilities, AdamW.

In bfloat16 the trained weights are float32 and the passes are autocast. Completions and the
reference's log-probabilities come from weights that were rounded, once a step.
"""

# Its packages are those of another Python.
# pyright: reportMissingImports=false

import copy

import torch
import transformers

PACKAGES = ("torch", "transformers")


def device_peak():
    """Return the most bytes of a GPU that were held; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def check(work):
    """Return log-probabilities [B, T] of the batch, and its loss."""
    batch = tensors(work)
    with torch.no_grad():
        logps = score(load(work), batch, batch["completion_ids"])
        loss = grpo_loss(work, logps, batch["old_logps"], batch["ref_logps"], batch["advantages"])
    return logps.cpu(), loss


def rollout(work, turns):
    """Draw completions."""
    model, batch = load(work, work.dtype), tensors(work)
    for _ in turns:
        turns.tokens = generate(work, model, batch).cpu()


def update(work, turns):
    """Take optimiser steps on the batch."""
    model, batch = load(work), tensors(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.learning_rate, weight_decay=0.0)
    for _ in turns:
        with autocast(work):
            logps = score(model, batch, batch["completion_ids"])
        known = batch["old_logps"], batch["ref_logps"], batch["advantages"]
        take_step(work, model, optimizer, grpo_loss(work, logps, *known))


def iteration(work, turns):
    """Draw, pay, score by the reference, and take a step."""
    model, batch = load(work), tensors(work)
    reference = copy.deepcopy(model).to(getattr(torch, work.dtype))
    sampler = copy.deepcopy(reference) if work.dtype == "bfloat16" else model
    tokenizer = work.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.learning_rate, weight_decay=0.0)
    for _ in turns:
        if sampler is not model:
            sampler.load_state_dict(model.state_dict())
        drawn = generate(work, sampler, batch)
        rewards = torch.tensor(
            work.reward(None, tokenizer.batch_decode(drawn)), device=device(work)
        )
        groups = rewards.view(-1, work.rollouts)
        centred = groups - groups.mean(1, keepdim=True)
        advantages = (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        with torch.no_grad():
            ref_logps = score(reference, batch, drawn)
        with autocast(work):
            logps = score(model, batch, drawn)
        loss = grpo_loss(work, logps, logps.detach(), ref_logps, advantages)
        take_step(work, model, optimizer, loss)


def device(work):
    """Return torch's name of the device."""
    return "cuda" if work.device == "gpu" else "cpu"


def autocast(work):
    """Return a context in which products are computed in the workload's dtype."""
    return torch.autocast(device(work), torch.bfloat16, enabled=work.dtype == "bfloat16")


def load(work, dtype="float32"):
    """Return the model on its device."""
    dtype = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype)
    return model.to(device=device(work))  # pyright: ignore[reportCallIssue]


def tensors(work):
    """Return the arrays of the batch; ids and masks as int64."""
    pairs = {name: torch.from_numpy(x).to(device(work)) for name, x in work.batch.items()}
    return {name: x if x.is_floating_point() else x.long() for name, x in pairs.items()}


def generate(work, model, batch):
    """Return ids [B, T] that were drawn at temperature 1 from the whole distribution."""
    config = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=work.new_tokens,
        pad_token_id=work.pad_id,
        eos_token_id=work.eos_id,
    )
    ids, mask = batch["prompt_ids"], batch["prompt_mask"]
    drawn = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return drawn[:, ids.shape[1] :]


def score(model, batch, completions):
    """Return the log-probability of each token of the completions, [B, T]."""
    ids = torch.cat([batch["prompt_ids"], completions], dim=1)
    mask = torch.cat([batch["prompt_mask"], torch.ones_like(completions)], dim=1)
    num_tokens = completions.shape[1]
    logits = (
        model(input_ids=ids, attention_mask=mask, logits_to_keep=num_tokens + 1)
        .logits[:, :-1]
        .float()
    )
    chosen = logits.gather(-1, completions.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def grpo_loss(work, logps, old_logps, ref_logps, advantages):
    """Return GRPO's loss; all completions are equally long, so one mean is that of their means."""
    ratio, advantages = torch.exp(logps - old_logps), advantages.unsqueeze(1)
    clipped = ratio.clamp(1 - work.clip, 1 + work.clip)
    gap = ref_logps - logps
    token_loss = work.kl_weight * (gap.exp() - gap - 1)
    return (token_loss - torch.min(ratio * advantages, clipped * advantages)).mean()


def take_step(work, model, optimizer, loss):
    """Take an optimiser step, with the gradient clipped by its norm."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), work.clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
