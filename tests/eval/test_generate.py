import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from launch.cli import main
from launch.generate import _print_as_written
from mythos.checkpoint import restore
from mythos.checkpoint.layout import find
from mythos.checkpoint.plain import load_plain_model
from mythos.checkpoint.trained import load_trained
from mythos.config.schema import Config
from mythos.data.format import BOS
from mythos.data.open import read_tokenizer
from mythos.engine.engine import TrainingEngine
from mythos.eval.generate import Sampling, continuation, continuations, prompt_ids
from mythos.eval.writer import Written, open_writer
from mythos.export import export
from mythos.model import Model, build_model, new_cache
from mythos.model.cache import Cache
from mythos.model.depth import fixed
from tests.eval.conftest import SEQUENCE_LENGTH
from tests.model.helpers import randomise
from tests.spawn import RankPool
from tests.text_tokenizer import text_tokenizer
from tests.tiny import MODELS, tiny_config
from tests.train.runs import run_some_steps

CPU = torch.device("cpu")


def model(kind: str = "looped-moe") -> Model:
    found = randomise(build_model(tiny_config(kind, "data", "run")), deviation=0.3).eval()
    assert isinstance(found, Model)
    return found


def write(
    net: Model, prompt: list[int], tokens: int, sampling: Sampling, seed: int = 0, depth: int | None = 2
) -> list[int]:
    with torch.no_grad():
        return continuation(lambda new, cache: net(new, cache=cache), net, prompt, tokens, sampling, depth, seed, CPU)


@pytest.mark.parametrize("kind", MODELS)
def test_temperature_zero_takes_the_likeliest_token(kind: str) -> None:
    """With a cache the same tokens as by complete passes, up to four times the mean depth of training."""
    net = model(kind)
    for depth in (None,) if kind == "dense" else (1, 3, 12):
        ids = write(net, [1, 2], 64, Sampling(), depth=depth)
        assert (ids[:2], len(ids)) == ([1, 2], 66)
        plan = None if depth is None else fixed(depth, 1)
        with torch.no_grad():
            for end in range(2, 66):
                assert ids[end] == net(torch.tensor([ids[:end]]), None, plan)[0, -1].argmax().item()


def test_sampling_follows_the_seed() -> None:
    net = model()
    first, again = (write(net, [1], 20, Sampling(1.0)) for _ in range(2))
    assert first == again
    assert first != write(net, [1], 20, Sampling(1.0), seed=1)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), [1, 2, 4, 8]),
        (Sampling(0.5), [1, 4, 16, 64]),
        (Sampling(1.0, top_k=2), [0, 0, 4, 8]),
        (Sampling(1.0, top_p=0.53), [0, 0, 0, 8]),
        (Sampling(1.0, top_p=0.54), [0, 0, 4, 8]),
        (Sampling(1.0, top_k=3, top_p=0.58), [0, 0, 4, 8]),  # 8 / 14 = 0.571
        (Sampling(1.0, ids=3), [1, 2, 4, 0]),
        (Sampling(0.0, ids=3), [0, 0, 1, 0]),
    ],
)
def test_tokens_are_drawn_from_the_tempered_and_cut_distribution(sampling: Sampling, expected: list[int]) -> None:
    logits, generator = torch.tensor([1.0, 2, 4, 8]).log(), torch.Generator().manual_seed(0)
    drawn = torch.tensor([sampling.draw(logits, generator) for _ in range(2000)])
    shares, expected_shares = torch.bincount(drawn, minlength=4) / 2000, torch.tensor(expected) / sum(expected)
    torch.testing.assert_close(shares, expected_shares, atol=0.04, rtol=0)
    assert shares[expected_shares == 0].sum() == 0


