"""Examples: `source[i] -> decode -> transform (host, uint8) -> batch -> device`.

`sources` finds examples, `transforms` turns one into pixels, `pipeline` batches them, and
`mixing` blends batches on the device.
"""
