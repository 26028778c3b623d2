"""``python -m bench.gpu``: everything that only a machine with a GPU can tell, in parts that resume."""
