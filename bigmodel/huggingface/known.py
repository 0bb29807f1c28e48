"""Lists which keys of a config.json are read, which change no prediction, and which classes are supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigmodel.config import InputError

# Keys that do not change what a trained model computes, or that other files decide.
NEUTRAL_TEXT = """
    model_type architectures dtype torch_dtype transformers_version _name_or_path _commit_hash auto_map
    attn_implementation _attn_implementation _attn_implementation_internal _attn_implementation_autoset
    custom_pipelines finetuning_task prefix task_specific_params id2label label2id num_labels problem_type
    return_dict use_return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
    chunk_size_feed_forward use_cache gradient_checkpointing initializer_range initializer_factor
    cross_attention_hidden_size tie_encoder_decoder tokenizer_class bos_token_id eos_token_id
    pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
    max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    classifier_dropout pretraining_tp unsloth_fixed unsloth_version
"""
NEUTRAL = set(NEUTRAL_TEXT.split())
OFF: dict[str, Any] = {
    "add_cross_attention": False, "is_decoder": False, "pruned_heads": {}, "quantization_config": None,
    "is_encoder_decoder": False, "partial_rotary_factor": 1.0,
}  # fmt: skip
# By model_type: keys that configs.py reads; keys that are neutral there.
READ = {
    "gpt2": """n_layer n_embd n_head vocab_size layer_norm_epsilon resid_pdrop n_inner n_positions
        activation_function scale_attn_weights scale_attn_by_inverse_layer_idx tie_word_embeddings""",
    "llama": """num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size rms_norm_eps
        hidden_act rope_parameters rope_scaling rope_theta max_position_embeddings attention_bias mlp_bias
        num_key_value_heads head_dim tie_word_embeddings sliding_window""",
    "bert": """num_hidden_layers hidden_size num_attention_heads intermediate_size vocab_size layer_norm_eps
        type_vocab_size hidden_dropout_prob hidden_act max_position_embeddings position_embedding_type""",
    "t5": """num_layers d_model num_heads d_kv d_ff vocab_size layer_norm_epsilon dropout_rate
        relative_attention_num_buckets relative_attention_max_distance feed_forward_proj num_decoder_layers
        scale_decoder_outputs tie_word_embeddings dense_act_fn is_gated_act""",
    "vit": """num_hidden_layers hidden_size num_attention_heads intermediate_size layer_norm_eps patch_size
        hidden_dropout_prob image_size hidden_act qkv_bias num_channels""",
    "resnet": """hidden_sizes depths embedding_size layer_type hidden_act downsample_in_first_stage
        downsample_in_bottleneck num_channels""",
}  # fmt: skip
READ["mixtral"] = READ["llama"] + " num_local_experts num_experts_per_tok"
ALSO_NEUTRAL = {
    "gpt2": """embd_pdrop attn_pdrop n_ctx reorder_and_upcast_attn summary_type summary_use_proj
        summary_activation summary_proj_to_labels summary_first_dropout""",
    "llama": "attention_dropout",
    "mixtral": "attention_dropout output_router_logits router_aux_loss_coef router_jitter_noise",
    "bert": """attention_probs_dropout_prob tie_word_embeddings directionality pooler_fc_size
        pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type""",
    "t5": "n_positions output_past",
    "vit": """attention_probs_dropout_prob encoder_stride pooler_output_size pooler_act tie_word_embeddings
        out_features out_indices stage_names""",
    "resnet": "out_features out_indices stage_names tie_word_embeddings",
}  # fmt: skip
CLASSES = {
    "gpt2": "GPT2Model GPT2LMHeadModel GPT2ForSequenceClassification",
    "llama": "LlamaModel LlamaForCausalLM LlamaForSequenceClassification",
    "mixtral": "MixtralModel MixtralForCausalLM MixtralForSequenceClassification",
    "bert": "BertModel BertForPreTraining BertForMaskedLM BertForSequenceClassification",
    "t5": "T5Model T5ForConditionalGeneration T5WithLMHeadModel",
    "vit": "ViTForImageClassification",
    "resnet": "ResNetForImageClassification",
}


def check(hf: Mapping[str, Any], kind: str, where: str) -> None:
    """Raises InputError for a key, a value or a class that is not supported."""
    for name in hf.get("architectures") or []:
        if name not in CLASSES[kind].split():
            known = ", ".join(CLASSES[kind].split())
            raise InputError(f"{where}: architectures={name!r} is not supported; known: {known}")
    plain = NEUTRAL | set(READ[kind].split()) | set(ALSO_NEUTRAL[kind].split())
    off = OFF | ({"is_encoder_decoder": True} if kind == "t5" else {})
    for key, value in hf.items():
        if key in plain or value is None:
            continue
        if key not in off and value not in ([], {}):
            raise InputError(
                f"{where}: {key}={str(value)[:60]!s} is unknown for a {kind}; remove it if it changes nothing"
            )
        if key in off and value != off[key]:
            raise InputError(f"{where}: {key}={str(value)[:60]!s} is not supported; only {off[key]!r} is")
