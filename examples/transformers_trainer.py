"""Gauges in transformers' Trainer: one line. A small Llama learns Python's manual, in half a minute on a CPU."""

import tempfile
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from grgauge.integrations.transformers import GaugeCallback

LENGTH = 32

text = "\n".join(topics.values()).encode()
rows = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=100,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        logging_steps=20,
        report_to="none",
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[GaugeCallback()]).train()
