"""A small Llama (RoPE, RMSNorm, SwiGLU) on the characters of 20 Newsgroups."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from . import Family
from .fetch import data

LENGTH = 32
"""Characters of a sample."""
TRAIN, HELD_OUT = 20_000, 300
ALPHABET = " abcdefghijklmnopqrstuvwxyz"
"""All characters that the data have left."""


def pieces(name: str, count: int) -> Tensor:
    """`count` stretches of LENGTH + 1 characters, spread evenly over a file's posts."""
    lines = data(name).read_text("utf-8").splitlines()[3:]
    text = " ".join(line.split("\t", 1)[1] for line in lines if "\t" in line)
    positions = torch.linspace(0, len(text) - LENGTH - 2, count).long().tolist()
    codes = {character: k for k, character in enumerate(ALPHABET)}
    return torch.tensor([[codes.get(c, 0) for c in text[at : at + LENGTH + 1]] for at in positions])


class Language(Family):
    name, metric, higher, samples = "language", "loss", False, 10_000

    def __init__(self) -> None:
        self.data = TensorDataset(pieces("20newsgroups-train.tab", TRAIN))
        self.held_out = TensorDataset(pieces("20newsgroups-test.tab", HELD_OUT))

    def model(self) -> nn.Module:
        config = LlamaConfig(
            vocab_size=len(ALPHABET),
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (piece,) = batch
        return F.cross_entropy(model(input_ids=piece[:, :-1]).logits.flatten(0, 1), piece[:, 1:].flatten())

    def measure(self, model: nn.Module) -> float:
        return float(self.loss(model, self.held_out.tensors))


FAMILY = Language
