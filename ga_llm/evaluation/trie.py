"""All candidates' spellings as one tree of tokens, which ranking and beams walk down."""
from collections.abc import Sequence

import numpy as np
import torch


class Trie:
    """The spelled candidates as a tree of tokens, numbered level by level; node 0 is the prompt's end.

    spelled: {POI id: its tokens}. parent, token, depth, first_child, children: (nodes,), a node's children being
    numbered first_child … first_child + children - 1; leaf: (candidates,), the node that ends each.
    """

    def __init__(self, spelled: dict[int, Sequence[int]]):
        self.candidates, self.spelled = list(spelled), spelled
        self.place = {poi: i for i, poi in enumerate(self.candidates)}
        parent, token, depth, first_child, children = [-1], [0], [0], [], []
        leaf = np.full(len(spelled), -1)
        # A node's candidates lie next to each other in lexicographic order: level by level, split each run by token.
        order = sorted(range(len(spelled)), key=lambda i: list(spelled[self.candidates[i]]))
        sorted_spellings = [spelled[self.candidates[i]] for i in order]
        runs = [(0, len(order))]
        for node, (first, last) in enumerate(runs):         # grows while it is read
            level = depth[node]
            first_child.append(len(parent))
            if len(sorted_spellings[first]) == level and node > 0:
                if last - first > 1:
                    raise ValueError("one candidate's spelling is the beginning of another's")
                leaf[order[first]] = node
                children.append(0)
                continue
            while first < last:
                here = sorted_spellings[first][level]
                end = first + 1
                while end < last and sorted_spellings[end][level] == here:
                    end += 1
                parent.append(node)
                token.append(here)
                depth.append(level + 1)
                runs.append((first, end))
                first = end
            children.append(len(parent) - first_child[node])
        self.parent, self.token, self.depth = (torch.tensor(x) for x in (parent, token, depth))
        self.first_child, self.children = torch.tensor(first_child), torch.tensor(children)
        self.leaf = torch.from_numpy(leaf)
        self.inner = self.children > 0
        self.levels = [torch.tensor([i for i, own in enumerate(depth) if own == level], dtype=torch.long)
                       for level in range(max(depth), 0, -1)]       # the deepest first
        # A node whose children are all leaves is never attended to once its logits are read.
        self.keeps = torch.zeros(len(parent), dtype=torch.bool)
        self.keeps[self.parent[self.inner & (self.parent >= 0)]] = True

    def path(self, poi: int) -> list[int]:
        """The nodes that spell a candidate, from below the root to its leaf."""
        path = [int(self.leaf[self.place[poi]])]
        while (above := int(self.parent[path[0]])) > 0:
            path.insert(0, above)
        return path

    def largest_below(self, values: torch.Tensor) -> torch.Tensor:
        """(prompts, nodes): the largest of the candidates' `values` (prompts, candidates) at or below each node."""
        found = values.new_full((len(values), len(self.parent)), -torch.inf)
        found[:, self.leaf] = values
        for nodes in self.levels:
            found.scatter_reduce_(1, self.parent[nodes].expand(len(values), -1), found[:, nodes], "amax")
        return found

    def first_nodes(self, limit: int) -> list[int]:
        """The root's inner children, if there are no more than `limit`: what any search has to visit."""
        children = torch.arange(self.first_child[0], self.first_child[0] + self.children[0])
        children = children[self.inner[children]].tolist()
        return children if len(children) <= limit else []

    def tokens_after(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that may follow a beginning; none if it is complete or begins no candidate."""
        node = 0
        for token in tokens:
            children = slice(self.first_child[node], self.first_child[node] + self.children[node])
            found = (self.token[children] == token).nonzero()
            if not len(found):
                return []
            node = int(self.first_child[node] + found[0])
        return self.token[self.first_child[node]:self.first_child[node] + self.children[node]].tolist()
