"""Global average to attentions, and the end of the convolution that comes before.

    average = mean of x over pixels
    gates   = sigmoid(heads · act(norm(hidden · average + hidden_bias)) + head_bias)
    local   = LayerNorm(average)

in two kernels. The first one pools, and since the hidden layer is linear in the average each of
its programs multiplies what it summed with its part of ``hidden``; the second adds up these
parts: the first one of the frequency assembly where it can (`attend_rows_launch`), else one of
its own. A convolution's bias, ReLU and sum with a shortcut is one pass over the same numbers, so
where the pooled input comes straight from a convolution, `finish` does both.

These are no operators of a graph: there, standard operators say the same.
"""
