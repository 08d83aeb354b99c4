"""Network -> static-shape network: exact folds at a fixed input shape.

Each file is one fold. Constants are derived in float64 and stored in float32; nothing
here approximates. The algebra is in docs/folding.md.
"""
