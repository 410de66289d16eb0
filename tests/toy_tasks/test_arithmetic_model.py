import json
from pathlib import Path

import pytest
import torch

from meds_megatron.config import DataConfig, ModelConfig, RandomModelConfig
from meds_megatron.errors import UserError
from meds_megatron.toy_tasks import arithmetic, arithmetic_model
from meds_megatron.toy_tasks.arithmetic_model import BOX, END, WORDS, WarmUp
from meds_megatron.toy_tasks.make import ensure_model

SHORT = WarmUp(steps=3, batch=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("toy")
    arithmetic_model.make_arithmetic_model(directory, "shared", SHORT)
    return directory


@pytest.fixture(scope="module")
def tokenizer(made):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made)


def test_is_a_small_qwen3_that_divides(made, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made)
    config = json.loads((made / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_hidden_layers"] % 4 == 0 and config["num_key_value_heads"] % 2 == 0
    assert config["vocab_size"] % 16 == 0 and config["vocab_size"] >= len(tokenizer)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 3e6
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == config["eos_token_id"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("text", ["coins 7+6*4-5", "6*4=24 \\boxed{24}", "π ≈ 3\n\t\\boxed{{x}}", "bookss user\nuser "])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_digits_and_the_end_are_single_tokens(tokenizer):
    for word in (*WORDS, *"0123456789", END):
        assert len(tokenizer.encode(word)) == 1, word
    assert len(tokenizer.encode("31")) == 2
    assert tokenizer.decode([tokenizer.encode(BOX)[0]]).endswith("\\boxed{")


def test_chat_template_makes_the_prompt_of_the_warm_up(tokenizer):
    messages = [{"role": "user", "content": "coins 7+6*4-5"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\ncoins 7+6*4-5<|im_end|>\n<|im_start|>assistant\n"
    assert len(tokenizer.encode(text)) == 15


def test_warm_up_trains_on_responses_only_and_never_on_a_held_out_expression(tokenizer):
    stream = arithmetic_model.ExampleStream(tokenizer, "shared", seed=0)
    held_out = {str(expression) for expression in arithmetic.expressions("validation")}
    tokens_BT, labels_BT = stream.batch(64)
    for tokens_T, labels_T in zip(tokens_BT, labels_BT, strict=True):
        learnt = labels_T != -100
        assert torch.equal(tokens_T[learnt], labels_T[learnt])
        answer = tokenizer.decode(labels_T[learnt])
        assert answer[0].isdigit() and answer.endswith("}" + END)
        question = tokenizer.decode(tokens_T[: int(learnt.nonzero()[0])])
        assert question.split(END)[0].split()[-1] not in held_out


def test_warm_up_is_repeatable_and_lowers_the_loss(tokenizer):
    def losses() -> list[float]:
        values: list[float] = []
        model = arithmetic_model.build_model(tokenizer, seed=0)
        warm_up = WarmUp(steps=12, batch=8, lr_warmup=2)
        arithmetic_model.train(model, tokenizer, "per_kind", warm_up, lambda step, loss: values.append(loss))
        return values

    first = losses()
    assert first == losses()
    assert first[-1] < 0.75 * first[0]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_random_model_takes_tokenizer_and_shape_and_is_made_once(made, tmp_path, architecture):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = RandomModelConfig(
        architecture=architecture, hidden_size=32, head_dim=8, ffn_size=48, num_layers=2, tokenizer=str(made)
    )
    config = ModelConfig(make="random", random=shape)
    directory = ensure_model(config, DataConfig(), tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.config.model_type == architecture
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert 0.015 < model.model.embed_tokens.weight.std().item() < 0.025
    assert tokenizer.chat_template == arithmetic_model.CHAT_TEMPLATE

    before = (directory / "model.safetensors").stat().st_mtime_ns
    assert ensure_model(config, DataConfig(), tmp_path / "cache") == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == before
    shape.vocab_size, shape.seed = 512, 1
    other = ensure_model(config, DataConfig(), tmp_path / "cache")
    assert other != directory
    assert AutoModelForCausalLM.from_pretrained(other).config.vocab_size == 512


def test_a_failed_generation_leaves_no_files(made, tmp_path):
    shape = RandomModelConfig(tokenizer=str(made), vocab_size=10)
    with pytest.raises(UserError, match=r"vocab_size is 10.*at least as many"):
        ensure_model(ModelConfig(make="random", random=shape), DataConfig(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_own_model_directory_is_checked(made, tmp_path):
    assert ensure_model(ModelConfig(path=str(made)), DataConfig(), tmp_path) == made
    with pytest.raises(UserError, match=r"model\.path is not set"):
        ensure_model(ModelConfig(), DataConfig(), tmp_path)
    with pytest.raises(UserError, match="absent does not exist"):
        ensure_model(ModelConfig(path=str(tmp_path / "absent")), DataConfig(), tmp_path)
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        ensure_model(ModelConfig(path=str(tmp_path)), DataConfig(), tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="LlamaForCausalLM: only Qwen2ForCausalLM and Qwen3ForCausalLM"):
        ensure_model(ModelConfig(path=str(tmp_path)), DataConfig(), tmp_path)


def test_random_model_without_a_tokenizer_is_refused(tmp_path):
    shape = RandomModelConfig(tokenizer=str(tmp_path))
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        ensure_model(ModelConfig(make="random", random=shape), DataConfig(), tmp_path / "cache")
