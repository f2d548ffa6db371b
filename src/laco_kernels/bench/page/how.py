"""How each number was taken, in words."""

HOW = (
    (
        "Time",
        "All variants of a case take turns, round after round, in one run; the median over the rounds, below it the 20th and "
        "80th percentile. On a GPU calls are captured in a CUDA graph and replayed: caches are warm, launching costs little.",
    ),
    (
        "Cold",
        "One call just after the GPU's L2 cache was overwritten, while the GPU still works on that: what launching from Python "
        "costs is no part of it, unless it is more than two milliseconds.",
    ),
    (
        "Against eager, against compile",
        "The time of the best eager variant (with or without F.conv2d), or of the best torch.compile variant, over the "
        "time of the row, paired round by round: the median, below it its 95 % interval. Above 1x is faster.",
    ),
    (
        "Default",
        "What runs where a call names no implementation, by the table that the package ships; eager is its reference. It is "
        "made of measurements: only what beats eager in every case of a bucket is chosen.",
    ),
    (
        "Slower",
        "A row of ours counts as losing where the whole interval of such a ratio is below 1x. Where no paired ratio is stored, "
        "as for cold caches, it loses where its interval lies wholly above that of the best other one in the same run.",
    ),
    ("Correct", "The error against a float64 computation is within its budget. A row that fails has no time and no ratio."),
    (
        "Roofline",
        "The time that the case needs at least, over the time taken: its operations at the rate of a large matrix product, or "
        "its inputs and results, each once, at the rate of a large copy. Both rates are measured in the same run (see the "
        "environment). What memory bounds is held against its cold time, for warm caches are faster than memory.",
    ),
    ("Products", "The bare cuBLAS products without anything around them: a floor, not a contender."),
    ("Moves, peak", "The bytes that the implementation reads and writes, and the most memory that one call holds at a time."),
    (
        "VEC",
        "The vision encoding cost: the time of one batch through the whole encoder. Its ratio is the time at @1 in eager mode "
        "over that of the row. Outside: the part of the time that is spent outside embeddings, layers, merge and norms.",
    ),
    (
        "TTFT, TPS, TPOT",
        "The time from prompt and image, both on the device, to the first token, whose parts are vision, projector and prefill "
        "with all else; the new tokens of all rows over the time of the whole answer; the time of each token behind the first. "
        "Greedy, a fixed number of tokens. Ratios are to the first model in eager mode; a row is correct where its logits err "
        "at most twice as much as eager's against float64, and in float32 where its tokens are eager's, too.",
    ),
    (
        "Training step",
        "Forward and backward pass and AdamW's update on one batch with random weights. Held: weights and AdamW's moments; "
        "peak: the most that a step takes beyond them. Correct: loss and gradients of narrow models, as above.",
    ),
    ("On a CPU", "The wall clock. Absolute times are shown for whole encoders only; elsewhere ratios are."),
)
