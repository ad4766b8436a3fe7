"""Names, in `config.layer_types`, of layers that mix tokens by something else than attention alone."""

RECURRENT = "linear_attention"
"""Layers with a recurrent state in the place of attention."""
HYBRID = "hybrid"
"""Layers with a recurrent state beside attention."""
CONVOLUTION = "conv"
"""Layers with a short causal convolution in the place of attention."""
