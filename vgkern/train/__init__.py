"""The thin trainer: critic-free RL of language models, built on the ops of `vgkern` only."""
