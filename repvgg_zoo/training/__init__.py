"""Extras to train with: the paper's weight decay, and RepOptimizer."""
