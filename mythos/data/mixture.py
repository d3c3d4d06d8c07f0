"""Which source each sample of a mixture comes from: exact over any window, with random access.

The sources are the leaves of a binary tree, built by repeatedly splitting them into two parts of nearly equal weight. A
node sends the share p of its samples to the left child, as evenly as possible: of its first m samples,

    left(m) = floor(m p + 1/2)

go left. So sample m goes left if left(m + 1) > left(m), and is sample left(m) of the left child; otherwise it is
sample m - left(m) of the right child. Of any n consecutive samples of a node, n p go to the left child, rounded up or
down. Over the whole tree, with W_a the weight of node a,

    |samples of source i in any window of n - n w_i / W| < bound_i = w_i * sum over a of 1 / W_a,

where a runs over the nodes from the root's child to the leaf i. The bound is 1 for two sources, below 2 for three and
3/2 for four of equal weight. It grows neither with n nor with the length of the run. Weights are interpreted as the
exact decimal fractions that they are written as; all arithmetic is in integers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property


@dataclass(frozen=True)
class _Node:
    weight: Fraction
    source: int = -1
    children: "tuple[_Node, _Node] | None" = None

    @cached_property
    def share(self) -> Fraction:
        """The fraction of the samples that goes to the left child."""
        assert self.children is not None
        return self.children[0].weight / self.weight

    def left_of_first(self, samples: int) -> int:
        """How many of the node's first ``samples`` go left."""
        return (2 * samples * self.share.numerator + self.share.denominator) // (2 * self.share.denominator)


class Mixture:
    """Sample number -> (source, number of the sample within that source).

    Args:
        weights: one positive number per source; they need not sum to 1.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        leaves = [_Node(Fraction(str(weight)), source) for source, weight in enumerate(weights)]
        if not leaves or any(leaf.weight <= 0 for leaf in leaves):
            raise ValueError(f"weights {list(weights)}: need at least one, all above 0")
        self._root = _tree(sorted(leaves, key=lambda leaf: -leaf.weight))
        self.shares = [float(leaf.weight / self._root.weight) for leaf in leaves]
        self.bounds = [0.0] * len(leaves)
        """For each source, the bound on the difference between its count in any window and its exact share."""
        self._fill_bounds(self._root, Fraction(0))

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and the number of the sample within that source."""
        node = self._root
        while node.children is not None:
            left, right = node.children
            before = node.left_of_first(sample)
            if node.left_of_first(sample + 1) > before:
                node, sample = left, before
            else:
                node, sample = right, sample - before
        return node.source, sample

    def counts(self, samples: int) -> list[int]:
        """How many of the first ``samples`` come from each source."""
        counts = [0] * len(self.shares)
        pending = [(self._root, samples)]
        while pending:
            node, number = pending.pop()
            if node.children is None:
                counts[node.source] = number
            else:
                to_the_left = node.left_of_first(number)
                pending += zip(node.children, (to_the_left, number - to_the_left), strict=True)
        return counts

    def _fill_bounds(self, node: _Node, inverse_weights: Fraction) -> None:
        if node is not self._root:
            inverse_weights += 1 / node.weight
        if node.children is None:
            self.bounds[node.source] = float(node.weight * inverse_weights)
            return
        for child in node.children:
            self._fill_bounds(child, inverse_weights)


def _tree(leaves: list[_Node]) -> _Node:
    """A tree of leaves sorted by decreasing weight, split where the two sums are closest to each other."""
    if len(leaves) == 1:
        return leaves[0]
    total = sum((leaf.weight for leaf in leaves), Fraction(0))
    sums = [sum((leaf.weight for leaf in leaves[:cut]), Fraction(0)) for cut in range(len(leaves))]
    cut = min(range(1, len(leaves)), key=lambda cut: abs(2 * sums[cut] - total))
    return _Node(total, children=(_tree(leaves[:cut]), _tree(leaves[cut:])))
