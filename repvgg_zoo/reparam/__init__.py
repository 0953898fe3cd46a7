"""The algebra of re-parameterization, and the switch to the deploy form; imports torch only."""
