"""The ops, one file each; every reads top to bottom: formula, reference, Function, op."""
