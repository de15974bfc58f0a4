"""How fast the layer is, against whom, how far from the machine's limit; and the demo."""
