"""The one complete configuration; `configs/*.py` change what differs.

Every field is listed here with its meaning; a misspelt field is an error. Durations
come in three units: of `total_steps`, `total_epochs` and `total_examples` exactly one is set
(`set_duration`), and setting another one on the command line replaces it.
"""

import json
import reprlib
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from vit_jax.system.errors import UserError

UNITS = ("steps", "epochs", "examples")

# Fields that may change when a work directory is resumed: they affect paths, speed and
# reports, never what is learned.
OPERATIONAL = (
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "profile",
    "model.unroll",
    "eval_batch_size",
    "mesh.",
    "data.data_dir",
    "data.eval_split",
    "data.max_bad",
    "data.workers",
    "data.threads",
    "sweep.",
    "few_shot.",
)

# Fields of `config.model` that a run decides even where its model comes from the weights that
# it begins with: how the network is trained and computed, and the head, which is new.
OF_THE_RUN = (
    "dropout",
    "stochastic_depth",
    "dtype",
    "attention",
    "scan",
    "unroll",
    "remat",
    "head_bias_init",
    "representation_size",
)


def get_config() -> ConfigDict:
    """Returns the defaults: a ViT-B/16 on 224-pixel colour images, trained with Adam."""
    config = ConfigDict()
    config.seed = 0  # decides initialisation, data order, augmentation and dropout
    config.image_size = (224, 224)  # height, width in pixels; of one number, a square
    config.batch_size = 1024  # examples in one update, over all devices and processes
    config.eval_batch_size = 1024
    config.accumulation = 1  # micro-batches that an update is computed in, to save memory
    config.ema_decay = (
        0.0  # exponential moving average of the weights, used to evaluate; 0: off
    )
    config.init_from = placeholder(str)  # weights to begin with: see vit_jax/convert.py
    config.init_resize = placeholder(
        str
    )  # of models/resize_positions.py; None: as their family does
    _duration(config, "total")  # length of training
    _duration(config, "log_every", steps=50)
    _duration(config, "eval_every", epochs=1)
    _duration(config, "checkpoint_every", epochs=1)
    config.keep_checkpoints = (
        2  # how many of the last checkpoints stay; the best one always does
    )
    config.profile = placeholder(str)  # FIRST:LAST: a trace of these steps, for TensorBoard

    config.mesh = mesh = ConfigDict()  # devices along each axis; see distributed/sharding.py
    mesh.data = -1  # examples are divided; -1: over all devices that remain
    # Examples are divided, and the weights, too. None: over up to 16 TPUs, if data is -1;
    # not at all elsewhere.
    mesh.fsdp = placeholder(int)
    mesh.tensor = 1  # each layer is divided: for models that do not fit even so

    config.model = model = ConfigDict()
    # None: all of the model but `OF_THE_RUN`, data.channels and data.value_range are those of
    # the weights `init_from`; what the command line sets stays.
    model.variant = "B/16"  # SIZE/PATCH, R50+B/16, R50x1, Mixer-B/16: see models/registry.py
    model.depth = placeholder(int)  # these four override the variant's shape
    model.width = placeholder(int)
    model.mlp_dim = placeholder(int)
    model.num_heads = placeholder(int)
    model.tokens_mlp_dim = placeholder(int)  # of a Mixer
    model.resnet = placeholder(tuple)  # units in each stage of a ResNet, or of the one in front
    model.resnet_width = placeholder(int)  # of a ResNet: 1 for the widths of ResNet-50
    model.pool = "cls"  # cls | gap (mean of patches) | cls_gap (both) | map
    model.class_token = placeholder(bool)  # None: if the pooling needs one
    model.distillation = "none"  # none | token (a second class token) | heads (two heads: DeiT)
    model.final_norm = "encoder"  # encoder | pooled: the last LayerNorm before or after pooling
    model.posemb = "learned"  # learned | learned_2d | sincos2d | none
    model.posemb_at = "stem"  # stem | layers (each its own) | shared (the same at every layer)
    model.relative = "none"  # none | keys (the paper's ablation) | bias (BEiT)
    model.representation_size = placeholder(int)  # tanh layer before the head; None: no layer
    model.head_bias_init = 0.0  # about -log(classes) with the sigmoid loss
    model.registers = 0  # extra tokens
    model.dropout = 0.0
    model.stochastic_depth = 0.0  # drop rate of the last block, linear from 0 at the first
    model.layer_scale_init = placeholder(float)  # None: no LayerScale
    model.mlp = "gelu"  # gelu | swiglu (DINOv2's largest)
    model.key_bias = True  # False: queries and values have a bias, keys have none (BEiT)
    model.gelu = "tanh"  # tanh | erf
    model.layer_norm_eps = 1e-6
    model.dtype = "float32"  # operands of matrix products: float32 | bfloat16
    model.attention = "auto"  # auto | xla | cudnn (NVIDIA GPUs) | pallas, splash (TPUs)
    model.scan = placeholder(bool)  # one compiled block for all layers; None: where possible
    # Layers in one turn of that loop. None: 1, and on TPUs all of up to 24, which takes longer
    # to compile and moves less.
    model.unroll = placeholder(int)
    # none | dots | full: what is recomputed in the backward pass to save memory. dots keeps the
    # results of dense layers, which costs little. None: dots where layers are scanned.
    model.remat = placeholder(str)

    config.data = data = ConfigDict()
    # digits | folder:PATH | hf:NAME | records:PATH | tfds:NAME | synthetic:
    # see data/sources/catalog.py
    data.source = "tfds:imagenet2012"
    data.data_dir = placeholder(str)  # where tfds: finds prepared data sets
    data.train_split = "train"
    data.eval_split = "validation"
    # Images with several labels, or none: auto | the separator of labels, such as ; or
    # space; see data/sources/multi_label.py. None: every image has one. Needs
    # objective.loss="sigmoid".
    data.multi_label = placeholder(str)
    # 1: grey, 3: RGB; 2 or 4 with transparency, or any other number: of TIFF or .npy files
    data.channels = 3
    data.bits = 8  # of a level: 8 | 16 (kept where images have them)
    data.train_transform = "inception_crop(0.05, 1.0)|flip"  # see data/transforms/language.py
    data.eval_transform = "resize"
    data.repeats = 1  # copies of an image in a batch, each augmented again (DeiT: 3); 1: off
    # inception: [-1, 1] | imagenet, openclip: by mean and deviation | mean=0.5,0.4,0.3
    # std=0.2,0.2,0.2: by others, of pixels in [0, 1]; see data/value_ranges.py
    data.value_range = "inception"
    data.mixup = 0.0  # alpha of the Beta distribution; 0: off
    data.cutmix = 0.0  # alpha of CutMix's Beta distribution; 0: off
    data.mix_probability = 1.0  # share of the batches that are mixed
    data.mix_switch = 0.5  # share of those that get CutMix, where both are on
    data.mix_form = "google"  # google | timm: partner and weight, see data/mixing.py
    data.binary_targets = (
        False  # after mixing, each class in the picture counts as 1 (DeiT III)
    )
    data.max_bad = 0.01  # share of a data set that may be images that cannot be read
    data.workers = 0  # processes that decode; 0: threads of this process
    data.threads = 16  # at most: fewer decode where more would only wait for each other

    config.few_shot = few_shot = ConfigDict()  # beside evaluation: see evaluation/probes.py
    few_shot.shots = ()  # images a class, e.g. (5, 10); none: off
    _duration(few_shot, "every", epochs=1)  # a multiple of eval_every

    config.objective = objective = ConfigDict()
    objective.name = "classification"  # classification | masked_patches (2010.11929, B.1.2)
    objective.target = "mean_colour"  # of masked patches: mean_colour | small_patch | pixels
    objective.mask_ratio = 0.5  # share of the patches that are corrupted
    objective.loss = "softmax"  # softmax | sigmoid (summed over classes)
    objective.label_smoothing = 0.0

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adam"  # adam | sgd
    optimizer.lr = 1e-3  # peak learning rate
    optimizer.schedule = "cosine"  # cosine | linear | rsqrt | constant, after a linear warm-up
    _duration(optimizer, "warmup", steps=10_000)
    _duration(optimizer, "timescale", steps=10_000)  # of rsqrt
    _duration(
        optimizer, "cooldown", steps=0
    )  # linear to 0 at the end; only for rsqrt, constant
    optimizer.linear_end = 1e-5  # learning rate at the end of the linear schedule
    optimizer.weight_decay = 0.0  # of kernels only
    optimizer.decay = "times_lr"  # times_lr | times_schedule | l2: see training/optimizer.py
    optimizer.clip_norm = 1.0  # global norm; 0: no clipping
    optimizer.b1 = 0.9  # Adam
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.momentum = 0.9  # SGD
    optimizer.moment_dtype = "float32"  # of the first moment or momentum: float32 | bfloat16

    config.sweep = sweep = ConfigDict()  # only for vit_jax/sweep.py
    sweep.lr = ()  # values of optimizer.lr to try
    sweep.steps = ()  # pairs (total_steps, optimizer.warmup_steps) to try
    sweep.train_split = placeholder(str)  # for the final run with the best; None: no final run
    sweep.test_split = placeholder(str)  # that the final run is evaluated on, once
    return _typed(config).lock()


