"""Texts of random tokens, and a small language model of Hugging Face for them."""

import torch

VOCABULARY, LENGTH = 32, 10


def texts(batches=2, size=6):
    """Batches as a collator of Hugging Face makes them; every second token is the one before, and some are ignored."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        tokens = torch.randint(0, VOCABULARY, (size, LENGTH), generator=generator)
        tokens[:, 1::2] = tokens[:, ::2]
        labels = tokens.clone()
        labels[: size // 2, :4] = -100
        made.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return made


def make_gpt2(seed=0):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
