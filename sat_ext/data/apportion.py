"""Whole numbers in given proportions, for any total: the closed form behind the schedule."""

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import floor

Path = tuple[Hashable, ...]


@dataclass(frozen=True, slots=True)
class _Split:
    """`part` of the total goes to the left. `owed` is what the left lacks of its part at the start."""

    left: "_Split | int"  # a number is a leaf: its index among the weights
    right: "_Split | int"
    part: float
    owed: float
    rate: float  # made up for per total

    def made_up(self, total: int) -> float:
        most = self.rate * total
        return max(-most, min(most, self.owed))


class Apportion:
    """Splits a growing total among leaves of fixed weights, in whole numbers that never fall.

    A binary tree makes this a closed form: each split gives floor(N * part + 1/2) of its N to the left and the
    rest to the right. So the counts follow from the total alone and add up to it, and over any window of totals a
    leaf or subtree gets its share to within `slack`.

    `paths` names the subtrees: leaves of one first name make one, in it those of one second name, and so on. The
    sum of a subtree is then off by the roundings above it, and not by one for each of its leaves. `used` are
    counts from before the total began to grow: what they lack of the proportions is made up for, at most half of
    one in every `window`.

    >>> thirds = Apportion([1, 1, 1], [("a",), ("a",), ("b",)], window=100)
    >>> [thirds.counts(n) for n in (1, 2, 3, 30, 31)]
    [(1, 0, 0), (1, 0, 1), (1, 1, 1), (10, 10, 10), (11, 10, 10)]
    """

    def __init__(
        self, weights: Sequence[float], paths: Sequence[Path], *, window: int, used: Sequence[float] | None = None
    ) -> None:
        assert weights and min(weights) > 0 and len({len(p) for p in paths}) == 1
        self.window = window
        self._leaves = len(weights)
        leaves = {
            (*path, i): (weight, used[i] if used else 0.0, i)
            for i, (path, weight) in enumerate(zip(paths, weights, strict=True))
        }
        *_, self._root = self._tree(leaves)

    def _tree(self, leaves: "Mapping[Path, _Tree]") -> "_Tree":
        """Huffman's tree of the leaves' subtrees, in which the heavy ones lie below few splits."""
        names = list(dict.fromkeys(path[0] for path in leaves))
        subtrees = [{p[1:]: leaf for p, leaf in leaves.items() if p[0] == name} for name in names]
        order = count()  # ties go to the first
        heap = [(tree[0], next(order), tree) for tree in (s[()] if () in s else self._tree(s) for s in subtrees)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (_, _, (light, had, left)), (_, _, (heavy, used, right)) = heapq.heappop(heap), heapq.heappop(heap)
            part = light / (light + heavy)
            split = _Split(left, right, part, part * (had + used) - had, min(0.5 / self.window, part / 2))
            heapq.heappush(heap, (light + heavy, next(order), (light + heavy, had + used, split)))
        return heap[0][-1]

    def counts(self, total: int) -> tuple[int, ...]:
        """The count of each leaf when they add up to `total`."""
        out = [0] * self._leaves
        stack = [(self._root, total)]
        while stack:
            node, n = stack.pop()
            if isinstance(node, int):
                out[node] = n
            else:
                left = floor(n * node.part + 0.5 + node.made_up(n))
                stack += [(node.left, left), (node.right, n - left)]
        return tuple(out)

    def slack(self, leaves: Sequence[bool]) -> float:
        """By how much the sum of these leaves may leave its share in any `window` of the total."""

        def within(node: "_Split | int", off: float) -> tuple[bool, float]:  # whether all of its leaves are meant
            if isinstance(node, int):
                return leaves[node], off if leaves[node] else 0.0
            own = 1 + abs(node.made_up(self.window))
            all_left, left = within(node.left, node.part * off + own)
            all_right, right = within(node.right, (1 - node.part) * off + own)
            return all_left and all_right, off if all_left and all_right else left + right

        return within(self._root, 0.0)[1]


_Tree = tuple[float, float, _Split | int]  # weight, used, root
