from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from mythos.data.format import BOS
from mythos.data.open import read_tokenizer
from mythos.eval.generate import prompt_ids, sample_tokens
from mythos.model import build_model
from tests.model.helpers import randomise
from tests.tiny import tiny_config

CPU = torch.device("cpu")
OPTIONS = {"longest": 8, "loop_depth": 2, "seed": 0, "device": CPU}


def model() -> torch.nn.Module:
    return randomise(build_model(tiny_config("looped-moe", "data", "run")), deviation=0.3)


def test_temperature_zero_takes_the_likeliest_token_of_the_last_window() -> None:
    net = model()
    ids = sample_tokens(net, [1, 2], 12, 0.0, **OPTIONS)
    assert ids[:2] == [1, 2]
    assert len(ids) == 14
    from mythos.model.depth import fixed

    for end in range(2, 14):
        window = torch.tensor([ids[max(0, end - 8) : end]])
        assert ids[end] == net(window, None, fixed(2, 1))[0, -1].argmax().item()


def test_sampling_follows_the_seed() -> None:
    net = model()
    first, again = (sample_tokens(net, [1], 20, 1.0, **OPTIONS) for _ in range(2))
    other = sample_tokens(net, [1], 20, 1.0, **(OPTIONS | {"seed": 1}))
    assert first == again
    assert first != other


def test_ids_beyond_the_tokenizer_are_never_drawn() -> None:
    def forward(tokens, targets, plan):
        return torch.tensor([0.0, 1.0, 2.0, 9.0, 9.0]).expand(1, tokens.shape[1], 5)

    assert sample_tokens(forward, [0], 3, 0.0, **OPTIONS) == [0, 3, 3, 3]
    assert sample_tokens(forward, [0], 3, 0.0, **OPTIONS, ids_of_text=3) == [0, 2, 2, 2]
    drawn = sample_tokens(forward, [0], 400, 1.0, **OPTIONS, ids_of_text=3)[1:]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 400
    torch.testing.assert_close(shares, torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0), atol=0.06, rtol=0)


def test_the_number_of_forward_passes_is_fixed() -> None:
    calls = []

    def forward(tokens, targets, plan):
        calls.append(tokens.shape[1])
        return torch.zeros(1, tokens.shape[1], 5)

    sample_tokens(forward, [0], 6, 1.0, **(OPTIONS | {"longest": 4}))
    assert calls == [1, 2, 3, 4, 4, 4]


def test_a_prompt_has_one_bos_and_all_of_its_text_whatever_the_tokenizer_file_says(tmp_path: Path) -> None:
    text = "a prompt of some length, with <|bos|> in it"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "plain.json"))
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100, pad_id=bos, pad_token=BOS)
    tokenizer.save(str(tmp_path / "special.json"))
    plain, special = (read_tokenizer(tmp_path / name) for name in ("plain.json", "special.json"))
    ids = prompt_ids(special, BOS, text)
    assert ids == prompt_ids(plain, BOS, text)
    assert (ids[0], ids.count(bos), special.decode(ids[1:])) == (bos, 1, text)
