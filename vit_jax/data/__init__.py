"""What a model learns from: `source[i] -> decode -> augment (host, uint8) -> batch -> device`.

`sources` finds examples, `preprocess` (with `resize` and `augment`) turns one into pixels,
`pipeline` batches them, and `mixing` blends batches on the device.
"""
