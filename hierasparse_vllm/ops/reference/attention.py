"""Dense attention with its log-sum-exp, and the merge of partial results."""

from __future__ import annotations

import torch


def attend_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over one part of the keys.

    Parameters
    ----------
    q : Tensor [H, rows, D]
        Rows are (query, head of the group) pairs, so that a KV head's group shares one product.
    k, v : Tensor [H, keys, D]
    scale : float
        Factor of q k^T.
    hidden : Tensor or None, bool [rows, keys]
        Keys that a row must not see; every row sees at least one.

    Returns
    -------
    out : Tensor, float32 [H, rows, D]
    lse : Tensor, float32 [H, rows]
        Natural logarithm of the sum of exponentials.
    """
    if q.device.type == "cpu":
        bias = None
        if hidden is not None:
            bias = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)[None, None]
        # What F.scaled_dot_product_attention runs on a CPU, called by its own name since that wrapper drops the LSE.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[None], k[None], v[None], 0.0, False, attn_mask=bias, scale=scale
        )
        return out[0].float(), lse[0].float()
    score = torch.matmul(q.float(), k.float().transpose(1, 2)) * scale
    if hidden is not None:
        score.masked_fill_(hidden, -torch.inf)
    lse = score.logsumexp(dim=-1)
    return torch.matmul((score - lse[..., None]).exp_(), v.float()), lse


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine attention over two disjoint sets of keys, in float32.

    Parameters
    ----------
    out_a, out_b : Tensor [..., D]
    lse_a, lse_b : Tensor [...]
        -inf marks an empty set, whose ``out`` must be finite.

    Returns
    -------
    out : Tensor [..., D]
    lse : Tensor [...]
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == -torch.inf, 0.0)  # both empty: weights 0, not NaN
    out = out_a * (lse_a - safe).exp()[..., None] + out_b * (lse_b - safe).exp()[..., None]
    return out, lse
