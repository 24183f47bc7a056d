"""A tiny Llama, plain and with LoRA adapters."""

from __future__ import annotations

import peft
import pytest
import transformers


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


PEFT = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def lora(targets=("q_proj", "down_proj")):
    return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=list(targets)))
