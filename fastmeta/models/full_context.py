"""Embeddings that depend on the whole support: the full context of Matching Networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastmeta.core.checks import check_count


class FullContext(nn.Module):
    """Full context embeddings (Vinyals et al. 2016, arXiv 1606.04080, section 2.1.2).

    The support is a sequence to a bidirectional LSTM: ``g(x_i, S) = forward_i + backward_i + g'_i``
    for the plain embedding ``g'_i``.
    A query reads it ``steps`` times by an LSTM with attention::

        r_k = sum_i softmax_i(h_k . g_i) g_i
        (h~, c_{k+1}) = LSTMCell([f', r_k], (h_k, c_k));    h_{k+1} = h~ + f'

    from ``h_0 = f'`` and ``c_0 = 0``; the query's embedding is the last h. The queries of all tasks
    take each step in one call.

    Args:
        dim: D, the width of embeddings and of all states.
        steps: K, the reads of a query; 0 leaves queries as they are.

    Raises:
        TypeError, ValueError: an argument is no integer, or out of range.

    Example:
        >>> import torch
        >>> from fastmeta.models import FullContext
        >>> context = FullContext(dim=4, steps=2)
        >>> keys = context.keys(torch.randn(2, 3, 4), torch.arange(3).repeat(2, 1))
        >>> context(torch.randn(2, 6, 4), keys).shape
        torch.Size([2, 6, 4])
    """

    def __init__(self, dim: int, steps: int = 5) -> None:
        super().__init__()
        self.dim = check_count("dim", dim, least=1)
        self.steps = check_count("steps", steps, least=0)
        self.support = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.query = nn.LSTMCell(2 * dim, dim)

    def keys(self, support: Tensor, order: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The support embeddings ``[T, S, D]`` in the context of their task.

        Args:
            support: ``[T, S, D]``.
            order: int64 ``[T, S]``, the places of each task in the order of the sequence.
            lengths: int64 ``[T]``: only so many at the start of the order are present. The keys of
                the others are 0. None: all are.
        """
        places = order.unsqueeze(2).expand_as(support)
        sequence = support.gather(1, places)
        if lengths is None:
            states = self.support(sequence)[0]
        else:
            states = self._states_of_present(sequence, lengths)
        forward, backward = states.chunk(2, dim=2)
        found = torch.zeros_like(sequence).scatter(1, places, forward + backward)
        return found + support

    def forward(self, query: Tensor, keys: Tensor, present: Tensor | None = None) -> Tensor:
        """Queries ``[T, Q, D]`` that have read the keys ``[T, S, D]`` of their task.

        ``present``, bool ``[T, S]``, are the keys that there are; None: all of them.
        """
        if not self.steps:
            return query
        start = query.flatten(0, 1)
        h, c = start, torch.zeros_like(start)
        for _ in range(self.steps):
            similarity = torch.bmm(h.view_as(query), keys.transpose(1, 2))
            read = torch.bmm(_softmax(similarity, present), keys).flatten(0, 1)
            h, c = self.query(torch.cat([start, read], dim=1), (h, c))
            h = h + start
        return h.view_as(query)

    def extra_repr(self) -> str:
        return f"{self.dim}, steps={self.steps}"

    def _states_of_present(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        """States ``[T, S, 2 D]``, 0 beyond the length of a task."""
        # A packed sequence has no task of length 0: such a task takes a step, whose state is lost.
        taken = lengths.clamp(min=1).cpu()
        packed = pack_padded_sequence(sequence, taken, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(
            self.support(packed)[0], batch_first=True, total_length=sequence.shape[1]
        )
        inside = torch.arange(sequence.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        return states * inside.unsqueeze(2)


def _softmax(similarity: Tensor, present: Tensor | None) -> Tensor:
    """Softmax ``[T, Q, S]`` over the present keys ``[T, S]``; 0 in a task without any."""
    if present is None:
        return similarity.softmax(2)
    absent = ~present.unsqueeze(1)
    weights = similarity.masked_fill(absent, torch.finfo(similarity.dtype).min).softmax(2)
    return weights.masked_fill(absent, 0)
