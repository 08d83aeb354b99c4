"""``fdconv::FrequencyBandModulation``: each band of an input weighted by its own map.

    y = sum over terms t of factor[t] ∘ low[t],  low[0] = x, factor = mix · act(conv(x)) + bias

Inputs, in order (B images, I channels in g groups, H × W; see `fdconv_deploy.folding.bands`):

    x               (B, I, H, W) float32
    conv_weight     (I, weighted, s, s) float32, of a transposed convolution
    conv_bias       (g·weighted,) float32
    mix             (terms, weighted) float32
    mix_bias        (terms, 1) float32
    to_columns      (W, 2·frequencies) float32
    to_rows         (rows, H') float32
    from_rows…      per band: (H', rows of the band) float32
    from_columns…   per band: (columns of the band, W) float32

Output: ``(B, I, H, W)`` float32.

Attributes, beside the shapes that the body reshapes to: ``layer`` (its name), ``groups`` g,
``feature_size`` H, W, ``softmax`` (1: over groups, in place of sigmoids) and ``complex_rows`` (1:
projected rows are complex, real and imaginary parts a row each).
"""
