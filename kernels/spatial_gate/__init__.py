"""Spatial gate: gate = sigmoid(conv_k([mean_c x, max_c x]) + bias), out = gate, x * gate or x * gate + x.

Backward, with D = sum_c x * dout (D = dout where the output is the map): dz = D * gate * (1 - gate), dbias = sum dz,
dweight_m[d] = sum_p dz[p] * map_m[p + d - r], dmap = dz convolved with the flipped weight, and
dx[c] = dout[c] * gate + davg / C + [c is the first maximum] * dmax; ties="even" shares dmax among all maxima.

Kept between the passes: the gate and both maps, in fp32 (fp64 for fp64 input), the maps interleaved (avg, max) in a
zero frame r wide, so that one row of the convolution is 2k contiguous numbers and needs no mask; and, where the output
is the map, the index of the maximum. Bytes, with P pixels, F framed pixels, S = bytes of x, a = 4 (8 in fp64):

forward    pool S + 2aF                 gate 2 S + 2aF + aP
backward   dgate 2 S + 2aP + aF + 4P    dx 2 S + aP + aF + 4P    dweight 2aF + aP
"map", "logit", with i = bytes an element of x
forward    pool S + 2aF + 4P            gate 2aF + aP + iP
backward   dgate aP + aF + iP           dx S + aF + 4P           dweight 2aF + aP    ("logit": dgate without aP)
ties="even": pool without 4P, dx + S + aP, and of "map" and "logit" dgate + S + aP + 4P
The weight, its gradient and partial sums come on top, of no size.
"""

from .backward import spatial_gate_backward
from .forward import spatial_gate_forward, spatial_gate_infer

__all__ = ["spatial_gate_backward", "spatial_gate_forward", "spatial_gate_infer"]
