"""A small BERT, from random weights, on the eight topics of Reuters R8."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from . import Family
from .fetch import data

WORDS, LENGTH = 2000, 24
"""Most frequent words of the training documents that are kept, and words of a document that are read."""
HELD_OUT = 500
PAD, CLS, UNKNOWN = 0, 1, 2


def documents(name: str) -> list[tuple[str, list[str]]]:
    """Topic and words of each document of a file."""
    lines = data(name).read_text("utf-8").splitlines()[3:]
    rows = (line.split("\t", 1) for line in lines if "\t" in line)
    return [(topic, text.split()) for topic, text in rows]


class Classification(Family):
    name, metric, higher, samples = "classification", "accuracy", True, 8_000

    def __init__(self) -> None:
        train, test = documents("reuters-r8-train.tab"), documents("reuters-r8-test.tab")
        counts = Counter(word for _, words in train for word in words)
        known = {word: 3 + k for k, (word, _) in enumerate(counts.most_common(WORDS - 3))}
        self.topics = sorted({topic for topic, _ in train})

        def tensors(rows: list[tuple[str, list[str]]]) -> TensorDataset:
            ids = torch.full((len(rows), LENGTH), PAD)
            for row, (_, words) in zip(ids, rows, strict=True):
                tokens = [CLS, *(known.get(word, UNKNOWN) for word in words)][:LENGTH]
                row[: len(tokens)] = torch.tensor(tokens)
            return TensorDataset(ids, torch.tensor([self.topics.index(topic) for topic, _ in rows]))

        self.data = tensors(train)
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:HELD_OUT]
        self.held_out = TensorDataset(*tensors(test)[chosen])

    def model(self) -> nn.Module:
        config = BertConfig(
            vocab_size=WORDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
            num_labels=len(self.topics),
        )
        return BertForSequenceClassification(config)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        ids, topics = batch
        return F.cross_entropy(model(input_ids=ids, attention_mask=(ids != PAD).long()).logits, topics)

    def measure(self, model: nn.Module) -> float:
        ids, topics = self.held_out.tensors
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
        return float((logits.argmax(1) == topics).double().mean())


FAMILY = Classification
