"""Evidence on held-out text: what a pattern costs, and how much the layers' selections overlap."""