def drawn(tokens: Sequence[int], end: int | None) -> list[list[int | None]]:
    """Two sequences: the first draws ``tokens``, the second always 0, by a model that knows how many it has seen."""
    net = model()
    seen = 0

    def decode(new_BS: Tensor, cache: Cache) -> Tensor:
        nonlocal seen
        seen += 1
        return torch.stack([torch.eye(5)[tokens[seen - 1]], torch.eye(5)[0]])

    cache = new_cache(net, [1, 1], 10, 2, CPU)
    generators = [torch.Generator() for _ in range(2)]
    found = list(continuations(decode, [[0], [0]], len(tokens), Sampling(), cache, generators, end))
    assert len(found) == seen
    return found


def test_a_sequence_ends_at_its_end_token_and_the_batch_with_its_last_one() -> None:
    assert drawn([1, 3, 1, 2], end=None) == [[1, 0], [3, 0], [1, 0], [2, 0]], "the number of passes is fixed"
    assert drawn([1, 3, 1, 2], end=3) == [[1, 0], [3, 0], [None, 0], [None, 0]]
    assert drawn([1, 0, 1, 2], end=0) == [[1, 0], [0, None]]


def greedy_text(run: Path, prompt: str, tokens: int) -> list[int]:
    """Without a cache, one prompt alone, never the end."""
    trained = load_trained(run)
    tokenizer = read_tokenizer(run / "tokenizer.json")
    ids = prompt_ids(tokenizer, BOS, prompt)
    begin, most = len(ids), max(tokenizer.get_vocab().values()) + 1
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(trained.model(torch.tensor([ids]), None, fixed(3, 1, [0]))[0, -1, :most].argmax()))
    return ids[begin:]


def test_a_batch_of_prompts_from_a_run_a_checkpoint_or_an_export(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one batch or several, each prompt gets what it gets alone."""
    prompts = ["The state", "", "My fellow citizens of the Union, caf\u00e9 \U0001f600"]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "\n".join(json.dumps({"prompt": prompt, "other": 1}) for prompt in prompts) + "\n", encoding="utf-8"
    )
    export(text_run, tmp_path / "export")
    places = [text_run, text_run / "checkpoints" / "step_00000004", tmp_path / "export"]
    options = ["--prompts", str(file), "--tokens", "12", "device=cpu"]
    found = []
    for place in places:
        for batch in ("1", "3"):
            assert main(["generate", str(place), *options, "--temperature", "0", "--batch", batch, "--ignore-end"]) == 0
            found.append(capsys.readouterr().out)
    assert found == [found[0]] * 6
    lines = [json.loads(line) for line in found[0].splitlines()]
    tokenizer = read_tokenizer(text_run / "tokenizer.json")
    assert [line["prompt"] for line in lines] == prompts
    for line in lines:
        ids = prompt_ids(tokenizer, BOS, line["prompt"]) + greedy_text(text_run, line["prompt"], 12)
        assert line["prompt"] + line["text"] == tokenizer.decode(ids)
        assert (line["tokens"], line["ended"]) == (12, False)
    drawn = []
    for seed, batch in (("0", "1"), ("0", "3"), ("1", "3")):
        assert main(["generate", str(text_run), *options, "--top-p", "0.9", "--seed", seed, "--batch", batch]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]

    ids = greedy_text(text_run, prompts[0], 12)
    place, end = next((n, one) for n, one in enumerate(ids) if n and one not in ids[:n])
    ended = [*options, "--temperature", "0", "--end", tokenizer.id_to_token(end)]
    assert main(["generate", str(text_run), *ended]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (line["tokens"], line["ended"]) == (place + 1, True)


def test_a_text_is_printed_as_it_is_written(text_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(text_run), "--prompt", "The state", "--tokens", "20", "--depth", "12", "device=cpu"]
    assert main([*command, "--temperature", "0"]) == 0
    out = capsys.readouterr().out
    writer = open_writer(load_trained(text_run), Sampling(), 12, None, None, ignore_end=False)
    *_, (written,) = writer.write(["The state"], 20, 0)
    assert out == f"The state{written.text(writer.tokenizer)}\n"
    assert main([*command, "--temperature", "0", "eval.exit_change=1000"]) == 0
    shallow = open_writer(load_trained(text_run, None, ["eval.exit_change=1000"]), Sampling(), 12, None, None, False)
    *_, (written,) = shallow.write(["The state"], 20, 0)
    assert set(written.loop_steps) == {1}


def test_a_character_is_printed_when_all_of_its_bytes_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token for each byte; the text ends within a character."""
    tokenizer = text_tokenizer(["a"], 257)
    ids = tokenizer.encode("x caf\u00e9 \u4e2d \U0001f600!").ids
    ids += tokenizer.encode("\U0001f600").ids[:2]
    stream = ([Written(ids[:2], ids[2:end])] for end in range(3, len(ids) + 1))
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **options: printed.append(text))
    _print_as_written(SimpleNamespace(tokenizer=tokenizer, write=lambda *arguments: stream), "x ", 20, 0)
    characters = [part for part in printed if part]
    assert characters == ["x ", *"caf\u00e9 \u4e2d \U0001f600!", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt TEXT or --prompts FILE.jsonl"),
        (["--prompt", "x", "--prompts", "y"], "give either --prompt TEXT or --prompts FILE.jsonl"),
        (["--prompt", "x", "--temperature", "0", "--top-k", "3"], "--top-k: has no effect at temperature 0"),
        (["--prompt", "x", "--top-p", "0"], "--top-p 0: no token would be left"),
        (["--prompt", "x", "--end", "<|end|>"], "--end <|end|>: not in "),
        (["--prompt", "x", "--step", "77"], "step 77: "),
        (["--prompts", "missing.jsonl"], "missing.jsonl: "),
        (["--prompt", "x", "--tokens", str(SEQUENCE_LENGTH)], "give at most"),
        (["--prompt", "x " * 200], "shorten the prompt"),
        (["--prompt", "x", "word"], "word: not of the form key=value"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, text_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(text_run), *arguments]) == 2
    out, error = capsys.readouterr()
    assert message in error
    assert (out, error.count("\n")) == ("", 1)