def _typed(config: ConfigDict) -> ConfigDict:
    """Gives every field its type, so that one left None can be set on the command line."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            _typed(value)
        elif value is not None:  # else it is a placeholder already
            config[name] = FieldReference(value)
    return config


def _duration(config: ConfigDict, name: str, **value: float) -> None:
    for unit in UNITS:
        config[f"{name}_{unit}"] = placeholder(float)
    config.update({f"{name}_{unit}": float(amount) for unit, amount in value.items()})


def take_model(config: ConfigDict, weights: ConfigDict, overridden: Collection[str]) -> None:
    """Sets the model of `config` to that of `weights`, with the pixel range of its training.

    Args:
      config: changed in place; the fields `OF_THE_RUN` stay.
      weights: the configuration of a trained model.
      overridden: dotted names of the fields set on the command line, which stay, too.
    """
    fields = [f"model.{name}" for name in weights.model if name not in OF_THE_RUN]
    for path in [*fields, "data.channels", "data.value_range"]:
        node, _, name = path.partition(".")
        if path not in overridden:
            config[node][name] = weights[node][name]


def set_duration(config: ConfigDict, name: str, **value: float) -> None:
    """`set_duration(config, "total", epochs=90)`: sets one unit and clears the others."""
    for unit in UNITS:
        config[f"{name}_{unit}"] = float(value.pop(unit)) if unit in value else None
    if value:
        raise UserError(f"{name} has no unit {', '.join(value)}: use {', '.join(UNITS)}")


def square_image_size(config: ConfigDict) -> None:
    """Makes one number in `image_size`, as in `--config.image_size=224`, a square.

    Raises:
      UserError: it is neither one whole number nor two.
    """
    size = config.image_size
    if len(size) not in (1, 2) or not all(type(edge) is int for edge in size):
        raise UserError(
            f"image_size is {size}: write the edge of a square, 224, or (height, width)"
        )
    config.image_size = (size[0], size[-1])


def prefer_overrides(config: ConfigDict, overridden: list[str]) -> None:
    """Makes a duration set on the command line replace the one that the file gave.

    Args:
      config: the configuration, overrides already applied.
      overridden: dotted names of the fields set on the command line.
    """
    for path in overridden:
        *parents, field = path.split(".")
        name, _, unit = field.rpartition("_")
        node = config
        for parent in parents:
            node = node[parent]
        if unit not in UNITS or f"{name}_steps" not in node:
            continue
        for other in UNITS:
            sibling = ".".join([*parents, f"{name}_{other}"])
            if sibling not in overridden:
                node[f"{name}_{other}"] = None


def steps(config: ConfigDict, name: str, examples: int, batch_size: int) -> int:
    """Resolves the duration `name` to a number of steps.

    Args:
      config: the node that holds `NAME_steps`, `NAME_epochs` and `NAME_examples`.
      name: for example `total`.
      examples: number of examples in an epoch.
      batch_size: number of examples in a step.

    Raises:
      UserError: none or several of the three are set, or the value is negative.
    """
    given = {unit: config[f"{name}_{unit}"] for unit in UNITS}
    given = {unit: value for unit, value in given.items() if value is not None}
    if len(given) != 1:
        raise UserError(
            f"of {name}_steps, {name}_epochs and {name}_examples {len(given)} are set: set one"
        )
    [(unit, value)] = given.items()
    if value < 0:
        raise UserError(f"{name}_{unit} is {value}: it cannot be negative")
    if unit == "steps":
        return round(value)
    return round(value * (examples if unit == "epochs" else 1) / batch_size)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns plain nested dicts that JSON can hold; tuples become lists."""
    return json.loads(json.dumps(config.copy_and_resolve_references().to_dict()))


