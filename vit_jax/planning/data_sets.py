"""Sizes of known data sets, which need not be present."""

# Classes, and examples of an epoch, of data sets that need not be present.
KNOWN = {
    "tfds:imagenet2012": (1000, 1_281_167),
    "tfds:imagenet21k": (21_843, 14_197_122),
    "tfds:cifar10": (10, 50_000),
    "tfds:cifar100": (100, 50_000),
    "digits": (10, 1_437),
}

ASSUMED = "tfds:imagenet2012"


def data_of(
    source: str, num_classes: int | None, examples: int | None
) -> tuple[int, int, str | None]:
    """Classes, examples and, where they are assumed, a sentence that says so."""
    known = KNOWN.get(source)
    classes_there, examples_there = known or KNOWN[ASSUMED]
    note = None
    if known is None and (num_classes is None or examples is None):
        note = (
            f"note: {source} is not opened; taken to have {num_classes or classes_there:,} "
            f"classes and {examples or examples_there:,} examples, unless --num_classes and "
            f"--examples say otherwise"
        )
    return num_classes or classes_there, examples or examples_there, note
