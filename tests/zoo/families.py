"""Small random checkpoints of the causal architectures that the installed transformers registers.

A new architecture joins by itself, as long as its config takes the common names. Where it does not,
SETTINGS has what its family needs. What cannot be built small is left out, with the reason.
"""

import math
import signal
from contextlib import contextmanager

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # its rotary part is the head that RoPE sees
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
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 64},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 256},
    "falcon": {"head_dim": None},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16},
    "bart": {"d_model": 64, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "decoder_layers": 2},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 8},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
    "xlstm": {"v_head_dim": None},
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


def config_of(kind, tokenizer):
    settings = COMMON | SETTINGS.get(kind, {})
    return CONFIG_MAPPING[kind](
        **{name: value for name, value in settings.items() if value is not None},
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build(kind, tokenizer):
    """A random model in fp32 whose outputs depend on all its inputs: matrices have unit gain.

    Raises:
        NotBuiltError: if it cannot be made, is not small, or does not read token ids alone.
    """
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
