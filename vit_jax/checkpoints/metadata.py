"""The card of a checkpoint: what whoever opens it must know, as JSON."""

from typing import Any, TypedDict


class DataCard(TypedDict):
    """What a split held, to tell later whether it is still the same."""

    source: str
    split: str
    examples: int
    fingerprint: str  # of data.sources.source


class Card(TypedDict, total=False):
    """Every checkpoint has the first three; what older versions did not write is missing."""

    config: dict[str, Any]  # the whole configuration, of config.to_dict
    class_names: list[str]  # one for each output of the model
    step: int  # number of updates made
    layout: int  # of the parameters, see older.py; missing: 1
    averaged: bool  # whether the state has averaged weights; missing: where config.ema_decay is
    vit_jax: str  # version that wrote it
    # Of a training run:
    data: dict[str, DataCard]  # "train" and "eval"
    frozen: str | None  # digest of a frozen network
    last_record: Any  # of the metrics, see training.metrics_file
    # Of the best weights:
    metrics: dict[str, float]
    score: float
    # Of an export:
    family: str  # whose code the weights come from; missing: vit_jax
    resize: str  # how that code resizes positions; missing: corner
    unprepared: str  # why images cannot be prepared as their publisher does, or ""
    multi_label: bool  # whether an image may have several classes
