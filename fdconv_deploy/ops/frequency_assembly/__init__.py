"""``fdconv::FrequencyAssembly``: kernel attention and spectra -> one kernel per image.

    K = (sum over planes of irfft2(spectrum ∘ attention[groups])) ∘ sigmoid(local) ∘ scales

Inputs, in order (B images, O·I kernels of kh × kw, R = O·kh, C = I·kw; see
`fdconv_deploy.folding` for the layouts):

    attention       (B, n) float32: kernel attentions
    spectrum        ([planes,] F, 2, fm·slots) float32
    patterns        (N, L) uint8 or int32: which attentions weigh L bins in a row
    blocks          (planes·F·fm·slots/L,) int32: each block of L bins' pattern
    column_stage…   ([batch,] 2·factor, 2·factor) float32, one per factor of C
    row_stage…      (batch, 2·factor, 2·factor) float32, one per factor of R but the first
    row_outer       (factor, 2·classes) float32
    local_input     (B, I) float32, local only: the normalised average
    local_window    (kw·taps, 1, kw·taps) float32, local only: the identity
    local_weight    (R, kw·taps) float32, local only
    column_scale    (B, 1, kh, C) float32, if any: spatial and channel attention
    row_scale       (B or 1, O, 1, 1) float32, if any: filter attention, BatchNorm's scale

Output: ``(B·O, I, kh, kw)`` float32, the weight of a convolution of B groups; by rows
``(B, O, kh, I·kw)``.

Attributes, beside the shapes that the body reshapes to:

    layer                       string: the layer's name, with its use where it has several
    out_channels, in_channels   O, I
    kernel_size                 kh, kw
    taps                        of the local attention's convolution, 0 without
    row_frequencies             of each row slot of the spectrum, -1 where nothing is stored
    column_frequencies          of each of the C places along its columns
    heads                       columns of the matrix that ``attention`` is split from
    filter_at, spatial_at, channel_at
                                where a gate that scales kernels begins in that matrix, else -1
    by_rows                     1: the graph convolves with each kernel row by itself; then also
                                strides, pads, dilations, input_size of the whole convolution

Layers differ in which inputs they have; each form is a function of its own, named after
what it departs in from the published 3×3 layer.
"""
