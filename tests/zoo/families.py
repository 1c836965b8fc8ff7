"""Small random checkpoints of the causal architectures that the installed transformers registers.

A new architecture joins by itself, as long as its config takes the common names. Where it does not,
SETTINGS has what its family needs. What cannot be built small is left out, with the reason.
"""

import math
import signal
from contextlib import contextmanager

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

TAKEN = MODEL_FOR_CAUSAL_LM_MAPPING.keys()
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MAX_WEIGHTS = 3_000_000
SECONDS_TO_BUILD = 25

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # mixtures of experts
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    # multi-head latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
# Encoders and decoders, of which the decoder is the causal model.
SEQ2SEQ = {
    "d_model": 64,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
}
# What a model has for images or sound, beside its language part.
SENSES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "image_size": 28,
    "patch_size": 14,
}
LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # its rotary part is the head that RoPE sees
INKLING2 = {
    "unpadded_vocab_size": 322,
    "layer_types": ["hybrid_sliding", "hybrid"],
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "n_layers_per_attn_res_block": 1,
    "moe_intermediate_size": 32,
    "intermediate_size": None,
    "num_local_experts": None,
}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
SETTINGS = {
    **dict.fromkeys(
        (
            "axk1",
            "axk2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "youtu",
            "dots3_note_text",
        ),
        LATENT,
    ),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "bailing_hybrid", "olmo_hybrid"), HYBRID
    ),
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 256},
    "falcon": {"head_dim": None},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16},
    **dict.fromkeys(
        (
            *("bart", "mbart", "mvp", "plbart", "pegasus", "bigbird_pegasus", "marian", "whisper"),
            *("blenderbot", "blenderbot-small"),
        ),
        SEQ2SEQ,
    ),
    "musicgen_decoder": {"num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96},
    "prophetnet": {
        "num_hidden_layers": None,
        "max_position_embeddings": 512,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
        "decoder_ffn_dim": 96,
        "encoder_ffn_dim": 96,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 384,
        "shape_embed_dim": 8,
        "shape_vocab_size": 384,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "axial_pos_embds": False,
    },
    "xlnet": {
        "max_position_embeddings": None,
        "d_model": 64,
        "n_layer": 2,
        "n_head": 4,
        "d_inner": 96,
    },
    "xmod": {"default_language": "en_XX"},
    "dbrx": {
        "hidden_size": None,
        "num_attention_heads": None,
        "num_hidden_layers": None,
        "max_position_embeddings": None,
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "inkling2_text": INKLING2,
    "inkling2_loop_text": INKLING2,
    "kimi_linear": {
        "num_key_value_heads": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm3": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "conv", "sliding_attention"],
    },
    "moshi": {"ffn_dim": 96},
    "qwen4_exp_text": {
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "ngram_vocab_size_base": 100,
        "hc_lowrank": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 256,
        "indexer_compress_ratio": 4,
    },
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "mlp_layer_types": ["dense"],
        "adapter_in_dim": 32,
        "adapter_out_dim": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_output_size": 64},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "output_proj_dims": 64, "mm_posemb_size": 8},
    "gemma4_unified_audio": {"audio_embed_dim": 32},
    "phi4_multimodal_audio": {
        "num_blocks": 1,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "patching_mode": "static",
        **{
            f"{part}_config": {
                "hidden_size": 128 if part == "global" else 64,
                "intermediate_size": 96,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "vocab_size": 400,
                "hidden_size_global": 128,
            }
            for part in ("patcher", "encoder", "decoder", "global")
        },
    },
    "cpmant": {"dim_ff": 96, "dim_head": 16},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 384,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8},
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"],
        "attention_head_dim": 32,
        "head_dim": None,
    },
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "xlstm": {"v_head_dim": None, "hidden_size": 128},
}

A_DRAFT = "it drafts tokens for another model, from that model's states"
OF_AUDIO = "its class takes no config that its model_type has: transformers cannot make it"
WITHOUT_A_FORM = {
    "gemma4_assistant": A_DRAFT,
    "gemma4_unified_assistant": A_DRAFT,
    "musicgen": OF_AUDIO,
    "musicgen_melody": OF_AUDIO,
}


class NotBuiltError(Exception):
    """The architecture has no small checkpoint here; the message says why."""


@contextmanager
def time_limit(seconds):
    def stop(*_):
        raise TimeoutError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def settings_of(kind, tokenizer):
    """What the config of an architecture is made with; None in a table leaves a setting out."""
    settings = COMMON | SETTINGS.get(kind, {})
    settings |= {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return {name: value for name, value in settings.items() if value is not None}


def config_of(kind, tokenizer):
    """A small config, and small ones of the language part and the others where it has parts."""
    parts = {}
    for name, part in (CONFIG_MAPPING[kind].sub_configs or {}).items():
        if name in ("text_config", "decoder"):
            parts[name] = settings_of(getattr(part, "model_type", ""), tokenizer)
        elif name in ("vision_config", "audio_config"):
            parts[name] = SENSES | SETTINGS.get(getattr(part, "model_type", ""), {})
    return CONFIG_MAPPING[kind](**settings_of(kind, tokenizer) | parts)


def build(kind, tokenizer):
    """A random model in fp32 whose outputs depend on all its inputs: matrices have unit gain.

    Raises:
        NotBuiltError: if it cannot be made, is not small, or does not read token ids alone.
    """
    if kind in WITHOUT_A_FORM:
        raise NotBuiltError(WITHOUT_A_FORM[kind])
    try:
        with time_limit(SECONDS_TO_BUILD):
            config = config_of(kind, tokenizer)
            with torch.device("meta"):
                on_meta = AutoModelForCausalLM.from_config(config)
            if (count := sum(p.numel() for p in on_meta.parameters())) > MAX_WEIGHTS:
                raise NotBuiltError(
                    f"{count / 1e6:,.0f} M weights: its config has no small form here"
                )
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            spread(model)
            logits = model(input_ids=torch.arange(3, 11)[None]).logits
    except NotBuiltError:
        raise
    except (Exception, TimeoutError) as error:
        raise NotBuiltError(
            f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        ) from error
    if tuple(logits.shape[:2]) != (1, 8) or not logits.isfinite().all():
        raise NotBuiltError(f"its logits of 8 tokens have the shape {tuple(logits.shape)}")
    if type(model.config) not in TAKEN:
        raise NotBuiltError("transformers saves a config of it that AutoModelForCausalLM refuses")
    return model


@torch.no_grad()
def spread(model):
    """Draws all matrices anew, so that a small start of its own hides no part."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith("A_log"):
            size = parameter[0].numel() if "conv" in name else max(parameter.shape[1:])
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / math.sqrt(size))
