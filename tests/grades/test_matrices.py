"""GradES: which matrices are watched."""

from __future__ import annotations

import pytest
import torch
import transformers
from blocks import MATRICES, grades_of, network
from llamas import PEFT, llama, lora
from torch import nn

from grgauge import GradES


def gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, **SMALL))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def torch_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24), 2, enable_nested_tensor=False)


STYLES = {
    llama: (
        "model.layers.{}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
    gpt2: ("transformer.h.{}.", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    bert: (
        "bert.encoder.layer.{}.",
        "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
        "output.dense",
    ),
    vit: (
        "vit.layers.{}.",
        "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2",
    ),
    torch_encoder: ("layers.{}.", "self_attn.in_proj_weight self_attn.out_proj linear1 linear2"),
}


@pytest.mark.parametrize(("make", "expected"), STYLES.items(), ids=[make.__name__ for make in STYLES])
def test_the_matrices_of_every_block_are_found_and_nothing_else(make, expected):
    model = make()
    grades = GradES(model, torch.optim.SGD(model.parameters()), tau=0.5, total_steps=10)
    prefix, names = expected
    assert set(grades.matrices) == {prefix.format(i) + name for i in range(2) for name in names.split()}


@PEFT
def test_lora_pairs_are_one_matrix_each():
    model = lora()
    grades = GradES(model, torch.optim.SGD(model.parameters()), tau=0.5, total_steps=10)
    expected = {
        f"base_model.model.model.layers.{i}.{module}.lora.default"
        for i in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert set(grades.matrices) == expected


@pytest.mark.parametrize("container", [nn.Sequential, lambda *blocks: nn.ModuleDict(zip("ab", blocks, strict=True))])
def test_blocks_of_one_type_in_a_sequential_or_a_dict_count_as_repeated(container):
    net = network()
    net.blocks = container(*net.blocks)
    assert len(grades_of(net)[0].matrices) == 4


def test_a_single_block_in_a_list_is_a_block():
    assert grades_of(network(depth=1))[0].matrices == MATRICES[:2]


def test_a_regular_expression_names_matrices():
    assert grades_of(network(), modules=r"\.up$")[0].matrices == ("blocks.0.up", "blocks.1.up")
    assert grades_of(network(), modules="embedding|head")[0].matrices == ("embedding", "head")


def test_what_is_not_trained_is_not_monitored():
    net = network()
    net.blocks[0].up.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for name, p in net.named_parameters() if name != "blocks.1.up.weight"])
    grades = GradES(net, optimizer, tau=0.5, total_steps=10)
    assert grades.matrices == ("blocks.0.down", "blocks.1.down")


@pytest.mark.parametrize(
    ("modules", "words"),
    [("q_proj", "matches no matrix.*blocks.0.up, blocks.0.down"), ("(", "must be 'auto' or a regular expression")],
)
def test_no_match_for_modules_is_an_error(modules, words):
    with pytest.raises(ValueError, match=words):
        grades_of(network(), modules=modules)


def test_a_model_without_blocks_is_an_error_that_says_what_there_is():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match=r"no 2-D weights inside repeated blocks.*: 0, 2$"):
        grades_of(net)


def test_weights_tied_between_blocks_are_one_matrix_and_such_to_the_embedding_none():
    net = network()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    net.head.weight = net.embedding.weight
    assert grades_of(net)[0].matrices == ("blocks.0.up", "blocks.0.down", "blocks.1.down")
    wide = nn.Linear(8, 16)
    wide.weight = net.embedding.weight
    net.blocks[1].up = wide
    assert grades_of(net)[0].matrices == ("blocks.0.up", "blocks.0.down", "blocks.1.down")
