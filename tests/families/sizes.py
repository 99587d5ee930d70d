"""What the keys of a config become in a tiny model, and what single families need besides."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CANNOT",
    "FILLED",
    "HEAD_DIM",
    "LAYERS",
    "OVERRIDES",
    "PARTS",
    "SIZES",
    "VOCAB",
    "WIDTH",
]

VOCAB, WIDTH, HEAD_DIM = 97, 64, 16

LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "depth",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "encoder_num_hidden_layers",
    "layers",
    "decoder_num_hidden_layers",
    "num_layers_per_stack",
    "num_global_layers",
]

_BY_SIZE: dict[int, str] = {
    WIDTH: """hidden_size d_model n_embd dim embed_dim hidden_dim embedding_size
        word_embed_proj_dim projection_dim out_hidden_size text_hidden_size
        encoder_hidden_size output_dim cross_hidden_size projector_hidden_size
        decoder_hidden_size vision_hidden_size attention_hidden_size input_embedding_size
        output_embedding_size emb_dim lru_width backbone_hidden_size thinker_hidden_size""",
    96: """intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner d_ff dim_ff dff
        d_inner mlp_dim inner_dim ffn_hidden_size moe_intermediate_size feed_forward_size
        shared_expert_intermediate_size dense_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size intermediate_size_mlp
        share_expert_dim moe_hidden_size projection_intermediate_size merged_hidden_size
        block_ff_dim alignment_intermediate_size""",
    4: """num_filters num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads attention_heads cross_num_attention_heads
        swa_num_attention_heads num_sliding_attention_heads encoder_num_attention_heads
        decoder_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads""",
    2: """num_key_value_heads num_kv_heads n_kv_heads swa_num_key_value_heads kv_n_heads
        cross_num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads
        num_global_key_value_heads num_query_groups
        num_experts num_local_experts n_routed_experts moe_num_experts num_experts_per_tok
        num_experts_per_token moe_top_k moe_topk moe_k top_k_experts num_selected_experts
        experts_per_token index_n_heads""",
    HEAD_DIM: """head_dim d_kv d_head dim_head swa_head_dim v_head_dim qk_nope_head_dim
        qk_rope_head_dim cross_head_dim attention_head_size kv_channels
        query_pre_attn_scalar global_head_dim swa_v_head_dim index_head_dim
        sliding_window sliding_window_size attention_chunk_size
        attention_window_size""",
    8: "rotary_dim",
    32: "qk_head_dim kv_lora_rank q_lora_rank o_lora_rank num_mel_bins",
    1: """n_group topk_group num_expert_group n_shared_experts moe_num_shared_experts
        num_shared_experts max_window_layers""",
    VOCAB: """vocab_size vocab_size_per_layer_input unpadded_vocab_size src_vocab_size
        tgt_vocab_size decoder_vocab_size n_vocab""",
}
SIZES = {key: size for size, keys in _BY_SIZE.items() for key in keys.split()}


#: Set where a config leaves them open.
FILLED = ["head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok"]

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EACH_ROPE = {"full_attention": _ROPE, "sliding_attention": _ROPE}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 512,
    "indexer_compress_ratio": 4,
}
_CLIP = {  # in place of a tower that needs timm
    "model_type": "clip_vision_model",
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}

#: "default": the values to start from; else a path in the shrunk config and its value.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "audio_config.codebook_dim": 64,
        "audio_config.codebook_size": 4,
        "vision_config.codebook_size": 4,
        "vision_config.base_channels": 32,
        "image_token_offset": 70,
        "audio_token_offset": 74,
    },
    "bailing_hybrid": {"linear_num_heads": 4, "linear_head_dim": 16},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "cohere_compass": {"text_config.rope_parameters": _EACH_ROPE},
    "cohere_compass_text": {"rope_parameters": _EACH_ROPE},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {
        "canvas_length": 40,
        "text_config.num_experts": 2,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 96,
    },
    "dory": {
        "num_hidden_layers": 6,
        "layer_types": [
            *("sliding_attention", "mlp"),
            *("full_attention", "mlp"),
            *("sliding_attention", "mlp"),
        ],
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots3_note": {
        "text_config.head_dim": 32,
        "vision_config.adapter_in_dim": 64,
        "audio_config.adapter_input_size": 64,
        "audio_config.adapter_out_dim": 64,
        "vision_config.adapter_out_dim": 64,
    },
    "dots3_note_text": {"head_dim": 32},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "fast_vlm": {"vision_config": _CLIP},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0],
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 97,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config.global_attn_indexes": [0]},
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": 2},
    "gemma4_assistant": {
        "text_config.num_kv_shared_layers": 2,
        "default": {
            "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        },
    },
    "glm5_next": {"text_config.num_key_value_heads": 4},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "hrm_text": {
        "num_hidden_layers": 8,
        "num_layers_per_stack": 2,
        "H_cycles": 2,
        "L_cycles": 1,
        "L_bp_cycles": [1],
    },
    "hunyuan_vl": {"text_config.rope_parameters.mrope_section": [2, 2, 2, 2]},
    "hy_v4_vl": {"text_config.rope_parameters.mrope_section": [4, 2, 2]},
    "jetmoe": {"num_local_experts": 1, "num_experts_per_tok": 1},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 16},
    "kyutai_speech_to_text": {"codec_config.upsample_groups": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_vl": {
        "text_config.layer_types": ["conv", "full_attention"],
        "text_config.num_hidden_layers": 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl": {"text_config.layer_types": ["full_attention", "minimax_m3_sparse"]},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mllama": {"text_config.num_hidden_layers": 3, "text_config.cross_attention_layers": [1]},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemo_speechlm": {"audio_config.diarization_config.head_config.audio_hidden_size": 64},
    "perception_lm": {"vision_config": {**_CLIP, "model_args": {"embed_dim": 64}}},
    "qwen2_5_omni": {
        "enable_audio_output": False,
        "thinker_config.text_config.rope_parameters.mrope_section": [4, 2, 2],
    },
    "qwen3_omni_moe": {"enable_audio_output": False},
    "qwen4_exp": {f"text_config.{key}": value for key, value in _INDEXER.items()},
    "qwen4_exp_text": dict(_INDEXER),
    "reformer": {"axial_pos_embds_dim": [16, 48]},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
    "step3p7": {"text_config.sliding_window": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {"num_experts_per_tok": 1, "num_experts": 1},
}

_SECTIONS = {
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl"], (4, 2, 2)),
    **dict.fromkeys(["glm4v", "glm46v", "glmga", "glm_ocr"], (4, 2, 2)),
    "glm4v_moe": (2, 1, 1),
}
for _name, _section in _SECTIONS.items():
    OVERRIDES[_name] = {"text_config.rope_parameters.mrope_section": list(_section)}

#: Families that the installed transformers cannot build from a config, and why.
CANNOT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm (its text model is gemma3n_text)",
    "inkling_mm_model": "its vision tower needs scipy (its text model is inkling_text)",
}

#: Families whose forward pass hands the text to a part, which has the cache.
PARTS: dict[str, str] = {
    "blip-2": "language_model",
    "instructblip": "language_model",
    "instructblipvideo": "language_model",
    "qwen2_5_omni": "thinker",
    "qwen3_omni_moe": "thinker",
}
