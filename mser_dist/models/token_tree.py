"""Several texts of token ids as one tree: what they begin with alike stands in it once.

A causal LLM makes of a token what the tokens before it say, and nothing behind it. So of texts side by side, where each
token sees its own text alone, it makes what it makes of each text by itself.
"""

from collections.abc import Sequence

import torch

from mser_dist.models.packed import SPEECH


class TokenTree:
    """N tokens, each behind the one that it follows. Those with no SPEECH before them stand first: `shared` of them.

    ids (N,): token ids, SPEECH among them. depth (N,): how many tokens stand before each in its text. paths: of each
    text, in the order given, the numbers of its tokens.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        children: dict[tuple[int, int], int] = {}  # of a token (-1: the start) by id
        ids: list[int] = []
        parents: list[int] = []
        paths: list[list[int]] = []
        for text in texts:
            at, path = -1, []
            for token in text:
                if (at, token) not in children:
                    children[at, token] = len(ids)
                    ids.append(token)
                    parents.append(at)
                at = children[at, token]
                path.append(at)
            paths.append(path)
        heard: list[bool] = []  # whether SPEECH is a token or stands before it; a parent's is known before its child's
        for token, parent in zip(ids, parents, strict=True):
            heard.append(token == SPEECH or (parent >= 0 and heard[parent]))
        order = sorted(range(len(ids)), key=heard.__getitem__)
        place = {number: new for new, number in enumerate(order)}
        self.shared = heard.count(False)
        self.ids = torch.tensor([ids[number] for number in order])
        self.paths = [[place[number] for number in path] for path in paths]
        self.visible = torch.eye(len(ids), dtype=torch.bool)  # (N, N): what each sees, itself and its ancestors
        for number in order:  # parents first
            if (parent := parents[number]) >= 0:
                self.visible[place[number]] |= self.visible[place[parent]]
        self.depth = self.visible.sum(1) - 1

    def to(self, device: str | torch.device) -> "TokenTree":
        """Its tensors on a device."""
        self.ids, self.visible, self.depth = (x.to(device) for x in (self.ids, self.visible, self.depth))
        return self

    @property
    def height(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.paths))