def from_dict(values: dict[str, Any]) -> ConfigDict:
    """Rebuilds a configuration that `to_dict` stored; fields it lacks get today's default.

    Raises:
      UserError: it has a field that does not exist, or a value that a field cannot have.
    """

    def fill(node: ConfigDict, values: dict[str, Any], path: str) -> None:
        for name, value in values.items():
            if name not in node:
                raise UserError(
                    f"the stored configuration has a field {path}{name} that this version of "
                    f"vit_jax does not know: open it with the version that wrote it"
                )
            if isinstance(node[name], ConfigDict) != isinstance(value, dict):
                raise impossible(path + name, value)
            if isinstance(value, dict):
                fill(node[name], value, f"{path}{name}.")
                continue
            try:
                node[name] = tuples(value)
            except (TypeError, ValueError) as error:
                raise impossible(path + name, value) from error

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    def impossible(name: str, value: Any) -> UserError:
        return UserError(
            f"the stored configuration has {name}={reprlib.repr(value)}, which it cannot have: "
            f"it was not written by vit_jax, or is damaged"
        )

    config = get_config()
    if not isinstance(values, dict):
        raise impossible("config", values)
    fill(config, values, "")
    return config


def flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """`{"model": {"variant": ...}}` -> `{"model.variant": ...}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            flatten(value, f"{path}{name}.")
            if isinstance(value, dict)
            else {path + name: value}
        )
    return flat


def check_resumable(stored: dict[str, Any], config: ConfigDict, workdir: Any) -> None:
    """Refuses to continue a run with a configuration that would not have made it.

    Raises:
      UserError: naming the first field that differs and is not merely operational.
    """
    # Fields that are newer than the run get the default, which is what the run did.
    old, new = flatten(to_dict(from_dict(stored))), flatten(to_dict(config))
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field) and not field.startswith(OPERATIONAL):
            raise UserError(
                f"{workdir} was trained with {field}={old.get(field)!r}, not "
                f"{new.get(field)!r}: set it back, or choose another --workdir"
            )
