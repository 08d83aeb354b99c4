"""Which frequency order a checkpoint was trained with, and who told it."""
