"""Tasks from local files against a plain form: one text after the other, as the CORE evaluation renders them."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos.config.schema import Config
from mythos.data.format import BOS
from mythos.data.open import read_tokenizer
from mythos.errors import UserError
from mythos.eval.measure import Metrics, Wanted
from mythos.eval.requests import Request, Score, score
from mythos.eval.tasks import accuracy, is_list, read_items, read_tasks
from mythos.model import build_model
from mythos.run.directory import RunDirectory
from tests.cluster import REPO
from tests.eval.conftest import SEQUENCE_LENGTH, text_config
from tests.eval.test_text_metrics import evaluate
from tests.harness_task import questions, write_task
from tests.model.helpers import randomise
from tests.require import missing
from tests.spawn import RankPool

CORE = REPO / "configs" / "eval" / "core.yaml"
WORDS = [
    "senate", "house", "people", "treaty", "nation", "law", "peace", "war", "year", "public", "good", "duty",
]  # fmt: skip
Encode = Callable[[str], list[int]]
GENERATE = (
    "output_type: generate_until\n"
    'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 20}\n'
    "metric_list: [{metric: exact_match}]\n"
)
KINDS = ("multiple_choice", "schema", "continuation")


def items_of(kind: str, count: int = 30) -> list[dict[str, Any]]:
    draw = random.Random(kind)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    if kind == "multiple_choice":
        return [{"query": text(4), "choices": [text(1), text(3), text(2)], "gold": n % 3} for n in range(count)]
    if kind == "schema":
        return [{"context_options": [text(2), text(4)], "continuation": text(3), "gold": n % 2} for n in range(count)]
    return [{"context": f" {text(5)} ", "continuation": text(1)[:1]} for n in range(count)]


def write_tasks(directory: Path, examples: int = 2) -> Path:
    tasks = []
    for kind in KINDS:
        lines = "".join(json.dumps(item) + "\n" for item in items_of(kind))
        (directory / f"{kind}.jsonl").write_text(lines, encoding="utf-8")
        tasks.append(
            {"name": f"toy_{kind}", "file": f"{kind}.jsonl", "kind": kind, "examples": examples, "chance": 0.2}
        )
    (directory / "toy.yaml").write_text(yaml.safe_dump({"name": "toy", "tasks": tasks}), encoding="utf-8")
    return directory / "toy.yaml"


def rendered(kind: str, item: dict[str, Any], delimiter: str) -> list[str]:
    match kind:
        case "multiple_choice":
            return [item["query"] + delimiter + choice for choice in item["choices"]]
        case "schema":
            return [context + delimiter + item["continuation"] for context in item["context_options"]]
        case _:
            return [item["context"].strip() + delimiter + item["continuation"]]


def is_right(kind: str, items: list[Any], number: int, examples: int, delimiter: str, encode: Encode, net: Any) -> bool:
    """One item, with a forward pass for each of its texts."""
    others = [other for other in range(len(items)) if other != number]
    before = ""
    for other in random.Random(1234 + number).sample(others, examples):
        texts = rendered(kind, items[other], delimiter)
        before += texts[items[other].get("gold", 0)] + "\n\n"
    texts = [before + text for text in rendered(kind, items[number], delimiter)]
    ids = [encode(text) for text in texts]
    if kind == "continuation":
        starts = [len(encode((before + items[number]["context"].strip() + delimiter).strip()))]
    elif kind == "schema":
        same = next(n for n in range(99) if ids[0][-1 - n] != ids[1][-1 - n])
        starts = [len(each) - same for each in ids]
    else:
        starts = 3 * [next(n for n, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)]
    means, greedy = [], []
    for each, start in zip(ids, starts, strict=True):
        cut = max(0, len(each) - SEQUENCE_LENGTH - 1)  # a long context is cut on the left
        tokens = torch.tensor(each[cut:])
        logits = net(tokens[None, :-1], None, None)[0]
        logp = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        means.append(logp[start - cut - 1 :].mean().item())
        greedy.append(bool((logits.argmax(-1) == tokens[1:])[start - cut - 1 :].all()))
    return greedy[0] if kind == "continuation" else int(np.argmax(means)) == items[number]["gold"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("examples", "delimiter"), [(0, " "), (3, "\nAnswer: ")])
def test_an_accuracy_is_that_of_the_plain_form(
    kind: str, examples: int, delimiter: str, text_data: Path, tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(text_data / "tokenizer.json")
    bos = tokenizer.token_to_id(BOS)
    net = randomise(build_model(text_config(text_data, text_data, model="dense")), deviation=0.3).eval()
    write_tasks(tmp_path)
    items = read_items(tmp_path / f"{kind}.jsonl", kind, None)
    shuffled = items_of(kind)
    random.Random(1337).shuffle(shuffled)
    assert items == shuffled
    task: Any = {"name": "toy", "file": "", "kind": kind, "examples": examples, "chance": 0.2, "delimiter": delimiter}
    with torch.no_grad():
        right = [
            is_right(kind, items, n, examples, delimiter, lambda text: [bos, *tokenizer.encode(text).ids], net)
            for n in range(len(items))
        ]
        found = accuracy(
            task,
            items,
            tokenizer,
            bos,
            SEQUENCE_LENGTH,
            lambda requests: score(net, requests, None, 300, SEQUENCE_LENGTH, torch.device("cpu")),
        )
    assert found.accuracy == sum(right) / 30
    assert found.centred == pytest.approx((found.accuracy - 0.2) / 0.8)
    assert found.standard_error == pytest.approx(np.std(right, ddof=1) / 30**0.5)
    assert 0 < found.accuracy < 1 or kind == "continuation"


def test_a_continuation_is_right_if_each_of_its_tokens_is_the_likeliest(text_data: Path) -> None:
    tokenizer = read_tokenizer(text_data / "tokenizer.json")
    items = items_of("continuation")
    wanted = [tokenizer.encode(" " + item["continuation"]).ids for item in items[::2]]

    def scorer(requests: Sequence[Request]) -> list[Score]:
        targets = [request.tokens[request.first :] for request in requests]
        right = [n % 2 == 0 and each.tolist() == wanted[n // 2] for n, each in enumerate(targets)]
        return [Score(np.zeros(len(each)), flag) for each, flag in zip(targets, right, strict=True)]

    task: Any = {"name": "toy", "file": "", "kind": "continuation", "examples": 1, "chance": 0.0}
    assert accuracy(task, items, tokenizer, tokenizer.token_to_id(BOS), SEQUENCE_LENGTH, scorer).accuracy == 0.5


def test_the_same_on_two_ranks_and_each_task_has_a_metric(
    text_run: Path, text_data: Path, tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    path = write_tasks(tmp_path)
    wanted = Wanted(documents=0, tasks=(str(path),), task_data=str(tmp_path), limit=20)
    found = [
        metrics
        for pool in (one_rank, two_ranks)
        for metrics in pool.run(evaluate, text_config(text_data, text_run, pool.ranks, eval__depths=[1, 2]), wanted)
    ]
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-6)
    tasks = {f"toy_{kind}_depth_{steps}" for kind in KINDS for steps in (1, 2)}
    assert {f"eval/{name}" for name in tasks} <= set(found[0])
    (result, *_) = [
        result
        for each in (text_run / "evaluations").glob("*.json")
        if (result := json.loads(each.read_text(encoding="utf-8")))["tasks"]
    ]
    assert set(result["tasks"]) == tasks
    centred = [result["tasks"][f"toy_{kind}_depth_2"]["centred"] for kind in KINDS]
    assert result["eval/toy_depth_2"] == pytest.approx(sum(centred) / 3)
    assert all(each["items"] == 20 for each in result["tasks"].values())


def evaluate_with_harness(config: Config, wanted: Wanted, home: Path) -> Metrics:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        return evaluate(config, wanted)


def test_tasks_of_the_harness_are_the_same_on_one_and_two_ranks_at_each_depth(
    text_run: Path, text_data: Path, sentences: list[str], tmp_path: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """One by log-likelihoods, and one that generates text: both by `mythos eval --tasks FILE.yaml`."""
    if find_spec("lm_eval") is None:
        missing("no lm-evaluation-harness here (the extra `eval`)")
    run = Path(shutil.copytree(text_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations")))
    items = questions(" ".join(sentences), 20)
    files = (
        write_task(tmp_path, "local_words", items),
        write_task(tmp_path, "local_text", [each | {"answer": "the"} for each in items[:3]], GENERATE),
    )
    found = [
        metrics
        for pool in (one_rank, two_ranks)
        for metrics in pool.run(
            evaluate_with_harness,
            text_config(text_data, run, pool.ranks, eval__depths=[1, 5], eval__sequences=4),
            Wanted(documents=0, tasks=files),
            tmp_path / "home",
        )
    ]
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-6)
    names = {f"{task}_depth_{steps}" for task in ("local_words", "local_text") for steps in (1, 5)}
    assert {f"eval/{name}" for name in names} <= set(found[0])
    for path in RunDirectory(run).evaluations.glob("*.json"):
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        assert set(tasks) == names
        assert all(found[0][f"eval/{name}"] == next(iter(tasks[name].values())) for name in names)
    events = EventAccumulator(str(RunDirectory(run).evaluations))
    events.Reload()
    assert {f"eval/{name}" for name in names} <= set(events.Tags()["scalars"])


def test_core_has_the_tasks_examples_and_baselines_of_its_publication() -> None:
    tasks = read_tasks(CORE)
    assert (tasks["name"], len(tasks["tasks"]), len({each["name"] for each in tasks["tasks"]})) == ("core", 22, 22)
    by_name = {each["name"]: each for each in tasks["tasks"]}
    assert {name: each["chance"] for name, each in by_name.items() if each["chance"]} == {
        **dict.fromkeys(["hellaswag", "hellaswag_zeroshot", "arc_easy", "arc_challenge", "openbook_qa"], 0.25),
        **dict.fromkeys(["copa", "piqa", "winograd", "winogrande"], 0.5),
        **dict.fromkeys(["commonsense_qa", "agi_eval_lsat_ar"], 0.2),
        "boolq": 0.62,
        "bigbench_language_identification": 0.091,
    }
    examples = [each["examples"] for each in tasks["tasks"]]
    assert (examples.count(0), examples.count(3), examples.count(10)) == (7, 1, 14)
    kinds = [each["kind"] for each in tasks["tasks"]]
    assert [kinds.count(kind) for kind in KINDS] == [11, 2, 9]
    answers = {each["name"] for each in tasks["tasks"] if each.get("delimiter") == "\nAnswer: "}
    assert answers == {"jeopardy", "arc_easy", "arc_challenge", "piqa", "boolq"}
    assert is_list(CORE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: gold is 2 of 2"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 2: damaged .choices"),
        ('{"query": "a", "choices": ["b", "c"]}', "line 2: damaged .gold"),
        ('{"query"', "line 2: damaged .not valid JSON"),
    ],
)
def test_a_damaged_item_is_one_line_that_names_it(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"items\.jsonl: {message}") as caught:
        read_items(path, "multiple_choice", None)
    assert "\n" not in str(caught.value)


def test_an_empty_or_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="empty.jsonl: no items"):
        read_items(tmp_path / "empty.jsonl", "schema", None)
    with pytest.raises(UserError, match="none.jsonl: No such file or directory: name its directory with --task-data"):
        read_items(tmp_path / "none.jsonl", "schema", None)
