"""Embeddings: tokens to rows of a table, with positions, segments, LayerNorm and dropout fused."""
