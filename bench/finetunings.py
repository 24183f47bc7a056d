"""Four fine-tunings of a small Llama that was pre-trained on Python's library: texts, batches, model, optimizer.

    every step helps     300 steps on a large part of Python's documentation, each text seen once
    ten times too long   900 steps on 16 KiB of it, seen 28 times
    new head             300 steps on the text of the pre-training, with a new head on the trained body
    LoRA                 300 steps on the documentation, adapters only

Needs transformers and peft.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data import topics
from statistics import mean

import peft
import torch
import transformers
from torch import Tensor, nn

from grgauge import AdamW

CACHE = Path(__file__).resolve().parents[1] / "build" / "bench"
TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """Tokens are bytes."""

    width: int = 64
    layers: int = 2
    context: int = 64
    batch: int = 8
    pretraining: int = 1000
    points: int = 15
    """Of the curve of a run, and passes of the validation."""
    held_out: int = 8
    """Batches of 32 windows in a test; a validation is half as many."""


QUICK = Size(width=32, layers=2, context=32, batch=4, pretraining=20, points=4, held_out=2)


@dataclass(frozen=True)
class Scenario:
    steps: int
    text: int = 2**19
    """Of the documentation, to train on."""
    head: bool = False
    """Train on the text of the pre-training, with a new head."""
    lora: bool = False


SCENARIOS = {
    "every step helps": Scenario(300),
    "ten times too long": Scenario(900, text=2**14),
    "new head": Scenario(300, head=True),
    "LoRA": Scenario(300, lora=True),
}


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def parts(text: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """80 % to train on, `length` at most; 10 % to validate on, 10 % to test on."""
    a, b = int(0.8 * len(text)), int(0.9 * len(text))
    return text[: min(length, a)], text[a:b], text[b:]


def library() -> Tensor:
    """The source of the standard library's modules."""
    folder = Path(sysconfig.get_path("stdlib"))
    return as_bytes("".join(file.read_text(errors="ignore") for file in sorted(folder.glob("*.py"))))


def documentation() -> Tensor:
    """The language reference's topics."""
    return as_bytes("".join(topics.topics[name] for name in sorted(topics.topics)))


def texts(scenario: Scenario) -> tuple[Tensor, Tensor, Tensor]:
    return parts(library(), len(library())) if scenario.head else parts(documentation(), scenario.text)


def batches(text: Tensor, size: Size, seed: int) -> Iterator[Tensor]:
    """Windows of the text, int64 [batch, context], each once an epoch in an order of its own, without end."""
    generator = torch.Generator().manual_seed(seed)
    windows = text[: len(text) // size.context * size.context].view(-1, size.context)
    while True:
        order = torch.randperm(len(windows), generator=generator)
        yield from (windows[i] for i in order[: len(order) // size.batch * size.batch].view(-1, size.batch))


def untrained(size: Size) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=size.width,
            intermediate_size=8 * size.width // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=size.context,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TYPES)))


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def scheduled(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up over a twentieth, then a cosine down to a tenth."""

    def factor(step: int) -> float:
        done = step / steps
        return min(1.0, (step + 1) / (0.05 * steps)) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def pretrained(size: Size) -> dict[str, Tensor]:
    """The weights that every arm starts from, kept from run to run."""
    own = (size.width, size.layers, size.context, size.batch, size.pretraining)
    file = CACHE / f"llama-of-parts-{'-'.join(map(str, own))}.pt"
    if not file.exists():
        torch.manual_seed(0)
        model = untrained(size)
        optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
        schedule = scheduled(optimizer, size.pretraining)
        for _, tokens in zip(range(size.pretraining), batches(texts(Scenario(0, head=True))[0], size, 0), strict=False):
            optimizer.zero_grad()
            loss_of(model, tokens).backward()
            optimizer.step()
            schedule.step()
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    weights: dict[str, Tensor] = torch.load(file, weights_only=True)
    return weights


@torch.no_grad()
def evaluated(model: nn.Module, text: Tensor, size: Size, batches_of: int) -> tuple[float, float]:
    """(mean loss, share of next bytes that are right) on fixed windows."""
    losses, right = [], []
    for _, tokens in zip(range(batches_of), batches(text, replace(size, batch=32), 7), strict=False):
        output = model(input_ids=tokens, labels=tokens)
        losses.append(float(output.loss))
        right.append(float((output.logits[:, :-1].argmax(-1) == tokens[:, 1:]).double().mean()))
    return mean(losses), mean(right)


@dataclass
class Setup:
    """A model at the start of a run, and all that trains it."""

    model: nn.Module
    optimizer: AdamW
    schedule: torch.optim.lr_scheduler.LRScheduler

    def step(self, tokens: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = loss_of(self.model, tokens)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def head_of(model: nn.Module) -> Tensor:
    return dict(model.named_parameters())["lm_head.weight"]


def setup(scenario: Scenario, weights: dict[str, Tensor], size: Size, seed: int) -> Setup:
    torch.manual_seed(seed)
    model = untrained(size)
    head = head_of(model).detach().clone()
    model.load_state_dict(weights)
    if scenario.head:
        head_of(model).data.copy_(head)
    if scenario.lora:
        model = with_lora(model)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(params, lr=3e-3 if scenario.lora else 1e-3, weight_decay=0.01)
    return Setup(model, optimizer, scheduled(optimizer, scenario.steps))
