"""The ops, one file each; every file reads top to bottom: formula, reference, Function, function."""
