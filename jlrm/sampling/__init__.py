"""How tokens are drawn: the sampler, beam search, decoding, stop strings, batches of prompts."""
