"""Networks of transformers, in tiny configurations without weights from elsewhere."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmc_curvature import BatchLoss
from tests.support.zoo.specimen import (
    CLASSES,
    CROSS_ENTROPY,
    REGRESSION,
    Specimen,
    classified,
    labels,
    numbers,
    regressed,
)

WORDS, TOKENS = 11, 6


class _DoublePrecision(TorchFunctionMode):
    """Leaves out single precision, to which some networks go on the way: it would hide the differences looked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wider = {torch.float32: torch.float64}
        args = [wider.get(each, each) if isinstance(each, torch.dtype) else each for each in args]
        kwargs = {k: wider.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


class _Called(nn.Module):
    """A network of transformers as a function of one tensor."""

    def __init__(self, network: nn.Module, call: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, x: Tensor) -> Tensor:
        with _DoublePrecision():
            return self.call(self.network, x)


# Classes come second where cross-entropy is taken at every position.
def _of_tokens(network: Any, ids: Tensor) -> Tensor:
    return network(input_ids=ids).logits.mT


def _of_pairs(network: Any, ids: Tensor) -> Tensor:
    return network(input_ids=ids, decoder_input_ids=ids.flip(1)).logits.mT


def _tokens(generator: torch.Generator) -> Any:
    ids = labels(generator, 3, TOKENS, classes=WORDS)
    return ids, ids.roll(-1, 1)


def _network(kind: str, head: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**options)
        return getattr(transformers, f"{kind}{head}")(config)

    return make


_SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_IDS = {"vocab_size": WORDS, "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}


def _language(
    kind: str, head: str = "ForCausalLM", call: Callable[[Any, Tensor], Tensor] = _of_tokens, **options: Any
) -> Specimen:
    make = _network(kind, head, **_IDS | options)
    return Specimen("transformers", lambda: _Called(make(), call), _tokens, CROSS_ENTROPY)


_LLAMA = {**_SIZES, "num_key_value_heads": 1, "use_cache": False}
_MIXTRAL = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
_DEEPSEEK = {
    **{**_SIZES, "num_key_value_heads": 2, "use_cache": False, "moe_intermediate_size": 4, "n_routed_experts": 4},
    "num_mtp_layers": 0,
    **{"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "q_lora_rank": 4},
    **{"kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2},
}


def _contrast(network: nn.Module, batch: Any) -> Tensor:
    with _DoublePrecision():
        return network(**batch, return_loss=True).loss


def _captions(generator: torch.Generator) -> Any:
    return {"input_ids": labels(generator, 3, TOKENS, classes=WORDS), "pixel_values": numbers(generator, 3, 3, 8, 8)}


def _clip() -> nn.Module:
    text = {**_SIZES, **_IDS, "max_position_embeddings": TOKENS, "projection_dim": 4, "eos_token_id": 2}
    vision = {**_SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 4}
    return _network("CLIP", "Model", text_config=text, vision_config=vision, projection_dim=4)()


TRANSFORMERS = {
    "GPT-2": _language("GPT2", "LMHeadModel", n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False),
    "GPT-NeoX": _language("GPTNeoX", max_position_embeddings=8, use_cache=False, **_SIZES),
    "BLOOM": _language("Bloom", hidden_size=8, n_layer=1, n_head=2, use_cache=False),
    "OPT": _language(
        "OPT",
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        word_embed_proj_dim=4,
        max_position_embeddings=8,
        use_cache=False,
    ),
    "Llama": _language("Llama", **_LLAMA),
    "Qwen3": _language("Qwen3", head_dim=4, **_LLAMA),
    "Gemma 2": _language("Gemma2", head_dim=4, query_pre_attn_scalar=4, sliding_window=4, **_LLAMA),
    "GPT-OSS": _language(
        "GptOss",
        experts_implementation="batched_mm",
        head_dim=4,
        layer_types=["sliding_attention"],
        sliding_window=4,
        **_MIXTRAL,
    ),
    "Mixtral, a loop over experts": _language("Mixtral", experts_implementation="eager", **_MIXTRAL),
    "Mixtral, weights gathered": _language("Mixtral", experts_implementation="batched_mm", **_MIXTRAL),
    "DeepSeek v3, weights gathered": _language("DeepseekV3", experts_implementation="batched_mm", **_DEEPSEEK),
    "Mamba": _language("Mamba", hidden_size=8, state_size=4, num_hidden_layers=1, conv_kernel=3, use_cache=False),
    "RWKV": _language("Rwkv", hidden_size=8, num_hidden_layers=2, context_length=8, use_cache=False),
    "RecurrentGemma": _language(
        "RecurrentGemma",
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=8,
        attention_window_size=4,
        use_cache=False,
    ),
    "XLNet": _language("XLNet", "LMHeadModel", d_model=8, n_layer=1, n_head=2, d_inner=16),
    "BERT": _language("Bert", "ForMaskedLM", max_position_embeddings=8, **_SIZES),
    "ALBERT": _language(
        "Albert", "ForMaskedLM", embedding_size=4, max_position_embeddings=8, **_SIZES | {"num_hidden_layers": 2}
    ),
    "DeBERTa v2": _language(
        "DebertaV2",
        "ForMaskedLM",
        max_position_embeddings=8,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=4,
        pad_token_id=0,
        **_SIZES,
    ),
    "FNet": _language("FNet", "ForMaskedLM", max_position_embeddings=8, **_SIZES),
    "Nyströmformer": _language(
        "Nystromformer",
        "ForMaskedLM",
        max_position_embeddings=8,
        num_landmarks=2,
        segment_means_seq_len=TOKENS,
        conv_kernel_size=3,
        **_SIZES,
    ),
    "Longformer": _language(
        "Longformer", "ForMaskedLM", max_position_embeddings=12, attention_window=4, pad_token_id=1, **_SIZES
    ),
    "T5": _language(
        "T5",
        "ForConditionalGeneration",
        _of_pairs,
        feed_forward_proj="gated-gelu",
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        use_cache=False,
        decoder_start_token_id=0,
    ),
    "BART": _language(
        "Bart",
        "ForConditionalGeneration",
        _of_pairs,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=8,
        use_cache=False,
        pad_token_id=1,
        decoder_start_token_id=0,
    ),
    "wav2vec 2.0": Specimen(
        "transformers",
        lambda: _Called(
            _network(
                "Wav2Vec2",
                "ForSequenceClassification",
                conv_dim=(4, 4),
                conv_kernel=(4, 2),
                conv_stride=(4, 2),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                classifier_proj_size=4,
                num_labels=CLASSES,
                **_SIZES,
            )(),
            lambda network, x: network(input_values=x).logits,
        ),
        classified(48),
        CROSS_ENTROPY,
    ),
    "PatchTST": Specimen(
        "transformers",
        lambda: _Called(
            _network(
                "PatchTST",
                "ForPrediction",
                num_input_channels=2,
                context_length=8,
                patch_length=2,
                patch_stride=2,
                prediction_length=3,
                d_model=8,
                num_attention_heads=2,
                ffn_dim=16,
                num_hidden_layers=1,
                loss="mse",
            )(),
            lambda network, x: network(past_values=x).prediction_outputs,
        ),
        regressed((8, 2), (3, 2)),
        REGRESSION,
    ),
    "CLIP": Specimen("transformers", _clip, _captions, {"contrast of captions": BatchLoss(_contrast)}),
}
