"""`mythos generate`: text from a trained model."""

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import RunOverrides, Step
from mythos.config.check import LOWEST_TEMPERATURE
from mythos.errors import DONE, UserError, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mythos.eval.writer import Writer, Written

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The last character while some of its bytes are missing."""

Place = Annotated[
    Path, typer.Argument(metavar="RUN", help="a run directory, one of its checkpoints, or exported weights")
]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", help="what the model continues")]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE.jsonl", help='many prompts: a line {"prompt": "..."} for each')
]
Tokens = Annotated[int, typer.Option(metavar="N", min=1, max=1_000_000, help="most tokens to write")]
Depth = Annotated[
    int | None, typer.Option(metavar="T", min=1, max=10_000, help="loop steps (default: the mean depth of training)")
]
Temperature = Annotated[
    float, typer.Option(metavar="X", min=0, max=1000, help="of the softmax; 0 takes the likeliest token")
]
TopK = Annotated[int | None, typer.Option(metavar="N", min=1, help="draw from the N likeliest tokens")]
TopP = Annotated[
    float | None,
    typer.Option(metavar="P", min=0, max=1, help="draw from the fewest tokens that have this probability together"),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**62, help="of the drawn tokens")]
Batch = Annotated[int, typer.Option(metavar="N", min=1, help="prompts that are continued at once")]
Bos = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="begins each text (default: as in the run's data, or <|bos|>)")
]
End = Annotated[
    str | None, typer.Option(metavar="TOKEN", help="ends a text (default: BOS, which begins the next document)")
]
IgnoreEnd = Annotated[bool, typer.Option("--ignore-end", help="always write --tokens tokens")]


def run(
    place: Place,
    overrides: RunOverrides = None,
    step: Step = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    tokens: Tokens = 128,
    depth: Depth = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    batch: Batch = 8,
    bos: Bos = None,
    end: End = None,
    ignore_end: IgnoreEnd = False,
) -> int:
    """Continue a text, which appears as it is written, or many prompts, as lines of JSON.

    Runs in one process, on a GPU if there is one, with a cache of keys and values. With eval.exit_change or
    eval.exit_when_halted each token takes only as many loop steps as it needs.

    \b
      mythos generate runs/demo --prompt "My fellow citizens" --tokens 64
      mythos generate runs/demo/export/step_00000200 --prompts prompts.jsonl --depth 16 --temperature 0
      mythos generate runs/demo --prompt "The" eval.exit_change=0.05 device=cpu
    """
    from mythos.checkpoint.trained import load_trained
    from mythos.config.arguments import split_arguments
    from mythos.eval.generate import Sampling
    from mythos.eval.writer import open_writer, read_prompts

    names, options = split_arguments(overrides or [])
    if names:
        raise UserError(f"{names[0]}: not of the form key=value; give the text as --prompt TEXT")
    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt TEXT or --prompts FILE.jsonl")
    _check(temperature, top_k, top_p, end, ignore_end)
    texts = [prompt or ""] if prompts is None else read_prompts(prompts)
    sampling = Sampling(temperature, top_k, top_p)
    writer = open_writer(load_trained(place, step, options), sampling, depth, bos, end, ignore_end)
    if prompts is None:
        _print_as_written(writer, texts[0], tokens, seed)
    else:
        parts = [texts[first : first + batch] for first in range(0, len(texts), batch)]
        streams = [writer.write(part, tokens, seed, batch * number) for number, part in enumerate(parts)]
        for part, stream in zip(parts, streams, strict=True):
            _print_lines(writer, part, stream)
    return DONE


def _check(temperature: float, top_k: int | None, top_p: float | None, end: str | None, ignore_end: bool) -> None:
    """Raises UserError for options that do not fit each other."""
    if ignore_end and end is not None:
        raise UserError(f"--end {end}: has no effect with --ignore-end: leave out one of them")
    if temperature == 0 and (top_k or top_p):
        raise UserError(f"{'--top-k' if top_k else '--top-p'}: has no effect at temperature 0: leave it out")
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise UserError(f"--temperature {temperature}: must be 0, or at least {LOWEST_TEMPERATURE}")
    if top_p == 0:
        raise UserError("--top-p 0: no token would be left: give more, or --temperature 0 for the likeliest one")


def _print_as_written(writer: "Writer", prompt: str, tokens: int, seed: int) -> None:
    """The prompt, and what follows as soon as its characters are complete."""
    stream = writer.write([prompt], tokens, seed)
    print(printable(prompt), end="", flush=True)
    shown = text = ""
    for (written,) in stream:
        text = written.text(writer.tokenizer)
        complete = text.rstrip(INCOMPLETE)
        print(printable(complete[len(shown) :]), end="", flush=True)
        shown = complete
    print(printable(text[len(shown) :]))


def _print_lines(writer: "Writer", prompts: list[str], stream: "Iterator[list[Written]]") -> None:
    """A line of JSON for each prompt, when all are written."""
    *_, written = stream
    for prompt, each in zip(prompts, written, strict=True):
        line = {
            "prompt": prompt,
            "text": each.text(writer.tokenizer),
            "tokens": len(each.ids),
            "ended": each.ended,
        }
        if writer.rule is not None and each.loop_steps:
            line["mean_loop_steps"] = round(statistics.mean(each.loop_steps), 2)
        print(json.dumps(line, ensure_ascii=False), flush=True)
