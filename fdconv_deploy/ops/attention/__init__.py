"""Global average to attentions, and the end of the convolution that comes before.

    average = mean of x over positions
    gates   = sigmoid(heads · act(norm(hidden · average + hidden_bias)) + head_bias)
    local   = LayerNorm(average)

In a graph it is ``fdconv::KernelAttention`` (`function`). Inputs, in order:

    x                           (B, I, H, W) or, of tokens, (B, L, I) float32
    hidden_weight, hidden_bias  (A, I), (A,)
    norm_weight, norm_bias      (A,), of a norm that is left; an RMSNorm has no bias
    heads_weight, heads_bias    (N, A), (N,)
    local_weight, local_bias    (I,), of the local attention's norm, if there is one

Outputs: gates ``(B, N)`` and, of a layer with local attention, ``(B, I)``. Attributes, beside the
shape that the body cuts long axes to:

    layer                       string: the layer's name, with its use where it has several
    head_sizes                  how many gates each head has: kernel, filter, spatial, channel
    norm, norm_epsilon          0: none, 1: LayerNorm, 2: RMSNorm
    squared                     1: act is a squared ReLU
    softmax                     1: each head is a softmax, else all gates are sigmoids
    local, local_epsilon        1: there is a second output

On GPUs it is two kernels. The first one pools, and since the hidden layer is linear in the average
each of its programs multiplies what it summed with its part of ``hidden``; the second adds up these
parts: the first one of the frequency assembly where it can (`attend_rows_launch`), else one of
its own. A convolution's bias, ReLU and sum with a shortcut is one pass over the same numbers, so
where the pooled input comes straight from a convolution, `finish` does both. TensorRT's engines
have the function's standard operators.
"""
