"""GPT-2 in a page, for machines without a library of language models; it imports torch alone.

The architecture is that of Radford et al. (2019): learned positions, normalisation before attention and before the
perceptron, queries, keys and values from one projection, GELU by tanh, and the head tied to the embedding. Entries are
named as Hugging Face names them; dropout is left out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPT2(nn.Module):
    """Logits, (batch, tokens, vocabulary), of the next token after each of some tokens, (batch, tokens)."""

    def __init__(self, *, layers: int, width: int, heads: int, vocabulary: int, positions: int):
        super().__init__()
        blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(positions, width),
                "h": blocks,
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        self.apply(_initialize)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits."""
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1], device=tokens.device))
        for block in parts["h"].children():
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(attended.transpose(1, 2).reshape(batch, tokens, width))


class _Perceptron(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), _Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), _Perceptron(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean cross-entropy of every next token, for a batch of tokens and those that follow each of them."""
    tokens, following = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())


def random_tokens(batch: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """A batch for `next_token_loss`: random tokens and those that follow each of them, both (batch, tokens)."""
    drawn = torch.randint(vocabulary, (batch, tokens + 1))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def _initialize(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
