"""CBAM behind its channel gate g: y = x * g, out = y * s (+ x), s = sigmoid(conv_k([mean_c y, max_c y]) + bias).

y is rounded to x's dtype before it is pooled, as its definition does, or other channels would tie; it is never written.
Backward, with t = x * dout: dz = (sum_c g * t) * s * (1 - s) (of "map" and "logit" from dout), dmap and dweight as in
the spatial gate, dy[c] = dout * s + davg / C + [c is the first maximum] * dmax,
dg[c] = sum_p dy * x = sum_p s * t + sum_p x * (davg / C + [c is the first maximum] * dmax), and with the channel pool's
dx = dy * g (+ dout) + dpool_avg / pixels + [p is the first maximum] * dpool_max; ties="even" shares among all maxima.

Kept: s, both maps (framed, see the spatial gate) and the first maximum's index (even: how many), as numbers of the
accumulators' dtype. Bytes, with P pixels, F framed pixels, S = bytes of x, a = 4 (8 in fp64), N = programs x channels:

forward    channel pool S     pool S + 2aF + aP     gate 2 S + 2aF + aP
backward   dgate 2 S + aP + aF + aN    dmaps S + aF + 4aP + aN    sum 2aN    dx 2 S + 4aP    dweight 2aF + aP
"map" and "logit", with i = bytes an element of x: gate without 2 S, + iP; dgate aP + aF + iP, and dx S + 3aP
ties="even": dmaps + aP (it writes the maxima for dx), dx + S. Scaling by given gates: 2 S + iP; dgate 2 S + 2iP + aN
Vectors of channels and the weight come on top, of no size.
"""

from .backward import cbam_backward, cbam_dx, cbam_scale_backward
from .forward import cbam_forward, cbam_infer, cbam_scale

__all__ = ["cbam_backward", "cbam_dx", "cbam_forward", "cbam_infer", "cbam_scale", "cbam_scale_backward"]
