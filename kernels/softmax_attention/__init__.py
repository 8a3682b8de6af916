"""Softmax attention: S = scale q k^T + bias, P = softmax(S), out = dropout(P) v, streamed over blocks of keys.

Backward, with dP = dropout(dout v^T) and delta = rowsum(out * dout) - dlse: dS = P * (dP - delta), dq = scale dS k,
dk = scale dS^T q, dv = dropout(P)^T dout, and dbias is dS summed over whatever the bias was broadcast along. P is
recomputed from statistics of rows: the sum of row_max and log_sum, in units of log 2, but natural ones in float64,
as no float argument of a kernel has 64 bits. Where a bias is added they stay apart, as their sum loses log_sum beside
huge logits, and in natural units, as a bias near the largest number must not overflow. A row that sees no key has
row_max = inf there, which makes its weights 0.

Bytes, with Q, K, V, O those of q, k, v, out, R = batch x heads x queries, a = 4 (8 in fp64), E the extras (bias, mask,
table), s = 2 with a bias or table, else 1, and b = 1 where dq is wanted:
forward    Q + K + V + O + E + saR (+ aR for lse)
backward   dq 2O + aR + b (2Q + K + V + saR + E)    dkv Q + 2K + 2V + O + (s + 1)aR + E
           dbias Q + K + V + O + 3aR + E + a x slabs x bias's elements
Backward sums are taken in a fixed order, without atomics. A bias table's gradient goes through a bounded scratch. Up
to DENSE_TABLE_BYTES of heads x queries x keys, a table without a bias beside it is first spread out to a bias, in the
forward and again in the backward, and E has that in its place.
"""

from .backward import softmax_attention_backward
from .forward import softmax_attention_forward

__all__ = ["softmax_attention_backward", "softmax_attention_forward"]
