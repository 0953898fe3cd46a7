"""Files of weights, their key layouts and their form; no modules."""