def test_another_directory_and_a_damaged_line_of_prompts_are_named(
    text_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert f"{tmp_path}: give a run directory, one of its checkpoints, or exported weights" in capsys.readouterr().err
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n{"text": "x"}\n', encoding="utf-8")
    assert main(["generate", str(text_run), "--prompts", str(file)]) == 2
    assert f"{file}: line 2: " in capsys.readouterr().err
    file.write_text(f'{{"prompt": "x"}}\n{{"prompt": "{"x " * 200}"}}\n', encoding="utf-8")
    assert main(["generate", str(text_run), "--prompts", str(file), "--tokens", "12", "--batch", "1"]) == 2
    out, error = capsys.readouterr()
    assert "shorten the prompt" in error
    assert out == "", "all prompts are checked before the first one is continued"
    file.write_text("\n", encoding="utf-8")
    assert main(["generate", str(text_run), "--prompts", str(file)]) == 2
    assert f"{file}: no prompts" in capsys.readouterr().err


def test_a_prompt_has_one_bos_and_all_of_its_text_whatever_the_tokenizer_file_says(tmp_path: Path) -> None:
    text = "a prompt of some length, with <|bos|> in it"
    tokenizer = text_tokenizer([text])
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


def write_with_the_engine(config: Config, found: Path) -> list[int]:
    engine = TrainingEngine(config, CPU)
    restore.load(engine, found)
    with engine.evaluation():
        return continuation(
            lambda new, cache: engine(new, cache=cache), engine.module, [1, 2, 3], 8, Sampling(), 4, 0, CPU
        )


def test_ranks_that_share_weights_and_experts_write_what_the_plain_model_writes(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("mythos", tiny_data, tmp_path, ranks=2, parallel__expert_parallel_size=2)
    two_ranks.run(run_some_steps, config, 2)
    found = find(tmp_path, None)
    expected = write(load_plain_model(config, found), [1, 2, 3], 8, Sampling(), depth=4)
    assert two_ranks.run(write_with_the_engine, config, found) == [expected, expected]
