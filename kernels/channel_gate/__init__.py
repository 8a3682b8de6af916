"""Channel gate: pools over the pixels avg[c] = mean_p x and max[c] = max_p x, and out = x * gate[c].

Backward: dgate[c] = sum_p x * dout and dx = dout * gate + davg / P + [p is the first maximum] * dmax; ties="even"
shares dmax among all maxima. Between pooling and scaling, forward and backward, stands a network that is not ours.

Kept between the passes: the first pixel of each maximum, or how many there are. The scaling and dx go through x in
reverse, to find in L2 what was read last. Bytes, with S = bytes of x, i of its elements, g of the gate's, P pixels a
plane, V = S / (i P) planes, a = 4 (8 in fp64), m = 1 with the maximum, otherwise 0:

forward    pool S + iV + m (i + 4) V      scale 2 S + gV
backward   dgate 2 S + aV                 dx 2 S + (g + i) V + m (i + 4) V, ties="even": + S + iV
A gradient that does not come is not read. Where the pixels of a plane are shared by K programs, their K partial results
a plane are written and read: pool (a + m (a + 4)) K V each way, dgate a K V.
"""

from .backward import channel_gate_backward, channel_gate_dx
from .forward import channel_gate_forward, channel_gate_pool

__all__ = ["channel_gate_backward", "channel_gate_dx", "channel_gate_forward", "channel_gate_pool"]
