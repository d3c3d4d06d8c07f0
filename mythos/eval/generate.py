"""Text from a model, one token after the other, without a cache."""

import torch

from mythos.model import Forward, depth


def sample_tokens(
    forward: Forward,
    prompt: list[int],
    tokens: int,
    temperature: float,
    longest: int,
    loop_depth: int | None,
    seed: int,
    device: torch.device,
) -> list[int]:
    """The prompt and ``tokens`` more, drawn from softmax(logits / temperature); the likeliest at temperature 0.

    Under expert parallelism all ranks call it together, so the number of forward passes is fixed: nothing drawn ends
    it early. Of the context the model sees the last ``longest`` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = None if loop_depth is None else depth.fixed(loop_depth, 1)
    ids = list(prompt)
    for _ in range(tokens):
        logits, _ = forward(torch.tensor([ids[-longest:]], device=device), None, plan)
        last_V = logits[0, -1].float().cpu()
        if temperature == 0:
            ids.append(int(last_V.argmax()))
        else:
            ids.append(int(torch.multinomial(torch.softmax(last_V / temperature, dim=-1), 1, generator=generator)))
    return ids
