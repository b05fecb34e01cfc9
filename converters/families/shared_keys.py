"""The keys of config.json that transformers' shared code reads: those that every model has, whatever its family.

Shared code means: `PreTrainedConfig`, `PreTrainedModel`, masks, rope, caches, generation,
integrations. A key that only it reads is absent from the family's own config class, so a family's tables alone would
miss it. Each key is honoured (a family or the import reads it), ignored (it does not change what the model computes),
or refused at all values but those listed. tests/converters/test_shared_keys.py compares this table with the source of
the installed transformers.
"""

from typing import Any

HONOURED: dict[str, str] = {
    "architectures": "selects the family and the head",
    "model_type": "selects the family where architectures is missing",
    "dtype": "the default dtype of an export",
    "torch_dtype": "the name of dtype before transformers 5",
    "id2label": "its length is the number of labels of a classifier, of which only one (a reward model) is supported",
    "num_labels": "replaces id2label",
    "bos_token_id": "copied into generation_config.json",
    "eos_token_id": "ends generation; copied into generation_config.json",
    "pad_token_id": "copied into generation_config.json; rows are packed, so that padding is never computed with",
    "vocab_size": "read by every family",
    "hidden_size": "read by every family",
    "num_hidden_layers": "read by every family",
    "num_attention_heads": "read by every family",
    "num_key_value_heads": "read by every family",
    "head_dim": "read by every family",
    "rms_norm_eps": "read by every family",
    "max_position_embeddings": "read by the rope types that depend on it",
    "original_max_position_embeddings": "read by the rope types that depend on it",
    "initializer_range": "the scale of new parameters",
    "tie_word_embeddings": "read by every family",
    "rope_parameters": "read by every family",
    "rope_scaling": "the name of rope_parameters before transformers 5",
    "rope_theta": "the base of rope before transformers 5",
}

_TRAINING = "only in effect while transformers trains; dropout is not a property of the checkpoint here"
_OUTPUTS = "selects what transformers returns, not what it computes"
_KERNELS = "selects a kernel; every kernel computes the same function"
_LAYOUT = "how transformers splits the model over devices, or reads its files"
_TOKENS = "an id for generation or for data, which no layer reads"
_CLASSIFIER = "read by heads that are not supported (token classification) or by their loss"
_EXTRA_HEADS = "multi-token prediction, which plain decoding does not run; its tensors are refused by name"
_DRAWS = "scales random weights; every weight is read from the checkpoint"
_OTHER_MODELS = "read only for models of other kinds (vision, audio, state spaces), which are not supported"
_NAMES = "information about the folder"

IGNORED: dict[str, str] = {
    **dict.fromkeys(
        ("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "residual_dropout"),
        _TRAINING,
    ),
    **dict.fromkeys(("gradient_checkpointing", "router_aux_loss_coef", "output_router_logits"), _TRAINING),
    **dict.fromkeys(("output_hidden_states", "output_attentions", "_output_attentions", "return_dict"), _OUTPUTS),
    **dict.fromkeys(("use_return_dict", "return_dict_in_generate", "use_cache", "tie_last_hidden_states"), _OUTPUTS),
    **dict.fromkeys(("_attn_implementation", "_attn_implementation_internal", "attn_implementation"), _KERNELS),
    **dict.fromkeys(("_experts_implementation", "_experts_implementation_internal"), _KERNELS),
    **dict.fromkeys(("experts_implementation", "chunk_size_feed_forward"), _KERNELS),
    "pretraining_tp": "slices the matrices of Llama in old versions of transformers, for the same result; now unread",
    **dict.fromkeys(("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan"), _LAYOUT),
    **dict.fromkeys(("base_model_fsdp_plan", "distributed_config", "device_map", "sub_configs"), _LAYOUT),
    **dict.fromkeys(("decoder_start_token_id", "sep_token_id", "forced_bos_token_id"), _TOKENS),
    **dict.fromkeys(("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"), _TOKENS),
    **dict.fromkeys(("classifier_dropout", "token_classification_bias", "problem_type", "label2id"), _CLASSIFIER),
    **dict.fromkeys(("mtp_layer_types", "mtp_mlp_layer_types", "mtp_hidden_states_first"), _EXTRA_HEADS),
    **dict.fromkeys(("chain_hidden_post_norm", "logits_mup_width_multiplier", "num_mtp_layers"), _EXTRA_HEADS),
    **dict.fromkeys(("unpadded_vocab_size", "first_k_dense_replace", "mlp_layer_types"), _EXTRA_HEADS),
    "mtp_per_layer_config": _EXTRA_HEADS,
    **dict.fromkeys(("init_std", "initializer_factor"), _DRAWS),
    **dict.fromkeys(("number_of_conv_states", "vision_config", "patch_size", "in_channels"), _OTHER_MODELS),
    **dict.fromkeys(("temporal_patch_size", "use_swiglu_ffn", "embed_dim", "num_heads", "encoder"), _OTHER_MODELS),
    **dict.fromkeys(("is_decoder", "add_cross_attention", "qk_head_dim", "features_only"), _OTHER_MODELS),
    **dict.fromkeys(("num_channels", "out_indices"), _OTHER_MODELS),
    **dict.fromkeys(("transformers_version", "_name_or_path", "name_or_path", "tokenizer_class"), _NAMES),
    "auto_map": "code in the folder, which transformers runs only with trust_remote_code",
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),  # transformers treats null as false: every token attends to all others
    "is_encoder_decoder": (None, False),  # its decoder_* keys replace the plain ones
    "attention_chunk_size": (None,),  # the cache drops tokens before the chunk
    "kv_sharing_modes": (None,),  # layers that read the keys and values of others
    "sliding_window": (None,),  # the cache drops tokens before the window
    "layer_types": (None,),  # the masks and the cache of every layer
    "per_layer_config": (None, {}),  # other sizes for single layers
    "fusion_config": (None, {}),  # replaces modules, and renames their tensors
    "transformers_weights": (None, "model.safetensors"),  # another file of weights
    "quantization_config": (None,),
    "_is_quantized": (None, False),
    "attribute_map": (None, {}),  # other names for keys
    "partial_rotary_factor": (None, 1.0),
    "_rope_type_labels": (None, [], ()),  # names of several ropes
    "default_rope_type": (None, "default"),
    # Sections that transformers reads instead of the top level:
    "text_config": (None,),
    "text_encoder": (None,),
    "decoder": (None,),
    "generator": (None,),
}
"""The values at which a key changes nothing. Does not apply to a family that reads the key (it is in its DEFAULTS)."""
