"""The experts as two GPU kernels that read only what was chosen, for TensorRT and for torch.

TensorRT's ahead-of-time plugins launch exactly one kernel each, and a feed-forward is two products
of which the second needs all of the first. So `medmoe::MoE` becomes two plugin ops with routing in
standard ops before them (`export/passes/tensorrt.py`):

    hidden = medmoe::RoutedHidden<activation>(x, tokens, offsets, experts' first matrices ...)
    parts  = medmoe::RoutedOutput(hidden, order, gates, offsets, experts' second matrices ...)

A token takes one slot per chosen expert and one for the meta expert, which is one more expert that
everyone takes. Slot `t * S + j` is the j-th of the S slots of token t. Slots are sorted by expert:

    order    [T * S] int32    the slot at each place of the sorted list
    tokens   [T * S] int32    its token, `order // S`
    offsets  [E + 1] int32    where each expert's slots begin; the last is T * S
    gates    [T, S]  fp32     the weight of each slot
    x        [T, D]           fp16 or bf16
    hidden   [T * S, F]       gate, up and activation fused; in sorted order
    parts    [T * S, D]       gate times expert, in the order of the slots; y is their sum by token

Of every expert the matrices are inputs of their own, so that each pages by itself, in this order:

    swiglu     gate, its scale, up, its scale        | down, its scale
    gelu_tanh  fc1, its scale, its bias              | fc2, its scale, its bias

A matrix `[K, N]` is either int8 `[K, N]` with fp32 scales `[N]`, or 4 bits in groups along K: bytes
`[N, K / group, group / 2]`, the first of two lowest, zero point 8, with fp16 scales
`[N, K / group]`; the same bytes as every other target's. Biases are fp16 or bf16, as x.
"""
