"""What is learned. An objective is two functions:

    init(key) -> (params, extra)       extra: whatever else it carries from step to step
    loss(params, extra, batch, key, train) -> (loss, (metrics, extra))

where `metrics` maps a name to (sum, count), so that averages over any number of batches,
devices and processes are exact.
"""
