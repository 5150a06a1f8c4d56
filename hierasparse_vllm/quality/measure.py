"""Loss and agreement of one text, from hidden states that come in pieces.

The dense arm stores its hidden states, not its distributions: they are a hundred times smaller and exact, and the
model's own head makes log-probabilities of them again in the process of the arm that is compared.  So every position
counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROWS = 256
"""Positions whose distributions are held at a time."""


class Measure:
    """Predictions of the tokens ``first`` to ``len(ids) - 1`` of one text.

    Parameters
    ----------
    head : function of Tensor [n, width] to Tensor [n, vocabulary]
        The model's head: hidden states to logits.
    ids : sequence of int
        The text.
    first : int
        First token whose prediction counts, from 1.
    reference : Tensor [len(ids) - first, width], optional
        Hidden states of the dense arm that predict the same tokens.
    keep : bool
        Whether to keep this arm's hidden states, to be the reference of others.
    """

    def __init__(
        self,
        head: Callable[[torch.Tensor], torch.Tensor],
        ids: Sequence[int],
        first: int,
        reference: torch.Tensor | None = None,
        keep: bool = False,
    ):
        self.head, self.ids, self.first, self.reference, self.keep = head, torch.tensor(ids), first, reference, keep
        self.seen = 0
        self.hidden: list[torch.Tensor] = []
        self.columns: dict[str, list[torch.Tensor]] = {}

    def add(self, hidden: torch.Tensor) -> None:
        """Take the hidden states of the next positions, [n, width] in the order of the text."""
        begin = max(self.first - 1 - self.seen, 0)
        end = min(len(hidden), len(self.ids) - 1 - self.seen)
        for at in range(begin, end, ROWS):
            rows = slice(at, min(at + ROWS, end))
            self._rows(hidden[rows], self.seen + at)
        self.seen += len(hidden)

    def _rows(self, hidden: torch.Tensor, position: int) -> None:
        targets = self.ids[position + 1 : position + 1 + len(hidden)].to(hidden.device)[:, None]
        logp = self.head(hidden).float().log_softmax(dim=-1)
        self._column("nll", -logp.gather(1, targets)[:, 0])
        if self.keep:
            self.hidden.append(hidden.cpu().clone())
        if self.reference is None:
            return
        at = position + 1 - self.first
        dense = self.head(self.reference[at : at + len(hidden)].to(hidden)).float().log_softmax(dim=-1)
        self._column("dense_nll", -dense.gather(1, targets)[:, 0])
        self._column("same", dense.argmax(dim=-1) == logp.argmax(dim=-1))
        p = dense.exp()
        # A token that the dense model gives probability 0 adds nothing, also where both logits are -inf.
        self._column("kl", (p * (dense - logp)).masked_fill(p == 0, 0).sum(dim=-1))

    def _column(self, name: str, values: torch.Tensor) -> None:
        self.columns.setdefault(name, []).append(values.cpu().double())

    def column(self, name: str) -> torch.Tensor:
        """One value per predicted token, float64 [tokens]: "nll", or with a reference "dense_nll", "same" and "kl"."""
        return torch.cat(self.columns[name])

    def result(self) -> dict[str, Any]:
        """Means over the predicted tokens: ``tokens``, ``loss``, and with a reference ``kl``, ``top1``, ``delta``...

        ``delta_se`` is the standard error of ``delta`` if tokens were independent; ``dense_loss`` is the dense arm's
        loss as its hidden states give it in this process, which checks that both have the same head.

        Raises
        ------
        RuntimeError
            If positions are missing.
        """
        tokens = len(self.ids) - self.first
        nll = self.column("nll") if self.columns else torch.empty(0)
        if len(nll) != tokens:
            raise RuntimeError(f"{len(nll)} of {tokens} predictions were seen")
        out = {"tokens": tokens, "loss": nll.mean().item()}
        if self.reference is not None:
            delta = nll - self.column("dense_nll")
            out |= {
                "delta": delta.mean().item(),
                "delta_se": delta.std().item() / math.sqrt(tokens) if tokens > 1 else 0.0,
                "kl": self.column("kl").mean().item(),
                "top1": self.column("same").mean().item(),
                "dense_loss": self.column("dense_nll").mean().item(),
            }
        return out
