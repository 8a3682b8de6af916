"""Attention inside groups of at most 128 tokens of a feature map: rows, columns, windows, dilated windows.

S = scale q k^T + bias, P = softmax(S), out = dropout(P) v, for each group and head, with q, k, v (B, height, width,
heads, D) read and out written where they lie. A program holds whole groups, so the softmax is plain, and the backward,
one kernel, needs neither out nor statistics: with dP = dropout(dout v^T), delta = rowsum(P * dP) and
dS = P * (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = dropout(P)^T dout. A program visits several groups of
one head, so that the bias is read once for them, and leaves one partial sum of dS for it.

Both axes take one launch each. "sum" adds what columns give to what rows left. "criss_cross" is one softmax over row
and column (https://arxiv.org/abs/1811.11721), the centre counted in the row: the second launch merges by way of lse.

Groups are not packed side by side into one tile, which would carry a NaN from one to another; few warps fill the GPU.

Bytes, with Q, K, V, O those of q, k, v, out, R = 4 B height width heads (8 in fp64), E what programs read of bias or
table, once each, and G what they leave of dS:
one axis     forward Q + K + V + O + E    backward 2 (Q + K + V) + O + E + G
sum          twice that, and what the first launch left is read once more: O, and Q + K + V
criss_cross  as sum, and forward 3R, backward 2 O + 2R
Nothing is summed by atomics.
"""

from .backward import group_attention_backward
from .forward import group_attention_forward

__all__ = ["group_attention_backward", "group_attention_forward"]
