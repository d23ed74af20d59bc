import pytest
import torch

from benchmarks.support import gpt2

SIZES = {"layers": 2, "width": 16, "heads": 4, "vocabulary": 30, "positions": 8}


def test_it_is_what_transformers_computes():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=4, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    ours = gpt2.GPT2(**SIZES).double()
    # Their projections are written as matrices to multiply with from the right.
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    ours.load_state_dict({name: t.T if name.endswith(turned) else t for name, t in theirs.state_dict().items()})
    batch = gpt2.random_tokens(3, 7, 30)
    torch.testing.assert_close(ours(batch[0]), theirs(batch[0]).logits, rtol=1e-12, atol=1e-12)
    # Their loss shifts the labels by itself.
    drawn = torch.cat([batch[0], batch[1][:, -1:]], dim=1)
    logits = theirs(drawn).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten())
    torch.testing.assert_close(gpt2.next_token_loss(ours, batch), expected, rtol=1e-12, atol=1e-12)


def test_the_head_is_the_embedding():
    model = gpt2.GPT2(**SIZES)
    assert model.lm_head.weight is model.transformer["wte"].weight
    # 12 width² + 13 width a layer, embeddings of tokens and positions, and a normalisation.
    assert sum(p.numel() for p in model.parameters()) == 2 * (12 * 16**2 + 13 * 16) + (30 + 8) * 16 + 32
