"""Rows of quantized vectors: what a codec is, and gathering and widening its rows."""
