"""Richer branches for the convolutions of any network while it trains."""
