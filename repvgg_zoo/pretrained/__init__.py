"""From a model's name to weights in a model: manifest, download, load."""
