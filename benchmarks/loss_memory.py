"""Peak memory of the loss in chunks and of the loss with all logits at once, forward and backward.

python -m benchmarks.loss_memory
"""

import multiprocessing
import resource

VOCABULARY, TOKENS, WIDTH = 32_768, 2_048, 1_280


def peak_mib(form: str) -> float:
    """Memory that a fresh process needs in addition to the inputs and their gradients, in MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (form,))


def _measure(form: str) -> float:
    import torch
    import torch.nn.functional as F

    from mythos.loss import cross_entropy_and_z_loss

    torch.set_num_threads(1)
    hidden = torch.randn(1, TOKENS, WIDTH, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    targets = torch.randint(VOCABULARY, (1, TOKENS))
    hidden.grad, head.grad = torch.zeros_like(hidden), torch.zeros_like(head)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if form == "chunks":
        cross_entropy_and_z_loss(hidden, head, targets).total.backward()
    elif form == "at once":
        F.cross_entropy(F.linear(hidden, head).flatten(0, 1), targets.flatten()).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    print(f"vocabulary {VOCABULARY}, {TOKENS} tokens, width {WIDTH}, fp32, above inputs and gradients:")
    for form in ("at once", "chunks"):
        print(f"  {form:<8} {peak_mib(form):7.0f} MiB")


if __name__ == "__main__":
    main()
