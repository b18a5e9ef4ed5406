"""Objectives that make labels of tokens: each takes micro-batches and gives others."""
