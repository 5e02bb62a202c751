"""Softmax cross-entropy, of logits and fused with the linear layer that makes them."""
