"""Modules that fold: the blocks, their branches, and the way back from one convolution to branches."""
